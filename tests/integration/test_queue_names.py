from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from kombu_jetstream.errors import PreconditionFailed, QueueMissing, QueueNameInvalid
from tests.messaging import Received, count, declare, send, take_all

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]

NAMES = [
    "celery@host.celery.pidbox",
    "a b",
    " ",
    "a.b.c",
    ".",
    "..",
    "a..b",
    "*",
    ">",
    "a.*.>",
    "/",
    "../etc/passwd",
    "C:\\path",
    "=",
    "=41",
    "@delay",
    "$JS.API.>",
    "_INBOX.x",
    "Grüße",
    "任务队列",
    "🥕",
    "tab\tnewline\nnull\0",
    "'\"`${}[]()<>|&;#%?!,",
    "\ud800",
    "A",
    "a",
    "medium",
    "x" * 200,
    ":",
    "con",
]


def ids(name: str) -> str:
    return name[:20].encode("unicode_escape").decode()


@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_a_queue_of_any_name_works(connect: Connect, name: str) -> None:
    connection, other = connect(), connect()
    queue = Queue(name, Exchange("d"), name)
    declare(connection, queue)

    send(other, 1, to=name)
    send(other, 2, exchange="d", key=name)
    received = Received(connection.channel(), queue)
    received.consume()

    assert received.wait(2) == [1, 2]
    assert received.messages[0].delivery_info["routing_key"] == name
    received.cancel()
    assert count(other, name) == 0
    assert {"destination": name, "source": "d", "routing_key": name} in (
        other.channel().get_bindings()
    )
    queue(connection.channel()).delete()
    with pytest.raises(QueueMissing):
        other.channel().queue_declare(name, passive=True)


def test_similar_names_are_different_queues(connection: Connection) -> None:
    declare(connection, *(Queue(name, no_declare=False) for name in NAMES))

    for number, name in enumerate(NAMES):
        send(connection, number, to=name)

    assert [take_all(connection, name) for name in NAMES] == [[n] for n in range(len(NAMES))]


@pytest.mark.parametrize("name", NAMES, ids=ids)
@pytest.mark.parametrize("kind", ["direct", "topic", "fanout"])
def test_exchanges_and_transient_queues_of_any_name_work(
    connect: Connect, name: str, kind: str
) -> None:
    connection, other = connect(), connect()
    queue = Queue(name, Exchange(name, type=kind), name, exclusive=True)
    received = Received(connection.channel(), queue)
    received.consume()

    send(other, 1, exchange=name, key=name)
    send(other, 2, to=name)

    # A topic pattern may have signs of its own, which mean what they mean.
    assert received.wait(2) == [1, 2]


@pytest.mark.parametrize("name", ["x" * 201, "." * 100, "ü" * 50, "🥕" * 20, "x" * 10_000], ids=ids)
def test_a_name_too_long_is_an_error_that_says_so(connection: Connection, name: str) -> None:
    channel = connection.channel()

    with pytest.raises(QueueNameInvalid, match=r"takes [\d ]+ bytes encoded, .* 200") as caught:
        channel.queue_declare(name, durable=True, auto_delete=False)

    assert caught.value.reply_code == 406
    assert isinstance(caught.value, connection.channel_errors)
    channel.queue_declare("sound", durable=True, auto_delete=False)
    send(connection, 1, to="sound")
    assert take_all(connection, "sound") == [1]


LONG = ["x" * 5000, "a." * 2500 + "a", "ü" * 1500]

#: What names the server a subject longer than it takes; it would close the connection.
TOO_LONG: dict[str, Callable[[Connection, str], Any]] = {
    "publish to an exchange": lambda c, long: send(c, 1, exchange="d", key=long),
    "publish to a long exchange": lambda c, long: send(c, 1, exchange=long, key="k"),
    "publish to a queue": lambda c, long: send(c, 1, to=long),
    "declare an exchange": lambda c, long: c.channel().exchange_declare(long),
    "bind": lambda c, long: c.channel().queue_bind("q", "d", long),
    "bind a transient queue": lambda c, long: Queue("t", Exchange("d"), long, exclusive=True)(
        c.channel()
    ).declare(),
    "declare a transient queue": lambda c, long: c.channel().queue_declare(long, exclusive=True),
}


@pytest.mark.parametrize("long", LONG, ids=["one word", "many words", "unicode"])
@pytest.mark.parametrize("what", TOO_LONG)
def test_keys_and_exchanges_too_long_are_errors_that_say_so(
    connection: Connection, what: str, long: str
) -> None:
    declare(connection, Queue("q", Exchange("d"), "k"))
    session = connection.connection

    with pytest.raises(PreconditionFailed, match="too long") as caught:
        TOO_LONG[what](connection, long)

    assert len(str(caught.value)) < 500
    send(connection, 1, to="q")
    assert take_all(connection, "q") == [1]
    assert connection.connection is session
