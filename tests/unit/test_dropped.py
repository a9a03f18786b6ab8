"""Whether anybody will settle a delivery whose connection is lost."""

from __future__ import annotations

import sys
import types
import weakref
from typing import Any

import pytest

from kombu_jetstream.backend import Delivery
from kombu_jetstream.dropped import is_dropped, note_scheduled


class Message:
    """What a request holds on to."""


class Request:
    """What Celery's state knows of a task."""

    time_start: float | None = None

    def __init__(self, message: Message) -> None:
        self.id = "t1"
        self.message = message
        self.entry = self  # as a timer's entry: it does not vanish when nobody holds it


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Celery's state of a worker, as of 5.7."""
    made: Any = types.ModuleType("celery.worker.state")
    made.requests = {}
    for name in ("reserved", "active", "scheduled"):
        setattr(made, f"{name}_requests", weakref.WeakSet())
    monkeypatch.setitem(sys.modules, "celery.worker.state", made)
    return made


def held(message: Message) -> Delivery:
    settler: Any = None
    return Delivery("q", 1, b"", b"token", settler, message=weakref.ref(message))


def scheduled(state: Any, message: Message) -> Request:
    request = Request(message)
    state.scheduled_requests.add(request)
    state.requests[request.id] = request
    return request


def closed(state: Any, request: Request) -> None:
    """Do what Celery's consumer does when its connection is lost."""
    state.scheduled_requests.clear()
    del state.requests[request.id]


def test_a_message_nobody_holds_is_dropped() -> None:
    message = Message()
    delivery = held(message)

    assert not is_dropped(delivery)
    del message

    assert is_dropped(delivery)


def test_a_message_nobody_has_seen_is_dropped() -> None:
    settler: Any = None
    assert is_dropped(Delivery("q", 1, b"", b"token", settler))


def test_a_task_that_waited_for_its_eta_is_dropped_although_its_request_lives(state: Any) -> None:
    message = Message()
    delivery, request = held(message), scheduled(state, message)
    note_scheduled([delivery])

    assert not is_dropped(delivery)  # Celery has not noticed the loss yet
    closed(state, request)

    assert is_dropped(delivery)


def test_one_whose_time_came_before_is_not_dropped(state: Any) -> None:
    message = Message()
    delivery, request = held(message), scheduled(state, message)
    note_scheduled([delivery])
    state.scheduled_requests.discard(request)
    state.reserved_requests.add(request)
    closed(state, request)

    assert not is_dropped(delivery)
    state.reserved_requests.discard(request)
    assert not is_dropped(delivery)  # it has run, and is about to be settled


def test_one_that_has_begun_is_not_dropped(state: Any) -> None:
    message = Message()
    delivery, request = held(message), scheduled(state, message)
    note_scheduled([delivery])
    request.time_start = 1.0
    closed(state, request)

    assert not is_dropped(delivery)


def test_a_task_that_runs_is_not_asked_about(state: Any) -> None:
    message, other = Message(), Message()
    delivery = held(message)
    scheduled(state, other)

    note_scheduled([delivery])

    assert delivery.request is None
    assert not is_dropped(delivery)


def test_without_celery_the_message_alone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "celery.worker.state", raising=False)
    message = Message()
    delivery = held(message)

    note_scheduled([delivery])

    assert not is_dropped(delivery)
