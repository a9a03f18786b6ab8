"""The pull credit, against a model of nats-server's pull consumers.

`Server` does what ``server/consumer.go`` does with requests of one consumer: messages go to the
waiting requests in turn, a ``no_wait`` request ends with 404 when there is nothing or nothing
more, and with 408 when others already wait for more than there is.  `Wire` keeps both directions
apart, so that a test decides what crosses what.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kombu_jetstream.pulls import (
    IDLE_HEARTBEAT,
    MAX_BATCH,
    PATIENCE,
    PULL_EXPIRES,
    RECHECK,
    RETRY_DELAYS,
    UNLIMITED,
    WAIT_SLOT,
    Cancel,
    Pull,
    Pulls,
    Ready,
    Source,
)

HIGH, MEDIUM, LOW = 0, 1, 2


@dataclass
class Request:
    """A pull as the server has it; one of another worker has no id."""

    pull_id: int | None
    left: int
    waits: bool
    slot: int = WAIT_SLOT
    generation: int = 0
    expires: float = float("inf")
    heartbeat: float = float("inf")


@dataclass
class Queue:
    pending: int = 0
    requests: deque[Request] = field(default_factory=deque)


@dataclass(frozen=True)
class Delivered:
    source: Source
    pending: int
    slot: int
    generation: int


@dataclass(frozen=True)
class Status:
    pull_id: int
    code: int


class Server:
    """Pull consumers, one for each source; what it sends goes to *events*."""

    def __init__(self) -> None:
        self.queues: dict[Source, Queue] = {}
        self.events: deque[Delivered | Status] = deque()
        #: how often each slot was withdrawn
        self.generations = Counter[int]()
        self.now = 0.0
        self.leader = True

    def __getitem__(self, source: Source) -> Queue:
        return self.queues.setdefault(source, Queue())

    def take(self, command: Pull | Cancel) -> None:
        if isinstance(command, Cancel):
            self.generations[command.slot] += 1
            for queue in self.queues.values():
                queue.requests = deque(
                    r for r in queue.requests if r.pull_id is None or r.slot != command.slot
                )
            return
        queue = self[command.source]
        if not self.leader:
            self.events.append(Status(command.pull_id, 503))
            return
        waits = command.slot == WAIT_SLOT
        if not waits and not queue.pending:
            self.events.append(Status(command.pull_id, 404))
            return
        if not waits and queue.pending < sum(r.left for r in queue.requests):
            self.events.append(Status(command.pull_id, 408))
            return
        queue.requests.append(
            Request(
                command.pull_id,
                command.batch,
                waits,
                command.slot,
                self.generations[command.slot],
                self.now + PULL_EXPIRES if waits else float("inf"),
                self.now + IDLE_HEARTBEAT if waits else float("inf"),
            )
        )
        self.serve(command.source)

    def publish(self, source: Source, count: int = 1) -> None:
        self[source].pending += count
        self.serve(source)

    def serve(self, source: Source) -> None:
        queue = self[source]
        while queue.pending and queue.requests:
            queue.pending -= 1
            request = queue.requests.popleft()
            request.left -= 1
            request.heartbeat = self.now + IDLE_HEARTBEAT
            if request.left:
                queue.requests.append(request)
            if request.pull_id is not None:
                self.events.append(
                    Delivered(source, queue.pending, request.slot, request.generation)
                )
        if not queue.pending:
            for request in [r for r in queue.requests if not r.waits]:
                queue.requests.remove(request)
                if request.pull_id is not None:
                    self.events.append(Status(request.pull_id, 404))

    def steal(self, source: Source, count: int) -> None:
        """Another worker takes messages."""
        queue = self[source]
        queue.pending -= min(count, queue.pending)
        self.serve(source)

    def compete(self, source: Source, count: int) -> None:
        """Another worker waits for *count* messages."""
        self[source].requests.append(Request(None, count, waits=True))
        self.serve(source)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for queue in self.queues.values():
            for request in list(queue.requests):
                if request.expires <= self.now and request.pull_id is not None:
                    queue.requests.remove(request)
                    self.events.append(Status(request.pull_id, 408))
                elif request.heartbeat <= self.now and request.pull_id is not None:
                    request.heartbeat = self.now + IDLE_HEARTBEAT
                    self.events.append(Status(request.pull_id, 100))

    def ours(self, source: Source) -> dict[int, int]:
        """What is left of each pull of ours."""
        return {r.pull_id: r.left for r in self[source].requests if r.pull_id is not None}


class Worker:
    """A channel: the code under test, a buffer and what it holds."""

    def __init__(self, limit: int, guard: int = 20) -> None:
        self.pulls = Pulls(guard=guard, limit=limit)
        self.ready: Ready[Source] = Ready(self.pulls)
        self.server = Server()
        #: commands on their way to the server
        self.commands: deque[Pull | Cancel] = deque()
        #: sources in the order in which their deliveries were handed on
        self.handed: list[Source] = []
        self.generations = Counter[int]()
        #: deliveries that crossed a withdrawal, and so were not counted as asked for
        self.crossed = 0
        self.asked_for = Counter[str]()

    @property
    def now(self) -> float:
        return self.server.now

    def add(self, *levels: int) -> list[Source]:
        """Consume a queue on these levels; returns its sources."""
        sources = [Source(level) for level in levels]
        for source in sources:
            self.pulls.add(source)
        self.plan()
        return sources

    def remove(self, source: Source) -> None:
        """Stop consuming, as `Channel._stop_pulling` does it."""
        self.pulls.remove(source)
        self.commands.append(Cancel(WAIT_SLOT))
        self.generations[WAIT_SLOT] += 1
        self.pulls.forget(self.now)
        back = self.ready.take(lambda item: item is source)
        self.pulls.settled(len(back))
        self.plan()

    def plan(self) -> list[Pull | Cancel]:
        commands = self.pulls.plan(self.now)
        for command in commands:
            if isinstance(command, Cancel):
                self.generations[command.slot] += 1
                self.asked_for["cancel"] += 1
            else:
                self.asked_for["wait" if command.wait else "take"] += 1
                assert 0 < command.batch <= MAX_BATCH
        self.commands.extend(commands)
        return commands

    def send(self, count: int = 10**9) -> None:
        """Let the server get *count* commands."""
        while self.commands and count:
            self.server.take(self.commands.popleft())
            count -= 1

    def read(self, count: int = 10**9) -> None:
        """Get *count* events of the server in one read, and plan as a channel does after it."""
        events = self.server.events
        taken = [events.popleft() for _ in range(min(count, len(events)))]
        for event in taken:
            if isinstance(event, Status):
                self._read_status(event)
            elif event.source not in self.pulls.sources:
                self.server[event.source].pending += 1  # handed back
            else:
                crossed = event.generation != self.generations[event.slot]
                self.crossed += crossed
                slot = None if crossed else event.slot
                self.pulls.received(event.source, event.pending, slot, self.now)
                self.ready.push(event.source, event.source.level)
        if taken:
            self.plan()

    def _read_status(self, status: Status) -> None:
        if status.code == 100:
            self.pulls.heard(status.pull_id, self.now)
        else:
            self.pulls.ended(status.pull_id, self.now, failed=status.code == 503)

    def exchange(self, at_most: int = 10_000) -> int:
        """Let everything under way arrive, and what it leads to; return how many round trips."""
        for trips in range(at_most):
            if not self.commands and not self.server.events:
                return trips
            self.send()
            self.read()
        raise AssertionError(f"still busy after {at_most} round trips")

    def work(self, count: int = 1) -> list[Source]:
        """Handle *count* deliveries, one at a time, each with the round trips it leads to."""
        done = []
        for _ in range(count):
            source = self.ready.pop()
            self.handed.append(source)
            done.append(source)
            self.pulls.settled()
            self.plan()
            self.exchange()
        return done

    def advance(self, seconds: float) -> None:
        self.server.advance(seconds)
        self.pulls.renew_silent(self.now)
        self.plan()

    # What must hold

    def check_sums(self) -> None:
        pulls = self.pulls
        for source in pulls.sources:
            lefts = [pull.left for pull in source.pulls if pull is not None]
            assert all(left > 0 for left in lefts)
            assert source.asked == sum(lefts)
        assert pulls._asked == sum(source.asked for source in pulls.sources)
        assert pulls.buffered == [
            sum(item.level == level for item in self.ready) for level in (HIGH, MEDIUM, LOW)
        ]
        assert pulls.held >= len(self.ready)

    def check_still(self) -> None:
        """Nothing is under way: both sides agree, and nothing waits without need."""
        pulls, server = self.pulls, self.server
        for source in pulls.sources:
            known = {p.pull_id: p.left for p in source.pulls if p is not None}
            assert known == server.ours(source)
            assert all(r.waits for r in server[source].requests)
        if pulls.held >= pulls.limit:
            assert not any(server.ours(source) for source in pulls.sources)
            return
        for source in pulls.sources:
            if source.retry_at <= self.now:
                assert server.ours(source), "an idle source has no pull that waits"
                assert not server[source].pending, "there is room, and a message waits"


def worker(limit: int, *levels: int, guard: int = 20) -> tuple[Worker, list[Source]]:
    made = Worker(limit, guard)
    sources = made.add(*levels)
    made.exchange()
    return made, sources


# Any sequence of events

Step = tuple[str, int, int]


def steps(max_size: int = 60) -> st.SearchStrategy[list[Step]]:
    """What happens, with a source by its index and a number."""
    index = st.integers(0, 5)
    return st.lists(
        st.one_of(
            st.tuples(st.just("publish"), index, st.integers(1, 40)),
            st.tuples(st.sampled_from(["send", "read", "settle"]), index, st.integers(1, 6)),
            st.tuples(st.sampled_from(["steal", "compete"]), index, st.integers(1, 30)),
            st.tuples(st.sampled_from(["send_all", "read_all"]), index, st.just(0)),
            st.tuples(st.just("limit"), index, st.sampled_from([0, 1, 2, 4, 8, 50])),
            st.tuples(st.just("add"), st.integers(0, 2), st.just(0)),
            st.tuples(st.sampled_from(["remove", "restart"]), index, st.just(0)),
            st.tuples(st.just("advance"), index, st.sampled_from([0, 1, 2, 4])),
        ),
        max_size=max_size,
    )


#: Seconds for the step "advance": within and after a recheck, a heartbeat, an expiry.
PAUSES = (RECHECK / 2, RECHECK * 2, IDLE_HEARTBEAT, 2.5 * IDLE_HEARTBEAT, PULL_EXPIRES)


def take_step(w: Worker, step: Step) -> None:
    name, index, number = step
    sources = w.pulls.sources
    source = sources[index % len(sources)] if sources else None
    if name == "publish" and source:
        w.server.publish(source, number)
    elif name == "steal" and source:
        w.server.steal(source, number)
    elif name == "compete" and source:
        w.server.compete(source, number)
    elif name == "send":
        w.send(number)
    elif name == "read":
        w.read(number)
    elif name == "send_all":
        w.send()
    elif name == "read_all":
        w.read()
    elif name == "settle":
        for _ in range(min(number, len(w.ready))):
            w.handed.append(w.ready.pop())
            w.pulls.settled()
        w.plan()
    elif name == "limit":
        w.pulls.set_limit(number)
        w.plan()
    elif name == "add":
        w.add(index)
    elif name == "remove" and source:
        w.remove(source)
    elif name == "restart":
        w.server.leader = not w.server.leader
    elif name == "advance":
        w.advance(PAUSES[number])


def come_to_rest(w: Worker) -> None:
    w.server.leader = True
    w.exchange()
    w.advance(max(RETRY_DELAYS))
    w.exchange()


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([1, 2, 8, 50, 0]), st.lists(st.integers(0, 2), max_size=6), steps())
def test_any_sequence_leaves_both_sides_agreed_and_loses_no_credit(limit, levels, happenings):
    w, _ = worker(limit, *levels)

    for step in happenings:
        take_step(w, step)
        w.check_sums()

    come_to_rest(w)
    w.check_sums()
    w.check_still()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([1, 2, 8, 50]), st.lists(st.integers(0, 2), min_size=1, max_size=6), steps())
def test_everything_is_delivered_when_the_worker_works(limit, levels, happenings):
    w, _ = worker(limit, *levels)
    for step in happenings:
        if step[0] != "remove":
            take_step(w, step)

    come_to_rest(w)
    while w.ready:
        w.work()

    w.check_still()
    assert not any(w.server[source].pending for source in w.pulls.sources)
    assert w.pulls.held == 0


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([1, 2, 8, 50]),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    steps().map(lambda all: [s for s in all if s[0] not in ("limit", "add", "remove")]),
)
def test_held_deliveries_exceed_the_limit_by_less_than_the_sources(limit, levels, happenings):
    w, sources = worker(limit, *levels)

    for step in happenings:
        take_step(w, step)

        held = w.pulls.held - w.crossed
        assert held <= limit + len(sources) - 1
        if w.pulls.held < limit:
            assert held + w.pulls._asked <= limit + len(sources) - 1


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.integers(0, 100))
def test_one_busy_queue_fills_the_limit_exactly(limit, count):
    w, (_high, medium, _low) = worker(limit, HIGH, MEDIUM, LOW)

    w.server.publish(medium, count)
    w.exchange()

    assert w.pulls.held == min(limit, count)


# Rules, one by one


def test_an_idle_worker_waits_on_every_source_and_is_silent():
    w, sources = worker(8, HIGH, MEDIUM, LOW, HIGH, MEDIUM, LOW)

    for _ in range(int(10 / 0.5)):
        w.advance(0.5)
        w.exchange()

    assert w.asked_for == {"wait": len(sources)}
    assert all(len(w.server.ours(source)) == 1 for source in sources)


def test_an_expired_pull_is_renewed_at_once():
    w, sources = worker(8, HIGH, MEDIUM, LOW)

    w.advance(PULL_EXPIRES)
    assert w.exchange() == 1

    assert all(w.server.ours(source) for source in sources)
    assert w.asked_for["wait"] == 2 * len(sources)


def test_a_message_for_an_idle_worker_needs_no_round_trip():
    w, (_, medium, _) = worker(8, HIGH, MEDIUM, LOW)

    w.server.publish(medium)
    w.read()

    assert w.ready.pop() is medium


def test_a_full_worker_leaves_nothing_waiting():
    w, sources = worker(4, MEDIUM, MEDIUM)

    w.server.publish(sources[0], 10)
    w.exchange()

    assert w.pulls.held == 4
    assert not any(w.server.ours(source) for source in sources)
    w.server.publish(sources[1])
    assert not w.server.events


def test_strict_priority_between_levels():
    w, (high, medium, low) = worker(8, HIGH, MEDIUM, LOW, guard=10**6)
    for source in (low, medium, high):
        w.server.publish(source, 100)
    w.exchange()

    order = w.work(300)

    # What was buffered before the others came may go first; after that it is strict.
    assert order.index(high) <= 8
    assert order[8:].count(medium) <= 100
    last_high = 299 - order[::-1].index(high)
    last_medium = 299 - order[::-1].index(medium)
    assert last_high < 100 + 2 * 8
    assert last_medium < 200 + 2 * 8


@pytest.mark.parametrize("limit", [1, 4, 8, 64])
@pytest.mark.parametrize("guard", [3, 20])
def test_starvation_guard_serves_a_lower_level_at_its_rate(limit, guard):
    w, (high, _, low) = worker(limit, HIGH, MEDIUM, LOW, guard=guard)
    w.server.publish(high, 5000)
    w.server.publish(low, 5000)
    w.exchange()

    order = w.work(2000)

    settled = order[limit + guard :]
    gaps = [i for i, source in enumerate(settled) if source is low]
    assert max(b - a for a, b in itertools.pairwise(gaps)) <= guard
    # Neither does it get much more than that: strict priority holds otherwise.
    assert len(gaps) <= len(settled) / guard * 1.2 + limit


def test_starvation_guard_serves_both_lower_levels():
    w, (high, medium, low) = worker(8, HIGH, MEDIUM, LOW, guard=10)
    for source in (high, medium, low):
        w.server.publish(source, 2000)
    w.exchange()

    served = Counter(s.level for s in w.work(1000)[50:])

    assert served[MEDIUM] >= 85
    assert served[LOW] >= 85
    assert served[HIGH] >= 700


def test_starvation_guard_reaches_every_queue_of_the_lower_level():
    w = Worker(8, guard=5)
    high, *_ = w.add(HIGH)
    lows = w.add(LOW, LOW, LOW)
    w.exchange()
    for source in (high, *lows):
        w.server.publish(source, 3000)
    w.exchange()

    served = Counter(w.work(1000))

    assert all(served[source] >= 40 for source in lows)


@pytest.mark.parametrize("limit", [1, 3, 8, 100])
def test_queues_of_one_level_take_turns(limit):
    w, sources = worker(limit, MEDIUM, MEDIUM, MEDIUM)
    for source in sources:
        w.server.publish(source, 1000)
    w.exchange()

    served = Counter(w.work(900))

    assert all(served[source] >= 300 - 2 * limit for source in sources)


@pytest.mark.parametrize("limit", [1, 8, 100])
@pytest.mark.parametrize("idle", [1, 30, 600])
@pytest.mark.parametrize("trip", [0.0001, 0.005, 0.05], ids=["near", "far", "very far"])
def test_a_busy_queue_is_not_slowed_by_idle_ones(limit, idle, trip):
    """At least every second round trip brings messages of the busy queue, however many others
    have to be looked at, and however long a round trip takes."""
    w = Worker(limit)
    (busy,) = w.add(MEDIUM)
    w.add(*([HIGH, MEDIUM, LOW] * idle)[:idle])
    w.exchange()
    w.server.publish(busy, 10_000)
    w.read()

    trips = 0
    for _ in range(100):
        while w.ready:
            w.ready.pop()
            w.pulls.settled()
        w.plan()
        w.send()
        w.server.advance(trip)
        w.read()
        trips += 1 if not w.ready else 0

    assert trips <= 52


def test_a_queue_beside_a_busy_one_is_looked_at():
    w, (busy, other) = worker(8, MEDIUM, MEDIUM)
    w.server.publish(busy, 10_000)
    w.exchange()
    w.work(50)

    w.server.publish(other)
    w.server.advance(2 * RECHECK)
    order = w.work(30)

    assert other in order


@pytest.mark.parametrize("limit", [1, 8, 50])
def test_a_backlog_that_others_took_does_not_hold_up_another_queue(limit):
    """The last word on a queue may be "500 left" when other workers have taken them all."""
    w, (shared, own) = worker(limit, MEDIUM, MEDIUM)
    w.server.publish(shared, 500)
    w.exchange()
    w.server.steal(shared, 500)
    while w.ready:
        w.work()

    w.server.publish(own, 3)
    w.exchange()

    assert w.pulls.held == min(3, limit)
    assert next(iter(w.ready)) is own


def test_others_waiting_for_all_there_is_are_left_to_it():
    """nats-server answers 408 "Requests Pending": there are messages, and all are spoken for."""
    w, (source,) = worker(2, MEDIUM)
    w.server.publish(source, 6)
    w.exchange()
    w.server[source].requests.append(Request(None, 30, waits=True))
    w.work(2)

    assert w.exchange() == 0
    w.check_still()


def test_a_lowered_limit_withdraws_what_was_asked_for_more():
    w, (high, medium, low) = worker(300, HIGH, MEDIUM, LOW)
    assert w.pulls._asked == 300

    w.pulls.set_limit(2)
    w.plan()
    w.exchange()
    w.server.publish(medium, 100)
    w.exchange()

    assert w.pulls.held == 2
    assert not any(w.server.ours(source) for source in (high, medium, low))


def test_a_raised_limit_is_used_at_once():
    w, (source,) = worker(1, MEDIUM)
    w.server.publish(source, 100)
    w.exchange()

    w.pulls.set_limit(40)
    w.plan()
    w.exchange()

    assert w.pulls.held == 40


def test_more_sources_share_the_limit_anew():
    w, _ = worker(8, MEDIUM)

    w.add(MEDIUM, MEDIUM, MEDIUM)
    w.exchange()

    assert w.pulls._asked == 8
    w.check_still()


def test_no_limit_is_bounded():
    w, (source,) = worker(0, MEDIUM)
    w.server.publish(source, UNLIMITED * 2)
    w.exchange()

    assert w.pulls.held == UNLIMITED


def test_a_stream_without_leader_is_asked_with_growing_pauses():
    w, (source,) = worker(8, MEDIUM)
    w.server.publish(source, 100)
    w.exchange()
    w.server.leader = False
    w.server[source].requests.clear()

    asked = 0
    end = w.now + 10
    while w.now < end:
        before = w.asked_for.total()
        while w.ready:
            w.ready.pop()
            w.pulls.settled()
        w.plan()
        w.exchange(at_most=5)
        asked += w.asked_for.total() - before
        w.server.advance(0.01)

    assert 5 <= asked <= 12 + len(RETRY_DELAYS)
    w.server.leader = True
    w.advance(max(RETRY_DELAYS))
    w.exchange()
    assert w.ready


def test_a_failing_source_does_not_hold_up_the_others():
    w, (failing, sound) = worker(8, HIGH, MEDIUM)
    w.server.publish(failing, 100)
    w.exchange()
    while w.ready:
        w.ready.pop()
        w.pulls.settled()
    for pull_id in list(w.server.ours(failing)):
        w.server.events.append(Status(pull_id, 503))
    w.server[failing].requests.clear()
    w.server.queues[failing].pending = 0
    failing.retry_at = w.now + 100
    w.plan()
    w.exchange()

    w.server.publish(sound)
    w.exchange()

    assert sound in list(w.ready)


def test_a_pull_that_is_not_answered_is_withdrawn_before_it_is_made_anew():
    """A server that was frozen answers both, and the worker would hold twice its limit."""
    w, (a, _) = worker(8, HIGH, HIGH)
    w.server.publish(a, 30)
    w.read()
    w.advance(2.5 * IDLE_HEARTBEAT)

    w.exchange()

    assert w.asked_for["cancel"] >= 2
    assert w.pulls.held - w.crossed <= 8 + 1
    w.check_sums()


def test_silent_pulls_are_withdrawn_and_made_anew():
    w, sources = worker(8, HIGH, MEDIUM, LOW)
    for source in sources:
        w.server[source].requests.clear()  # the server forgot them and says nothing

    w.advance(2 * IDLE_HEARTBEAT + 0.1)
    w.exchange()

    w.check_still()
    assert w.asked_for["cancel"] == 1


def test_heartbeats_keep_a_waiting_pull():
    w, _ = worker(8, MEDIUM)

    for _ in range(5):
        w.advance(IDLE_HEARTBEAT)
        w.exchange()

    assert w.asked_for == {"wait": 1}


def test_a_probe_without_answer_is_given_up():
    w, (source,) = worker(4, MEDIUM)
    w.server.publish(source, 100)
    w.exchange()
    w.ready.pop()
    w.pulls.settled()
    assert [command.wait for command in w.plan() if isinstance(command, Pull)] == [False]
    w.commands.clear()  # nats-server 2.9 does not answer a pull on a consumer that is gone

    w.advance(2 * IDLE_HEARTBEAT + 0.1)

    assert w.commands


def test_a_late_word_on_a_withdrawn_pull_changes_nothing():
    w, (source,) = worker(1, MEDIUM)
    (pull_id,) = w.server.ours(source)
    w.server.publish(source, 2)
    w.exchange()
    assert w.pulls.held == 1

    assert w.pulls.ended(pull_id, w.now) is None
    w.pulls.heard(pull_id, w.now)

    w.check_sums()
    assert source.pending == 1


def test_removing_a_source_gives_its_credit_to_the_others():
    w, (first, second) = worker(8, MEDIUM, MEDIUM)
    assert (first.asked, second.asked) == (4, 4)

    w.remove(first)
    w.exchange()

    assert second.asked == 8
    w.check_still()


@pytest.mark.parametrize("limit", [1, 8, 256])
def test_six_hundred_sources_cost_little_more_than_six(limit):
    """Time for 2,000 messages of one queue, with hundreds of others beside it."""

    def seconds(others: int) -> float:
        w = Worker(limit)
        (busy,) = w.add(MEDIUM)
        w.add(*[MEDIUM] * others)
        w.exchange()
        w.server.publish(busy, 2000)
        w.read()
        start = time.perf_counter()
        for _ in range(2000):
            if not w.ready:
                w.send()
                w.read()
            if w.ready:
                w.ready.pop()
                w.pulls.settled()
            w.plan()
            w.server.now += 0.0001
        return time.perf_counter() - start

    few = min(seconds(6) for _ in range(3))
    many = min(seconds(600) for _ in range(3))

    assert many < few * 15 + 0.05, f"{few:.3f} s with 6, {many:.3f} s with 600"


# What arrived


def items(w: Worker, *levels: int) -> list[Source]:
    made = [Source(level) for level in levels]
    for item in made:
        w.ready.push(item, item.level)
    return made


def test_ready_hands_on_the_most_urgent_first_and_in_order():
    w = Worker(8)
    low, high, medium, high2 = items(w, LOW, HIGH, MEDIUM, HIGH)

    assert [w.ready.pop() for _ in range(4)] == [high, high2, medium, low]
    with pytest.raises(IndexError):
        w.ready.pop()


def test_ready_keeps_the_starvation_guard():
    w = Worker(100, guard=5)
    items(w, *[HIGH] * 50, *[MEDIUM] * 50, *[LOW] * 50)

    order = [w.ready.pop().level for _ in range(50)]

    assert Counter(order)[HIGH] >= 25
    for level in (MEDIUM, LOW):
        at = [-1, *(i for i, found in enumerate(order) if found == level)]
        assert max(b - a for a, b in itertools.pairwise(at)) <= 5


def test_ready_takes_out_what_belongs_to_a_queue():
    w = Worker(8)
    a, b, c = items(w, LOW, HIGH, LOW)

    assert w.ready.take(lambda item: item in (a, b)) == [b, a]

    assert list(w.ready) == [c]
    assert len(w.ready) == 1
    assert w.pulls.buffered == [0, 0, 1]


def busy(limit: int = 8) -> Pulls:
    """Return pulls that hold *limit* deliveries, with a backlog behind them and nothing asked."""
    pulls, source = Pulls(guard=20, limit=limit), Source(1)
    pulls.add(source)
    pulls.plan(0.0)
    for _ in range(limit):
        pulls.received(source, 100, 0, 0.0)
    return pulls


def test_a_channel_with_a_pull_under_way_and_little_room_is_content() -> None:
    pulls = busy()
    assert pulls.is_content(0.0), "there is no room"
    pulls.settled(4)
    assert not pulls.is_content(0.0)
    (command,) = pulls.plan(0.0)

    assert isinstance(command, Pull)
    assert pulls.is_content(0.0)
    assert pulls.plan(0.0) == []
    pulls.set_limit(4)
    assert not pulls.is_content(0.0), "waiting pulls are to be withdrawn"


def test_a_channel_without_messages_is_not_content() -> None:
    pulls = Pulls(guard=20, limit=8)
    pulls.add(Source(1))

    assert len(pulls.plan(0.0)) == 1

    assert not pulls.is_content(0.0), "waiting pulls may have to be widened"


def test_little_room_waits_for_more_while_work_waits_here() -> None:
    pulls = busy()
    pulls.at_work = 2
    pulls.settled(1)

    assert pulls.is_content(1.0)
    assert pulls.asks_at == 1.0 + PATIENCE
    pulls.settled(2)
    assert pulls.is_content(1.0)
    pulls.settled(1)
    assert not pulls.is_content(1.0), "half of the limit is free"
    (command,) = pulls.plan(1.0)
    assert isinstance(command, Pull)
    assert command.batch == 4
    assert pulls.asks_at is None


def test_little_room_waits_no_longer_than_its_patience() -> None:
    pulls = busy()
    pulls.at_work = 2
    pulls.settled(1)
    assert pulls.is_content(1.0)

    assert not pulls.is_content(1.0 + PATIENCE)

    (command,) = pulls.plan(1.0 + PATIENCE)
    assert isinstance(command, Pull)
    assert command.batch == 1


@pytest.mark.parametrize("at_work", [None, 7, 8])
def test_room_is_used_at_once_when_a_process_may_have_nothing_to_do(at_work: int | None) -> None:
    pulls = busy()
    pulls.at_work = at_work

    pulls.settled(1)

    assert not pulls.is_content(1.0)


def test_little_room_waits_for_more_while_messages_wait_to_be_handed_on() -> None:
    pulls = busy()
    pulls.buffered[1] = 4
    pulls.settled(1)

    assert pulls.is_content(1.0)
    pulls.buffered[1] = 3
    assert not pulls.is_content(1.0)


def test_a_source_that_waits_on_the_server_is_known_to_be_empty() -> None:
    pulls, source = Pulls(guard=20, limit=8), Source(1)
    pulls.add(source)
    assert not source.is_waiting(0.0), "nothing was asked"
    (command,) = pulls.plan(0.0)
    assert isinstance(command, Pull)

    assert source.is_waiting(0.0)
    pulls.received(source, 1, WAIT_SLOT, 0.0)
    assert not source.is_waiting(0.0), "there is another one"
    pulls.received(source, 0, WAIT_SLOT, 0.0)
    assert source.is_waiting(0.0)
    assert not source.is_waiting(2 * IDLE_HEARTBEAT), "nothing was heard for long"
    pulls.heard(command.pull_id, 2 * IDLE_HEARTBEAT)
    assert source.is_waiting(2 * IDLE_HEARTBEAT)


def test_one_of_many_idle_sources_below_a_backlog_is_looked_at_in_a_while() -> None:
    """Each look costs the server what a pull of several messages does."""
    w, (medium, *low) = worker(8, MEDIUM, *[LOW] * 50)
    w.server.publish(medium, 1000)
    w.exchange()
    w.advance(2 * RECHECK)
    looked = Counter[int]()
    take = w.server.take

    def seen(command: Pull | Cancel) -> None:
        if isinstance(command, Pull) and command.source in low:
            looked[command.source.level] += 1
        take(command)

    w.server.take = seen  # type: ignore[method-assign]

    w.work(200)
    assert looked == {LOW: 1}
    w.advance(2 * RECHECK)
    w.work(200)
    assert looked == {LOW: 2}
