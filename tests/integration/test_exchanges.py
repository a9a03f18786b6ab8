from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.exceptions import ChannelError

from kombu_jetstream.errors import (
    ExchangeMissing,
    NotSupported,
    PreconditionFailed,
    QueueMissing,
)
from tests.messaging import Received, count, declare, drain, send, take_all
from tests.servers import eventually, python_env, run_python

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]


def transient(name: str, exchange: Exchange, key: str = "") -> Queue:
    return Queue(name, exchange, key, durable=False, expires=60)


KINDS = pytest.mark.parametrize("kind", ["durable", "transient"])


class Bound:
    """Queues on an exchange, with what each of them got."""

    def __init__(self, connection: Connection, exchange: Exchange, kind: str, *keys: str) -> None:
        self.connection = connection
        self.exchange = exchange
        make: Any = Queue if kind == "durable" else transient
        self.channel = connection.channel()
        self.received = {}
        for number, key in enumerate(keys):
            queue = make(f"q{number}", exchange, key)
            self.received[key] = Received(self.channel, queue)
            self.received[key].consume()

    def route(self, *keys: str) -> dict[str, list[Any]]:
        """Publish each key under itself, then "end" to all; return what each binding got."""
        for key in keys:
            send(self.connection, {"key": key}, exchange=self.exchange, key=key)
        for number in range(len(self.received)):
            send(self.connection, "end", to=f"q{number}")
        drain(
            self.connection,
            lambda: all("end" in received.bodies for received in self.received.values()),
        )
        return {
            key: [body["key"] for body in received.bodies[:-1]]
            for key, received in self.received.items()
        }


@KINDS
def test_direct_exchange_routes_by_the_equal_key(connection: Connection, kind: str) -> None:
    bound = Bound(connection, Exchange("d"), kind, "a", "a.b", "b", "*", "")

    got = bound.route("a", "a.b", "b", "c", "a.", "*", "")

    assert got == {"a": ["a"], "a.b": ["a.b"], "b": ["b"], "*": ["*"], "": [""]}


@KINDS
def test_topic_exchange_routes_by_patterns(connection: Connection, kind: str) -> None:
    patterns = ("#", "a.#", "#.z", "a.*.z", "*", "*.*", "a.#.z", "a.b", "#.b.#", "*.b.#", "")
    keys = ("", "a", "z", "a.b", "a.z", "a.b.z", "a.b.c.z", "b", "x.b.y")
    bound = Bound(connection, Exchange("t", type="topic"), kind, *patterns)

    got = bound.route(*keys)

    assert got == {
        "#": list(keys),
        "a.#": ["a", "a.b", "a.z", "a.b.z", "a.b.c.z"],
        "#.z": ["z", "a.z", "a.b.z", "a.b.c.z"],
        "a.*.z": ["a.b.z"],
        "*": ["a", "z", "b"],
        "*.*": ["a.b", "a.z"],
        "a.#.z": ["a.z", "a.b.z", "a.b.c.z"],
        "a.b": ["a.b"],
        "#.b.#": ["a.b", "a.b.z", "a.b.c.z", "b", "x.b.y"],
        "*.b.#": ["a.b", "a.b.z", "a.b.c.z", "x.b.y"],
        "": [""],
    }


@KINDS
def test_fanout_exchange_ignores_the_key(connection: Connection, kind: str) -> None:
    bound = Bound(connection, Exchange("f", type="fanout"), kind, "", "x", "a.b")

    got = bound.route("", "x", "other.key")

    assert all(bodies == ["", "x", "other.key"] for bodies in got.values())


@KINDS
def test_default_exchange_reaches_a_queue_by_its_name(connection: Connection, kind: str) -> None:
    bound = Bound(connection, Exchange("d"), kind, "k")

    send(connection, "hello", to="q0")

    assert bound.received["k"].wait(1) == ["hello"]


@KINDS
@pytest.mark.parametrize("name", ["amq.direct", "amq.topic", "amq.fanout"])
def test_exchanges_every_broker_has_need_no_declaration(
    connection: Connection, kind: str, name: str
) -> None:
    bound = Bound(connection, Exchange(name, type=name[4:], no_declare=True), kind, "k")

    send(connection, "hello", exchange=name, key="k")

    assert bound.received["k"].wait(1) == ["hello"]


