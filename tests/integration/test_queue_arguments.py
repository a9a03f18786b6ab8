"""Queue arguments and message expiry: what can be honoured is, what cannot is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from kombu_jetstream.errors import NotSupported, PreconditionFailed
from kombu_jetstream.server import NatsServer
from tests.acceptance.letters import Letterbox
from tests.messaging import (
    Received,
    count,
    declare,
    drain_quiet,
    send,
    state_of,
    take_all,
)
from tests.servers import api_request, eventually

Connect = Callable[..., Connection]


@pytest.fixture
def box(shared_nats_server: NatsServer, namespace: str) -> Letterbox:
    return Letterbox(shared_nats_server, namespace)


def with_arguments(name: str, **arguments: Any) -> Queue:
    return Queue(
        name, queue_arguments={f"x-{key.replace('_', '-')}": v for key, v in arguments.items()}
    )


# Expiry of messages


@pytest.mark.requires_nats("2.11")
@pytest.mark.parametrize(
    ("expiration", "ttl"),
    [(0, "1s"), (0.001, "1s"), (1, "1s"), (1.1, "2s"), (90, "90s"), (1e9, "1000000000s")],
)
def test_expiration_is_a_ttl_of_whole_seconds(
    connection: Connection, box: Letterbox, expiration: float, ttl: str
) -> None:
    work = Queue("work")
    declare(connection, work)

    send(connection, "x", to=work, expiration=expiration)

    (stored,) = box.stored("medium")
    assert stored.headers["Nats-TTL"] == ttl


@pytest.mark.requires_nats("2.11")
def test_an_expired_message_is_gone(connection: Connection) -> None:
    work = Queue("work")
    declare(connection, work)

    send(connection, "expires", to=work, expiration=0.5)
    send(connection, "stays", to=work)

    assert count(connection, work) == 2
    eventually(lambda: count(connection, work) == 1, within=4)
    assert take_all(connection, work) == ["stays"]


@pytest.mark.requires_nats("2.11")
def test_the_shorter_of_the_queues_and_the_messages_ttl_counts(
    connection: Connection, box: Letterbox
) -> None:
    work = Queue("work", message_ttl=60)
    declare(connection, work)

    for expiration in (None, 30, 90):
        send(connection, "x", to=work, expiration=expiration)

    assert [s.headers["Nats-TTL"] for s in box.stored("medium")] == ["60s", "30s", "60s"]


def test_an_expiration_that_is_no_number_is_refused(connection: Connection) -> None:
    work = Queue("work")
    declare(connection, work)

    with connection.channel() as channel:
        message = channel.prepare_message("x", properties={"expiration": "soon"})
        with pytest.raises(PreconditionFailed, match="'expiration'"):
            channel.basic_publish(message, routing_key="work")

    assert count(connection, work) == 0


# x-expires


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused queues go within a second or two, not ten."""
    monkeypatch.setattr("kombu_jetstream.registry.MIN_EXPIRES", 1.0)


def streams(server: NatsServer, namespace: str) -> dict[str, dict[str, Any]]:
    return state_of(server.url, namespace)


def consumers(server: NatsServer, namespace: str, queue: str) -> list[str]:
    state = streams(server, namespace)
    return [name for name, each in state.items() if queue in each["consumers"]]


@pytest.mark.usefixtures("fast")
def test_an_unused_queue_goes_with_its_messages_and_bindings(
    connect: Connect, shared_nats_server: NatsServer, namespace: str
) -> None:
    with connect() as connection:
        exchange = Exchange("news", type="topic", durable=True)
        declare(connection, Queue("gone", exchange, routing_key="a.#", expires=1.0))
        declare(connection, Queue("kept", exchange, routing_key="a.#"))
        send(connection, "x", exchange="news", key="a.b")
    eventually(lambda: consumers(shared_nats_server, namespace, "gone") == [], within=8)
    time.sleep(1.0)  # a queue is left alone until it is twice as old as it may be unused

    with connect() as later:
        with later.channel() as channel:
            destinations = {binding["destination"] for binding in channel.get_bindings()}
        assert take_all(later, "kept") == ["x"]

    assert destinations == {"kept"}
    subjects = streams(shared_nats_server, namespace)[f"{namespace}_medium"]["subjects"]
    assert subjects == {}


