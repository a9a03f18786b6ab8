"""``celery jetstream …``: parse, call, print.

What a command does is in the module named after it; the groups of commands are in `cli_dlq` and
`cli_queues`, what all share in `cli_common`.  Every ``celery`` command loads these files, so they
import nothing that takes time, and never a broker.

Exit codes: 0, `EX_FAILURE` (1) when the command could not do its work or found a fault,
`EX_USAGE` (64) for a bad configuration, `EX_UNAVAILABLE` (69) when the broker cannot be reached or
lets nobody in; click's 2 for a bad command line.  Data goes to stdout, remarks to stderr.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import click
from celery.bin.base import handle_preload_options
from celery.platforms import EX_FAILURE, EX_UNAVAILABLE

from . import remote
from .cli_common import (
    command,
    complain,
    count_of,
    dry_run_option,
    duration,
    json_option,
    print_json,
    print_table,
    queues_option,
    remark,
    timeout_option,
)
from .cli_dlq import dlq
from .cli_migrate import migrate
from .cli_queues import print_queues, queues, scheduled

__all__ = ["jetstream"]


@click.group()
@click.pass_context
@handle_preload_options  # type: ignore[untyped-decorator]  # Celery's has no types
def jetstream(ctx: click.Context, **kwargs: Any) -> None:
    """Look at and look after queues on NATS JetStream."""


for group in (dlq, migrate, queues, scheduled):
    jetstream.add_command(group)

# ``celery inspect`` refuses commands it does not know, and has loaded this module by then.
remote.register()


@command(jetstream)
@queues_option
@click.option(
    "--interval",
    metavar="TIME",
    callback=duration,
    default="1s",
    show_default=True,
    help="Time over which the rate is measured; 0 leaves it out.",
)
@click.option("-w", "--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@json_option
@timeout_option
def status(
    ctx: click.Context,
    queue_names: list[str] | None,
    interval: float,
    watch: bool,
    as_json: bool,
    timeout: float,
) -> None:
    """Show the queues: what is in them, and who consumes them."""
    from kombu_jetstream.errors import ConnectionLost

    from .broker import options_of, run
    from .fallback_health import look as look_at_redis
    from .overview import overview

    app = ctx.obj.app
    options = options_of(app)

    def look() -> None:
        away: Exception | None = None
        found = None
        try:
            found = run(
                app,
                lambda broker: overview(broker, queue_names, interval=interval),
                timeout=timeout,
            )
        except ConnectionLost as exc:
            if options.fallback_url is None:
                raise
            away = exc
        fallback = look_at_redis(app, options)
        if watch and sys.stdout.isatty() and not as_json:
            click.clear()
        if as_json:
            shown: dict[str, Any] = found.as_json() if found is not None else {"server": None}
            if fallback is not None:
                shown["fallback"] = fallback.as_json()
            print_json(ctx, shown)
        else:
            if found is not None:
                _print_overview(ctx, found)
            if fallback is not None:
                _print_fallback(ctx, fallback, is_in_use=away is not None)
        if away is not None:
            raise away

    if not watch:
        look()
        return
    try:
        while True:
            began = time.monotonic()
            try:
                look()
            except ConnectionLost as exc:
                complain(ctx, str(exc))
            time.sleep(max(0.2, interval - (time.monotonic() - began)))
    except KeyboardInterrupt:
        return


def _print_fallback(ctx: click.Context, fallback: Any, *, is_in_use: bool) -> None:
    if fallback.problem is not None:
        ctx.obj.echo(f"fallback: {fallback.problem}")
        return
    role = "has taken over" if is_in_use else "stands by"
    waiting = [f"{number} of {name}" for name, number in fallback.waiting.items()]
    parts = [f"messages wait there: {', '.join(waiting)}" if waiting else "nothing waits there"]
    if fallback.held:
        parts.append(f"workers hold {fallback.held}")
    if fallback.letters:
        parts.append(count_of(fallback.letters, "dead letter"))
    ctx.obj.echo(f"fallback: Redis {role}, {', '.join(parts)}")


def _print_overview(ctx: click.Context, found: Any) -> None:
    from .tables import size
    from .times import show_age

    stored = sum(stream.size for stream in found.streams)
    ctx.obj.echo(
        f"nats-server {found.version} at {found.server}, namespace {found.namespace}, "
        f"{size(stored)} stored"
    )
    print_queues(ctx, found.queues)
    letters = sum(found.dead_letters.values())
    if letters:
        age = show_age(time.time() - (found.oldest_dead_letter_at or time.time()))
        ctx.obj.echo(f"{count_of(letters, 'dead letter')}, the oldest {age} old")


@command(jetstream)
@json_option
@timeout_option
def doctor(ctx: click.Context, as_json: bool, timeout: float) -> None:
    """Look for what is wrong, and say what to do about it.

    Exits with 1 if there is an error, 69 if the broker cannot be reached; warnings are no errors.
    """
    import asyncio

    from .doctor import diagnose

    found = asyncio.run(diagnose(ctx.obj.app, timeout=timeout))
    if as_json:
        print_json(ctx, found.as_json())
    else:
        colours = {"ok": "green", "warning": "yellow", "error": "red"}
        for finding in found.findings:
            severity = ctx.obj.style(f"{finding.severity:7}", fg=colours[finding.severity])
            ctx.obj.echo(f"{severity}  {finding.check}: {finding.message}")
            if finding.remedy:
                ctx.obj.echo(f"         → {finding.remedy}")
    if not found.reachable:
        ctx.exit(EX_UNAVAILABLE)
    if not found.healthy:
        ctx.exit(EX_FAILURE)


@command(jetstream)
@json_option
@timeout_option
def health(ctx: click.Context, as_json: bool, timeout: float) -> None:
    """Tell whether the broker can be used; for probes.

    Exits with 0 or 69.  A worker's permissions are enough.
    """
    import asyncio

    from .health import health as look

    found = asyncio.run(look(ctx.obj.app, timeout=timeout))
    if as_json:
        print_json(ctx, found.as_json())
    elif found.healthy:
        ctx.obj.echo(f"healthy: nats-server {found.version} at {found.server}")
        if found.reason:
            remark(ctx, found.reason)
    else:
        complain(ctx, f"unhealthy: {found.reason}")
    if not found.healthy:
        ctx.exit(EX_UNAVAILABLE)


@command(jetstream)
@click.option("-c", "--count", type=click.IntRange(min=1), default=5, show_default=True)
@json_option
@timeout_option
def ping(ctx: click.Context, count: int, as_json: bool, timeout: float) -> None:
    """Measure the round trip to the broker."""
    import asyncio

    from .health import round_trips

    server, seconds = asyncio.run(round_trips(ctx.obj.app, count, timeout=timeout))
    least, most, mean = min(seconds), max(seconds), sum(seconds) / len(seconds)
    if as_json:
        found = {"server": server, "count": count, "min": least, "mean": mean, "max": most}
        print_json(ctx, found)
    else:
        times = "/".join(f"{each * 1000:.2f}" for each in (least, mean, most))
        ctx.obj.echo(f"{server}: {count} round trips, min/mean/max {times} ms")


@command(jetstream)
@click.option(
    "-t",
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Seconds to wait for the workers' answers.",
)
@json_option
def workers(ctx: click.Context, timeout: float, as_json: bool) -> None:
    """Show what became of the tasks of each worker."""
    from .broker import run
    from .overview import worker_stats
    from .tables import Column

    run(ctx.obj.app, _nothing)  # kombu would try for seconds to reach a server that is away
    found = worker_stats(ctx.obj.app, timeout=timeout)
    if as_json:
        print_json(ctx, found)
        return
    outcomes = ("processed", "succeeded", "failed", "retried", "dead_lettered")
    columns = [Column("worker"), Column("task"), Column("queue")]
    columns += [Column(name.partition("_")[0], right=True, keep=True) for name in outcomes]
    rows = [
        [worker, task, queue, *(counts.get(name, 0) for name in outcomes)]
        for worker, stats in sorted(found.items())
        for task, queues in stats.get("tasks", {}).items()
        for queue, counts in queues.items()
    ]
    silent = (
        f"{count_of(len(found), 'worker')} answered, no task has run" if found else "no workers"
    )
    print_table(ctx, columns, rows, silent)


@command(jetstream)
@queues_option
@dry_run_option
@json_option
@timeout_option
def provision(
    ctx: click.Context,
    queue_names: list[str] | None,
    dry_run: bool,
    as_json: bool,
    timeout: float,
) -> None:
    """Make or change the streams, and the queues of the app.

    Shows what is not as the options want it, and mends it unless --dry-run.  Exits with 1 if
    something is left that cannot be changed.
    """
    from .broker import Broker, run
    from .provision import apply, declared, plan

    needed = declared(ctx.obj.app, queue_names)

    async def work(broker: Broker) -> list[Any]:
        changes = await plan(broker, needed)
        if not dry_run:
            await apply(broker, changes)
        return changes

    changes = run(ctx.obj.app, work, timeout=timeout)
    if as_json:
        report = {"applied": not dry_run, "changes": [change.as_json() for change in changes]}
        print_json(ctx, report)
    else:
        _print_changes(ctx, changes, dry_run)
    if any(change.action == "impossible" for change in changes):
        ctx.exit(EX_FAILURE)


def _print_changes(ctx: click.Context, changes: list[Any], dry_run: bool) -> None:
    verbs = {"create": "create", "update": "change", "impossible": "CANNOT change"}
    for change in changes:
        ctx.obj.echo(f"{verbs[change.action]} {change.what}")
        for each in change.differences:
            ctx.obj.echo(f"    {each.field}: {each.found!r} → {each.expected!r}")
    if not changes:
        remark(ctx, "everything is as the options want it")
    elif dry_run:
        remark(ctx, f"{count_of(len(changes), 'difference')}, nothing was changed")


async def _nothing(broker: Any) -> None:
    """Connect, and no more."""


@command(jetstream)
@click.argument("role", type=click.Choice(["producer", "worker", "operator"]))
@queues_option
@click.option(
    "--control", is_flag=True, help="A producer may revoke tasks and ask workers, and stop them."
)
@json_option
def permissions(
    ctx: click.Context, role: str, queue_names: list[str] | None, control: bool, as_json: bool
) -> None:
    """Print what NATS must allow to a ROLE of this app.

    A block for a user in the server's configuration; with --json for tools that make users.  For
    the transport option provision="off".  No server is asked.
    """
    from .broker import options_of
    from .permissions import as_nats_config, uses_rpc_results
    from .permissions import permissions as permissions_of
    from .provision import declared

    app = ctx.obj.app
    options = options_of(app)
    if role == "producer" and uses_rpc_results(app):
        remark(
            ctx,
            "results of rpc:// need a queue of each producer's own, which these permissions and "
            "provision='off' do not allow: use another result backend",
        )
    allowed = permissions_of(
        role,  # type: ignore[arg-type]  # click has checked it
        options,
        declared(app, queue_names),
        control=control,
        rpc_results=uses_rpc_results(app),
    )
    if as_json:
        print_json(ctx, allowed)
    else:
        ctx.obj.echo(as_nats_config(allowed))


@command(jetstream)
@click.option("--port", type=click.IntRange(0, 65535), default=4222, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--store", metavar="DIR", help="Folder for everything the server keeps.")
@click.option("--config", metavar="FILE", help="More of nats-server's configuration.")
@click.option("--nats-server", metavar="PATH", help="Another nats-server than the installed one.")
@click.option("--verbose", is_flag=True, help="Print the server's log.")
def server(
    ctx: click.Context,
    port: int,
    host: str,
    store: str | None,
    config: str | None,
    nats_server: str | None,
    verbose: bool,
) -> None:
    """Run a nats-server for development, until Ctrl-C."""
    from pathlib import Path

    from kombu_jetstream.server import DEFAULT_STORE_DIR, run

    code = run(
        port=port,
        host=host,
        store_dir=store if store is not None else DEFAULT_STORE_DIR,
        config=Path(config) if config is not None else None,
        binary=nats_server,
        verbose=verbose,
        say=ctx.obj.echo,
        complain=lambda text: complain(ctx, f"Error: {text}"),
    )
    ctx.exit(code)


@command(jetstream)
@click.option("--port", type=click.IntRange(0, 65535), default=9809, show_default=True)
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
@timeout_option
def exporter(ctx: click.Context, port: int, host: str, timeout: float) -> None:
    """Serve Prometheus metrics of queues and dead letters.

    Needs the extra "metrics".  Each scrape asks the broker; nothing is asked in between.
    """
    try:
        from .metrics import serve
    except ImportError as exc:
        complain(ctx, f"Error: {exc}; pip install 'kombu-jetstream[metrics]'")
        ctx.exit(EX_FAILURE)
    serve(ctx.obj.app, host, port, timeout=timeout, say=lambda text: remark(ctx, text))