@KINDS
def test_a_queue_gets_one_copy_though_two_bindings_match(connection: Connection, kind: str) -> None:
    exchange = Exchange("t", type="topic")
    bound = Bound(connection, exchange, kind, "a.#")
    for key in ("*.b", "a.b", "#"):
        bound.channel.queue_bind("q0", "t", key)

    got = bound.route("a.b")

    assert got == {"a.#": ["a.b"]}


@KINDS
def test_binding_twice_is_binding_once(connection: Connection, kind: str) -> None:
    bound = Bound(connection, Exchange("d"), kind, "k")
    bound.channel.queue_bind("q0", "d", "k")

    assert bound.route("k") == {"k": ["k"]}


@KINDS
def test_a_queue_bound_to_two_exchanges_hears_both(connection: Connection, kind: str) -> None:
    bound = Bound(connection, Exchange("d"), kind, "k")
    Exchange("other", type="fanout", channel=bound.channel).declare()
    bound.channel.queue_bind("q0", "other")

    send(connection, 1, exchange="d", key="k")
    send(connection, 2, exchange="other")

    assert bound.received["k"].wait(2) == [1, 2]


@KINDS
def test_unbind_ends_one_binding_and_leaves_the_others(connection: Connection, kind: str) -> None:
    bound = Bound(connection, Exchange("d"), kind, "k")
    bound.channel.queue_bind("q0", "d", "other")

    bound.channel.queue_unbind("q0", "d", "k")

    assert bound.route("k", "other") == {"k": ["other"]}
    bound.channel.queue_unbind("q0", "d", "never bound")


def test_durable_and_transient_queues_share_an_exchange(connection: Connection) -> None:
    exchange = Exchange("t", type="topic")
    channel = connection.channel()
    stored = Received(channel, Queue("stored", exchange, "a.*"))
    passing = Received(channel, transient("passing", exchange, "*.b"))
    stored.consume()
    passing.consume()

    send(connection, 1, exchange=exchange, key="a.b")
    send(connection, 2, exchange=exchange, key="a.c")
    send(connection, 3, exchange=exchange, key="x.b")
    send(connection, "end", to="stored")
    send(connection, "end", to="passing")

    drain(connection, lambda: "end" in stored.bodies and "end" in passing.bodies)
    assert stored.bodies == [1, 2, "end"]
    assert passing.bodies == [1, 3, "end"]


def test_a_message_nobody_is_bound_for_is_dropped(connection: Connection) -> None:
    queue = Queue("q", Exchange("d"), "k")
    declare(connection, queue)

    send(connection, "lost", exchange="d", key="other")
    send(connection, "lost", exchange="no such exchange", key="k")
    send(connection, "lost", to="no such queue")

    assert take_all(connection, queue) == []


@pytest.mark.parametrize(
    ("exchange", "key"), [("d", "other"), ("", "no such queue"), ("no such exchange", "k")]
)
def test_a_mandatory_message_nobody_takes_comes_back(
    connection: Connection, exchange: str, key: str
) -> None:
    declare(connection, Queue("q", Exchange("d"), "k"))
    returned: list[tuple[Any, ...]] = []
    channel = connection.channel()
    producer = connection.Producer(
        channel, on_return=lambda *args: returned.append(args), auto_declare=False
    )

    producer.publish({"x": 1}, exchange=exchange, routing_key=key, mandatory=True)

    ((error, from_exchange, from_key, message),) = returned
    assert isinstance(error, ChannelError)
    assert error.reply_code == 312
    assert (from_exchange, from_key) == (exchange, key)
    assert message is not None


@KINDS
def test_a_mandatory_message_somebody_takes_does_not_come_back(
    connection: Connection, kind: str
) -> None:
    bound = Bound(connection, Exchange("d"), kind, "k")
    returned: list[Any] = []
    producer = connection.Producer(
        connection.channel(), on_return=lambda *args: returned.append(args), auto_declare=False
    )

    producer.publish(1, exchange="d", routing_key="k", mandatory=True)
    producer.publish(2, exchange="", routing_key="q0", mandatory=True)

    assert bound.received["k"].wait(2) == [1, 2]
    assert returned == []


def test_deleting_a_queue_removes_its_messages_and_bindings(connection: Connection) -> None:
    queue = Queue("q", Exchange("d"), "k")
    declare(connection, queue)
    send(connection, 1, 2, exchange="d", key="k")
    channel = connection.channel()

    assert channel.queue_delete("q") == 2

    with pytest.raises(QueueMissing):
        channel.queue_declare("q", passive=True)
    assert channel.get_bindings() == []
    channel.queue_declare("q", durable=True, auto_delete=False)
    send(connection, "lost", exchange="d", key="k")
    assert take_all(connection, "q") == []