@pytest.mark.usefixtures("fast")
def test_a_queue_whose_consumer_has_no_room_is_in_use(
    connect: Connect, shared_nats_server: NatsServer, namespace: str
) -> None:
    """A worker busy with long tasks of another queue asks nothing of this one for a while."""
    connection = connect()
    busy, rare = Queue("busy"), Queue("rare", expires=1.5)
    declare(connection, busy, rare)
    channel = connection.channel()
    received = Received(channel, "busy", "rare", ack=False, prefetch_count=1)
    received.consume()
    send(connection, "long", to=busy)
    received.wait(1)

    drain_quiet(connection, quiet=6.0)

    assert len(consumers(shared_nats_server, namespace, "rare")) == 3
    send(connection, "x", to=rare)
    received.messages[0].ack()
    assert received.wait(2) == ["long", "x"]


@pytest.mark.usefixtures("fast")
def test_an_expired_queue_that_is_declared_again_has_what_was_sent_meanwhile(
    connect: Connect, shared_nats_server: NatsServer, namespace: str
) -> None:
    """More than AMQP promises: a producer need not know that the queue was unused."""
    connection = connect()
    declare(connection, Queue("rare", expires=1.0))
    eventually(lambda: consumers(shared_nats_server, namespace, "rare") == [], within=8)
    send(connection, "x", to="rare")

    declare(connection, Queue("rare", expires=1.0))

    assert take_all(connection, "rare") == ["x"]


def test_a_consumer_that_vanished_is_made_again(
    connection: Connection, shared_nats_server: NatsServer, namespace: str
) -> None:
    """While nothing was asked of it, so that the server had nobody to tell."""
    work = Queue("work")
    declare(connection, work)
    received = Received(connection.channel(), "work", ack=False, prefetch_count=1)
    received.consume()
    send(connection, "first", to=work)
    received.wait(1)
    drain_quiet(connection)
    api_request(shared_nats_server.url, f"CONSUMER.DELETE.{namespace}_low.work")

    received.messages[0].ack()
    send(connection, "second", to=work, priority=1)

    assert received.wait(2, within=15) == ["first", "second"]


def test_expires_may_be_changed(
    connection: Connection, shared_nats_server: NatsServer, namespace: str
) -> None:
    def threshold() -> float:
        subject = f"CONSUMER.INFO.{namespace}_medium.work"
        config = api_request(shared_nats_server.url, subject)["config"]
        return float(config.get("inactive_threshold", 0)) / 1e9

    seen = []
    for expires in (60.0, 90.0, None, 60.0):
        declare(connection, Queue("work", expires=expires))
        seen.append(threshold())

    assert seen == [60.0, 90.0, 0.0, 60.0]


# x-max-priority


@pytest.mark.parametrize(
    ("most", "order"),
    [
        (10, [10, 8, 7, 4, 3, 1, None, 0]),
        (9, [9, 7, 6, 4, 3, 1, None, 0]),
        (255, [255, 171, 170, 86, 85, None, 0]),
        (3, [3, 2, 1, None, 0]),
        (2, [2, 1, None, 0]),
        (1, [1, None, 0]),
    ],
)
def test_priorities_of_a_queue_with_a_maximum_are_ordered_by_number(
    connection: Connection, most: int, order: list[int | None]
) -> None:
    """As in RabbitMQ: none is the least, and a message of less urgency never comes before one of
    more."""
    work = Queue("work", max_priority=most)
    declare(connection, work)
    for priority in reversed(order):
        send(connection, priority, to=work, priority=priority)

    taken = [priority or 0 for priority in take_all(connection, work)]

    def third(priority: int) -> int:
        return priority * 3 // (most + 1)

    assert [third(p) for p in taken] == sorted((third(p) for p in taken), reverse=True)
    assert sorted(taken) == sorted(priority or 0 for priority in order)
    assert taken[0] > 0


def test_a_priority_beyond_the_maximum_is_the_maximum(connection: Connection) -> None:
    work = Queue("work", max_priority=5)
    declare(connection, work)
    for priority in (0, 4, 200):
        send(connection, priority, to=work, priority=priority)

    assert take_all(connection, work) == [4, 200, 0]


# x-dead-letter-exchange


@pytest.fixture
def dead_letters(connection: Connection) -> Queue:
    """A queue bound to the exchange ``dead`` for keys that start with ``work``."""
    queue = Queue("graveyard", Exchange("dead", type="topic"), routing_key="work.#")
    declare(connection, queue)
    return queue


