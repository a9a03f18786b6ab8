"""The rule, and the ledger with a connection that only writes down what it is given."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kombu_jetstream.backend import Delivery, Outcome
from kombu_jetstream.endpoint import Server
from kombu_jetstream.errors import ConnectionLost
from kombu_jetstream.leases import (
    BEATS_PER_LEASE,
    REMEMBERED_ACKS,
    REMEMBERED_SECONDS,
    Ledger,
    due,
    ledger_of,
    message_of,
)
from kombu_jetstream.options import Options
from kombu_jetstream.pulls import Pulls
from kombu_jetstream.qos import QoS

TIMEOUT = 30.0
BEAT = TIMEOUT / BEATS_PER_LEASE


class Wire:
    """What a ledger knows of a NATS connection."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, bytes]] = []
        self.is_open = True
        self.server = Server("127.0.0.1", 4222)
        self.discovered_servers: tuple[Server, ...] = (self.server,)

    def publish(self, subject: bytes, payload: bytes) -> None:
        if not self.is_open:
            raise ConnectionLost("closed")
        self.sent.append((subject, payload))

    @contextmanager
    def corked(self) -> Iterator[None]:
        yield

    def keepalive(self, now: float) -> None:
        pass

    def read_neglected(self) -> None:
        pass


class Link:
    """What a ledger knows of JetStream, and whoever settles with it."""

    def __init__(self, ledger: Ledger) -> None:
        self.connection = Wire()
        self.ledger = ledger
        self.looked_at: set[bytes] = set()

    def drop_withdrawn(self, consumers: Iterable[bytes]) -> None:
        self.looked_at |= set(consumers)

    @property
    def sent(self) -> list[tuple[bytes, bytes]]:
        return self.connection.sent

    def settle(self, delivery: Delivery, outcome: Outcome, delay: float | None = None) -> None:
        payload = {"ack": b"+ACK", "nak": b"-NAK", "term": b"+TERM", "progress": b"+WPI"}[outcome]
        try:
            self.connection.publish(delivery.token, payload)
        except ConnectionLost:
            self.ledger.forward(self, delivery.token, payload)  # type: ignore[arg-type]
        else:
            if outcome == "ack":
                self.ledger.note_ack(self, delivery.token)  # type: ignore[arg-type]

    def lose(self) -> None:
        self.connection.is_open = False


class Seen:
    """A message object somebody holds."""


def token(number: int, attempt: int = 1) -> bytes:
    return b"$JS.ACK.ns_medium.q.%d.%d.%d.1795323600000000%03d.0" % (
        attempt,
        number,
        number + attempt,
        number,
    )


def delivery(number: int, link: Any = None, at: float = 0.0, message: Any = None) -> Delivery:
    made = Delivery("q", 1, b"", token(number), link, leased_at=at, received_at=at)
    if message is not None:
        made.message = weakref.ref(message)
    return made


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger(Options(visibility_timeout=TIMEOUT))
    yield made
    made._links.clear()
    made._orphans.clear()
    made._unsent.clear()
    made._wake.set()


def attached(ledger: Ledger) -> Link:
    link = Link(ledger)
    ledger.attach(link)  # type: ignore[arg-type]
    return link


def lose(ledger: Ledger, link: Link, *held: Delivery) -> None:
    """What a session does when its connection is lost."""
    link.lose()
    ledger.adopt(held)
    ledger.detach(link, lost=True)  # type: ignore[arg-type]


# The rule


def test_a_lease_is_due_each_third_of_the_timeout() -> None:
    held = [delivery(n, at=at) for n, at in enumerate([0.0, BEAT, 2 * BEAT])]

    assert due(held, BEAT, TIMEOUT, None) == [held[0]]
    assert due(held, 2 * BEAT, TIMEOUT, None) == held[:2]
    assert due(held, 3 * BEAT, TIMEOUT, None) == held


def test_a_lease_half_a_beat_old_can_wait() -> None:
    held = [delivery(1, at=100.0)]

    assert due(held, 100.0 + BEAT / 2 - 0.01, TIMEOUT, None) == []
    assert due(held, 100.0 + BEAT / 2, TIMEOUT, None) == held


def test_settled_deliveries_and_transient_ones_have_no_lease() -> None:
    settled = delivery(1)
    settled.settled = True
    transient = delivery(2, at=float("inf"))

    assert due([settled, transient], 1e9, TIMEOUT, None) == []


def test_a_limit_ends_the_extensions() -> None:
    held = delivery(1, at=0.0)
    held.leased_at = 50.0

    assert due([held], 99.0, TIMEOUT, 100.0) == [held]
    assert due([held], 100.0, TIMEOUT, 100.0) == []