def test_deleting_a_queue_that_does_not_exist_is_no_error(connection: Connection) -> None:
    assert connection.channel().queue_delete("no such queue") == 0


def test_a_queue_in_use_or_with_messages_is_deleted_only_without_conditions(
    connection: Connection,
) -> None:
    queue = Queue("q", Exchange("d"), "k")
    declare(connection, queue)
    send(connection, 1, to=queue)
    channel = connection.channel()

    with pytest.raises(PreconditionFailed, match="'q' is not empty"):
        channel.queue_delete("q", if_empty=True)
    consumer = Received(connection.channel(), queue)
    consumer.consume()
    consumer.wait(1)
    with pytest.raises(PreconditionFailed, match="'q' is in use"):
        channel.queue_delete("q", if_unused=True)
    consumer.cancel()
    channel.queue_delete("q", if_unused=True, if_empty=True)

    with pytest.raises(QueueMissing):
        channel.queue_declare("q", passive=True)


def test_deleting_an_exchange_removes_its_bindings_and_leaves_the_queues(
    connection: Connection,
) -> None:
    declare(connection, Queue("q", Exchange("d"), "k"))
    channel = connection.channel()
    with pytest.raises(PreconditionFailed, match="'d' is in use"):
        channel.exchange_delete("d", if_unused=True)

    channel.exchange_delete("d")

    with pytest.raises(ExchangeMissing):
        channel.exchange_declare("d", passive=True)
    channel.exchange_declare("d")
    send(connection, "lost", exchange="d", key="k")
    assert count(connection, "q") == 0


@pytest.mark.parametrize("name", ["no such", "a.b *>", ""])
def test_passive_declare_of_a_queue_that_does_not_exist(connection: Connection, name: str) -> None:
    channel = connection.channel()

    with pytest.raises(QueueMissing) as caught:
        channel.queue_declare(name or "x", passive=True)

    assert isinstance(caught.value, connection.channel_errors)
    assert caught.value.reply_code == 404
    channel.queue_declare("q", durable=True, auto_delete=False)


def test_passive_declare_of_an_exchange_that_does_not_exist(connection: Connection) -> None:
    channel = connection.channel()

    with pytest.raises(ExchangeMissing) as caught:
        channel.exchange_declare("no such", passive=True)

    assert isinstance(caught.value, connection.channel_errors)
    assert caught.value.reply_code == 404
    channel.exchange_declare("d")
    channel.exchange_declare("d", passive=True)
    channel.exchange_declare("amq.topic", passive=True)


def test_an_exchange_is_not_declared_again_with_another_type(connection: Connection) -> None:
    channel = connection.channel()
    channel.exchange_declare("e", type="topic")

    with pytest.raises(PreconditionFailed, match="'e' exists with type 'topic'") as caught:
        channel.exchange_declare("e", type="fanout")

    assert caught.value.reply_code == 406
    channel.exchange_declare("e", type="topic")


@pytest.mark.parametrize("type", ["headers", "x-delayed-message", "Direct"])
def test_an_unknown_exchange_type_is_an_error(connection: Connection, type: str) -> None:
    with pytest.raises(PreconditionFailed, match="expected one of direct, fanout, topic"):
        connection.channel().exchange_declare("e", type=type)


def test_binding_what_does_not_exist_is_an_error(connection: Connection) -> None:
    declare(connection, Queue("q", Exchange("d"), "k"))
    channel = connection.channel()

    with pytest.raises(ExchangeMissing):
        channel.queue_bind("q", "no such", "k")
    with pytest.raises(QueueMissing):
        channel.queue_bind("no such", "d", "k")


def test_binding_exchanges_to_exchanges_says_what_to_do_instead(connection: Connection) -> None:
    with pytest.raises(NotSupported, match="bind the queues to both"):
        connection.channel().exchange_bind("a", "b")


def test_queue_length_counts_ready_messages(connection: Connection) -> None:
    queue = Queue("q", Exchange("d"), "k")
    declare(connection, queue)
    send(connection, *range(5), to=queue)
    for priority in (2, 9):
        send(connection, 5, to=queue, priority=priority)

    channel = connection.channel()
    declared = channel.queue_declare("q", passive=True)
    assert declared == ("q", 7, 0)
    assert channel.queue_declare("q", durable=True, auto_delete=False).message_count == 7
    held = channel.basic_get("q")
    assert count(connection, queue) == 6
    held.ack()
    assert channel.queue_purge("q") == 6
    assert count(connection, queue) == 0


