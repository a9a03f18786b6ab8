"""A message that dies is first in the dead letters, and only then out of its queue.

Whatever breaks in between: it is in at least one of the two at every moment, and in the end there
is one letter of it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.messaging import Consumer

from kombu_jetstream.deadletter import read_fields
from kombu_jetstream.server import NatsServer
from tests.acceptance.letters import Letterbox
from tests.messaging import declare, send
from tests.proxy import TcpProxy, _Pipe
from tests.servers import api_request, eventually, run_nats_server

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]

WORK = Queue("work")

#: Seconds until the server hands out again what nobody settled.
VISIBILITY_TIMEOUT = 1.5


class Trap(TcpProxy):
    """A proxy that breaks everything the moment it is to forward certain bytes."""

    def __init__(self, target_port: int) -> None:
        self._marker = b""
        self._up = True
        self._then: Callable[[], Any] = bool
        self.sprung = threading.Event()
        super().__init__(target_port)

    def set(self, marker: bytes, *, up: bool, then: Callable[[], Any]) -> None:
        """Instead of forwarding *marker* to the server (*up*) or from it, cut and call *then*."""
        self._up, self._then = up, then
        self._marker = marker

    def _read(self, pipe: _Pipe, now: float) -> None:
        super()._read(pipe, now)
        marker = self._marker
        if marker and pipe.up == self._up and any(marker in chunk for _, chunk in pipe.chunks):
            self._marker = b""
            self.down()
            self._then()
            self.sprung.set()


#: What is caught on its way, and whether to the server.
POINTS = {
    "before the write": (b".dlq.work ", True),
    "before the confirm": (b'"stream":"order_dlq"', False),
    "before the end of the message": (b"+TERM", True),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with run_nats_server(tmp_path / "nats store") as server:
        yield server


@pytest.fixture
def trap(server: NatsServer) -> Iterator[Trap]:
    trap = Trap(server.port)
    with trap:
        yield trap


@pytest.fixture
def box(server: NatsServer) -> Letterbox:
    return Letterbox(server, "order")


def connected(port: int, **options: Any) -> Connection:
    return Connection(
        f"jetstream://127.0.0.1:{port}/order",
        transport_options={"visibility_timeout": VISIBILITY_TIMEOUT, **options},
        connect_timeout=1,
    )


def rejecting(connection: Connection, over: Callable[[], Any], within: float = 15.0) -> None:
    """Reject everything in the queue until *over*, or until the connection is lost."""
    consumer = Consumer(
        connection.channel(), [Queue("work", no_declare=True)], on_message=lambda m: m.reject()
    )
    consumer.consume()
    deadline = time.monotonic() + within
    while not over():
        assert time.monotonic() < deadline
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.05)


def publish_rejected(connection: Connection) -> None:
    send(connection, "x", to=WORK)


def publish_malformed(connection: Connection) -> None:
    subject = b"order.medium.work"
    connection.default_channel.connection.publisher.publish(subject, b'{"body', b"")


def publish_delivered_too_often(connection: Connection) -> None:
    send(connection, "x", to=WORK)
    with connection.channel() as channel:
        channel.basic_get("work").requeue()


@pytest.mark.parametrize("fault", ["the server is killed", "the connection is cut"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    ("publish", "options", "reason"),
    [
        (publish_rejected, {}, "rejected"),
        (publish_malformed, {}, "malformed"),
        (publish_delivered_too_often, {"max_deliveries": 1}, "max_deliveries_exceeded"),
    ],
    ids=["rejected", "malformed", "delivered too often"],
)
def test_a_fault_on_the_way_to_the_dead_letters_loses_and_doubles_nothing(
    server: NatsServer,
    trap: Trap,
    box: Letterbox,
    publish: Callable[[Connection], None],
    options: dict[str, Any],
    reason: str,
    point: str,
    fault: str,
) -> None:
    with connected(server.port) as connection:
        declare(connection, WORK)
        publish(connection)
        (original,) = box.stored("medium")
    marker, up = POINTS[point]
    killed = fault == "the server is killed"
    trap.set(marker, up=up, then=server.kill if killed else bool)

    with connected(trap.port, **options) as connection:
        with pytest.raises(connection.connection_errors):
            rejecting(connection, over=lambda: False)
        assert trap.sprung.wait(5)
        connection.collect()  # it is lost; closing it would wait for a server that is away
    if killed:
        server.start()

    in_queue, letters = box.stored("medium"), box.stored()
    assert in_queue or letters
    if point != "before the write":
        assert letters, "the letter was on its way to be confirmed"

    with connected(server.port, **options) as connection:
        rejecting(connection, over=lambda: not box.stored("medium"))
    (letter,) = box.stored()
    assert letter.payload == original.payload
    assert read_fields(letter.headers).reason == reason


# A dead-letter stream that takes nothing


def test_a_full_dead_letter_stream_keeps_the_message_and_is_told_once(
    server: NatsServer,
    box: Letterbox,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", "kombu_jetstream")
    monkeypatch.setattr("kombu_jetstream.deadletter.RETRY_INTERVAL", 0.3)
    with connected(server.port) as connection:
        declare(connection, WORK)
        config = api_request(server.url, "STREAM.INFO.order_dlq")["config"]
        full = {**config, "discard": "new", "max_msgs": 1}
        api_request(server.url, "STREAM.UPDATE.order_dlq", full)
        send(connection, "first", to=WORK)
        rejecting(connection, over=box.stored)
        send(connection, "second", "third", to=WORK)

        ends = time.monotonic() + 2.0  # several tries of each
        rejecting(connection, over=lambda: time.monotonic() > ends)

        assert len(box.stored()) == 1
        assert len(box.stored("medium")) == 2
        told = [r.getMessage() for r in caplog.records if "cannot be stored" in r.getMessage()]
        assert len(told) == 1, told
        assert "their messages stay in the queue" in told[0]
        assert "maximum messages exceeded" in told[0]

        api_request(server.url, "STREAM.UPDATE.order_dlq", {**full, "max_msgs": -1})
        rejecting(connection, over=lambda: len(box.stored()) == 3)
        rejecting(connection, over=lambda: not box.stored("medium"))
    assert caplog.text.count("dead letters are stored again") == 1


def test_a_dead_letter_stream_that_was_deleted_is_made_again(
    server: NatsServer, box: Letterbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kombu_jetstream.deadletter.RETRY_INTERVAL", 0.3)
    with connected(server.port) as connection:
        declare(connection, WORK)
        send(connection, "x", to=WORK)
        api_request(server.url, "STREAM.DELETE.order_dlq")

        rejecting(connection, over=lambda: not box.stored("medium"))

    assert len(box.stored()) == 1


def test_a_missing_dead_letter_stream_keeps_the_message_where_it_is_not_ours_to_make(
    server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(server.port) as connection:
        declare(connection, WORK)
        send(connection, "x", to=WORK)
    api_request(server.url, "STREAM.DELETE.order_dlq")

    with connected(server.port, provision="off") as connection:
        rejecting(connection, over=lambda: "dead letters cannot be stored" in caplog.text)

    with connected(server.port) as connection:
        state = api_request(server.url, "STREAM.INFO.order_medium")["state"]
        assert state["messages"] == 1
        assert "nobody listens on" in caplog.text


def test_a_message_its_dead_letter_exchange_cannot_take_is_kept(
    server: NatsServer, box: Letterbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it can: here the stream of the level is made again that it is to be written to."""
    monkeypatch.setattr("kombu_jetstream.deadletter.RETRY_INTERVAL", 0.3)
    graveyard = Queue("graveyard", exchange="dead", routing_key="work", max_priority=2)
    work = Queue("work", queue_arguments={"x-dead-letter-exchange": "dead"})
    with connected(server.port) as connection:
        declare(connection, graveyard, work)
        send(connection, "x", to=work, priority=2)  # low in one queue, the highest in the other
        api_request(server.url, "STREAM.DELETE.order_high")

        rejecting(connection, over=lambda: not box.stored("low"))

    (letter,) = box.stored("high")
    assert letter.subject == "order.high.graveyard"
    assert box.stored() == []