@given(
    st.floats(0.1, 1000.0),
    st.floats(0.0, 1.0, exclude_max=True),
    st.lists(st.floats(0.0, 0.2), min_size=1, max_size=30),
)
def test_a_held_delivery_never_outlives_its_lease(
    timeout: float, arrives: float, lateness: list[float]
) -> None:
    """Whenever it arrives between two beats, and though each beat is late by up to a fifth."""
    beat = timeout / BEATS_PER_LEASE
    held = delivery(1, at=arrives * beat)

    for number, late in enumerate(lateness, 1):
        now = (number + late) * beat
        assert now - held.leased_at < timeout
        for each in due([held], now, timeout, None):
            each.leased_at = now


# A connection


def test_a_beat_extends_what_is_held(ledger: Ledger) -> None:
    link = attached(ledger)
    qos = QoS(Pulls(guard=20))
    qos.hold(delivery(1, link))
    qos.hold(delivery(2, link, at=2 * BEAT))
    ledger.hold(qos)

    ledger.beat(2 * BEAT)

    assert link.sent == [(token(1), b"+WPI")]
    ledger.release(qos)
    ledger.beat(10 * BEAT)
    assert len(link.sent) == 1


def test_who_holds_is_not_kept_alive(ledger: Ledger) -> None:
    qos = QoS(Pulls(guard=20))
    ledger.hold(qos)
    gone = weakref.ref(qos)

    del qos
    gc.collect()

    assert gone() is None
    ledger.beat(100.0)


# After a loss


def test_what_somebody_can_still_settle_is_extended_through_the_next_connection(
    ledger: Ledger,
) -> None:
    message = Seen()
    link = attached(ledger)
    lose(ledger, link, delivery(1, link, time.monotonic(), message))

    later = attached(ledger)
    assert later.sent == [(token(1), b"+WPI")]
    ledger.beat(time.monotonic() + BEAT)

    assert later.sent == [(token(1), b"+WPI")] * 2
    assert link.sent == []


def test_what_nobody_can_settle_any_more_is_handed_back(ledger: Ledger) -> None:
    kept, dropped = Seen(), Seen()
    link = attached(ledger)
    lose(
        ledger,
        link,
        delivery(1, link, time.monotonic(), kept),
        delivery(2, link, time.monotonic(), dropped),
        delivery(3, link, time.monotonic()),
    )
    del dropped
    gc.collect()

    later = attached(ledger)

    assert sorted(later.sent) == [
        (token(1), b"+WPI"),
        (token(2), b"-NAK"),
        (token(3), b"-NAK"),
    ]
    assert later.looked_at == {b"ns_medium.q"}


def test_a_message_dropped_later_is_handed_back_then(ledger: Ledger) -> None:
    message = Seen()
    link = attached(ledger)
    lose(ledger, link, delivery(1, link, time.monotonic(), message))
    later = attached(ledger)
    later.sent.clear()

    del message
    gc.collect()
    ledger._settle_orphans(time.monotonic())

    assert later.sent == [(token(1), b"-NAK")]


def test_an_ack_after_the_loss_goes_through_the_connection_there_is(ledger: Ledger) -> None:
    message = Seen()
    link = attached(ledger)
    held = delivery(1, link, time.monotonic(), message)
    lose(ledger, link, held)
    later = attached(ledger)
    later.sent.clear()

    held.settled = True
    link.settle(held, "ack")

    assert later.sent == [(token(1), b"+ACK")]
    ledger.beat(time.monotonic() + 2 * BEAT)
    assert later.sent == [(token(1), b"+ACK")]


def test_an_ack_without_a_connection_waits_for_one(ledger: Ledger) -> None:
    link = attached(ledger)
    held = delivery(1, link, time.monotonic(), message := Seen())
    lose(ledger, link, held)

    held.settled = True
    link.settle(held, "ack")
    later = attached(ledger)

    assert later.sent == [(token(1), b"+ACK")]
    assert message


def test_an_outcome_does_not_go_through_a_connection_older_than_the_loss(ledger: Ledger) -> None:
    """What broke one of them may have broken the other, which takes bytes until it notices."""
    older, link = attached(ledger), attached(ledger)
    link.lose()

    link.settle(delivery(1, link), "ack")
    assert older.sent == []
    later = attached(ledger)

    assert later.sent == [(token(1), b"+ACK")]
    assert older.sent == []


def test_acks_shortly_before_a_loss_are_sent_again(ledger: Ledger) -> None:
    link, other = attached(ledger), attached(ledger)
    for number in range(3):
        link.settle(delivery(number, link), "ack")
    other.settle(delivery(9, other), "ack")
    lose(ledger, link)

    later = attached(ledger)

    assert later.sent == [(token(number), b"+ACK") for number in range(3)]


def test_acks_are_sent_again_through_each_connection_that_is_lost(ledger: Ledger) -> None:
    first = attached(ledger)
    first.settle(delivery(1, first), "ack")
    lose(ledger, first)
    second = attached(ledger)
    lose(ledger, second)

    third = attached(ledger)

    assert third.sent == [(token(1), b"+ACK")]