def reject(connection: Connection, queue: Queue) -> None:
    with connection.channel() as channel:
        message = channel.basic_get(queue.name)
        assert message is not None
        message.reject()


def test_a_rejected_message_goes_to_the_queues_dead_letter_exchange(
    connection: Connection, dead_letters: Queue, box: Letterbox
) -> None:
    work = with_arguments("work", dead_letter_exchange="dead")
    declare(connection, work)
    send(connection, "x", to=work, headers={"task": "noop", "id": "t1"}, expiration=60)

    reject(connection, work)

    with connection.channel() as channel:
        message = channel.basic_get(dead_letters.name)
    assert message is not None
    assert message.headers == {"task": "noop", "id": "t1"}
    assert message.delivery_info["exchange"] == "dead"
    assert message.delivery_info["routing_key"] == "work"
    assert "expiration" not in message.properties
    assert [stored.subject for stored in box.stored("medium")] == [
        f"{box.namespace}.medium.graveyard"
    ]
    assert box.stored() == []


def test_with_the_queues_dead_letter_routing_key(
    connection: Connection, dead_letters: Queue
) -> None:
    work = with_arguments(
        "work", dead_letter_exchange="dead", dead_letter_routing_key="work.failed"
    )
    declare(connection, work)
    send(connection, "x", to=work)

    reject(connection, work)

    with connection.channel() as channel:
        message = channel.basic_get(dead_letters.name)
    assert message is not None
    assert message.delivery_info["routing_key"] == "work.failed"


def test_a_message_delivered_too_often_goes_there_too(connect: Connect, box: Letterbox) -> None:
    connection = connect(max_deliveries=2)
    graveyard = Queue("graveyard", Exchange("dead"), routing_key="work")
    work = with_arguments("work", dead_letter_exchange="dead")
    declare(connection, graveyard, work)
    send(connection, "x", to=work)

    with connection.channel() as channel:
        for _ in range(2):
            message = channel.basic_get("work")
            assert message is not None
            message.requeue()
        assert channel.basic_get("work") is None

    assert take_all(connection, graveyard) == ["x"]
    assert box.stored() == []


@pytest.mark.parametrize("confirms", ["each", "pipelined"])
def test_it_arrives_there_once_although_it_is_tried_again(connect: Connect, confirms: str) -> None:
    """The process died between the publish and the end of the original."""
    connection = connect(publish_confirms=confirms, visibility_timeout=1)
    graveyard = Queue("graveyard", Exchange("dead"), routing_key="work")
    work = with_arguments("work", dead_letter_exchange="dead")
    declare(connection, graveyard, work)
    send(connection, "x", to=work, headers={"dedup_id": "i1"})
    first = connection.channel()
    message = first.basic_get("work")
    death = message.delivery
    assert first._forward(death, json.loads(death.payload))

    second = connect(visibility_timeout=1)
    again = eventually(lambda: second.default_channel.basic_get("work"), within=5)
    again.reject()

    assert take_all(second, graveyard) == ["x"]
    assert count(second, work) == 0


