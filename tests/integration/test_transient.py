"""Queues of one connection: nothing of them is ever stored on the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from kombu.asynchronous import Hub
from kombu.common import Broadcast
from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from kombu_jetstream.errors import PreconditionFailed, QueueMissing
from kombu_jetstream.jetstream import JetStream
from kombu_jetstream.server import NatsServer
from tests.messaging import (
    Received,
    count,
    declare,
    drain,
    drain_quiet,
    send,
    state_of,
    take_all,
)
from tests.servers import eventually

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]
State = Callable[[], dict[str, Any]]

TOPIC = Exchange("t", type="topic")

REPLIES = Queue("replies", TOPIC, "r.*", durable=False, expires=60)

KINDS = {
    "exclusive": lambda: Queue("q", TOPIC, "a.*", exclusive=True),
    "not durable, expires": lambda: Queue(
        "q", TOPIC, "a.*", durable=False, auto_delete=True, expires=60
    ),
    "bound to a fanout exchange": lambda: Queue(
        "q", Exchange("f", type="fanout"), auto_delete=True
    ),
    "broadcast": lambda: Broadcast("all", queue="q"),
    "named by the server": lambda: Queue("", TOPIC, "a.*", exclusive=True),
}

AUTO_DELETE = Queue("kept", Exchange("d"), "k", durable=True, auto_delete=True)


@pytest.fixture
def state(shared_nats_server: NatsServer, namespace: str) -> State:
    """Returns what JetStream keeps for the test now."""
    return lambda: state_of(shared_nats_server.url, namespace)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_on_the_server(connect: Connect, state: State, kind: str) -> None:
    queue = KINDS[kind]()
    with connect() as before:
        queue.exchange(before.channel()).declare()  # exchanges stay, as they do in RabbitMQ
    empty = state()
    connection, sending = connect(), connect()
    received = Received(connection.channel(), queue)
    received.consume()
    name = received.queues[0].name

    send(sending, *range(20), exchange=queue.exchange, key="a.b")
    send(sending, *range(20, 40), to=name)

    assert sorted(received.wait(40)) == list(range(40))
    assert state() == empty
    connection.close()
    send(sending, "lost", to=name)
    send(sending, "lost", exchange=queue.exchange, key="a.b")
    assert state() == empty


def test_a_thousand_replies_leave_nothing(connect: Connect, state: State) -> None:
    connection = connect()
    REPLIES.exchange(connection.channel()).declare()
    empty = state()

    for number in range(50):
        with connection.channel() as channel:
            reply = Queue(f"reply.{number}", TOPIC, f"r.{number}", exclusive=True)
            received = Received(channel, reply)
            received.consume()
            send(connection, *range(20), exchange="t", key=f"r.{number}")
            received.wait(20)
            received.cancel()
            reply(channel).delete()

    assert connection.connection.transient == {}
    assert state() == empty


def test_every_connection_gets_a_broadcast(connect: Connect) -> None:
    connections = [connect() for _ in range(3)]
    received = []
    for connection in connections:
        received.append(Received(connection.channel(), Broadcast("tasks")))
        received[-1].consume()

    send(connections[0], *range(10), exchange="tasks")

    assert all(each.wait(10) == list(range(10)) for each in received)


def test_order_is_kept(connect: Connect) -> None:
    connection, sending = connect(), connect()
    received = Received(connection.channel(), REPLIES)
    received.consume()

    send(sending, *range(500), exchange="t", key="r.1")

    assert received.wait(500) == list(range(500))


def test_what_comes_before_the_first_consumer_is_kept(connect: Connect) -> None:
    connection, sending = connect(), connect()
    declare(connection, REPLIES)

    send(sending, 1, 2, exchange="t", key="r.1")
    eventually(lambda: count(connection, "replies") == 2)
    received = Received(connection.channel(), REPLIES)
    received.consume()

    assert received.wait(2) == [1, 2]


def test_a_process_that_never_consumes_keeps_the_newest_and_says_so_once(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    connection, sending = connect(transient_buffer=10), connect()
    declare(connection, REPLIES)

    send(sending, *range(25), exchange="t", key="r.1")
    eventually(lambda: count(connection, "replies") == 10 and take_first(connection) == 15)
    send(sending, *range(30), exchange="t", key="r.1")
    eventually(lambda: count(connection, "replies") and take_first(connection) == 20)

    said = [r for r in caplog.records if "'replies'" in r.getMessage()]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING
    assert "transient_buffer" in said[0].getMessage()
    assert count(connection, "replies") <= 10


def take_first(connection: Connection) -> Any:
    """Get the oldest message and put it back."""
    with connection.channel() as channel:
        message = channel.basic_get("replies")
        body = message.decode()
        message.requeue()
    return body


def test_verbs_of_a_transient_queue(connect: Connect) -> None:
    connection = connect()
    declare(connection, REPLIES)
    channel = connection.channel()
    send(connection, 1, 2, 3, exchange="t", key="r.1")
    eventually(lambda: count(connection, "replies") == 3)

    assert channel.basic_get("replies", no_ack=True).decode() == 1
    with pytest.raises(PreconditionFailed, match="'replies' is not empty"):
        channel.queue_delete("replies", if_empty=True)
    assert channel.queue_purge("replies") == 2
    assert channel.basic_get("replies") is None
    received = Received(channel, REPLIES)
    received.consume()
    assert channel.queue_declare("replies", passive=True).consumer_count == 1
    with pytest.raises(PreconditionFailed, match="'replies' is in use"):
        connection.channel().queue_delete("replies", if_unused=True)
    received.cancel()
    channel.queue_delete("replies", if_unused=True, if_empty=True)
    with pytest.raises(QueueMissing):
        channel.queue_declare("replies", passive=True)


def test_another_connection_does_not_know_it(connect: Connect) -> None:
    declare(connect(), REPLIES)

    with pytest.raises(QueueMissing):
        connect().channel().queue_declare("replies", passive=True)


def test_prefetch_holds(connect: Connect) -> None:
    connection = connect()
    received = Received(connection.channel(), REPLIES, ack=False, prefetch_count=2)
    received.consume()
    send(connection, *range(6), exchange="t", key="r.1")
    received.wait(2)
    drain_quiet(connection, 0.2)
    assert received.bodies == [0, 1]

    received.messages[0].ack()
    received.wait(3)
    received.messages[1].reject()
    received.messages[2].ack()
    received.wait(5)
    drain_quiet(connection, 0.2)

    assert received.bodies == [0, 1, 2, 3, 4]


def test_prefetch_is_shared_with_a_queue_of_the_server(connect: Connect) -> None:
    connection = connect()
    work = Queue("work", Exchange("d"), "k")
    received = Received(connection.channel(), REPLIES, work, ack=False, prefetch_count=3)
    received.consume()

    send(connection, *["w"] * 5, to="work")
    received.wait(3)
    send(connection, *["r"] * 5, exchange="t", key="r.1")
    drain_quiet(connection, 0.2)

    assert received.bodies == ["w"] * 3
    for message in received.messages[:3]:
        message.ack()
    received.wait(6)
    drain_quiet(connection, 0.2)
    assert len(received) <= 3 + 3 + 2


def test_requeued_messages_come_again_first(connect: Connect) -> None:
    connection = connect()
    received = Received(connection.channel(), REPLIES, ack=False, prefetch_count=1)
    received.consume()
    send(connection, 1, 2, exchange="t", key="r.1")
    received.wait(1)

    received.messages[0].requeue()
    received.wait(2)
    assert received.bodies == [1, 1]
    assert received.messages[1].delivery_info["redelivered"]
    received.messages[1].ack()
    assert received.wait(3) == [1, 1, 2]


def test_consumers_of_one_connection_take_turns(connect: Connect) -> None:
    connection = connect()
    channels = [connection.channel() for _ in range(2)]
    pair = [Received(channel, REPLIES, ack=False, prefetch_count=5) for channel in channels]
    for received in pair:
        received.consume()

    send(connection, *range(10), exchange="t", key="r.1")
    drain(connection, lambda: sum(map(len, pair)) == 10)

    assert sorted(pair[0].bodies + pair[1].bodies) == list(range(10))
    assert len(pair[0]) == len(pair[1]) == 5


def test_what_a_closed_channel_held_goes_to_the_next_consumer(connect: Connect) -> None:
    connection = connect()
    first = Received(connection.channel(), REPLIES, ack=False, prefetch_count=3)
    first.consume()
    send(connection, *range(5), exchange="t", key="r.1")
    first.wait(3)

    first.channel.close()
    second = Received(connection.channel(), REPLIES)
    second.consume()

    assert sorted(second.wait(5)) == list(range(5))


def test_messages_expire_in_it(connect: Connect) -> None:
    connection = connect()
    queue = Queue("q", TOPIC, "r.*", exclusive=True, message_ttl=0.2)
    declare(connection, queue)
    send(connection, "old", exchange="t", key="r.1")
    eventually(lambda: count(connection, "q") == 1)
    time.sleep(0.25)  # its life is over; nothing happens then that could be waited for
    send(connection, "new", exchange="t", key="r.1")

    received = Received(connection.channel(), queue)
    received.consume()

    assert received.wait(1) == ["new"]


def test_an_unused_queue_expires(connect: Connect) -> None:
    connection = connect()
    declare(connection, Queue("q", TOPIC, "r.*", durable=False, expires=0.3))

    def is_gone() -> bool:
        drain_quiet(connection, 0.1)
        return "q" not in connection.connection.transient

    eventually(is_gone, within=5)


def test_a_used_queue_does_not_expire(connect: Connect) -> None:
    connection = connect()
    queue = Queue("q", TOPIC, "r.*", durable=False, expires=0.3)
    received = Received(connection.channel(), queue)
    received.consume()

    drain_quiet(connection, 2.5)
    send(connection, 1, exchange="t", key="r.1")

    assert received.wait(1) == [1]


def test_an_event_loop_hands_it_out(connect: Connect) -> None:
    connection, sending = connect(), connect()
    received = Received(connection.channel(), REPLIES, prefetch_count=5)
    received.consume()
    hub = Hub()
    connection.transport.register_with_event_loop(connection.connection, hub)
    timer = hub.call_repeatedly(0.01, lambda: None)
    loop = hub.create_loop()

    send(sending, *range(50), exchange="t", key="r.1")
    deadline = time.monotonic() + 5
    while len(received) < 50:
        assert time.monotonic() < deadline
        next(loop)

    assert received.bodies == list(range(50))
    timer.cancel()
    connection.transport.unregister_from_event_loop(connection.connection, hub)
    hub.close()


def test_the_last_consumer_takes_an_auto_delete_queue_with_it(connect: Connect) -> None:
    connection = connect()
    received = Received(connection.channel(), KINDS["bound to a fanout exchange"]())
    received.consume()
    assert "q" in connection.connection.transient

    received.cancel()

    assert connection.connection.transient == {}


# Auto-delete queues that are not transient


def test_an_auto_delete_queue_holds_messages_before_its_first_consumer(
    connect: Connect, state: State
) -> None:
    declaring, sending, consuming = connect(), connect(), connect()
    declare(declaring, AUTO_DELETE)
    declaring.close()

    send(sending, 1, 2, exchange="d", key="k")
    send(sending, 3, to="kept")
    assert count(sending, "kept") == 3
    received = Received(consuming.channel(), "kept")
    received.consume()

    assert received.wait(3) == [1, 2, 3]


def test_an_auto_delete_queue_goes_with_its_last_consumer(connect: Connect, state: State) -> None:
    first, second = connect(), connect()
    Exchange("d", channel=first.channel()).declare()
    empty = state()
    pair = [Received(c.channel(), AUTO_DELETE) for c in (first, second)]
    for received in pair:
        received.consume()
    send(first, *range(20), exchange="d", key="k")
    drain(first, lambda: len(pair[0]) > 0)
    drain_quiet(first, 0.1)
    drain_quiet(second, 0.1)

    pair[0].cancel()
    send(first, "still there", exchange="d", key="k")
    drain(second, lambda: "still there" in pair[1].bodies)
    pair[1].cancel()

    with pytest.raises(QueueMissing):
        connect().channel().queue_declare("kept", passive=True)
    after = state()
    # The registry keeps a mark of what is gone for a minute, so that everybody hears of it.
    for stream in after:
        if not stream.endswith("registry"):
            assert after[stream] == empty[stream]
    send(first, "lost", exchange="d", key="k")
    assert take_left(connect(), "kept") == []


def take_left(connection: Connection, name: str) -> list[Any]:
    try:
        return take_all(connection, name)
    except QueueMissing:
        return []


def test_an_auto_delete_queue_is_there_for_another_channel_at_once(connect: Connect) -> None:
    """Whether it is transient shows when it is bound, or when anybody uses it."""
    connection = connect()
    connection.channel().queue_declare("early", durable=True, auto_delete=True)

    send(connection, 1, to="early")

    assert take_all(connect(), "early") == [1]


def test_a_closed_channel_leaves_its_auto_delete_queue(connect: Connect) -> None:
    connection = connect()
    with connection.channel() as channel:
        channel.queue_declare("early", durable=True, auto_delete=True)

    assert count(connect(), "early") == 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What all connections ask of JetStream's API from now on."""
    operations: list[str] = []
    request_many = JetStream.request_many

    def noted(self: JetStream, requests: Any) -> Any:
        operations.extend(operation.split(".")[1] for operation, _ in requests)
        return request_many(self, requests)

    monkeypatch.setattr(JetStream, "request_many", noted)
    return operations


