from __future__ import annotations

from typing import Any

import pytest
from kombu.transport.base import to_rabbitmq_queue_arguments

from kombu_jetstream.arguments import QueueArguments
from kombu_jetstream.errors import NotSupported, PreconditionFailed


def parse(**arguments: Any) -> QueueArguments:
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    return QueueArguments.parse("q", named)


@pytest.mark.parametrize("arguments", [None, {}, {"my-own": 1, "version": 2}])
def test_nothing_and_what_is_the_applications_own(arguments: Any) -> None:
    assert QueueArguments.parse("q", arguments) == QueueArguments()


def test_what_can_be_honoured() -> None:
    assert parse(
        x_expires=60_000,
        x_max_priority=10,
        x_dead_letter_exchange="dlx",
        x_dead_letter_routing_key="dead",
    ) == QueueArguments(
        expires=60.0,
        max_priority=10,
        dead_letter_exchange="dlx",
        dead_letter_routing_key="dead",
    )
    assert parse(x_message_ttl=1500).message_ttl == 1.5
    assert parse(x_message_ttl=0).message_ttl == 0.0


def test_kombus_names_for_them() -> None:
    made = to_rabbitmq_queue_arguments({}, expires=60.0, message_ttl=2.5, max_priority=7)

    parsed = QueueArguments.parse("q", made)

    assert parsed == QueueArguments(message_ttl=2.5, expires=60.0, max_priority=7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-queue-mode", "lazy"),
        ("x-queue-version", 2),
        ("x-queue-leader-locator", "balanced"),
        ("x-queue-type", "classic"),
        ("x-queue-type", "quorum"),
    ],
)
def test_how_rabbitmq_would_store_the_queue_has_no_effect(name: str, value: Any) -> None:
    assert QueueArguments.parse("q", {name: value}) == QueueArguments()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x-max-length": 5}, "'x-max-length' of queue 'q' is not supported; .*stream_max_bytes"),
        ({"x-max-length-bytes": 5}, "stream_max_bytes"),
        ({"x-overflow": "reject-publish"}, "stream_max_bytes"),
        ({"x-single-active-consumer": True}, "run one worker"),
        ({"x-delivery-limit": 3}, "max_deliveries"),
        ({"x-queue-type": "stream"}, "queue type 'stream'"),
        ({"x-queue-type": ["classic"]}, "queue type"),
        ({"x-something-new": 1}, "'x-something-new' of queue 'q' is not supported"),
        ({"x-message-ttl": 5, "x-dead-letter-exchange": "e"}, "use a countdown"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupported, match=message):
        QueueArguments.parse("q", arguments)


@pytest.mark.parametrize("value", ["60", None, True, -1, [], float("nan")])
@pytest.mark.parametrize("name", ["x-message-ttl", "x-expires"])
def test_bad_times_are_refused(name: str, value: Any) -> None:
    with pytest.raises(PreconditionFailed, match=f"expected '{name}' of queue 'q' to be millis"):
        QueueArguments.parse("q", {name: value})


def test_a_queue_may_not_expire_at_once() -> None:
    with pytest.raises(PreconditionFailed, match=">= 1, got 0"):
        parse(x_expires=0)


@pytest.mark.parametrize("value", ["5", None, True, -1, 256, 1.5])
def test_bad_priorities_are_refused(value: Any) -> None:
    with pytest.raises(PreconditionFailed, match="to be 0 to 255"):
        parse(x_max_priority=value)


def test_arguments_that_are_no_mapping_are_refused() -> None:
    bad: Any = ["x-expires"]
    with pytest.raises(PreconditionFailed, match="queue 'q' are no mapping"):
        QueueArguments.parse("q", bad)


def test_a_maximum_of_0_is_no_priorities() -> None:
    assert parse(x_max_priority=0).max_priority is None
    assert parse(x_max_priority=255).max_priority == 255


@pytest.mark.parametrize("value", [None, 5, ["e"]])
@pytest.mark.parametrize("name", ["x-dead-letter-exchange", "x-dead-letter-routing-key"])
def test_bad_names_are_refused(name: str, value: Any) -> None:
    with pytest.raises(PreconditionFailed, match=f"expected '{name}' of queue 'q' to be text"):
        QueueArguments.parse("q", {name: value})


def test_a_dead_letter_routing_key_needs_an_exchange() -> None:
    with pytest.raises(PreconditionFailed, match="needs an 'x-dead-letter-exchange'"):
        parse(x_dead_letter_routing_key="k")
