"""What is taken for a task or an event, before Celery gets to see it."""

from __future__ import annotations

import functools
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kombu_jetstream.backend import Delivery
from kombu_jetstream.errors import MalformedMessage, PreconditionFailed
from kombu_jetstream.pulls import Pulls
from kombu_jetstream.qos import QoS
from kombu_jetstream.tasks import check_body, check_event, check_fields, taker_of

FIELDS: dict[str, Any] = {
    "lang": "py",
    "task": "shop.pay",
    "id": "3f0c5b1e-8a38-4d5c-b9a7-4a7b1d1d1c11",
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "retries": 0,
    "timelimit": [None, None],
    "stamped_headers": None,
    "stamps": {},
}
BODY: list[Any] = [[1], {"two": 2}, {"callbacks": None, "chain": None}]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"id": "an id of my own, with ümläuts"},
        {
            "eta": "2026-11-22T05:00:00+00:00",
            "expires": datetime(2026, 11, 22, 6, tzinfo=timezone.utc),
        },
        {"timelimit": (10, 5.5)},
        {"timelimit": None},
        {"stamped_headers": ["tenant"], "stamps": {"tenant": ["t1"]}},
        {"shadow": "pay"},
        {"my own header": complex(1, 2)},
    ],
    ids=str,
)
def test_what_celery_writes_is_a_task(fields: dict[str, Any]) -> None:
    check_fields({**FIELDS, **fields})
    check_body({**FIELDS, **fields}, BODY)


def test_a_field_that_is_missing_is_named() -> None:
    for name in ("task", "id"):
        fields = {key: value for key, value in FIELDS.items() if key != name}
        with pytest.raises(MalformedMessage, match=f"expected '{name}' to be text"):
            check_fields(fields)


def test_the_value_is_told_shortened() -> None:
    with pytest.raises(MalformedMessage) as caught:
        check_fields({**FIELDS, "timelimit": ["x" * 10_000]})

    assert "expected 'timelimit' to be two numbers, got ['xxx" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("limit", [10**400, -(10**400), float("nan"), float("inf"), 1e10])
def test_a_time_limit_no_timer_can_count_is_malformed(limit: float) -> None:
    with pytest.raises(MalformedMessage, match="expected 'timelimit' to be two numbers"):
        check_fields({**FIELDS, "timelimit": [limit, None]})


@pytest.mark.parametrize(
    "body",
    [
        {"task": "noop", "id": "i", "args": [], "kwargs": {}, "timelimit": [None, None]},
        {"task": "noop", "id": "i"},
        {"anything": "else"},
        "not for tasks at all",
        None,
    ],
    ids=str,
)
def test_protocol_1_and_what_is_no_task_is_left_to_celery(body: Any) -> None:
    check_body({}, body)


@pytest.mark.parametrize("body", [{"task": "noop"}, {"task": "noop", "id": 5}], ids=str)
def test_protocol_1_without_an_id_is_malformed(body: Any) -> None:
    with pytest.raises(MalformedMessage, match="expected 'id' to be text"):
        check_body({}, body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(
    fields=st.dictionaries(st.sampled_from(sorted(FIELDS)), JSON),
    body=JSON,
)
def test_whatever_comes_is_checked_or_malformed(fields: dict[str, Any], body: Any) -> None:
    """No other error, and what passes can be taken apart as Celery does."""
    try:
        check_fields(fields)
        check_body(fields, body)
    except MalformedMessage:
        return
    hash((fields["task"], fields["id"], fields.get("shadow")))
    if fields.get("timelimit"):
        _hard, _soft = fields["timelimit"]
    if not isinstance(body, dict):
        args, kwargs, embed = body
        list(args), dict(kwargs), dict(embed or {})


@given(headers=st.dictionaries(st.sampled_from(["hostname", "id"]), JSON), body=JSON)
def test_whatever_comes_as_an_event_is_checked_or_malformed(
    headers: dict[str, Any], body: Any
) -> None:
    try:
        check_event(headers, body)
    except MalformedMessage:
        return
    hash((body["type"], body["hostname"], headers.get("hostname")))


def test_what_celery_sends_is_an_event() -> None:
    heartbeat = {
        "type": "worker-heartbeat",
        "hostname": "worker@host",
        "utcoffset": 0.0,
        "pid": 17,
        "clock": 4,
        "freq": 2.0,
        "active": 0,
        "loadavg": [0.1, 0.2, 0.3],
        "timestamp": 1.5,
    }
    check_event({"hostname": "worker@host"}, heartbeat)
    check_event({}, {**heartbeat, "type": "worker-elect", "id": "i", "topic": "task"})


class Consumer:
    """As kombu's: what consumes calls one of its methods."""

    def __init__(self, on_message: Any) -> None:
        self.on_message = on_message

    def receive(self, message: Any) -> None: ...


def test_celerys_parts_are_told_by_the_handler_of_their_consumer() -> None:
    from celery.worker.consumer.gossip import Gossip

    def of_tasks(message: Any) -> None: ...

    of_tasks.__module__ = "celery.worker.consumer.consumer"
    gossip = functools.partial(Gossip.on_message, None)

    assert taker_of(Consumer(of_tasks).receive) == "tasks"
    assert taker_of(Consumer(gossip).receive) == "gossip"
    for other in (Consumer(None).receive, Consumer(print).receive, print, lambda message: None):
        assert taker_of(other) is None


# What is given up on


def delivery() -> Delivery:
    return Delivery("work", 1, b"", b"", settler=None)  # type: ignore[arg-type]


def test_what_is_given_up_on_is_held_until_it_is_gone() -> None:
    pulls = Pulls(guard=20, limit=1)
    qos = QoS(pulls)
    dying = delivery()
    pulls.held += 1
    qos.hold(dying)

    assert qos.give_up(dying.tag) is dying

    assert (len(qos), qos.up_to(0), pulls.held) == (0, [], 1)
    assert qos.deliveries() == [dying]
    assert qos.is_giving_up
    with pytest.raises(PreconditionFailed, match="unknown delivery tag"):
        qos.release(dying.tag)

    qos.gone(dying)
    qos.gone(dying)

    assert (qos.deliveries(), qos.is_giving_up, pulls.held) == ([], False, 0)
