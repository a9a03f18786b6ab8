from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nats.js import api

from kombu_jetstream.errors import PreconditionFailed, QueueNameInvalid
from kombu_jetstream.options import Options
from kombu_jetstream.topology import (
    LEVELS,
    MAX_TOKEN_BYTES,
    Difference,
    Names,
    consumer_config,
    dead_letter_stream,
    decode_token,
    differences,
    encode_token,
    level_of,
    level_stream,
    levels,
    queue_token,
    registry_stream,
)

#: Any text Python can hold, lone surrogates too: a file name may become a queue name.
any_text = st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=40)

#: ADR-6: what is allowed in names on every platform, the escape character added.
TOKEN = re.compile(r"[A-Za-z0-9_=-]+")

NAMES = Names("ns")
NEWEST = 2


@given(any_text)
@example("")
@example("=")
@example("=41")
@example("celery@host.celery.pidbox")
@example("\ud800")
@example("a b*>/\\.\t\r\n\0")
def test_tokens_can_be_undone(name: str) -> None:
    token = encode_token(name)

    assert TOKEN.fullmatch(token)
    assert decode_token(token) == name


@given(any_text, any_text)
def test_different_names_have_different_tokens(name: str, other: str) -> None:
    assert (encode_token(name) == encode_token(other)) == (name == other)


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("celery", "celery"),
        ("a_b-C9", "a_b-C9"),
        ("", "="),
        ("a b", "a=20b"),
        ("a.b", "a=2Eb"),
        ("=", "=3D"),
        ("é", "=C3=A9"),
        ("²", "=C2=B2"),  # a digit to str.isdigit, two bytes on the wire
    ],
)
def test_tokens_stay_readable(name: str, token: str) -> None:
    assert encode_token(name) == token


@given(any_text)
def test_a_token_of_a_token_is_another(name: str) -> None:
    """Two encodings do not cancel out: a queue named as another's token is not that one."""
    assert decode_token(encode_token(encode_token(name))) == encode_token(name)


