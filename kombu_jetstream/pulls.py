"""How many messages to ask of which queue and level, and in what order to hand them on.

*Theory of operation.*  A channel has a limit (its prefetch) and a set of sources, one per queue
and level.  ``credit = limit - held - asked``: what it may still ask for.  Each delivery says how
many messages its consumer has left, so a source is known to have a backlog without asking.

- No backlog anywhere: every source has a pull that *waits* on the server, so a new message
  arrives without a round trip.  Waiting pulls expire and are renewed every `PULL_EXPIRES` seconds.
- A backlog: the most urgent level that has one gets the credit, shared between its queues in turn,
  in pulls that take what is there (`no_wait`): a backlog that other workers took away ends them at
  once.  Empty sources of that and more urgent levels are probed once in `RECHECK` seconds; less
  urgent ones are not asked, but for the starvation guard.
- Little room: a pull for one message costs the server as much as a pull for several.  So while one
  is under way, or deliveries wait for their turn here, the credit grows to half of the limit before
  it is used; in the latter case for no longer than `PATIENCE`.
- No room: the waiting pulls are withdrawn, so that a worker busy with long tasks takes nothing
  away from one that is free.

*Exact accounting.*  The server hands a consumer's messages to its pulls in turn, and a delivery
does not say which pull it answers.  So a source has at most one pull in each *slot*, each slot has
a subscription of its own, and the subscription says it.  A slot is withdrawn as a whole by ending
its subscription: `WAIT_SLOT` when there is no room, the others, whose pulls end by themselves
within a round trip, only when the server leaves one unanswered.

*Bound.*  Held deliveries exceed the limit only when several sources deliver at the same moment, by
at most one for each source but one (an idle source waits with a batch of at least 1), or by
messages that crossed a withdrawal on the wire.

The less urgent levels are served at least once in ``guard`` deliveries.  Nothing here does I/O or
reads a clock: ``now`` comes in, commands go out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

__all__ = ["SLOTS", "WAIT_SLOT", "Cancel", "Pull", "Pulls", "Ready", "Source"]

#: Seconds a pull waits on the server.  A frozen worker attracts messages no longer than this.
PULL_EXPIRES = 30.0

#: Seconds between the server's signs of life on a waiting pull; two missed ones renew it.
IDLE_HEARTBEAT = 5.0

#: Seconds between looks at sources that were found empty, while another has a backlog.
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

#: Seconds in which a server that lives answers a pull for what is there.
ANSWER_TIME = 0.5

#: Seconds for which little room may wait for more room, while held deliveries wait for their turn.
PATIENCE = 0.005

#: The slot of waiting pulls.
WAIT_SLOT = 0

#: All slots.  Two for pulls of a backlog: the next one is under way before the last one is over.
SLOTS = 3


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
    retry_at: float = 0.0
    failures: int = 0
    #: outstanding pulls by slot
    pulls: list[_Outstanding | None] = field(default_factory=lambda: [None] * SLOTS)

    @property
    def backlog(self) -> int:
        """How many messages are left to ask for, as far as is known.

        None beyond a waiting pull: either that one gets them at once, or other workers got them.
        """
        return self.pending - self.asked if self.pulls[WAIT_SLOT] is None else 0

    def is_waiting(self, now: float) -> bool:
        """Tell whether the server has nothing for us, and said so a short while ago."""
        pull = self.pulls[WAIT_SLOT]
        return pull is not None and not self.pending and now - pull.seen < 2 * IDLE_HEARTBEAT


@dataclass(slots=True, eq=False)
class _Outstanding:
    """A pull the server has: how many messages are to come, and its last sign of life."""

    pull_id: int
    source: Source
    slot: int
    left: int
    seen: float


@dataclass(frozen=True, slots=True)
class Pull:
    """Ask *source* for *batch* messages; in `WAIT_SLOT` wait for them, else take what is there."""

    source: Source
    pull_id: int
    batch: int
    slot: int

    @property
    def wait(self) -> bool:
        return self.slot == WAIT_SLOT


@dataclass(frozen=True, slots=True)
class Cancel:
    """Withdraw every pull in *slot*."""

    slot: int


class Pulls:
    """The pull credit of one channel."""

    def __init__(self, *, guard: int, limit: int = 0) -> None:
        self.sources: list[Source] = []
        self.held = 0
        self.guard = guard
        #: a level is due when as many others were handed on; low goes first when both are
        self.low_due, self.medium_due = max(1, guard - 1), max(1, guard - 2)
        #: by level: deliveries of other levels handed on since its own last one
        self.since_served = [0, 0, 0]
        #: by level: deliveries that arrived and were not handed on yet
        self.buffered = [0, 0, 0]
        self.limit = UNLIMITED
        #: deliveries that may be worked on at the same time, if that is known
        self.at_work: int | None = None
        #: when `plan` is to be asked although there is little room, None if at any time
        self.asks_at: float | None = None
        self._asked = 0
        self._levels: list[list[Source]] = [[], [], []]
        #: by level: sources that have messages left, the next one to be served first
        self._hot: list[dict[Source, None]] = [{}, {}, {}]
        #: sources without a pull
        self._unasked: dict[Source, None] = {}
        self._outstanding: dict[int, _Outstanding] = {}
        #: how many of these wait
        self._waiting = 0
        #: slots whose pulls ask for too much, or may be lost
        self._recalled: set[int] = set()
        self._probed_at = float("-inf")
        #: the backlog got its turn after the last probes
        self._served = True
        #: by level: the starvation guard's next turn is a look around
        self._look_around = [False, False, False]
        #: by level: when the next one may be
        self._look_at = [float("-inf")] * 3
        self._next_id = 0
        self.set_limit(limit)

    def set_limit(self, limit: int) -> None:
        """Take a new prefetch count; 0 means unlimited, which is `UNLIMITED`."""
        before, self.limit = self.limit, limit if limit > 0 else UNLIMITED
        self._enough = max(1, min(self.limit, MAX_BATCH) // 2)
        if self.limit < before:
            self._recalled.add(WAIT_SLOT)

    def add(self, source: Source) -> None:
        self.sources.append(source)
        self._levels[source.level].append(source)
        self._unasked[source] = None

    def remove(self, source: Source) -> None:
        """Forget *source*; the caller withdraws the waiting pulls, and calls `forget`."""
        for pull in source.pulls:
            if pull is not None:
                self._end(pull)
        self.sources.remove(source)
        self._levels[source.level].remove(source)
        self._hot[source.level].pop(source, None)
        del self._unasked[source]

    def received(self, source: Source, pending: int, slot: int | None, now: float) -> None:
        """Count a delivery; *pending* is what its consumer has left after it.

        *slot* is None for one that crossed a withdrawal.
        """
        self.held += 1
        source.failures = 0
        if pending:
            source.pending = pending
            self._hot[source.level][source] = None
        else:
            self._found_empty(source, now)
        pull = source.pulls[slot] if slot is not None else None
        if pull is not None:
            pull.seen = now
            pull.left -= 1
            source.asked -= 1
            self._asked -= 1
            if not pull.left:
                self._end(pull)

    def settled(self, count: int = 1) -> None:
        """Count *count* deliveries as no longer held."""
        self.held -= count

    def reserve(self, count: int) -> None:
        """Count *count* messages as held that are asked of another store.

        `plan` withdraws the waiting pulls if there is no credit left for them.
        """
        self.held += count
        if self.held + self._asked > self.limit:
            self._recalled.add(WAIT_SLOT)

    def under_way(self, now: float) -> int:
        """Return how many messages may arrive at any moment.

        Those of pulls that wait on the server are not among them, nor those of pulls that were
        to be answered at once and were not: that server is frozen.
        """
        return sum(
            pull.left
            for pull in self._outstanding.values()
            if pull.slot != WAIT_SLOT and now - pull.seen < ANSWER_TIME
        )

    def has_backlog(self, now: float) -> bool:
        """Tell whether a source is known to have messages that were not asked for."""
        return self._backlogged_level(now) is not None

    def heard(self, pull_id: int, now: float) -> None:
        """Note a heartbeat."""
        pull = self._outstanding.get(pull_id)
        if pull is not None:
            pull.seen = now

    def ended(self, pull_id: int, now: float, *, failed: bool = False) -> Source | None:
        """Note that a pull is over: served in part, expired, found nothing, or *failed*.

        Returns its source, or None if the pull was withdrawn before.
        """
        pull = self._outstanding.get(pull_id)
        if pull is None:
            return None
        self._end(pull)
        source = pull.source
        if failed:
            delay = RETRY_DELAYS[min(source.failures, len(RETRY_DELAYS) - 1)]
            source.retry_at = now + delay
            source.failures += 1
        else:
            source.failures = 0
            self._found_empty(source, now)
            if not self._hot[source.level]:
                self.since_served[source.level] = 0
        return source

    def is_content(self, now: float) -> bool:
        """Tell, for little, that `plan` has nothing to say: it is cheaper to ask for more at once
        when there is more room, and a pull is under way, or work enough is here.

        Because of the latter not for longer than `PATIENCE`, until `asks_at`.
        """
        if self._recalled:
            return False
        if self.held >= self.limit:
            return not self._waiting
        if self.limit - self.held - self._asked >= self._enough:
            return False
        if len(self._outstanding) > self._waiting:
            return True
        if sum(self.buffered) < self._enough and not (
            self.at_work is not None and self.held > self.at_work
        ):
            return False
        if self.asks_at is None:
            self.asks_at = now + PATIENCE
        return now < self.asks_at

    def plan(self, now: float) -> list[Pull | Cancel]:
        """Return what to tell the server now."""
        self.asks_at = None
        if self.held >= self.limit:
            self._recalled.add(WAIT_SLOT)
        commands: list[Pull | Cancel] = []
        for slot in sorted(self._recalled):
            commands += self._cancel(now, slot)
        self._recalled.clear()
        if self.held >= self.limit:
            return commands
        level = self._backlogged_level(now)
        if level is None:
            return commands + self._wait_everywhere(now)
        return commands + self._serve(level, now)

    def renew_silent(self, now: float) -> None:
        """Have `plan` withdraw pulls that missed two heartbeats, and make new ones.

        The server may have them still, and two would add up.
        """
        for pull in self._outstanding.values():
            if now - pull.seen > 2 * IDLE_HEARTBEAT:
                self._recalled.add(pull.slot)

    def forget(self, now: float, slot: int = WAIT_SLOT) -> None:
        """Take every pull in *slot* for withdrawn."""
        for pull in list(self._outstanding.values()):
            if pull.slot == slot:
                source = pull.source
                if source.pending <= source.asked:
                    self._found_empty(source, now)
                self._end(pull)

    def _backlogged_level(self, now: float) -> int | None:
        for level, sources in enumerate(self._hot):
            for source in sources:
                if source.backlog > 0 and source.retry_at <= now:
                    return level
        return None

    def _wait_everywhere(self, now: float) -> list[Pull | Cancel]:
        """Have a pull wait for every source, each with its share of the credit."""
        sources = [source for source in self._unasked if source.retry_at <= now]
        if not sources:
            return []
        commands: list[Pull | Cancel] = []
        credit = self.limit - self.held - self._asked
        if credit < len(sources) and self._can_share_more():
            commands += self._cancel(now)
            sources = [source for source in self._unasked if source.retry_at <= now]
            credit = self.limit - self.held - self._asked
        share = max(1, credit // len(sources))
        commands += [self._pull(source, share, WAIT_SLOT, now) for source in sources]
        return commands

    def _can_share_more(self) -> bool:
        """Tell whether a waiting pull asks for more than the one message each source may."""
        return self._asked > len(self._outstanding) and any(
            pull.left > 1 for pull in self._outstanding.values() if pull.slot == WAIT_SLOT
        )

    def _serve(self, level: int, now: float) -> list[Pull | Cancel]:
        """Give the credit to the backlog of *level*, after what else is due."""
        commands: list[Pull | Cancel] = []
        credit = self.limit - self.held - self._asked
        if credit < self._enough and len(self._outstanding) > self._waiting:
            return commands  # one is under way, and more at once costs less
        # As many as there is credit for, however many queues there are.
        backlogged = (s for s in self._hot[level] if s.backlog > 0 and s.retry_at <= now)
        sources = list(islice(backlogged, max(1, credit + 1)))
        if credit < self._enough and credit < sum(source.backlog for source in sources):
            commands += self._cancel(now)
            credit = self.limit - self.held - self._asked

        for source in self._due_below(level, now):
            batch = min(credit, max(1, credit // self.guard))
            credit -= self._take(commands, source, batch, now)
        for source in self._due_above(level, credit, now):
            credit -= self._take(commands, source, 1, now)
        if credit > 0:
            self._served = True
        share = max(self._enough, credit // len(sources))
        for source in sources:
            credit -= self._take(commands, source, min(share, source.backlog, credit), now)
        return commands

    def _take(self, commands: list[Pull | Cancel], source: Source, batch: int, now: float) -> int:
        """Pull what is there, if there is credit and a free slot; return how much was asked."""
        if batch <= 0:
            return 0
        for slot in range(WAIT_SLOT + 1, SLOTS):
            if source.pulls[slot] is None:
                pull = self._pull(source, batch, slot, now)
                commands.append(pull)
                self._rotate(source)
                return pull.batch
        return 0

    def _due_below(self, level: int, now: float) -> list[Source]:
        """Return a source of each less urgent level that the starvation guard must serve now.

        Asked so early that the message is there when its turn comes: all that the limit allows
        may be handed on meanwhile.  A source known to have messages and a look at the others take
        turns; there is one such look in `RECHECK`, as each costs the server what a pull does.
        """
        due = []
        for lower in range(level + 1, len(self._levels)):
            hot = self._hot[lower]
            if self.since_served[lower] + self.limit < self.guard or self.buffered[lower]:
                continue
            if any(source.asked for source in hot):
                continue  # on its way
            known = next((source for source in hot if source.retry_at <= now), None)
            source = known
            if (known is None or self._look_around[lower]) and now >= self._look_at[lower]:
                source = min(
                    self._unseen(lower, now), key=lambda source: source.checked, default=known
                )
            if source is not known:
                self._look_at[lower] = now + RECHECK
            self._look_around[lower] = source is known
            if source is not None:
                due.append(source)
        return due

    def _due_above(self, level: int, credit: int, now: float) -> list[Source]:
        """Return sources as urgent as *level* or more that may have got messages meanwhile.

        They get half of the credit, or with a credit of 1 every second turn, and once in
        `RECHECK` at most: any number of idle sources leaves room for the backlog.
        """
        if now - self._probed_at < RECHECK or not self._served or credit <= 0:
            return []
        due = [source for above in range(level + 1) for source in self._unseen(above, now)]
        if not due:
            return due
        self._probed_at = now
        self._served = False
        due.sort(key=lambda source: source.checked)
        return due[: min(MAX_PROBES, max(1, credit // 2))]

    def _unseen(self, level: int, now: float) -> list[Source]:
        """Return the sources of *level* without a pull that were empty a while ago."""
        hot = self._hot[level]
        return [
            source
            for source in self._levels[level]
            if not source.asked
            and source not in hot
            and now - source.checked >= RECHECK
            and source.retry_at <= now
        ]

    def _rotate(self, source: Source) -> None:
        """Put *source* behind its peers, so that queues take turns."""
        hot = self._hot[source.level]
        if source in hot:
            del hot[source]
            hot[source] = None

    def _found_empty(self, source: Source, now: float) -> None:
        source.pending = 0
        source.checked = now
        self._hot[source.level].pop(source, None)

    def _pull(self, source: Source, batch: int, slot: int, now: float) -> Pull:
        batch = min(batch, MAX_BATCH)
        self._next_id += 1
        outstanding = _Outstanding(self._next_id, source, slot, batch, now)
        self._outstanding[self._next_id] = source.pulls[slot] = outstanding
        self._waiting += slot == WAIT_SLOT
        self._unasked.pop(source, None)
        source.asked += batch
        self._asked += batch
        return Pull(source, self._next_id, batch, slot)

    def _end(self, pull: _Outstanding) -> None:
        """Take back what a pull asked for and did not get."""
        source = pull.source
        del self._outstanding[pull.pull_id]
        source.pulls[pull.slot] = None
        self._waiting -= pull.slot == WAIT_SLOT
        source.asked -= pull.left
        self._asked -= pull.left
        if not source.asked:
            self._unasked[source] = None

    def _cancel(self, now: float, slot: int = WAIT_SLOT) -> list[Pull | Cancel]:
        if slot == WAIT_SLOT and not self._waiting:
            return []
        self.forget(now, slot)
        return [Cancel(slot)]


T = TypeVar("T")


class Ready(Generic[T]):
    """Deliveries that arrived and were not handed on yet, the most urgent level first.

    The starvation guard holds here, too.  `Pulls` is told what is buffered and what was served.
    """

    def __init__(self, pulls: Pulls) -> None:
        self._levels: tuple[deque[T], ...] = (deque(), deque(), deque())
        self._pulls = pulls
        #: how many there are
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[T]:
        for items in self._levels:
            yield from items

    def push(self, item: T, level: int) -> None:
        self._levels[level].append(item)
        self._pulls.buffered[level] += 1
        self.count += 1

    def pop(self) -> T:
        """Return the next item.  Raises IndexError when there is none."""
        pulls = self._pulls
        since = pulls.since_served
        high, medium, low = self._levels
        if low and (since[2] >= pulls.low_due or not (high or medium)):
            chosen = 2
        elif medium and (since[1] >= pulls.medium_due or not high):
            chosen = 1
        elif high:
            chosen = 0
        else:
            raise IndexError("nothing is ready")
        since[1] += 1
        since[2] += 1
        since[chosen] = 0
        pulls.buffered[chosen] -= 1
        self.count -= 1
        return self._levels[chosen].popleft()

    def take(self, predicate: Callable[[T], bool]) -> list[T]:
        """Remove and return the items *predicate* is true of."""
        taken: list[T] = []
        for level, items in enumerate(self._levels):
            matching = [item for item in items if predicate(item)]
            if matching:
                rest = [item for item in items if not predicate(item)]
                items.clear()
                items.extend(rest)
                self._pulls.buffered[level] -= len(matching)
                self.count -= len(matching)
                taken += matching
        return taken
