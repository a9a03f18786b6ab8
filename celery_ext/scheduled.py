"""What waits in the server for its time: tasks with an ``eta`` or ``countdown``.

Each waits on a subject of its own, ``<ns>.<level>.@delay.<queue>.<task id>.<message id>``, with its
due time in the header ``Nats-Schedule``; so a task is found, and cancelled, by its id.  Servers
before 2.12 have no schedules, their workers hold such tasks: ``celery inspect scheduled``.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

from kombu_jetstream.topology import LEVELS, Level, decode_token, encode_token

from .broker import Broker, Stored

__all__ = ["Scheduled", "ScheduledFilter", "ScheduledTask"]

#: Messages read at once; they come with their payloads.
PAGE = 500


@dataclass(frozen=True, slots=True)
class ScheduledTask:
    """A task that waits in the server."""

    task: str | None
    task_id: str
    queue: str
    level: Level
    #: Seconds since the epoch.
    due_at: float
    published_at: float

    def as_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "task_id": self.task_id,
            "queue": self.queue,
            "level": self.level,
            "due_at": self.due_at,
            "published_at": self.published_at,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledFilter:
    """Which tasks are meant; None is any."""

    queue: str | None = None
    #: Glob of the task name.
    task: str | None = None
    #: Seconds since the epoch: those due before.
    before: float | None = None

    def matches(self, waiting: ScheduledTask) -> bool:
        return (
            self.queue in (None, waiting.queue)
            and (self.task is None or fnmatchcase(waiting.task or "", self.task))
            and (self.before is None or waiting.due_at < self.before)
        )


class Scheduled:
    """The waiting tasks of one namespace."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    async def all(self, which: ScheduledFilter | None = None) -> AsyncIterator[ScheduledTask]:
        """Yield the tasks that match, in the order in which they were published to each level."""
        which = which if which is not None else ScheduledFilter()
        names = self.broker.names
        for level in LEVELS:
            subject = names.delayed(level, which.queue)
            async for page in self.broker.pages(names.stream(level), subject, PAGE):
                for stored in page:
                    waiting = _waiting(stored, level)
                    if waiting is not None and which.matches(waiting):
                        yield waiting

    async def next_due(
        self, which: ScheduledFilter | None = None, limit: int | None = None
    ) -> list[ScheduledTask]:
        """Return the tasks that match, at most *limit*, those due first at the front."""
        found = [waiting async for waiting in self.all(which)]
        if limit is None:
            return sorted(found, key=lambda waiting: waiting.due_at)
        return heapq.nsmallest(limit, found, key=lambda waiting: waiting.due_at)

    async def cancel(self, task_id: str) -> int:
        """Remove the waiting messages of a task and return their number.

        A task that came due meanwhile is in its queue or with a worker: ``celery control revoke``
        is for those.
        """
        return await self._purge(f"*.{encode_token(task_id)}.*")

    async def cancel_queue(self, queue: str) -> int:
        """Remove all that waits for a queue and return its number."""
        return await self._purge(f"{encode_token(queue)}.>")

    async def _purge(self, tokens: str) -> int:
        names = self.broker.names
        removed = 0
        for level in LEVELS:
            answer = await self.broker.find(
                f"STREAM.PURGE.{names.stream(level)}",
                {"filter": f"{names.namespace}.{level}.@delay.{tokens}"},
            )
            removed += int(answer["purged"]) if answer is not None else 0
        return removed


def _waiting(stored: Stored, level: Level) -> ScheduledTask | None:
    """Return the task in a message; None for what somebody else put there."""
    tokens = stored.subject.split(".")
    due_at = _due_at(stored.headers.get("Nats-Schedule", ""))
    if len(tokens) != 6 or due_at is None:
        return None
    return ScheduledTask(
        task=stored.headers.get("Celery-Task"),
        task_id=decode_token(tokens[4]),
        queue=decode_token(tokens[3]),
        level=level,
        due_at=due_at,
        published_at=stored.stored_at,
    )


def _due_at(schedule: str) -> float | None:
    """Return the moment of ``@at <RFC 3339>``, in seconds since the epoch."""
    if not schedule.startswith("@at "):
        return None
    try:
        return datetime.fromisoformat(schedule[4:].replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