def test_a_queue_name_that_has_no_room_is_refused() -> None:
    assert queue_token("q" * MAX_TOKEN_BYTES) == "q" * MAX_TOKEN_BYTES
    assert queue_token("." * (MAX_TOKEN_BYTES // 3))

    for name in ("q" * (MAX_TOKEN_BYTES + 1), "." * (MAX_TOKEN_BYTES // 3 + 1), "ü" * 40):
        with pytest.raises(QueueNameInvalid, match=rf"bytes encoded, .* {MAX_TOKEN_BYTES}"):
            queue_token(name)


# Levels


def by_level(options: Options, max_priority: int | None = None) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for priority in (None, *range(12)):
        found.setdefault(level_of(priority, options, max_priority), []).append(priority)
    return found


def test_levels_of_amqp_priorities() -> None:
    assert by_level(Options()) == {
        "medium": [None, 0, 4, 5, 6],
        "low": [1, 2, 3],
        "high": [7, 8, 9, 10, 11],
    }
    assert level_of(-1, Options()) == "medium"


@pytest.mark.parametrize("priority", ["9", "high", [], float("nan")])
@pytest.mark.parametrize("order", ["amqp", "redis"])
def test_a_priority_that_is_no_number_is_refused(priority: Any, order: Any) -> None:
    with pytest.raises(PreconditionFailed, match="expected a message's priority to be a number"):
        level_of(priority, Options(priority_order=order), 10)


def test_levels_of_redis_priorities() -> None:
    """There 0 is the most urgent, and what a message without one is published with."""
    assert by_level(Options(priority_order="redis")) == {
        "medium": [None, 3, 4, 5],
        "high": [0, 1, 2],
        "low": [6, 7, 8, 9, 10, 11],
    }


def test_one_level_takes_all() -> None:
    options = Options(priority_levels=1)

    assert by_level(options) == {"medium": [None, *range(12)]}
    assert by_level(options, max_priority=5) == {"medium": [None, *range(12)]}
    assert levels(options) == ("medium",)
    assert levels(Options()) == LEVELS


@pytest.mark.parametrize(
    ("max_priority", "expected"),
    [
        (2, {"low": [None, 0], "medium": [1], "high": list(range(2, 12))}),
        (9, {"low": [None, 0, 1, 2, 3], "medium": [4, 5, 6], "high": [7, 8, 9, 10, 11]}),
        (10, {"low": [None, 0, 1, 2, 3], "medium": [4, 5, 6, 7], "high": [8, 9, 10, 11]}),
    ],
)
def test_levels_of_a_queue_with_a_maximum(max_priority: int, expected: dict[str, Any]) -> None:
    assert by_level(Options(), max_priority) == expected


@given(st.integers(1, 255), st.integers(-5, 300), st.integers(-5, 300))
def test_a_higher_priority_is_never_in_a_lower_level(maximum: int, one: int, two: int) -> None:
    options = Options()
    order = [LEVELS.index(level_of(p, options, maximum)) for p in sorted((one, two))]

    assert order[0] >= order[1]


# Names


def test_all_names_of_a_namespace() -> None:
    assert NAMES.stream("high") == "ns_high"
    assert NAMES.dead_letter_stream == "ns_dlq"
    assert NAMES.registry_stream == "ns_registry"
    assert NAMES.mirror_stream == "ns_mirror"
    assert NAMES.subject("low", "a b") == "ns.low.a=20b"
    assert NAMES.dead_letter_subject("a.b") == "ns.dlq.a=2Eb"
    assert NAMES.registry_queue("q") == "ns.registry.queue.q"
    assert NAMES.registry_exchange("") == "ns.registry.exchange.="
    assert NAMES.registry_binding("e", "q", "a.#") == "ns.registry.binding.e.q.a=2E=23"
    assert NAMES.transient_queue("r.1") == "ns.q.r=2E1"
    assert NAMES.exchange("e", "") == "ns.x.e"
    assert NAMES.exchange("e", "a.>") == "ns.x.e.a.>"
    assert NAMES.delay_subject("high", "q", "id", "m") == "ns.high.@delay.q.id.m"
    assert NAMES.delayed("high") == "ns.high.@delay.>"
    assert NAMES.delayed("high", "a b") == "ns.high.@delay.a=20b.>"


@given(any_text.filter(lambda name: len(encode_token(name)) <= MAX_TOKEN_BYTES), any_text, any_text)
def test_delayed_messages_are_outside_of_every_consumers_filter(
    queue: str, task_id: str, message_id: str
) -> None:
    delayed = NAMES.delay_subject("medium", queue, task_id, message_id).split(".")

    assert len(delayed) == 6
    assert len(NAMES.subject("medium", queue).split(".")) == 3
    assert delayed[:3] == ["ns", "medium", "@delay"]
    assert encode_token(queue) != "@delay"
    assert all(len(token) <= 200 for token in delayed)


def test_ids_too_long_for_a_subject_are_digested() -> None:
    one = NAMES.delay_subject("low", "q", "x" * 500, "m" * 500)

    assert len(one) < 200
    assert one != NAMES.delay_subject("low", "q", "x" * 501, "m" * 500)
    assert one == NAMES.delay_subject("low", "q", "x" * 500, "m" * 500)


# Configurations


def test_a_level_is_a_work_queue_on_file() -> None:
    config = level_stream(Options(namespace="ns"), "high", NEWEST)

    assert config.name == "ns_high"
    assert config.subjects == ["ns.high.>"]
    assert config.retention is api.RetentionPolicy.WORK_QUEUE
    assert config.storage is api.StorageType.FILE
    assert config.allow_msg_ttl
    assert config.allow_msg_schedules
    assert (config.max_bytes, config.max_age, config.duplicate_window) == (-1, 0, 120.0)


def test_a_limited_stream_refuses_and_has_no_schedules() -> None:
    """The server refuses schedules in a stream that discards new messages (10052)."""
    config = level_stream(Options(stream_max_bytes=10_000), "low", NEWEST)

    assert config.max_bytes == 10_000
    assert config.discard is api.DiscardPolicy.NEW
    assert config.allow_msg_schedules is None


@pytest.mark.parametrize(
    ("level", "ttl", "schedules"), [(0, None, None), (1, True, None), (2, True, True)]
)
def test_older_servers_are_not_asked_for_what_they_would_drop(
    level: int, ttl: bool | None, schedules: bool | None
) -> None:
    config = level_stream(Options(), "low", level)

    assert (config.allow_msg_ttl, config.allow_msg_schedules) == (ttl, schedules)
    assert registry_stream(Options(), level).allow_msg_ttl == ttl


def test_options_reach_every_stream() -> None:
    options = Options(
        namespace="ns", stream_storage="memory", stream_replicas=3, stream_max_age=600.0
    )

    for config in (
        level_stream(options, "low", NEWEST),
        dead_letter_stream(options, NEWEST),
        registry_stream(options, NEWEST),
    ):
        assert config.storage is api.StorageType.MEMORY
        assert config.num_replicas == 3
    assert level_stream(options, "low", NEWEST).max_age == 600.0
    assert registry_stream(options, NEWEST).max_age == 0


def test_dead_letters_are_limited_by_their_own_options() -> None:
    config = dead_letter_stream(
        Options(dead_letter_max_age=7200.0, dead_letter_max_bytes=5_000_000), NEWEST
    )

    assert config.retention is api.RetentionPolicy.LIMITS
    assert (config.max_age, config.max_bytes) == (7200.0, 5_000_000)
    assert config.discard is not api.DiscardPolicy.NEW
    forever = dead_letter_stream(
        Options(dead_letter_max_age=None, dead_letter_max_bytes=None), NEWEST
    )
    assert (forever.max_age, forever.max_bytes) == (0, -1)


@given(
    st.floats(1e3, 1e7) | st.none(),
    st.floats(0.1, 1e5).map(lambda seconds: round(seconds, 3)),
    st.floats(10.0, 1e3).map(lambda seconds: round(seconds, 3)),
)
def test_a_window_of_the_dead_letters_fits_their_age(
    max_age: float | None, visibility_timeout: float, dedup_window: float
) -> None:
    """The server refuses a duplicate window longer than the maximal age (10052)."""
    config = dead_letter_stream(
        Options(
            dead_letter_max_age=max_age,
            visibility_timeout=visibility_timeout,
            dedup_window=dedup_window,
        ),
        NEWEST,
    )

    assert config.duplicate_window is not None
    assert max_age is None or config.duplicate_window <= max_age


def test_a_consumer_never_gives_up_or_stalls_by_itself() -> None:
    config = consumer_config(Options(namespace="ns", visibility_timeout=45.0), "low", "a b")

    assert config.name == config.durable_name == "a=20b"
    assert config.filter_subject == "ns.low.a=20b"
    assert config.ack_policy is api.AckPolicy.EXPLICIT
    assert config.ack_wait == 45.0
    assert (config.max_deliver, config.max_ack_pending) == (-1, -1)
    assert config.inactive_threshold is None
    assert consumer_config(Options(), "low", "q", inactive_after=60.0).inactive_threshold == 60.0


def as_the_server_answers(config: Any) -> Any:
    return type(config).from_response(config.as_dict())


@given(st.sampled_from(LEVELS), st.integers(0, 2), st.booleans())
def test_what_the_server_took_over_makes_no_difference(
    level: Any, api_level: int, limited: bool
) -> None:
    options = Options(stream_max_bytes=1000 if limited else None)

    for config in (
        level_stream(options, level, api_level),
        dead_letter_stream(options, api_level),
        registry_stream(options, api_level),
        consumer_config(options, level, "q", inactive_after=60.0),
    ):
        assert differences(as_the_server_answers(config), config) == []


def test_differences_are_told_with_plain_values() -> None:
    expected = level_stream(Options(), "low", NEWEST)
    found = as_the_server_answers(expected).evolve(
        retention=api.RetentionPolicy.LIMITS, max_age=5.0, description="an operator's"
    )

    assert differences(found, expected) == [
        Difference("retention", "limits", "workqueue"),
        Difference("max_age", 5.0, None),
    ]


def test_what_an_old_server_dropped_is_a_difference() -> None:
    expected = level_stream(Options(), "low", NEWEST)
    found = as_the_server_answers(level_stream(Options(), "low", 0))

    assert {d.field for d in differences(found, expected)} >= {
        "allow_msg_ttl",
        "allow_msg_schedules",
    }
