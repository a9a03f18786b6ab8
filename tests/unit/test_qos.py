from __future__ import annotations

import threading
from typing import Any

import pytest

from kombu_jetstream.backend import Delivery, Outcome
from kombu_jetstream.errors import PreconditionFailed
from kombu_jetstream.pulls import UNLIMITED, Pulls
from kombu_jetstream.qos import QoS


class Nobody:
    """A store that is never asked."""

    def settle(self, delivery: Delivery, outcome: Outcome, delay: float | None = None) -> None:
        raise AssertionError


@pytest.fixture
def pulls() -> Pulls:
    return Pulls(guard=20)


@pytest.fixture
def qos(pulls: Pulls) -> QoS:
    return QoS(pulls)


def hold(qos: QoS, pulls: Pulls, count: int) -> list[Delivery]:
    made = [Delivery("q", 1, b"", b"%d" % n, Nobody()) for n in range(count)]
    for delivery in made:
        pulls.held += 1
        qos.hold(delivery)
    return made


def test_tags_count_up_and_are_never_used_again(qos: QoS, pulls: Pulls) -> None:
    first = hold(qos, pulls, 3)
    for delivery in first:
        qos.release(delivery.tag)

    assert [d.tag for d in first] == [1, 2, 3]
    assert [d.tag for d in hold(qos, pulls, 2)] == [4, 5]


def test_released_deliveries_give_their_credit_back(qos: QoS, pulls: Pulls) -> None:
    one, two = hold(qos, pulls, 2)

    assert qos.release(one.tag) is one

    assert len(qos) == pulls.held == 1
    assert qos.deliveries() == [two]


@pytest.mark.parametrize("tag", [0, 1, 99, -1, None, "1"])
def test_an_unknown_tag_changes_nothing(qos: QoS, pulls: Pulls, tag: Any) -> None:
    (delivery,) = hold(qos, pulls, 1)
    qos.release(delivery.tag)
    hold(qos, pulls, 1)

    with pytest.raises(PreconditionFailed, match="unknown delivery tag"):
        qos.release(tag)

    assert len(qos) == pulls.held == 1


def test_multiple_means_all_up_to_a_tag_and_0_means_all(qos: QoS, pulls: Pulls) -> None:
    hold(qos, pulls, 5)
    qos.release(2)

    assert qos.up_to(3) == [1, 3]
    assert qos.up_to(0) == [1, 3, 4, 5]
    assert qos.up_to(99) == [1, 3, 4, 5]


@pytest.mark.parametrize(("count", "limit"), [(5, 5), (0, UNLIMITED), (None, UNLIMITED)])
def test_the_prefetch_count_is_the_limit_of_the_pulls(
    qos: QoS, pulls: Pulls, count: Any, limit: int
) -> None:
    qos.set_prefetch_count(count)

    assert qos.prefetch_count == (count or 0)
    assert pulls.limit == limit


def test_there_is_room_up_to_the_prefetch_count(qos: QoS, pulls: Pulls) -> None:
    qos.set_prefetch_count(2)
    assert qos.can_consume()
    hold(qos, pulls, 2)
    assert not qos.can_consume()
    qos.release(1)
    assert qos.can_consume()
    qos.set_prefetch_count(0)
    hold(qos, pulls, 100)
    assert qos.can_consume()


def test_what_is_held_can_be_looked_at_from_another_thread(qos: QoS, pulls: Pulls) -> None:
    """The lease keeper does, while deliveries come and go."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def look() -> None:
        try:
            while not stop.is_set():
                qos.deliveries()
                qos.up_to(0)
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(3000):
        for delivery in hold(qos, pulls, 3):
            qos.release(delivery.tag)
    stop.set()
    thread.join()

    assert not failures
