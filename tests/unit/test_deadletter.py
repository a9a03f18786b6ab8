from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kombu_jetstream.deadletter import (
    MAX_TEXT,
    MAX_TRACEBACK,
    REASONS,
    REPLAYED_HEADER,
    DeadLetter,
    death_id,
    facts_of,
    headers_of,
    read_fields,
    read_headers,
    worker_name,
)
from kombu_jetstream.protocol import parse_headers

ROOM = 1_000_000

LETTER = DeadLetter(
    reason="task_failed",
    queue="a b.c",
    level="high",
    task="shop.pay",
    task_id="t-1",
    error="ValueError",
    message="no such card\nor such",
    traceback="Traceback …\n  File …",
    attempts=4,
    worker="host:17",
    published_at=1_795_323_600.25,
    died_at=1_795_323_700.5,
    replayed=2,
)

any_text = st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=300)
letters = st.builds(
    DeadLetter,
    reason=st.sampled_from(REASONS),
    queue=any_text,
    task=any_text | st.none(),
    task_id=any_text | st.none(),
    error=any_text | st.none(),
    message=any_text | st.none(),
    worker=any_text | st.none(),
    attempts=st.integers(1, 10**6),
    published_at=st.floats(0, 1e10) | st.none(),
    died_at=st.floats(0, 1e10),
    replayed=st.integers(0, 100),
)


def test_all_that_is_recorded_can_be_read() -> None:
    assert read_headers(headers_of(LETTER, "dead.1", ROOM)) == LETTER


@given(letters)
def test_any_text_can_be_recorded(letter: DeadLetter) -> None:
    raw = headers_of(letter, "dead.1", ROOM)

    assert read_headers(raw) == letter
    fields = parse_headers(raw).fields
    assert fields["Nats-Msg-Id"] == "dead.1"
    assert all(value.isascii() for value in fields.values())


def test_the_end_of_a_traceback_is_kept() -> None:
    long = dataclasses.replace(LETTER, traceback="first" + "ü" * MAX_TRACEBACK + "last")

    kept = read_headers(headers_of(long, "dead.1", ROOM)).traceback

    assert kept is not None
    assert len(kept.encode()) <= MAX_TRACEBACK
    assert kept.endswith("last")
    assert kept.startswith("ü")


def test_other_texts_are_cut_at_their_end() -> None:
    long = dataclasses.replace(LETTER, message="x" * 5000, task_id="i" * 5000)

    read = read_headers(headers_of(long, "dead.1", ROOM))

    assert read.message == "x" * MAX_TEXT
    assert read.task_id == "i" * MAX_TEXT


def test_less_room_leaves_out_the_least_important_first() -> None:
    long = dataclasses.replace(LETTER, traceback="t" * 5000, message="m" * 1000)
    whole = len(headers_of(long, "dead.1", ROOM))

    without_traceback = read_headers(headers_of(long, "dead.1", whole - 1))
    assert (without_traceback.traceback, without_traceback.message) == (None, "m" * 1000)
    small = read_headers(headers_of(long, "dead.1", 500))
    assert (small.traceback, small.message) == (None, None)
    assert (small.reason, small.queue, small.task) == ("task_failed", "a b.c", "shop.pay")


@given(letters, st.integers(0, 3000))
def test_headers_never_exceed_the_room(letter: DeadLetter, room: int) -> None:
    assert len(headers_of(letter, "dead.1", room)) <= room


def test_a_letter_is_written_even_without_room_for_headers() -> None:
    assert headers_of(LETTER, "dead.1", 10) == b""
    assert read_headers(b"") == DeadLetter(reason="malformed", queue="")


def test_foreign_headers_are_read_as_far_as_possible() -> None:
    read = read_fields({"Dlq-Reason": "task_failed", "Dlq-Task": "no JSON", "X-Other": "1"})

    assert read == DeadLetter(reason="task_failed", queue="", task="no JSON")


# Deaths

OLD = b"$JS.ACK.ns_medium.q.3.17.20.1795323600000000000.5"
NEW = b"$JS.ACK.hub.acchash.ns_medium.q.3.17.20.1795323600000000000.5.rnd"


@pytest.mark.parametrize("token", [OLD, NEW])
def test_a_death_is_named_by_what_the_message_is_in_its_stream(token: bytes) -> None:
    assert death_id(token, b"x") == "dead.ns_medium.17.1795323600000000000"


@pytest.mark.parametrize("token", [OLD, NEW])
def test_a_later_delivery_of_the_message_dies_the_same_death(token: bytes) -> None:
    later = token.replace(b".3.17.20.", b".4.17.99.").replace(b"000.5", b"000.0")

    assert later != token
    assert death_id(later, b"x") == death_id(token, b"x")


def test_another_message_dies_another_death() -> None:
    ids = {
        death_id(OLD, b"x"),
        death_id(OLD.replace(b".17.", b".18."), b"x"),
        death_id(OLD.replace(b"ns_medium", b"ns_high"), b"x"),
        # A stream made anew begins to count anew.
        death_id(OLD.replace(b"17953236", b"17953237"), b"x"),
        death_id(b"redis-1", b"x"),
        death_id(b"redis-1", b"y"),
        death_id(b"redis-2", b"x"),
    }

    assert len(ids) == 7


# Facts


def test_facts_of_a_task() -> None:
    envelope = {"headers": {"task": "t", "id": "i", REPLAYED_HEADER: 2, "args": []}}

    assert facts_of(envelope) == {"task": "t", "task_id": "i", "replayed": 2}


@pytest.mark.parametrize(
    "envelope",
    [
        None,
        {},
        {"headers": None},
        {"headers": {}},
        {"headers": {"task": 5, "id": ["i"], REPLAYED_HEADER: "2"}},
        {"headers": {"task": None, "id": {}, REPLAYED_HEADER: None}},
    ],
)
def test_facts_of_what_is_no_task(envelope: Any) -> None:
    assert facts_of(envelope) == {"task": None, "task_id": None, "replayed": 0}


def test_the_worker_is_host_and_process() -> None:
    host, _, pid = worker_name().rpartition(":")

    assert host
    assert pid == str(os.getpid())


def test_every_fact_has_a_header_and_every_default_is_json() -> None:
    fields = parse_headers(headers_of(LETTER, "dead.1", ROOM)).fields

    assert len(fields) == len(get_type_hints(DeadLetter)) + 1
    for name, value in fields.items():
        if name.startswith("Dlq-"):
            json.loads(value)
