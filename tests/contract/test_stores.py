"""One suite over every store: what a queue does, whether JetStream, Redis or NATS itself has it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import kombu
import pytest

import kombu_jetstream  # noqa: F401  # registers jetstream://
from kombu_jetstream.errors import ConnectionLost, PreconditionFailed
from kombu_jetstream.fallback import DualSession, RedisSession
from kombu_jetstream.server import NatsServer
from tests.servers import RedisServer, eventually, free_port, run_redis_server

pytestmark = pytest.mark.redis

#: The stores: JetStream; JetStream with Redis beside it, written through either; Redis alone;
#: and a transient queue, which is a NATS subscription.
STORES = ("jetstream", "both", "both-redis", "redis", "transient")
DURABLE = tuple(store for store in STORES if store != "transient")


class Store:
    """Connections to one store, and how to declare its kind of queue."""

    def __init__(self, kind: str, url: str, options: dict[str, Any], session: type) -> None:
        self.kind = kind
        self._url = url
        self._options = options
        self._session = session
        self._stack = contextlib.ExitStack()

    def connect(self) -> Any:
        connection = kombu.Connection(self._url, transport_options=self._options, connect_timeout=2)
        self._stack.callback(connection.release)
        connection.connect()
        if self._session is not object:
            assert type(connection.connection) is self._session
        return connection

    def queue(self, channel: Any, name: str = "q") -> str:
        """Declare the queue of this test, and return its name."""
        transient = self.kind == "transient"
        ok = channel.queue_declare(
            name, durable=not transient, auto_delete=False, exclusive=transient
        )
        return str(ok.queue)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(params=STORES)
def store(
    request: pytest.FixtureRequest,
    shared_nats_server: NatsServer,
    shared_redis_server: RedisServer,
    namespace: str,
) -> Iterator[Store]:
    kind: str = request.param
    url = f"{shared_nats_server.broker_url}/{namespace}"
    options: dict[str, Any] = {
        "fallback_url": shared_redis_server.url,
        "global_keyprefix": namespace,
    }
    session: type = object
    if kind in ("jetstream", "transient"):
        options = {}
    elif kind == "redis":
        # Nobody listens there, and nobody is waited for.
        url = f"jetstream://127.0.0.1:{free_port()}/{namespace}"
        options |= {"migration_phase": "redis"}
        session = RedisSession
    else:
        options |= {"migration_phase": "redis" if kind == "both-redis" else "jetstream"}
        session = DualSession
    made = Store(kind, url, options, session)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with run_redis_server(tmp_path_factory.mktemp("redis data")) as server:
        yield server


class Receiver:
    """A consumer in this thread; messages are kept, and settled by the test."""

    def __init__(
        self, connection: Any, *queues: str, prefetch: int = 0, no_ack: bool = False
    ) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.channel.basic_qos(0, prefetch, False)
        self.messages: list[Any] = []
        for queue in queues:
            self.channel.basic_consume(queue, no_ack=no_ack, callback=self.messages.append)

    def receive(self, count: int, within: float = 5.0) -> list[Any]:
        """Wait until *count* messages came in all."""
        deadline = time.monotonic() + within
        while len(self.messages) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(self.messages)} of {count} came"
            with contextlib.suppress(TimeoutError):
                self.connection.drain_events(timeout=left)
        return self.messages

    def nothing_more(self, for_seconds: float = 0.4) -> None:
        count = len(self.messages)
        deadline = time.monotonic() + for_seconds
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                self.connection.drain_events(timeout=left)
        assert len(self.messages) == count

    def bodies(self) -> list[Any]:
        return [message.payload for message in self.messages]


def send(channel: Any, queue: str, *bodies: Any, **options: Any) -> None:
    producer = kombu.Producer(channel)
    for body in bodies:
        producer.publish(body, routing_key=queue, **options)


durable = pytest.mark.parametrize("store", DURABLE, indirect=True)


def test_a_message_is_received_as_it_was_sent(store: Store) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    send(
        channel,
        queue,
        {"text": "käse", "n": 1},
        headers={"h": [1, None]},
        correlation_id="c",
        priority=4,
    )

    (message,) = Receiver(connection, queue).receive(1)

    assert message.payload == {"text": "käse", "n": 1}
    assert message.headers["h"] == [1, None]
    assert message.properties["correlation_id"] == "c"
    assert message.delivery_info["routing_key"] == queue
    assert not message.delivery_info["redelivered"]
    message.ack()


def test_binary_bodies_survive(store: Store) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    body = bytes(range(256))
    send(channel, queue, body, content_type="application/data", content_encoding="binary")

    (message,) = Receiver(connection, queue).receive(1)

    assert message.body == body
    message.ack()


def test_messages_keep_their_order(store: Store) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    send(channel, queue, *range(300))

    receiver = Receiver(connection, queue, no_ack=True)

    receiver.receive(300)
    assert receiver.bodies() == list(range(300))
    receiver.nothing_more()


def test_a_waiting_consumer_gets_a_new_message_at_once(store: Store) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    receiver = Receiver(connection, queue)
    receiver.nothing_more()
    sent_at = []

    def send_later() -> None:
        other = store.connect() if store.kind != "transient" else connection
        sent_at.append(time.monotonic())
        send(other.channel(), queue, "now")

    timer = threading.Timer(0.2, send_later)
    timer.start()
    receiver.receive(1)

    assert time.monotonic() - sent_at[0] < 0.5
    timer.join()
    receiver.messages[0].ack()


@pytest.mark.parametrize("timeout", [0, 0.05, 0.5])
def test_drain_events_keeps_to_its_timeout(store: Store, timeout: float) -> None:
    connection = store.connect()
    queue = store.queue(connection.channel())
    Receiver(connection, queue).nothing_more()
    began = time.monotonic()

    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=timeout)

    assert timeout <= time.monotonic() - began < timeout + 0.2


@durable
def test_no_more_is_held_than_the_prefetch_limit(store: Store) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    send(channel, queue, *range(50))

    receiver = Receiver(connection, queue, prefetch=5)
    receiver.receive(5)
    receiver.nothing_more()
    receiver.messages[0].ack()
    receiver.messages[1].ack()

    receiver.receive(7)
    receiver.nothing_more()
    # Those that wait for room are there for others.
    other = Receiver(store.connect(), queue, no_ack=True)
    other.receive(43)


@durable
def test_acked_messages_are_gone_and_others_come_back(store: Store) -> None:
    first = store.connect()
    channel = first.channel()
    queue = store.queue(channel)
    send(channel, queue, *range(6))
    receiver = Receiver(first, queue)
    receiver.receive(6)
    for message in receiver.messages[:2]:
        message.ack()
    receiver.channel.close()

    again = Receiver(store.connect(), queue)

    again.receive(4)
    assert sorted(again.bodies()) == [2, 3, 4, 5]
    assert all(message.delivery_info["redelivered"] for message in again.messages)
    again.nothing_more()


def test_a_requeued_message_is_delivered_again(store: Store) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    send(channel, queue, "x")
    receiver = Receiver(connection, queue)
    receiver.receive(1)[0].requeue()

    again = receiver.receive(2)[1]

    assert again.payload == "x"
    assert again.attempt == 2
    assert again.delivery_info["redelivered"]
    again.ack()


@durable
def test_a_message_put_back_for_later_waits(store: Store) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    send(channel, queue, "x")
    receiver = Receiver(connection, queue)
    (message,) = receiver.receive(1)
    receiver.channel.nack_later(message.delivery_tag, 0.8)
    began = time.monotonic()

    receiver.receive(2)

    assert 0.75 < time.monotonic() - began < 2.5
    receiver.messages[1].ack()


def test_an_unknown_delivery_tag_is_an_error(store: Store) -> None:
    channel = store.connect().channel()
    store.queue(channel)

    with pytest.raises(PreconditionFailed, match="unknown delivery tag"):
        channel.basic_ack(4711)


def test_a_message_can_be_got(store: Store) -> None:
    channel = store.connect().channel()
    queue = store.queue(channel)
    assert channel.basic_get(queue) is None
    send(channel, queue, 1, 2)

    def got() -> Any:
        message = channel.basic_get(queue, no_ack=True)
        return message and message.payload

    assert [eventually(got), eventually(got)] == [1, 2]
    assert channel.basic_get(queue) is None


@durable
def test_a_declare_tells_the_number_of_messages_and_a_purge_removes_them(store: Store) -> None:
    channel = store.connect().channel()
    queue = store.queue(channel)
    send(channel, queue, *range(4))

    # The server counts for a consumer a moment after it has confirmed.
    eventually(lambda: channel.queue_declare(queue, passive=True).message_count == 4)
    assert channel.queue_purge(queue) == 4
    assert channel.queue_declare(queue, passive=True).message_count == 0
    assert channel.basic_get(queue) is None


@durable
def test_a_queue_with_messages_is_deleted_unless_it_has_to_be_empty(store: Store) -> None:
    channel = store.connect().channel()
    queue = store.queue(channel)
    send(channel, queue, *range(3))

    with pytest.raises(PreconditionFailed, match="is not empty"):
        channel.queue_delete(queue, if_empty=True)
    assert channel.queue_delete(queue) == 3

    store.queue(channel)
    assert channel.basic_get(queue) is None


@durable
def test_two_queues_of_one_consumer_are_both_served(store: Store) -> None:
    connection = store.connect()
    channel = connection.channel()
    queues = [store.queue(channel, name) for name in ("a.b", "c d")]
    for queue in queues:
        send(channel, queue, *[queue] * 600)

    receiver = Receiver(connection, *queues, prefetch=4)
    while len(receiver.messages) < 1200:
        before = len(receiver.messages)
        receiver.receive(before + 1)
        for message in receiver.messages[before:]:
            message.ack()

    first = receiver.bodies()[:800]
    assert {queue: first.count(queue) > 100 for queue in queues} == dict.fromkeys(queues, True), (
        first
    )


@durable
@pytest.mark.parametrize(
    ("kind", "bound", "key", "is_reached"),
    [
        ("direct", "a.b", "a.b", True),
        ("direct", "a.b", "a", False),
        ("topic", "a.*", "a.b", True),
        ("topic", "a.#", "a", True),
        ("topic", "a.#", "a.b.c", True),
        ("topic", "a.*", "a.b.c", False),
        ("fanout", "", "whatever", True),
    ],
)
def test_exchanges_route_by_their_bindings(
    store: Store, kind: str, bound: str, key: str, is_reached: bool
) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    exchange = kombu.Exchange("x", kind, channel=channel)
    exchange.declare()
    channel.queue_bind(queue, "x", bound)

    kombu.Producer(channel, exchange).publish("hello", routing_key=key)

    receiver = Receiver(connection, queue, no_ack=True)
    if is_reached:
        receiver.receive(1)
    receiver.nothing_more(0.2)
    assert len(receiver.messages) == is_reached


@durable
def test_late_acks_outlive_their_connection(store: Store) -> None:
    lost = store.connect()
    channel = lost.channel()
    queue = store.queue(channel)
    send(channel, queue, "kept", "dropped")
    receiver = Receiver(lost, queue)
    receiver.receive(2)
    kept = next(message for message in receiver.messages if message.payload == "kept")
    receiver.messages.clear()

    lost.collect()  # what kombu does with a connection it takes for lost
    again = Receiver(store.connect(), queue)
    kept.ack()

    again.receive(1)
    assert again.bodies() == ["dropped"]
    again.nothing_more()


def test_deliveries_of_an_event_loop(store: Store) -> None:
    """The hub reads what came while something else waited, and what comes while it is idle."""
    from kombu.asynchronous import Hub

    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    receiver = Receiver(connection, queue, prefetch=3)
    hub = Hub()
    connection.register_with_event_loop(hub)
    loop = hub.create_loop()
    sender = connection if store.kind == "transient" else store.connect()

    def run_until(count: int) -> None:
        deadline = time.monotonic() + 5
        while len(receiver.messages) < count:
            assert time.monotonic() < deadline, receiver.bodies()
            next(loop)

    for round_number in range(1, 5):
        hub.call_later(0.05, send, sender.channel(), queue, round_number)
        run_until(round_number)
        receiver.messages[-1].ack()

    assert receiver.bodies() == [1, 2, 3, 4]
    connection.transport.unregister_from_event_loop(connection.connection, hub)
    hub.close()


def test_verbs_of_a_closed_channel_say_so(store: Store) -> None:
    channel = store.connect().channel()
    queue = store.queue(channel)
    channel.close()

    with pytest.raises(ConnectionLost, match="the channel is closed"):
        send(channel, queue, "x")


# Both stores under one limit


@pytest.mark.parametrize("store", ["both"], indirect=True)
@pytest.mark.parametrize("prefetch", [1, 4, 20])
def test_one_prefetch_limit_covers_both_stores(
    store: Store, prefetch: int, shared_redis_server: RedisServer
) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    lists = connection.connection.fallback.lists
    send(channel, queue, *(f"jetstream-{n}" for n in range(100)))
    _send_to_redis(shared_redis_server, lists.prefix, queue, 100)

    receiver = Receiver(connection, queue, prefetch=prefetch)
    held: list[Any] = []
    while len(receiver.messages) < 200:
        receiver.receive(len(held) + 1)
        held.append(len(receiver.channel.qos))
        receiver.messages[len(held) - 1].ack()

    # Messages that cross a withdrawal on the wire may come on top, as with JetStream alone.
    assert max(held) <= 2 * prefetch + 1
    bodies = receiver.bodies()
    assert Counter(bodies) == Counter([*(f"jetstream-{n}" for n in range(100)), *range(100)])
    half = [type(body) is int for body in bodies[:100]]
    assert 20 < sum(half) < 80, "neither store waits for the other to be empty"


def _send_to_redis(server: RedisServer, prefix: str, queue: str, count: int) -> None:
    with kombu.Connection(server.url, transport_options={"global_keyprefix": prefix}) as connection:
        send(connection.channel(), queue, *range(count))


@pytest.mark.parametrize("store", ["both"], indirect=True)
def test_an_idle_worker_beside_a_busy_one_gets_what_the_busy_one_has_no_room_for(
    store: Store, shared_redis_server: RedisServer
) -> None:
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    lists = connection.connection.fallback.lists
    _send_to_redis(shared_redis_server, lists.prefix, queue, 3)
    busy = Receiver(connection, queue, prefetch=3)
    busy.receive(3)
    busy.nothing_more()

    send(channel, queue, "through jetstream")
    _send_to_redis(shared_redis_server, lists.prefix, queue, 1)

    idle = Receiver(store.connect(), queue, prefetch=3)
    idle.receive(2)
    busy.nothing_more(0.2)


# What is refused


@durable
def test_a_rejected_message_does_not_come_back_at_once(store: Store) -> None:
    """It becomes a dead letter; while JetStream is away, that one waits in Redis."""
    connection = store.connect()
    channel = connection.channel()
    queue = store.queue(channel)
    send(channel, queue, "x")
    receiver = Receiver(connection, queue)

    receiver.receive(1)[0].reject()

    receiver.nothing_more()
    if store.kind == "redis":
        letter = connection.connection.fallback.lists.next_letter()
        assert b'"reason": "rejected"' in letter