def test_an_orderly_end_repeats_nothing(ledger: Ledger) -> None:
    link = attached(ledger)
    link.settle(delivery(1, link), "ack")
    ledger.detach(link, lost=False)  # type: ignore[arg-type]

    assert attached(ledger).sent == []


def test_remembered_acks_are_bounded(ledger: Ledger) -> None:
    link = attached(ledger)
    for number in range(REMEMBERED_ACKS + 100):
        ledger.note_ack(link, b"%d" % number)  # type: ignore[arg-type]

    assert len(ledger._acks) == REMEMBERED_ACKS


# Deliveries that come again


def test_a_message_that_is_held_is_held_by_its_new_token(ledger: Ledger) -> None:
    """The server gave it up while this process was stopped: it runs already, not once more."""
    link = attached(ledger)
    qos = QoS(Pulls(guard=20))
    held = delivery(1, link, time.monotonic())
    qos.hold(held)
    ledger.hold(qos)

    assert ledger.held_again(token(1, attempt=2))
    assert not ledger.held_again(token(2, attempt=2))

    assert held.token == token(1, attempt=2)


def test_an_orphan_is_held_by_its_new_token(ledger: Ledger) -> None:
    message = Seen()
    link = attached(ledger)
    held = delivery(1, link, time.monotonic(), message)
    lose(ledger, link, held)
    later = attached(ledger)
    later.sent.clear()

    assert ledger.held_again(token(1, attempt=2))
    link.settle(held, "ack")

    assert later.sent == [(token(1, attempt=2), b"+ACK")]


def test_a_message_that_was_acknowledged_across_a_loss_is_acknowledged_again(
    ledger: Ledger,
) -> None:
    link = attached(ledger)
    link.settle(delivery(1, link), "ack")
    lose(ledger, link)
    later = attached(ledger)
    later.sent.clear()

    assert ledger.held_again(token(1, attempt=2))
    ledger._flush()

    assert later.sent == [(token(1, attempt=2), b"+ACK")]


def test_a_message_that_left_the_server_before_its_acknowledgement_came_is_acknowledged_again(
    ledger: Ledger,
) -> None:
    link = attached(ledger)
    link.settle(delivery(1, link), "ack")
    link.settle(delivery(2, link), "nak")
    link.sent.clear()

    assert ledger.held_again(token(1, attempt=2))
    assert not ledger.held_again(token(2, attempt=2))

    ledger._flush()
    assert link.sent == [(token(1, attempt=2), b"+ACK")]


def test_an_acknowledgement_is_remembered_for_a_while(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = attached(ledger)
    link.settle(delivery(1, link), "ack")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + REMEMBERED_SECONDS + 1)

    assert not ledger.held_again(token(1, attempt=2))


def test_a_message_whose_lease_limit_is_over_is_for_somebody_else() -> None:
    ledger = Ledger(Options(visibility_timeout=TIMEOUT, lease_limit=60.0))
    qos = QoS(Pulls(guard=20))
    qos.hold(delivery(1, at=time.monotonic() - 61))
    qos.hold(delivery(2, at=time.monotonic() - 59))
    ledger.hold(qos)

    assert not ledger.held_again(token(1, attempt=2))
    assert ledger.held_again(token(2, attempt=2))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (token(17), (b"ns_medium", b"17", b"1795323600000000017")),
        (
            b"$JS.ACK.hub.hash.ns_medium.q.3.17.20.1795323600000000017.5.rnd",
            (b"ns_medium", b"17", b"1795323600000000017"),
        ),
        (b"redis-token", (b"redis-token", b"", b"")),
    ],
)
def test_a_message_is_named_by_its_stream(reply: bytes, expected: tuple[bytes, ...]) -> None:
    assert message_of(reply) == expected


# Processes


def test_one_ledger_for_each_broker() -> None:
    one, other = Options(namespace="leases_a"), Options(namespace="leases_b")

    assert ledger_of(one) is ledger_of(Options(namespace="leases_a"))
    assert ledger_of(one) is not ledger_of(other)


def test_the_lost_server_is_tried_last(ledger: Ledger) -> None:
    a, b, c = (Server("127.0.0.1", port) for port in (1, 2, 3))
    link = attached(ledger)
    link.connection.server = a
    link.connection.discovered_servers = (a, b, c)
    lose(ledger, link)

    assert ledger.servers((a, b)) == (b, c, a)


def test_the_thread_ends_when_there_is_nothing_left_to_keep(ledger: Ledger) -> None:
    link = attached(ledger)
    thread = ledger._thread
    assert thread is not None
    assert thread.is_alive()

    ledger.detach(link, lost=False)  # type: ignore[arg-type]
    ledger._wake.set()
    thread.join(5)

    assert not thread.is_alive()
    again = attached(ledger)
    assert ledger._thread is not None
    assert ledger._thread.is_alive()
    assert again.sent == []
