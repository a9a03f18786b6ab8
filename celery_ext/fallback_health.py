"""The Redis that takes over while JetStream is away: whether it could now, and what it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kombu_jetstream.errors import FallbackLost
from kombu_jetstream.options import Options

if TYPE_CHECKING:
    from kombu_jetstream.redis_lists import RedisLists

__all__ = ["FallbackState", "Remark", "examine", "look", "open_lists", "sizes_of"]

#: Oldest Redis that works.
OLDEST_REDIS = (6, 2)


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing about the fallback."""

    severity: Literal["warning", "error"]
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class FallbackState:
    """What is in the fallback Redis at one moment."""

    #: Why nothing is known, None if Redis answered.
    problem: str | None = None
    #: Messages that wait, by queue; queues without any are left out.
    waiting: dict[str, int] = field(default_factory=dict)
    #: Messages our workers took and did not settle.
    held: int = 0
    #: Dead letters that wait for JetStream.
    letters: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def look(app: Any, options: Options) -> FallbackState | None:
    """Return what is in the fallback Redis, or None without one.

    It waits for Redis: at most a few seconds.  Does not need JetStream.
    """
    if options.fallback_url is None:
        return None
    with open_lists(options) as lists:
        try:
            sizes = sizes_of(app, lists)
            return FallbackState(
                waiting={queue: size for queue, size in sizes.items() if size},
                held=lists.held_by_all(),
                letters=lists.letters(),
            )
        except FallbackLost as exc:
            return FallbackState(problem=exc.reason)


def sizes_of(app: Any, lists: RedisLists, queues: Iterable[str] | None = None) -> dict[str, int]:
    """Return how many messages wait in each of *queues*, or of all the app and Redis know."""
    names = queues or sorted({*app.amqp.queues, *lists.bound_queues()})
    return {queue: lists.size(queue) for queue in names}


@contextmanager
def open_lists(options: Options) -> Iterator[RedisLists]:
    """Connect to the fallback Redis alone.  Its calls raise `FallbackLost` when it is away."""
    from kombu_jetstream.redis_lists import RedisLists

    lists = RedisLists(options)
    try:
        yield lists
    finally:
        lists.close()


def examine(options: Options) -> list[Remark]:
    """Return what is wrong with the fallback of *options*; nothing without one.

    It waits for Redis: at most a few seconds.
    """
    if options.fallback_url is None:
        return []
    try:
        with open_lists(options) as lists:
            found = lists.describe()
    except ModuleNotFoundError as exc:
        return [
            Remark(
                "error",
                f"fallback_url needs the package {exc.name!r}",
                "pip install 'kombu-jetstream[redis]'",
            )
        ]
    except FallbackLost as exc:
        return [Remark("error", str(exc), "start Redis, or correct fallback_url")]
    remarks = []
    if found.version is None:
        remarks.append(
            Remark(
                "warning",
                "the fallback Redis does not tell us whether it keeps and does not drop messages",
                "allow INFO to this user, or see to appendonly yes and maxmemory-policy noeviction",
            )
        )
        return remarks
    if tuple(int(part) for part in found.version.split(".")[:2] if part.isdigit()) < OLDEST_REDIS:
        remarks.append(
            Remark("error", f"the fallback is Redis {found.version}", "use 6.2 or newer, or Valkey")
        )
    if not found.persistent:
        remarks.append(
            Remark(
                "warning",
                "the fallback Redis has no append-only file: what it holds is gone when it crashes",
                "set appendonly yes",
            )
        )
    if found.evicts:
        remarks.append(
            Remark(
                "warning",
                "the fallback Redis may drop queues when its memory is full",
                "set maxmemory-policy noeviction",
            )
        )
    if not found.tracks:
        remarks.append(
            Remark(
                "warning",
                "workers look for messages in Redis once a second, as client tracking is refused",
                "allow CLIENT TRACKING to this user",
            )
        )
    if found.letters:
        remarks.append(
            Remark(
                "warning",
                f"{found.letters} dead letters of an outage wait in Redis",
                "the next worker or producer that connects takes them over",
            )
        )
    return remarks