def test_without_a_queue_behind_the_exchange_the_message_is_a_dead_letter(
    connection: Connection, box: Letterbox, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ drops it."""
    work = with_arguments("work", dead_letter_exchange="nowhere")
    declare(connection, work)
    send(connection, "x", to=work, headers={"task": "noop", "id": "t1"})

    reject(connection, work)

    assert box.wait_for("t1").reason == "rejected"
    assert "nothing is bound to exchange 'nowhere' for 'work'" in caplog.text


def test_a_malformed_message_is_a_dead_letter_whatever_the_queue_says(
    connection: Connection, dead_letters: Queue, box: Letterbox, shared_nats_server: NatsServer
) -> None:
    """No consumer of another queue could read it either."""
    work = with_arguments("work", dead_letter_exchange="dead")
    declare(connection, work)
    with connection.channel() as channel:
        channel.connection.publisher.publish(f"{box.namespace}.medium.work".encode(), b"x", b"")
        assert channel.basic_get("work") is None

    (stored,) = eventually(box.stored)
    assert stored.headers["Dlq-Reason"] == '"malformed"'
    assert count(connection, dead_letters) == 0


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x-max-length": 10}, "'x-max-length' .* stream_max_bytes"),
        ({"x-max-length-bytes": 10}, "'x-max-length-bytes' .* stream_max_bytes"),
        ({"x-overflow": "drop-head"}, "'x-overflow' .* refuses new messages"),
        ({"x-single-active-consumer": True}, "'x-single-active-consumer' .* one worker"),
        ({"x-delivery-limit": 3}, "'x-delivery-limit' .* max_deliveries"),
        ({"x-queue-type": "stream"}, "queue type 'stream'"),
        ({"x-anything": 1}, "'x-anything' of queue 'work' is not supported"),
        (
            {"x-message-ttl": 1000, "x-dead-letter-exchange": "dead"},
            "'x-message-ttl' with 'x-dead-letter-exchange' .* use a countdown",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused_with_what_to_do_instead(
    connection: Connection, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotSupported, match=message):
        declare(connection, Queue("work", queue_arguments=arguments))

    with connection.channel() as channel, pytest.raises(connection.channel_errors):
        channel.queue_declare("work", passive=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x-message-ttl": -1}, "'x-message-ttl' of queue 'work' to be milliseconds >= 0"),
        ({"x-message-ttl": "60000"}, "'x-message-ttl' .* got '60000'"),
        ({"x-message-ttl": float("nan")}, "'x-message-ttl'"),
        ({"x-expires": 0}, "'x-expires' of queue 'work' to be milliseconds >= 1, got 0"),
        ({"x-max-priority": 256}, "'x-max-priority' of queue 'work' to be 0 to 255"),
        ({"x-max-priority": True}, "'x-max-priority'"),
        ({"x-max-priority": "10"}, "'x-max-priority'"),
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_refused(
    connection: Connection, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(PreconditionFailed, match=message):
        declare(connection, Queue("work", queue_arguments=arguments))


def test_arguments_about_how_rabbitmq_stores_a_queue_are_taken(connection: Connection) -> None:
    arguments = {"x-queue-type": "quorum", "x-queue-mode": "lazy", "x-queue-version": 2}
    work = Queue("work", queue_arguments=arguments)
    declare(connection, work)

    send(connection, "x", to=work)

    assert take_all(connection, work) == ["x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auto_delete": True, "max_priority": 10}, "such a queue has one level"),
        (
            {"exclusive": True, "queue_arguments": {"x-dead-letter-exchange": "dead"}},
            "which is one connection's",
        ),
    ],
    ids=["priorities of an auto-delete queue", "dead letters of an exclusive queue"],
)
def test_what_a_kind_of_queue_cannot_honour_is_refused(
    connection: Connection, arguments: dict[str, Any], message: str
) -> None:
    def use() -> None:
        with connection.channel() as channel:
            Queue("work", **arguments).bind(channel).declare()
            channel.basic_get("work")

    with pytest.raises(NotSupported, match=message):
        use()


def test_a_broadcast_queue_may_have_priorities_it_does_not_use(connection: Connection) -> None:
    """Celery's task_queue_max_priority gives them to every queue."""
    news = Queue("news.1", Exchange("news", type="fanout"), auto_delete=True, max_priority=10)

    declare(connection, news)


def test_a_message_that_cannot_be_published_to_the_exchange_is_a_dead_letter(
    connection: Connection,
    dead_letters: Queue,
    box: Letterbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever a foreign client wrote into it."""
    work = with_arguments("work", dead_letter_exchange="dead")
    declare(connection, work)
    send(connection, "x", to=work, headers={"task": "noop", "id": "t1"})
    channel = connection.channel()
    message = channel.basic_get("work")
    assert message is not None

    def fail(*args: Any, **kwargs: Any) -> bool:
        raise ValueError("a header with a line break")

    monkeypatch.setattr(channel._outgoing, "forward", fail)
    message.reject()

    assert box.wait_for("t1").reason == "rejected"
    assert "cannot be published to its dead-letter exchange" in caplog.text
    assert count(connection, work) == 0


@pytest.mark.parametrize("by", ["queue", "message"])
def test_where_the_server_removes_nothing_an_expired_message_is_not_handed_on(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    connection = connect()
    jetstream = connection.connection.jetstream
    work = Queue("work", message_ttl=0.5 if by == "queue" else None)
    declare(connection, work)
    jetstream.has_ttl = False  # as before 2.11
    send(connection, "old", to=work, expiration=0.5 if by == "message" else None)
    sent_at = time.monotonic()
    eventually(lambda: time.monotonic() - sent_at > 0.6)
    send(connection, "new", to=work, expiration=60 if by == "message" else None)

    assert take_all(connection, work) == ["new"]
    eventually(lambda: count(connection, work) == 0)
