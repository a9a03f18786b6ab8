"""How many messages to ask of which queue and level, and in what order to hand them on.

*Theory of operation.*  A channel has a limit (its prefetch) and a set of sources, one per queue
and level.  ``credit = limit - held - asked``: what it may still ask for.  Each delivery says how
many messages its consumer has left, so a source is known to be *backlogged* or not without asking.

- No backlog anywhere: every source has a pull that waits on the server (`Pull.wait`), so a new
  message arrives without a round trip.  Pulls expire and are renewed every `PULL_EXPIRES` seconds.
- A backlog: the most urgent backlogged level gets the credit, shared between its queues in turn.
  Sources of the same or a more urgent level that have no pull are probed (`no_wait`, at most once
  in `RECHECK` seconds); less urgent ones are not asked, but for the starvation guard.
- No room: pulls that still wait on the server are cancelled, so that a worker busy with long
  tasks takes nothing away from one that is free.

*Bound.*  Held deliveries exceed the limit only while the sources outnumber the limit (each idle
source waits with a batch of at least 1), or by messages that crossed a cancel on the wire.

The less urgent levels are served at least once in ``guard`` deliveries.  Nothing here does I/O or
reads a clock: ``now`` comes in, commands go out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

__all__ = ["Cancel", "Pull", "Pulls", "Ready", "Source"]

#: Seconds a pull waits on the server.  A frozen worker attracts messages no longer than this.
PULL_EXPIRES = 30.0

#: Seconds between the server's signs of life on a waiting pull; two missed ones renew it.
IDLE_HEARTBEAT = 5.0

#: Seconds for which a level found empty is taken for empty while another has a backlog.
RECHECK = 0.01

#: Probes sent in one go, so that hundreds of idle queues do not slow a busy one.
MAX_PROBES = 8

#: Messages asked for in one pull, whatever the prefetch: bounds what arrives in one burst.
MAX_BATCH = 256

#: What a channel without a prefetch limit may hold.
UNLIMITED = 10_000

#: Seconds before a source whose pull failed (no leader, no responders) is asked again, doubled
#: each time up to the last.
RETRY_DELAYS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)


@dataclass(slots=True, eq=False)
class Source:
    """One queue and level as the server knows it; *token* is the caller's, level 0 the most
    urgent."""

    level: int
    token: Any = None
    #: messages asked for and not yet delivered
    asked: int = 0
    #: messages the server had left at its last word
    pending: int = 0
    #: when the source was last seen empty
    checked: float = float("-inf")
    #: last sign of life of a waiting pull
    seen: float = 0.0
    retry_at: float = 0.0
    failures: int = 0
    pulls: deque[list[int]] = field(default_factory=deque)

    @property
    def backlog(self) -> int:
        return self.pending - self.asked


@dataclass(frozen=True, slots=True)
class Pull:
    """Ask *source* for *batch* messages; *wait* on the server for them, or take what is there."""

    source: Source
    pull_id: int
    batch: int
    wait: bool


@dataclass(frozen=True, slots=True)
class Cancel:
    """Withdraw every pull; their sources are empty."""


class Pulls:
    """The pull credit of one channel."""

    def __init__(self, *, guard: int, limit: int = 0) -> None:
        self.sources: list[Source] = []
        self.held = 0
        self.since_served = [0, 0, 0]
        self._guard = guard
        self._asked = 0
        self._levels: list[list[Source]] = [[], [], []]
        self._next_id = 0
        self.set_limit(limit)

    def set_limit(self, limit: int) -> None:
        """Take a new prefetch count; 0 means unlimited, which is `UNLIMITED`."""
        self.limit = limit if limit > 0 else UNLIMITED
        self._enough = max(1, min(self.limit, MAX_BATCH) // 2)

    def add(self, source: Source) -> None:
        self.sources.append(source)
        self._levels[source.level].append(source)

    def remove(self, source: Source) -> None:
        self._drop_pulls(source)
        self.sources.remove(source)
        self._levels[source.level].remove(source)

    def received(self, source: Source, pending: int) -> None:
        """Count a delivery; *pending* is what its consumer has left after it."""
        self.held += 1
        source.pending = pending
        source.failures = 0
        if source.asked:
            source.asked -= 1
            self._asked -= 1
            pulls = source.pulls
            head = pulls[0]
            head[1] -= 1
            if not head[1]:
                pulls.popleft()

    def settled(self, count: int = 1) -> None:
        """Count *count* deliveries as no longer held."""
        self.held -= count

    def heard(self, source: Source, now: float) -> None:
        """Note a heartbeat."""
        source.seen = now

    def ended(self, source: Source, pull_id: int, now: float, *, failed: bool = False) -> None:
        """Note that a pull is over: served in part, expired, found nothing, or *failed*."""
        known = any(pull[0] == pull_id for pull in source.pulls)
        while known and source.pulls:  # the server serves pulls in order, so earlier ones are over
            ended_id, left = source.pulls.popleft()
            source.asked -= left
            self._asked -= left
            if ended_id == pull_id:
                break
        if failed:
            delay = RETRY_DELAYS[min(source.failures, len(RETRY_DELAYS) - 1)]
            source.retry_at = now + delay
            source.failures += 1
        else:
            source.failures = 0
            source.pending = 0
            source.checked = now
            if not any(peer.pending for peer in self._levels[source.level]):
                self.since_served[source.level] = 0

    def next_wake(self) -> float | None:
        """Return when `plan` has something to do even if nothing happens, or None."""
        times = [
            source.seen + 2 * IDLE_HEARTBEAT if source.asked else source.retry_at
            for source in self.sources
        ]
        return min(times) if times else None

    def plan(self, now: float) -> list[Pull | Cancel]:
        """Return what to tell the server now."""
        if self.held >= self.limit:
            return self._cancel(now) if self._asked else []
        level = self._backlogged_level()
        if level is None:
            return self._wait_everywhere(now)
        return self._serve(level, now)

    def renew_silent(self, now: float) -> None:
        """Forget pulls that missed two heartbeats, so that `plan` makes new ones."""
        for source in self.sources:
            if source.asked and now - source.seen > 2 * IDLE_HEARTBEAT:
                self._drop_pulls(source)

    def _backlogged_level(self) -> int | None:
        for level, sources in enumerate(self._levels):
            for source in sources:
                if source.pending > source.asked:
                    return level
        return None

    def _wait_everywhere(self, now: float) -> list[Pull | Cancel]:
        commands: list[Pull | Cancel] = []
        share = 0
        for source in self.sources:
            if source.asked or source.retry_at > now:
                continue
            if not share:
                credit = self.limit - self.held - self._asked
                share = max(1, credit // len(self.sources))
            commands.append(self._pull(source, share, now, wait=True))
        return commands

    def _serve(self, level: int, now: float) -> list[Pull | Cancel]:
        sources = [source for source in self._levels[level] if source.pending > source.asked]
        asked = sum(source.asked for source in sources)
        credit = self.limit - self.held - self._asked
        commands: list[Pull | Cancel] = []
        if credit < self._enough:
            if asked:
                return commands
            if credit < sum(source.backlog for source in sources) and self._waits_elsewhere():
                commands += self._cancel(now)
                credit = self.limit - self.held
        if credit <= 0:
            return commands

        for probe in self._due_below(level, credit, now) + self._due_above(level, now):
            if credit <= 0:
                return commands
            batch = min(credit, max(1, credit // self._guard)) if probe.level > level else 1
            commands.append(self._pull(probe, batch, now, wait=False))
            credit -= batch
        share = max(1, credit // len(sources))
        for source in sources:
            if credit <= 0:
                break
            batch = min(share, source.backlog, credit)
            commands.append(self._pull(source, batch, now, wait=True))
            credit -= batch
            self._rotate(source)
        return commands

    def _waits_elsewhere(self) -> bool:
        """Tell whether an empty source holds credit in a waiting pull."""
        return any(source.asked and source.pending <= source.asked for source in self.sources)

    def _due_below(self, level: int, credit: int, now: float) -> list[Source]:
        """Return a source of each less urgent level that the starvation guard must serve now."""
        due = []
        for lower in range(level + 1, len(self._levels)):
            sources = self._levels[lower]
            if not sources or self.since_served[lower] + credit < self._guard:
                continue
            source = max(sources, key=lambda source: (source.pending, -source.checked))
            if not source.asked and now - source.checked >= RECHECK and source.retry_at <= now:
                due.append(source)
        return due

    def _due_above(self, level: int, now: float) -> list[Source]:
        """Return sources as urgent as *level* or more that have no pull and may have messages."""
        due: list[Source] = []
        for sources in self._levels[: level + 1]:
            for source in sources:
                if (
                    not source.asked
                    and not source.pending
                    and now - source.checked >= RECHECK
                    and source.retry_at <= now
                ):
                    due.append(source)
        if len(due) > MAX_PROBES:
            due = sorted(due, key=lambda source: source.checked)[:MAX_PROBES]
        return due

    def _rotate(self, source: Source) -> None:
        """Put *source* behind its peers, so that queues take turns."""
        peers = self._levels[source.level]
        if len(peers) > 1:
            peers.remove(source)
            peers.append(source)

    def _pull(self, source: Source, batch: int, now: float, *, wait: bool) -> Pull:
        batch = min(batch, MAX_BATCH)
        self._next_id += 1
        source.asked += batch
        self._asked += batch
        source.pulls.append([self._next_id, batch])
        source.seen = now
        return Pull(source, self._next_id, batch, wait)

    def forget(self, now: float) -> None:
        """Take every pull for withdrawn."""
        for source in self.sources:
            if source.asked:
                if source.pending <= source.asked:
                    source.pending = 0
                    source.checked = now
                self._drop_pulls(source)

    def _cancel(self, now: float) -> list[Pull | Cancel]:
        self.forget(now)
        return [Cancel()]

    def _drop_pulls(self, source: Source) -> None:
        self._asked -= source.asked
        source.asked = 0
        source.pulls.clear()


T = TypeVar("T")


class Ready(Generic[T]):
    """Deliveries that arrived and were not handed on yet, the most urgent level first.

    The starvation guard holds here, too: *since_served* (shared with `Pulls`) counts, per level,
    the deliveries of more urgent levels handed on since its own last one.
    """

    def __init__(self, pulls: Pulls) -> None:
        self._levels: tuple[deque[T], ...] = (deque(), deque(), deque())
        self._pulls = pulls

    def __len__(self) -> int:
        high, medium, low = self._levels
        return len(high) + len(medium) + len(low)

    def push(self, item: T, level: int) -> None:
        self._levels[level].append(item)

    def pop(self) -> T:
        """Return the next item.  Raises IndexError when there is none."""
        since, guard = self._pulls.since_served, self._pulls._guard
        chosen = -1
        for level, items in enumerate(self._levels):
            if items and (chosen < 0 or since[level] >= guard - 1):
                chosen = level
        if chosen < 0:
            raise IndexError("nothing is ready")
        since[chosen] = 0
        for lower in range(chosen + 1, 3):
            since[lower] += 1
        return self._levels[chosen].popleft()

    def take(self, predicate: Any) -> list[T]:
        """Remove and return the items *predicate* is true of."""
        taken: list[T] = []
        for items in self._levels:
            matching = [item for item in items if predicate(item)]
            if matching:
                rest = [item for item in items if not predicate(item)]
                items.clear()
                items.extend(rest)
                taken += matching
        return taken

    def __iter__(self) -> Iterable[T]:  # type: ignore[override]
        for items in self._levels:
            yield from items