def test_purge_leaves_what_a_worker_holds(connection: Connection) -> None:
    queue = Queue("q", Exchange("d"), "k")
    declare(connection, queue)
    send(connection, 1, 2, 3, to=queue)
    channel = connection.channel()
    held = channel.basic_get("q")

    assert connection.channel().queue_purge("q") == 2

    held.requeue()
    assert take_all(connection, queue) == [1]


def test_a_queue_without_a_name_gets_one(connection: Connection) -> None:
    channel = connection.channel()
    names = {channel.queue_declare("", exclusive=True).queue for _ in range(3)}

    assert len(names) == 3
    assert all(name.startswith("amq.gen-") for name in names)


def test_another_connection_sees_queues_and_bindings_at_once(connect: Connect) -> None:
    here, there = connect(), connect()
    declare(there, Queue("old", Exchange("d"), "old"))
    send(here, 1, exchange="d", key="old")

    declare(there, Queue("new", Exchange("d"), "new"))
    send(here, 2, exchange="d", key="new")
    send(here, 3, to="new")

    assert take_all(there, "old") == [1]
    assert take_all(there, "new") == [2, 3]


def test_another_connection_sees_what_is_removed(connect: Connect) -> None:
    here, there = connect(), connect()
    declare(there, Queue("q", Exchange("d"), "k"), Queue("gone", Exchange("d"), "k"))
    send(here, 1, exchange="d", key="k")
    channel = there.channel()
    channel.queue_delete("gone")
    channel.queue_unbind("q", "d", "k")

    def news_arrived() -> bool:
        with here.channel() as mine:
            return mine.get_bindings() == []

    eventually(news_arrived, within=2)
    send(here, 2, exchange="d", key="k")

    assert take_all(there, "q") == [1]


def test_a_process_that_only_publishes_sees_a_binding_made_meanwhile(
    connect: Connect, shared_nats_server: Any, namespace: str
) -> None:
    """The other process declares nothing, and publishes before and after the binding is made."""
    connection = connect()
    declare(connection, Queue("first", Exchange("d"), "k"))
    code = """
import sys, kombu, kombu_jetstream
with kombu.Connection(sys.argv[1]) as connection:
    producer = connection.Producer()
    producer.publish(1, exchange="d", routing_key="k")
    print("ready", flush=True)
    sys.stdin.readline()
    producer.publish(2, exchange="d", routing_key="k")
"""
    url = f"{shared_nats_server.broker_url}/{namespace}"
    with subprocess.Popen(
        [sys.executable, "-c", code, url],
        env=python_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        declare(connection, Queue("second", Exchange("d"), "k"))
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.wait(10) == 0

    assert take_all(connection, "first") == [1, 2]
    assert take_all(connection, "second") == [2]


def test_what_was_declared_is_still_there_for_a_later_process(
    connect: Connect, shared_nats_server: Any, namespace: str
) -> None:
    connection = connect()
    declare(connection, Queue("q", Exchange("t", type="topic"), "a.#"))
    connection.close()

    done = run_python(
        "import sys, kombu, kombu_jetstream\n"
        "with kombu.Connection(sys.argv[1]) as c:\n"
        "    c.Producer().publish(1, exchange='t', routing_key='a.b')\n",
        args=[f"{shared_nats_server.broker_url}/{namespace}"],
    )
    assert done.returncode == 0, done.stderr

    assert take_all(connect(), "q") == [1]


def test_two_namespaces_on_a_server_do_not_mix(
    connection: Connection, shared_nats_server: Any, namespace: str
) -> None:
    declare(connection, Queue("q", Exchange("d"), "k"))
    with Connection(f"{shared_nats_server.broker_url}/{namespace}_2") as other:
        declare(other, Queue("q", Exchange("d"), "k"))
        send(other, "theirs", exchange="d", key="k")
        send(connection, "ours", exchange="d", key="k")

        assert take_all(connection, "q") == ["ours"]
        assert take_all(other, "q") == ["theirs"]


def test_declaring_hundreds_of_queues_is_not_slow(connection: Connection) -> None:
    start = time.monotonic()
    declare(connection, *(Queue(f"q{i}", Exchange("d"), f"k{i}") for i in range(100)))
    seconds = time.monotonic() - start

    assert seconds < 10
    send(connection, "hello", exchange="d", key="k77")
    assert take_all(connection, "q77") == ["hello"]
