"""``celery jetstream queues`` and ``celery jetstream scheduled``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from celery.platforms import EX_FAILURE

from .cli_common import (
    TABLE_LIMIT,
    command,
    complain,
    confirm,
    count_of,
    dry_run_option,
    duration,
    force_option,
    json_option,
    print_json,
    print_table,
    queues_option,
    remark,
    timeout_option,
)

if TYPE_CHECKING:
    from .queues import QueueStatus
    from .scheduled import ScheduledTask

__all__ = ["print_queues", "queues", "scheduled"]


@click.group()
def queues() -> None:
    """List, pause, purge and delete queues."""


@command(queues, "list")
@queues_option
@click.option(
    "--interval",
    metavar="TIME",
    callback=duration,
    default="0",
    help="Time over which the rate is measured.  [default: not]",
)
@json_option
@timeout_option
def list_queues(
    ctx: click.Context,
    queue_names: list[str] | None,
    interval: float,
    as_json: bool,
    timeout: float,
) -> None:
    """List the queues that exist."""
    from .broker import run
    from .queues import statuses

    found = run(
        ctx.obj.app,
        lambda broker: statuses(broker, queue_names, interval=interval),
        timeout=timeout,
    )
    if as_json:
        print_json(ctx, [queue.as_json() for queue in found])
    else:
        print_queues(ctx, found)


def print_queues(ctx: click.Context, queues: Iterable[Any]) -> None:
    from .tables import Column
    from .times import show_age

    columns = [
        Column("queue"),
        Column("ready", right=True, keep=True),
        Column("in flight", right=True, keep=True),
        Column("delayed", right=True, keep=True),
        Column("redelivered", right=True, keep=True),
        Column("consumers", right=True, keep=True),
        Column("oldest", right=True, keep=True),
        Column("rate", right=True, keep=True, optional=True),
        Column("ready by level", wide=True),
        Column("state", optional=True),
    ]
    rows = [
        [
            queue.name,
            queue.ready,
            queue.in_flight,
            queue.delayed,
            queue.redelivered,
            queue.consumers,
            show_age(queue.oldest_age),
            "" if queue.rate is None else f"{queue.rate:.1f}",
            " ".join(f"{level} {count}" for level, count in queue.levels.items()),
            "no consumer" if queue.missing else "paused" if queue.paused_until else "",
        ]
        for queue in queues
    ]
    print_table(ctx, columns, rows, "no queues; the first worker makes them, or `provision`")


@command(queues, "pause")
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@click.option(
    "--for", "duration", metavar="TIME", callback=duration, help="As 30m. [default: until resumed]"
)
@timeout_option
def pause_queues(
    ctx: click.Context, names: tuple[str, ...], duration: float | None, timeout: float
) -> None:
    """Hand out no messages of a QUEUE; what workers hold they finish."""
    from .broker import Broker, run
    from .queues import UNTIL_RESUMED, pause

    until = time.time() + duration if duration is not None else UNTIL_RESUMED

    async def work(broker: Broker) -> None:
        for name in names:
            await pause(broker, name, until)

    run(ctx.obj.app, work, timeout=timeout)
    for name in names:
        ctx.obj.echo(f"paused {name}")


@command(queues, "resume")
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@timeout_option
def resume_queues(ctx: click.Context, names: tuple[str, ...], timeout: float) -> None:
    """Hand out messages of a QUEUE again."""
    from .broker import Broker, run
    from .queues import resume

    async def work(broker: Broker) -> None:
        for name in names:
            await resume(broker, name)

    run(ctx.obj.app, work, timeout=timeout)
    for name in names:
        ctx.obj.echo(f"resumed {name}")


@command(queues, "purge")
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@force_option
@dry_run_option
@timeout_option
def purge_queues(
    ctx: click.Context, names: tuple[str, ...], force: bool, dry_run: bool, timeout: float
) -> None:
    """Remove the ready messages of a QUEUE.

    What workers hold stays, and so does what waits for its time (`scheduled cancel --queue`).
    """
    from .queues import purge

    total = sum(queue.ready for queue in _statuses_of(ctx, names, timeout))
    shown = f"{count_of(total, 'ready message')} of {', '.join(names)}"
    if dry_run:
        remark(ctx, f"would remove {shown}")
        return
    confirm(ctx, f"Remove {shown}", force)
    removed = sum(purge(ctx.obj.app, name) for name in names)
    ctx.obj.echo(f"removed {count_of(removed, 'message')}")


@command(queues, "delete")
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@force_option
@dry_run_option
@timeout_option
def delete_queues(
    ctx: click.Context, names: tuple[str, ...], force: bool, dry_run: bool, timeout: float
) -> None:
    """Delete a QUEUE with its bindings and all its messages."""
    from .queues import delete

    found = _statuses_of(ctx, names, timeout)
    kinds = {
        "ready": sum(queue.ready for queue in found),
        "in flight": sum(queue.in_flight for queue in found),
        "delayed": sum(queue.delayed for queue in found),
    }
    total = count_of(sum(kinds.values()), "message")
    parts = ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
    shown = f"{', '.join(names)} with {total}{f' ({parts})' if parts else ''}"
    if dry_run:
        remark(ctx, f"would delete {shown}")
        return
    confirm(ctx, f"Delete {shown}", force)
    for name in names:
        delete(ctx.obj.app, name)
        ctx.obj.echo(f"deleted {name}")


def _statuses_of(ctx: click.Context, names: Iterable[str], timeout: float) -> list[QueueStatus]:
    from .broker import run
    from .queues import statuses

    return run(ctx.obj.app, lambda broker: statuses(broker, names), timeout=timeout)


@click.group()
def scheduled() -> None:
    """List and cancel tasks that wait in the server for their time."""


@command(scheduled, "list")
@click.option("--queue", help="For this queue.")
@click.option("--task", metavar="GLOB", help="Name of the task, as 'billing.*'.")
@click.option("--within", metavar="TIME", callback=duration, help="Due within this time, as 1h.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"At most this many, the next. [default: {TABLE_LIMIT} in a table, all as JSON]",
)
@json_option
@timeout_option
def list_scheduled(
    ctx: click.Context,
    queue: str | None,
    task: str | None,
    within: float | None,
    limit: int | None,
    as_json: bool,
    timeout: float,
) -> None:
    """List waiting tasks, those due first at the front."""
    from kombu_jetstream.topology import API_LEVEL_SCHEDULES

    from .broker import Broker, run
    from .scheduled import Scheduled, ScheduledFilter
    from .tables import Column
    from .times import show_age, show_moment

    before = time.time() + within if within is not None else None
    which = ScheduledFilter(queue=queue, task=task, before=before)
    rows = limit if limit is not None else None if as_json else TABLE_LIMIT

    async def work(broker: Broker) -> tuple[list[ScheduledTask], bool]:
        next_due = await Scheduled(broker).next_due(which, rows + 1 if rows is not None else None)
        return next_due, broker.info.api_level >= API_LEVEL_SCHEDULES

    found, can_schedule = run(ctx.obj.app, work, timeout=timeout)
    shown = found[:rows] if rows is not None else found
    if as_json:
        print_json(ctx, [waiting.as_json() for waiting in shown])
        return
    now = time.time()
    columns = [
        Column("due at", keep=True, wide=True),
        Column("in", right=True, keep=True),
        Column("task"),
        Column("task id", keep=True),
        Column("queue"),
        Column("level", wide=True),
        Column("published at", keep=True, wide=True),
    ]
    cells = [
        [
            show_moment(waiting.due_at),
            show_age(waiting.due_at - now),
            waiting.task,
            waiting.task_id,
            waiting.queue,
            waiting.level,
            show_moment(waiting.published_at),
        ]
        for waiting in shown
    ]
    print_table(ctx, columns, cells, "nothing waits")
    if not found and not can_schedule:
        remark(ctx, "this server keeps no tasks, workers hold them: celery inspect scheduled")
    if len(found) > len(shown):
        remark(ctx, "there are more: --limit")


@command(scheduled, "cancel")
@click.argument("task_ids", nargs=-1, metavar="[TASK_ID]...")
@click.option("--queue", help="All that wait for this queue.")
@force_option
@dry_run_option
@timeout_option
def cancel_scheduled(
    ctx: click.Context,
    task_ids: tuple[str, ...],
    queue: str | None,
    force: bool,
    dry_run: bool,
    timeout: float,
) -> None:
    """Remove waiting tasks, by their ids or all of a queue.

    A task whose time has come is in its queue or with a worker: `celery control revoke` is for
    those.  Exits with 1 if a task does not wait.
    """
    from .broker import Broker, run
    from .scheduled import Scheduled, ScheduledFilter

    if bool(task_ids) == (queue is not None):
        raise click.UsageError("name tasks by TASK_ID, or a queue by --queue")
    wanted = set(task_ids)

    async def count(broker: Broker) -> int:
        waiting = Scheduled(broker).all(ScheduledFilter(queue=queue))
        return len([each async for each in waiting if not wanted or each.task_id in wanted])

    if dry_run or not force:
        shown = count_of(run(ctx.obj.app, count, timeout=timeout), "waiting task")
        if dry_run:
            remark(ctx, f"would cancel {shown}")
            return
        confirm(ctx, f"Cancel {shown}", force)

    async def work(broker: Broker) -> dict[str, int]:
        waiting = Scheduled(broker)
        if queue is not None:
            return {queue: await waiting.cancel_queue(queue)}
        return {task_id: await waiting.cancel(task_id) for task_id in task_ids}

    removed = run(ctx.obj.app, work, timeout=timeout)
    ctx.obj.echo(f"cancelled {count_of(sum(removed.values()), 'task')}")
    missing = [name for name, number in removed.items() if not number and queue is None]
    for name in missing:
        complain(ctx, f"task {name} does not wait in the server")
    if missing:
        ctx.exit(EX_FAILURE)
