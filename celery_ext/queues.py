"""Durable queues as an operator sees them: what is in them, and pause, purge, delete.

A queue is a record in the registry and one consumer in each level's stream; the numbers come from
the consumers, so looking at a queue takes nothing from it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any

from kombu_jetstream.errors import NotSupported, QueueMissing
from kombu_jetstream.registry import Queue
from kombu_jetstream.topology import API_LEVEL_TTL, LEVELS, Level, decode_token, queue_token

from .broker import Broker, gather

__all__ = [
    "UNTIL_RESUMED",
    "QueueStatus",
    "delayed_counts",
    "delete",
    "pause",
    "purge",
    "registered_queues",
    "resume",
    "statuses",
]

#: Seconds since the epoch (in 2100): a pause without an end has one all the same.
UNTIL_RESUMED = 4_102_444_800.0

#: Consumers can be paused from 2.11 on, as messages can have a TTL.
API_LEVEL_PAUSE = API_LEVEL_TTL


async def registered_queues(broker: Broker) -> dict[str, Queue]:
    """Return the durable queues of the namespace by name, as they were declared."""
    found: dict[str, Queue] = {}
    names = broker.names
    async for page in broker.pages(names.registry_stream, f"{names.registry}.queue.*", 500):
        for stored in page:
            if stored.payload:  # else it was deleted
                record = json.loads(stored.payload)
                found[record["name"]] = Queue(**record)
    return found


@dataclass(slots=True)
class QueueStatus:
    """The numbers of one queue, its levels together."""

    name: str
    #: Messages a worker may have now.
    ready: int = 0
    #: Messages workers hold: running and prefetched.
    in_flight: int = 0
    #: Messages whose time has not come.
    delayed: int = 0
    #: Of those in flight, how many were delivered before.
    redelivered: int = 0
    #: Workers that wait for a message; one that is busy to its prefetch limit does not.
    consumers: int = 0
    #: Seconds the oldest message has been there, ready or in flight; None without any.
    oldest_age: float | None = None
    #: Deliveries a second, again delivered ones included; None if not measured.
    rate: float | None = None
    #: Seconds since the epoch, None if not paused.
    paused_until: float | None = None
    #: Ready messages by level.
    levels: dict[str, int] = field(default_factory=dict)
    #: Levels whose consumer does not exist.
    missing: list[str] = field(default_factory=list)
    #: Deliveries so far.
    delivered: int = 0
    #: It goes when it is not used (auto-delete, x-expires): that nobody uses it is no fault.
    temporary: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ready": self.ready,
            "in_flight": self.in_flight,
            "delayed": self.delayed,
            "redelivered": self.redelivered,
            "consumers": self.consumers,
            "oldest_age": self.oldest_age,
            "rate": self.rate,
            "paused_until": self.paused_until,
            "levels": self.levels,
        }


def _levels_of(broker: Broker, queue: Queue) -> tuple[Level, ...]:
    return ("medium",) if queue.auto_delete else broker.levels


async def statuses(
    broker: Broker, queue_names: Iterable[str] | None = None, *, interval: float = 0.0
) -> list[QueueStatus]:
    """Return the numbers of all queues, or of those named; sorted by name.

    With an *interval* in seconds the rate is measured, which takes that long.  Raises
    `QueueMissing` for a name that is not registered.
    """
    queues = await registered_queues(broker)
    if queue_names is not None:
        wanted = list(dict.fromkeys(queue_names))
        for name in wanted:
            if name not in queues:
                raise QueueMissing(name)
        queues = {name: queues[name] for name in wanted}
    before: dict[str, int] = {}
    began = 0.0
    if interval > 0 and queues:
        first = await gather(partial(_status, broker), queues.values())
        before, began = {each.name: each.delivered for each in first}, time.monotonic()
        await asyncio.sleep(interval)
    found = await gather(partial(_status, broker), queues.values())
    took = time.monotonic() - began
    delayed = await delayed_counts(broker)
    for each in found:
        each.delayed = delayed[each.name]
        if before:
            each.rate = max(0, each.delivered - before[each.name]) / took
    await gather(lambda each: _find_oldest(broker, each, queues[each.name]), found)
    return sorted(found, key=lambda each: each.name)


async def _status(broker: Broker, queue: Queue) -> QueueStatus:
    status = QueueStatus(queue.name, temporary=queue.inactive_after > 0)
    for level in _levels_of(broker, queue):
        stream = broker.names.stream(level)
        info = await broker.find(f"CONSUMER.INFO.{stream}.{queue_token(queue.name)}")
        if info is None:
            status.missing.append(level)
            continue
        status.levels[level] = int(info.get("num_pending", 0))
        status.ready += status.levels[level]
        status.in_flight += int(info.get("num_ack_pending", 0))
        status.redelivered += int(info.get("num_redelivered", 0))
        status.delivered += int(info["delivered"]["consumer_seq"])
        # A waiting worker has one pull at each level.
        status.consumers = max(status.consumers, int(info.get("num_waiting", 0)))
        if info.get("paused"):
            status.paused_until = _moment(info["config"]["pause_until"])
    return status


def _moment(text: str) -> float:
    seconds = text.partition(".")[0].removesuffix("Z")
    return datetime.fromisoformat(f"{seconds}+00:00").timestamp()


async def _find_oldest(broker: Broker, status: QueueStatus, queue: Queue) -> None:
    if not status.ready and not status.in_flight:
        return
    for level in _levels_of(broker, queue):
        stored = await broker.get(
            broker.names.stream(level),
            seq=1,
            next_by_subj=broker.names.subject(level, queue.name),
        )
        if stored is not None:
            age = max(0.0, time.time() - stored.stored_at)
            status.oldest_age = max(age, status.oldest_age or 0.0)


async def delayed_counts(broker: Broker) -> Counter[str]:
    """Return how many messages wait for their time, by queue."""
    counts: Counter[str] = Counter()
    for level in LEVELS:
        waiting = await broker.subjects(broker.names.stream(level), broker.names.delayed(level))
        for subject, count in waiting.items():
            counts[decode_token(subject.split(".")[3])] += count
    return counts


# -- changing --------------------------------------------------------------------------------------


async def pause(broker: Broker, queue_name: str, until: float = UNTIL_RESUMED) -> None:
    """Hand out no messages of a queue until a moment, in seconds since the epoch.

    What workers hold they finish; publishing goes on.  Raises `QueueMissing`, and `NotSupported`
    before nats-server 2.11.
    """
    await _check_exists(broker, queue_name)
    if broker.info.api_level < API_LEVEL_PAUSE:
        raise NotSupported(
            f"pausing a queue on nats-server {broker.version}",
            "stop the workers of the queue (celery control cancel_consumer), or use 2.11 or newer",
        )
    moment = datetime.fromtimestamp(until, timezone.utc)
    await _pause(broker, queue_name, {"pause_until": f"{moment:%Y-%m-%dT%H:%M:%S.%f}Z"})


async def resume(broker: Broker, queue_name: str) -> None:
    """End a pause; no error if there is none.  Raises `QueueMissing`."""
    await _check_exists(broker, queue_name)
    if broker.info.api_level >= API_LEVEL_PAUSE:
        await _pause(broker, queue_name, {})


async def _check_exists(broker: Broker, queue_name: str) -> None:
    if queue_name not in await registered_queues(broker):
        raise QueueMissing(queue_name)


async def _pause(broker: Broker, queue_name: str, body: dict[str, str]) -> None:
    for level in broker.levels:
        stream = broker.names.stream(level)
        # An auto-delete queue has one level; `find` makes nothing of the others.
        await broker.find(f"CONSUMER.PAUSE.{stream}.{queue_token(queue_name)}", body)


def purge(app: Any, queue_name: str) -> int:
    """Remove the ready messages of a queue and return their number.

    What workers hold, and what is delayed, stays.  Raises `QueueMissing`.
    """
    with app.connection_for_write() as connection:
        return int(connection.default_channel.queue_purge(queue_name))


def delete(app: Any, queue_name: str) -> int:
    """Delete a queue, its bindings and its messages; return how many were ready.

    Delayed messages go, too: their time would come in a queue that nobody reads.  Raises
    `QueueMissing`.
    """
    from .broker import run
    from .scheduled import Scheduled

    with app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_declare(queue_name, passive=True)
        removed = int(channel.queue_delete(queue_name))
    run(app, lambda broker: Scheduled(broker).cancel_queue(queue_name))
    return removed