@pytest.fixture
def waiting(connect: Connect) -> Received:
    """A consumer of `AUTO_DELETE` in this process that has got all there is."""
    received = Received(connect().channel(), AUTO_DELETE)
    received.consume()
    send(connect(), 1, to="kept")
    received.wait(1)
    return received


@pytest.fixture
def sending(connect: Connect, waiting: Received, asked: list[str]) -> Connection:
    """Another connection that declared the queue that is waited for, before `asked` begins."""
    connection = connect()
    declare(connection, AUTO_DELETE)
    asked.clear()
    return connection


def test_declaring_a_queue_this_process_waits_for_asks_the_server_nothing(
    sending: Connection, waiting: Received, asked: list[str]
) -> None:
    """As Celery does with the queue of its results, for each task it sends."""
    name, messages, consumers = sending.default_channel.queue_declare(
        "kept", durable=True, auto_delete=True
    )
    send(sending, 2, to="kept")

    assert (name, messages, consumers) == ("kept", 0, 1)
    assert asked == []
    assert waiting.wait(2) == [1, 2]


@pytest.mark.parametrize("deletes", ["queue", "consumer"])
def test_declaring_makes_a_queue_again_that_was_deleted_under_its_consumer(
    connect: Connect, sending: Connection, waiting: Received, deletes: str
) -> None:
    if deletes == "queue":
        connect().default_channel.queue_delete("kept")
    else:
        waiting.cancel()

    sending.default_channel.queue_declare("kept", durable=True, auto_delete=True)
    send(sending, 2, to="kept")

    assert count(connect(), "kept") == 1


def test_declaring_what_has_waiting_messages_counts_them(
    connect: Connect, asked: list[str]
) -> None:
    received = Received(connect().channel(), AUTO_DELETE, prefetch_count=1, ack=False)
    received.consume()
    sending = connect()
    send(sending, 1, 2, 3, to="kept")
    received.wait(1)
    asked.clear()

    declared = sending.default_channel.queue_declare("kept", durable=True, auto_delete=True)

    assert declared.message_count == 2
    assert asked


def test_declaring_with_other_arguments_is_not_what_this_process_waits_for(
    sending: Connection, asked: list[str]
) -> None:
    sending.default_channel.queue_declare(
        "kept", durable=True, auto_delete=True, arguments={"x-expires": 3600_000}
    )

    assert asked
