"""``celery jetstream dlq``."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from celery.platforms import EX_FAILURE

from kombu_jetstream.deadletter import REASONS

from .cli_common import (
    TABLE_LIMIT,
    command,
    complain,
    confirm,
    count_of,
    dry_run_option,
    force_option,
    json_option,
    moment,
    print_json,
    print_table,
    remark,
    timeout_option,
)

if TYPE_CHECKING:
    from .dlq import Letter, LetterFilter
    from .replay import Report

__all__ = ["dlq"]

#: Shown for a character that is no letter, digit or sign.
UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"

F = TypeVar("F", bound=Callable[..., Any])


def _reason(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and value not in REASONS:
        raise click.BadParameter(f"expected one of {', '.join(REASONS)}, got {value!r}")
    return value


def letter_filter_options(function: F) -> F:
    """Add the options that choose dead letters; the command gets ``which``."""

    @functools.wraps(function)
    def with_filter(*args: Any, **kwargs: Any) -> Any:
        from .dlq import LetterFilter

        names = ("queue", "task", "error", "reason", "since")
        chosen = {name: kwargs.pop(name) for name in names}
        return function(*args, which=LetterFilter(**chosen), **kwargs)

    for option in (
        click.option(
            "--since",
            metavar="TIME",
            callback=moment,
            help="Died since, as 2h or 2026-11-22T14:30.",
        ),
        click.option(
            "--reason", callback=_reason, help=f"Died for this reason: {', '.join(REASONS)}."
        ),
        click.option("--error", help="Exception class, with or without its module."),
        click.option("--task", metavar="GLOB", help="Name of the task, as 'billing.*'."),
        click.option("--queue", help="Queue it died in."),
    ):
        with_filter = option(with_filter)
    return with_filter  # type: ignore[return-value]


@click.group()
def dlq() -> None:
    """List, explain, replay and remove dead letters."""


@command(dlq, "list")
@letter_filter_options
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"At most this many, the newest. [default: {TABLE_LIMIT} in a table, all as JSON]",
)
@click.option("--before", metavar="ID", help="Those older than this one: the next page.")
@json_option
@timeout_option
def list_letters(
    ctx: click.Context,
    which: LetterFilter,
    limit: int | None,
    before: str | None,
    as_json: bool,
    timeout: float,
) -> None:
    """List dead letters, the newest first."""
    from .broker import Broker, run
    from .dlq import DeadLetters

    if as_json:
        run(
            ctx.obj.app,
            lambda broker: _stream_letters(ctx, broker, which, limit, before),
            timeout=timeout,
        )
        return
    rows = limit if limit is not None else TABLE_LIMIT

    async def read(broker: Broker) -> list[Letter]:
        found = DeadLetters(broker).newest(which, limit=rows + 1, before=before)
        return [letter async for letter in found]

    letters = run(ctx.obj.app, read, timeout=timeout)
    _print_letters(ctx, letters[:rows], "no dead letters")
    if len(letters) > rows:
        remark(ctx, f"there are more: --before {letters[rows - 1].id}, or --limit")


async def _stream_letters(
    ctx: click.Context, broker: Any, which: LetterFilter, limit: int | None, before: str | None
) -> None:
    """Print one JSON array, each letter when it is read: there may be very many."""
    from .dlq import DeadLetters

    start = "["
    async for letter in DeadLetters(broker).newest(which, limit=limit, before=before):
        ctx.obj.echo(f"{start}\n{json.dumps(letter.as_json())}", nl=False)
        start = ","
    ctx.obj.echo("[]" if start == "[" else "\n]")


def _print_letters(ctx: click.Context, letters: Iterable[Letter], empty: str) -> None:
    from .tables import Column
    from .times import show_age, show_moment

    now = time.time()
    columns = [
        Column("id", right=True, keep=True),
        Column("age", right=True, keep=True),
        Column("died at", keep=True, wide=True),
        Column("reason"),
        Column("task"),
        Column("task id", wide=True),
        Column("queue"),
        Column("error"),
        Column("message"),
        Column("tries", right=True, keep=True, wide=True),
        Column("replayed", right=True, keep=True, wide=True, optional=True),
    ]
    rows = [
        [
            letter.id,
            show_age(now - letter.died_at),
            show_moment(letter.died_at),
            letter.record.reason,
            letter.record.task,
            letter.record.task_id,
            letter.record.queue,
            letter.record.error,
            letter.record.message,
            letter.record.attempts,
            letter.record.replayed or "",
        ]
        for letter in letters
    ]
    print_table(ctx, columns, rows, empty)


@command(dlq, "show")
@click.argument("letter_id", metavar="ID")
@json_option
@timeout_option
def show_letter(ctx: click.Context, letter_id: str, as_json: bool, timeout: float) -> None:
    """Show one dead letter, with its traceback and the original message."""
    from .broker import run
    from .dlq import DeadLetters
    from .times import show_moment

    letter = run(ctx.obj.app, lambda broker: DeadLetters(broker).get(letter_id), timeout=timeout)
    details = letter.details()
    if as_json:
        print_json(ctx, details)
        return
    traceback, original = details.pop("traceback"), details.pop("original")
    lines = []
    for name, value in details.items():
        if name.endswith("_at"):
            value = show_moment(value)
        if value not in (None, ""):
            lines.append(f"{name.replace('_', ' ') + ':':14} {value}")
    text = original if isinstance(original, str) else json.dumps(original, indent=2)
    lines += ["original:", *(f"    {line}" for line in text.splitlines())]
    if traceback:
        lines += ["traceback:", *(f"    {line}" for line in traceback.splitlines())]
    for line in lines:
        # Anybody may have written it, with half a character or a terminal's commands in it.
        ctx.obj.echo("".join(char if char.isprintable() else UNPRINTABLE for char in line))


def _choose(ids: tuple[str, ...], everything: bool, which: LetterFilter) -> LetterFilter | None:
    """Return what was chosen by filter, or None if it was by ids; exactly one is needed."""
    if ids and (everything or not which.is_empty):
        raise click.UsageError("name letters by ID, or choose them by --all or filters, not both")
    if not ids and not everything and which.is_empty:
        raise click.UsageError("name letters by ID, or choose them by filters, or all by --all")
    return None if ids else which


def _chosen(ctx: click.Context, ids: tuple[str, ...], which: LetterFilter | None) -> list[Letter]:
    """Return the letters that are meant, without payloads, oldest first."""
    from .broker import Broker, gather, run
    from .dlq import DeadLetters

    async def read(broker: Broker) -> list[Letter]:
        store = DeadLetters(broker)
        if which is None:
            return await gather(store.get, dict.fromkeys(ids))
        return [letter async for letter in store.oldest(which)]

    return run(ctx.obj.app, read)


def _count_of_chosen(ctx: click.Context, ids: tuple[str, ...], which: LetterFilter | None) -> int:
    from .broker import run
    from .dlq import DeadLetters

    if which is None:
        return len(_chosen(ctx, ids, None))
    return run(ctx.obj.app, lambda broker: DeadLetters(broker).stats(which)).count


_ids = click.argument("ids", nargs=-1, metavar="[ID]...")
_all = click.option("--all", "everything", is_flag=True, help="All dead letters.")


@command(dlq, "replay")
@_ids
@_all
@letter_filter_options
@click.option("--to-queue", metavar="QUEUE", help="Put them here, not where they died.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many, the oldest.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Letters a second at most. [default: no limit]",
)
@click.option(
    "--in-doubt",
    is_flag=True,
    help="Also those that an interrupted command may have replayed (servers before 2.12).",
)
@dry_run_option
@force_option
@json_option
@timeout_option
def replay_letters(
    ctx: click.Context,
    ids: tuple[str, ...],
    everything: bool,
    which: LetterFilter,
    to_queue: str | None,
    rate: float | None,
    limit: int | None,
    in_doubt: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    timeout: float,
) -> None:
    """Put dead letters back into their queues, oldest first.

    The same tasks, with all their attempts again.  Interrupt it and run it again: no letter is
    replayed twice.  Asks before it replays what filters choose.  Exits with 1 if letters stay
    behind.
    """
    from .broker import run
    from .replay import Replay, Report

    chosen = _choose(ids, everything, which)
    if dry_run:
        letters = _chosen(ctx, ids, chosen)[:limit]
        if as_json:
            print_json(ctx, [letter.as_json() for letter in letters])
        else:
            _print_letters(ctx, letters, "no dead letters")
        remark(ctx, f"would replay {count_of(len(letters), 'letter')}")
        return
    if chosen is not None and not force:
        count = _count_of_chosen(ctx, ids, chosen)
        count = count if limit is None else min(count, limit)
        where = f"to queue {to_queue!r}" if to_queue is not None else "to their queues"
        confirm(ctx, f"Replay {count_of(count, 'dead letter')} {where}", force)
    done = Report()

    def progress(report: Report) -> None:
        nonlocal done
        done = report

    try:
        report = run(
            ctx.obj.app,
            lambda broker: Replay(
                broker, to_queue=to_queue, rate=rate, in_doubt=in_doubt, progress=progress
            ).run(ids, chosen, limit=limit),
            timeout=timeout,
        )
    except BaseException:
        if done.replayed:
            remark(ctx, f"{done.replayed} replayed so far; run it again for the others")
        raise
    if as_json:
        print_json(ctx, report.as_json())
    else:
        _print_report(ctx, report)
    if report.failed or report.in_doubt:
        ctx.exit(EX_FAILURE)


def _print_report(ctx: click.Context, report: Report) -> None:
    ctx.obj.echo(f"replayed {count_of(report.replayed, 'letter')}")
    if report.already:
        ctx.obj.echo(f"{report.already} had been replayed before an interruption")
    if report.expired:
        remark(ctx, f"{report.expired} of them have expired, workers will drop them")
    for letter_id, reason in report.failed:
        complain(ctx, f"letter {letter_id} stays: {reason}")
    if report.in_doubt:
        remark(
            ctx,
            f"{count_of(len(report.in_doubt), 'letter')} may have been replayed by an interrupted "
            f"command and stay: {', '.join(report.in_doubt)}; delete them, or use --in-doubt",
        )


@command(dlq, "delete")
@_ids
@_all
@letter_filter_options
@dry_run_option
@force_option
@timeout_option
def delete_letters(
    ctx: click.Context,
    ids: tuple[str, ...],
    everything: bool,
    which: LetterFilter,
    dry_run: bool,
    force: bool,
    timeout: float,
) -> None:
    """Remove dead letters for good."""
    from .broker import Broker, run
    from .dlq import DeadLetters

    chosen = _choose(ids, everything, which)
    if dry_run or not force:
        shown = count_of(_count_of_chosen(ctx, ids, chosen), "dead letter")
        if dry_run:
            remark(ctx, f"would delete {shown}")
            return
        confirm(ctx, f"Delete {shown} for good", force)

    async def work(broker: Broker) -> int:
        store = DeadLetters(broker)
        if chosen is None:
            return await store.delete(ids)
        return await store.delete_matching(chosen)

    removed = run(ctx.obj.app, work, timeout=timeout)
    ctx.obj.echo(f"deleted {count_of(removed, 'letter')}")
    missing = len(set(ids)) - removed
    if missing > 0:
        complain(ctx, f"{count_of(missing, 'letter')} of those named did not exist")
        ctx.exit(EX_FAILURE)


@command(dlq, "purge")
@click.option("--queue", help="Only those that died in this queue.")
@dry_run_option
@force_option
@timeout_option
def purge_letters(
    ctx: click.Context, queue: str | None, dry_run: bool, force: bool, timeout: float
) -> None:
    """Remove all dead letters at once."""
    from .broker import run
    from .dlq import DeadLetters

    counts = run(ctx.obj.app, lambda broker: DeadLetters(broker).counts(), timeout=timeout)
    total = sum(counts.values()) if queue is None else counts.get(queue, 0)
    where = f" of queue {queue!r}" if queue is not None else ""
    shown = f"{count_of(total, 'dead letter')}{where}"
    if dry_run:
        remark(ctx, f"would delete {shown}")
        return
    confirm(ctx, f"Delete {shown} for good", force)
    removed = run(ctx.obj.app, lambda broker: DeadLetters(broker).purge(queue), timeout=timeout)
    ctx.obj.echo(f"deleted {count_of(removed, 'letter')}")


@command(dlq, "stats")
@letter_filter_options
@json_option
@timeout_option
def letter_stats(ctx: click.Context, which: LetterFilter, as_json: bool, timeout: float) -> None:
    """Count dead letters by queue, reason, error and task."""
    from .broker import run
    from .dlq import DeadLetters
    from .tables import Column, size
    from .times import show_moment

    stats = run(ctx.obj.app, lambda broker: DeadLetters(broker).stats(which), timeout=timeout)
    if as_json:
        print_json(ctx, stats.as_json())
        return
    if not stats.count:
        remark(ctx, "no dead letters")
        return
    first, last = show_moment(stats.oldest_at), show_moment(stats.newest_at)
    ctx.obj.echo(
        f"{count_of(stats.count, 'dead letter')}, {size(stats.size)}, from {first} to {last}"
    )
    groups = {
        "queue": stats.queues,
        "reason": stats.reasons,
        "error": stats.errors,
        "task": stats.tasks,
    }
    columns = [Column("by"), Column("value"), Column("letters", right=True, keep=True)]
    rows = [
        [name, value or "(none)", count]
        for name, group in groups.items()
        for value, count in group.most_common(TABLE_LIMIT)
    ]
    print_table(ctx, columns, rows, "")
