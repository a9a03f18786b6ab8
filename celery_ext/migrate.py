"""What ``celery jetstream migrate`` does: where messages wait, the mirror, draining the lists.

It works on the application's own connection, as `kombu_jetstream.migration` does; JetStream has to
be there, so a connection that fell back to Redis is an error here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from kombu_jetstream.errors import ApiError, ConnectionLost, OptionsError
from kombu_jetstream.fallback import DualSession
from kombu_jetstream.jetstream import STREAM_NOT_FOUND
from kombu_jetstream.migration import (
    Comparison,
    Drain,
    DrainReport,
    InDoubt,
    compare,
    drain_key,
    reset_mirror,
)
from kombu_jetstream.redis_lists import RedisLists

from .broker import options_of
from .fallback_health import open_lists, sizes_of

__all__ = ["Migration", "Status", "WaitingQueue", "open_migration", "status_without_jetstream"]


@dataclass(frozen=True, slots=True)
class WaitingQueue:
    """Where the messages of one queue are."""

    queue: str
    #: Messages in its Redis lists.
    redis: int
    #: Messages in JetStream that a worker may have now, and those workers hold; None while it is
    #: away.
    jetstream: int | None
    in_flight: int | None


@dataclass(frozen=True, slots=True)
class Status:
    """Where all messages of an application are."""

    phase: str
    queues: list[WaitingQueue]
    #: Messages our workers took from Redis and did not settle.
    held: int
    #: Messages plain ``redis://`` workers took and did not settle: running, or left by dead ones.
    unacked: int
    #: Messages on their way to JetStream, left by an interrupted drain.
    draining: int
    #: Copies in the mirror, None without one.
    mirrored: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def open_migration(app: Any) -> Iterator[Migration]:
    """Connect to both stores of an *app*.

    Raises `OptionsError` without ``fallback_url``, `ConnectionLost` if one of the two is away.
    """
    with app.connection_for_write() as connection:
        options, _ = connection.transport.settings()
        if options.fallback_url is None:
            raise OptionsError(
                "expected 'fallback_url' to be the URL of the Redis to migrate from", "fallback_url"
            )
        session = connection.ensure_connection(max_retries=1).connection
        if not isinstance(session, DualSession):
            raise ConnectionLost(f"JetStream is away ({session.fallback.cause})")
        session.fallback.lists.ping()
        yield Migration(app, session)


def status_without_jetstream(app: Any, queues: Iterable[str] | None = None) -> Status:
    """Return what is in Redis while JetStream is away: of *queues*, or of all that hold something.

    Raises `FallbackLost` without Redis.
    """
    options = options_of(app)
    if options.fallback_url is None:
        raise OptionsError("expected 'fallback_url' to be given", "fallback_url")
    with open_lists(options) as lists:
        return Status(
            phase=options.migration_phase,
            queues=[
                WaitingQueue(queue, size, None, None)
                for queue, size in sizes_of(app, lists, queues).items()
                if size or queues
            ],
            held=lists.held_by_all(),
            unacked=lists.count(lists.key("unacked")),
            draining=lists.count(drain_key(lists)),
            mirrored=None,
        )


class Migration:
    """The two stores of one application."""

    def __init__(self, app: Any, session: DualSession) -> None:
        self._app = app
        self._session = session
        self._lists: RedisLists = session.fallback.lists

    @property
    def queues(self) -> list[str]:
        """The queues either side knows: declared here, configured, or bound in Redis."""
        self._session.registry.load()
        known = {
            name for name, queue in self._session.registry.queues.items() if not queue.auto_delete
        }
        known.update(self._app.amqp.queues)
        known.update(self._lists.bound_queues())
        return sorted(known)

    def status(self, queues: Iterable[str] | None = None) -> Status:
        lists = self._lists
        return Status(
            phase=self._session.options.migration_phase,
            queues=[self._waiting(queue) for queue in (queues or self.queues)],
            held=lists.held_by_all(),
            unacked=lists.count(lists.key("unacked")),
            draining=lists.count(Drain(self._session, lists).way),
            mirrored=self._mirrored(),
        )

    def _waiting(self, queue: str) -> WaitingQueue:
        counts = self._session.jetstream.counts(queue)
        return WaitingQueue(
            queue,
            self._lists.size(queue),
            counts.ready if counts is not None else 0,
            counts.in_flight if counts is not None else 0,
        )

    def _mirrored(self) -> int | None:
        name = self._session.jetstream.names.mirror_stream
        try:
            return int(self._session.jetstream.request(f"STREAM.INFO.{name}")["state"]["messages"])
        except ApiError as exc:
            if exc.err_code == STREAM_NOT_FOUND:
                return None
            raise

    def compare(self) -> list[Comparison]:
        return compare(self._session, self._lists, time.time())

    def reset(self) -> None:
        """Begin the comparison anew."""
        reset_mirror(self._session, self._lists)

    def drain(
        self,
        queues: Iterable[str] | None,
        *,
        in_doubt: InDoubt,
        unacked: bool,
        progress: Callable[[int], None],
    ) -> DrainReport:
        self._lists.reclaim()
        drain = Drain(self._session, self._lists)
        return drain.run(
            queues or self.queues, in_doubt=in_doubt, unacked=unacked, progress=progress
        )