def test_a_payload_of_the_servers_limit_becomes_a_letter(
    server: NatsServer, box: Letterbox
) -> None:
    """There is no room for a header in it."""
    payload = b"x" * (1024 * 1024)
    with connected(server.port) as connection:
        declare(connection, WORK)
        connection.default_channel.connection.publisher.publish(b"order.medium.work", payload, b"")

        rejecting(connection, over=box.stored)
        rejecting(connection, over=lambda: not box.stored("medium"))

    (letter,) = box.stored()
    assert letter.payload == payload
    assert letter.subject == "order.dlq.work"


def test_the_traceback_goes_before_the_rest_when_there_is_little_room(
    server: NatsServer, box: Letterbox
) -> None:
    payload = b"x" * (1024 * 1024 - 300)
    with connected(server.port) as connection:
        declare(connection, WORK)
        connection.default_channel.connection.publisher.publish(b"order.medium.work", payload, b"")

        rejecting(connection, over=box.stored)

    (letter,) = box.stored()
    found = read_fields(letter.headers)
    assert (found.reason, found.queue, found.level) == ("malformed", "work", "medium")
    assert found.message is None


def test_what_was_rejected_last_is_a_letter_when_the_connection_is_closed(
    server: NatsServer, box: Letterbox
) -> None:
    """And not handed back to be rejected again."""
    with connected(server.port) as connection:
        declare(connection, WORK)
        send(connection, *range(20), to=WORK)
        channel = connection.channel()
        for _ in range(20):
            channel.basic_get("work").reject()

    eventually(lambda: not box.stored("medium"), within=1.0)
    assert len(box.stored()) == 20
