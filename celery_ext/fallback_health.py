"""Whether the Redis that takes over while JetStream is away could do so now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kombu_jetstream.errors import FallbackLost
from kombu_jetstream.options import Options

__all__ = ["Remark", "examine"]

#: Oldest Redis that works.
OLDEST_REDIS = (6, 2)


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing about the fallback."""

    severity: Literal["warning", "error"]
    message: str
    remedy: str


def examine(options: Options) -> list[Remark]:
    """Return what is wrong with the fallback of *options*; nothing without one.

    It waits for Redis: at most a few seconds.
    """
    if options.fallback_url is None:
        return []
    try:
        from kombu_jetstream.redis_lists import RedisLists
    except ModuleNotFoundError as exc:
        return [
            Remark(
                "error",
                f"fallback_url needs the package {exc.name!r}",
                "pip install 'kombu-jetstream[redis]'",
            )
        ]
    lists = RedisLists(options)
    try:
        found = lists.describe()
    except FallbackLost as exc:
        return [Remark("error", str(exc), "start Redis, or correct fallback_url")]
    finally:
        lists.close()
    remarks = []
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
