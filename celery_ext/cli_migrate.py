"""``celery jetstream migrate``: from Redis lists to JetStream."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from celery.platforms import EX_FAILURE

from .cli_common import (
    command,
    complain,
    confirm,
    count_of,
    dry_run_option,
    force_option,
    json_option,
    print_json,
    print_table,
    queues_option,
    remark,
)

if TYPE_CHECKING:
    from .migrate import Status

__all__ = ["migrate"]


@click.group()
def migrate() -> None:
    """Move from Redis lists to JetStream, and see how far it is."""


@command(migrate, "status")
@queues_option
@json_option
def show_status(ctx: click.Context, queue_names: list[str] | None, as_json: bool) -> None:
    """Show what waits where."""
    from kombu_jetstream.errors import ConnectionLost

    from .migrate import open_migration, status_without_jetstream

    away = None
    try:
        with open_migration(ctx.obj.app) as migration:
            found = migration.status(queue_names)
    except ConnectionLost as exc:
        found, away = status_without_jetstream(ctx.obj.app, queue_names), exc
    if as_json:
        print_json(ctx, found.as_json())
    else:
        _print_status(ctx, found)
    if away is not None:
        raise away


def _print_status(ctx: click.Context, found: Status) -> None:
    from .tables import Column

    ctx.obj.echo(f"migration_phase {found.phase!r}")
    columns = [
        Column("queue"),
        Column("in Redis", right=True, keep=True),
        Column("in JetStream", right=True, keep=True),
        Column("in flight", right=True, keep=True),
    ]
    rows = [
        [
            each.queue,
            each.redis,
            each.jetstream if each.jetstream is not None else "?",
            each.in_flight if each.in_flight is not None else "?",
        ]
        for each in found.queues
    ]
    print_table(ctx, columns, rows, "nothing waits in Redis")
    for number, what in (
        (found.held, "held by workers that took them from Redis"),
        (found.unacked, "taken by plain redis:// workers and not acknowledged"),
        (found.draining, "left on their way by an interrupted drain"),
        (found.mirrored or 0, "copied to the mirror"),
    ):
        if number:
            ctx.obj.echo(f"{count_of(number, 'message')} {what}")


@command(migrate, "compare")
@click.option("--reset", is_flag=True, help="Forget what was compared, and begin anew.")
@force_option
@json_option
def compare_mirror(ctx: click.Context, reset: bool, force: bool, as_json: bool) -> None:
    """Tell whether the mirror has what Redis took since dual-write began.

    Exits with 1 if a queue differs.
    """
    from dataclasses import asdict

    from .migrate import open_migration
    from .tables import Column

    with open_migration(ctx.obj.app) as migration:
        if reset:
            confirm(ctx, "Empty the mirror and forget what was written", force)
            migration.reset()
            remark(ctx, "the comparison begins anew")
            return
        found = migration.compare()
    if as_json:
        print_json(ctx, [asdict(each) for each in found])
    else:
        columns = [
            Column("queue"),
            Column("written to Redis", right=True, keep=True),
            Column("in the mirror", right=True, keep=True),
            Column("under way", right=True),
            Column("result", keep=True),
        ]
        rows = [
            [
                each.queue,
                each.written,
                each.mirrored,
                each.under_way,
                "same" if each.is_same else "differs",
            ]
            for each in found
        ]
        print_table(ctx, columns, rows, "nothing was written with migration_phase 'dual-write'")
    if not all(each.is_same for each in found):
        ctx.exit(EX_FAILURE)


@command(migrate, "drain")
@queues_option
@click.option(
    "--unacked",
    is_flag=True,
    help="Also what plain redis:// workers took and never acknowledged; when none runs any more.",
)
@click.option(
    "--in-doubt",
    type=click.Choice(["keep", "publish", "drop"]),
    default="keep",
    show_default=True,
    help="What to do with messages of an interrupted drain that JetStream may have or not.",
)
@dry_run_option
@force_option
@json_option
def drain_lists(
    ctx: click.Context,
    queue_names: list[str] | None,
    unacked: bool,
    in_doubt: Any,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Move what waits in Redis lists into JetStream, each message once.

    It may be interrupted and run again.  Exits with 1 if something could not be moved.
    """
    from dataclasses import asdict

    from .migrate import open_migration

    with open_migration(ctx.obj.app) as migration:
        before = migration.status(queue_names)
        waiting = sum(each.redis for each in before.queues) + before.draining
        waiting += before.unacked if unacked else 0
        if dry_run:
            if as_json:
                print_json(ctx, {each.queue: each.redis for each in before.queues})
            else:
                ctx.obj.echo(f"{count_of(waiting, 'message')} would move to JetStream")
            return
        if before.held:
            remark(
                ctx,
                f"{count_of(before.held, 'message')} {'is' if before.held == 1 else 'are'} held by "
                "workers, or were by dead ones; run it again when these have ended",
            )
        if not waiting:
            remark(ctx, "nothing waits in Redis")
        else:
            confirm(ctx, f"Move {count_of(waiting, 'message')} to JetStream", force)
        report = migration.drain(
            queue_names, in_doubt=in_doubt, unacked=unacked, progress=_progress(ctx, as_json)
        )
    if as_json:
        print_json(ctx, asdict(report))
    else:
        _print_report(ctx, report)
    if report.in_doubt or report.malformed:
        ctx.exit(EX_FAILURE)


def _progress(ctx: click.Context, as_json: bool) -> Any:
    def show(moved: int) -> None:
        if sys.stderr.isatty() and not as_json and not ctx.obj.quiet:
            click.echo(f"\r{count_of(moved, 'message')} moved ", nl=False, err=True)

    return show


def _print_report(ctx: click.Context, report: Any) -> None:
    if sys.stderr.isatty():
        click.echo("\r", nl=False, err=True)
    for queue, number in sorted(report.moved.items()):
        ctx.obj.echo(f"{queue}: {count_of(number, 'message')} moved")
    if report.known:
        ctx.obj.echo(f"{count_of(report.known, 'message')} of them an earlier drain had written")
    if report.in_doubt:
        complain(
            ctx,
            f"{count_of(report.in_doubt, 'message')} of an earlier drain may be in JetStream or "
            "not, and stay where they are; decide with --in-doubt",
        )
    if report.malformed:
        complain(ctx, f"{count_of(report.malformed, 'message')} cannot be read and stay in Redis")
