"""What is held stays held, whatever happens to the connection; what is dropped comes back."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from kombu_jetstream.server import NatsServer
from tests.messaging import Received, count, declare, drain_quiet, send, take_all
from tests.proxy import TcpProxy
from tests.servers import api_request, eventually, python_env

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]

WORK = Queue("work", Exchange("work"), "work")

#: Seconds until the server hands out again what nobody renews.
TIMEOUT = 1.0


@pytest.fixture
def own(nats_server: NatsServer, namespace: str) -> Iterator[Connect]:
    """Opens connections to a server of this test, with a short lease."""
    opened: list[Connection] = []

    def connect(url: str | None = None, **options: Any) -> Connection:
        base = url if url is not None else nats_server.broker_url
        options = {"visibility_timeout": TIMEOUT, **options}
        connection = Connection(f"{base}/{namespace}", transport_options=options)
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        connection.collect()


@pytest.fixture
def ledger_is_empty(nats_server: NatsServer) -> Callable[[str], bool]:
    """Tells whether the server waits for nothing in a namespace."""

    def is_empty(namespace: str) -> bool:
        info = api_request(nats_server.url, f"CONSUMER.INFO.{namespace}_medium.work")
        return bool(info["num_ack_pending"] == 0 and info["num_pending"] == 0)

    return is_empty


def held(connection: Connection, *bodies: Any, prefetch: int = 20) -> Received:
    """Send messages and have a consumer hold them."""
    declare(connection, WORK)
    send(connection, *bodies, to=WORK)
    received = Received(connection.channel(), WORK, ack=False, prefetch_count=prefetch)
    received.consume()
    received.wait(min(len(bodies), prefetch))
    return received


def wait_out(seconds: float, *connections: Connection) -> None:
    """Let time pass, while connections are read."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for connection in connections:
            drain_quiet(connection, 0.05)
        if not connections:
            threading.Event().wait(0.05)


@pytest.mark.parametrize("reading", [True, False], ids=["reading", "blocked"])
def test_what_is_held_longer_than_the_timeout_is_not_redelivered(
    own: Connect, reading: bool
) -> None:
    connection, other = own(), own()
    received = held(connection, 1, 2)
    idle = Received(other.channel(), WORK, ack=False)
    idle.consume()

    wait_out(3.5 * TIMEOUT, other, *([connection] if reading else []))

    assert idle.bodies == []
    assert received.bodies == [1, 2]
    for message in received.messages:
        message.ack()
    connection.close()
    wait_out(1.5 * TIMEOUT, other)
    assert idle.bodies == []


def test_what_waits_in_the_buffer_is_not_redelivered(own: Connect) -> None:
    """A solo worker works on the first of its messages, the others are not even decoded."""
    connection, other = own(), own()
    received = held(connection, 1)
    send(connection, 2, 3, 4, to=WORK)  # they wait in the socket, nobody reads
    idle = Received(other.channel(), WORK, ack=False)
    idle.consume()

    wait_out(3.5 * TIMEOUT, other)

    assert idle.bodies == []
    assert received.wait(4) == [1, 2, 3, 4]
    assert not any(m.delivery_info["redelivered"] for m in received.messages)


def test_lease_limit_lets_a_stuck_message_move_on(own: Connect) -> None:
    connection = own(lease_limit=1.5 * TIMEOUT)
    other = own(lease_limit=1.5 * TIMEOUT)
    received = held(connection, "stuck", prefetch=1)
    start = time.monotonic()
    idle = Received(other.channel(), WORK)
    idle.consume()

    idle.wait(1, within=6)

    assert 1.5 * TIMEOUT <= time.monotonic() - start < 4 * TIMEOUT
    assert idle.messages[0].delivery_info["redelivered"]
    assert len(received) == 1


def test_messages_of_a_killed_process_come_back_after_the_timeout(
    nats_server: NatsServer, own: Connect, namespace: str
) -> None:
    connection = own()
    declare(connection, WORK)
    send(connection, *range(5), to=WORK)
    code = """
import sys, kombu, kombu_jetstream
connection = kombu.Connection(sys.argv[1])
held = []
queue = kombu.Queue("work", no_declare=True)
with connection.Consumer([queue], on_message=held.append, prefetch_count=5):
    while len(held) < 5:
        connection.drain_events(timeout=5)
    print("holds", flush=True)
    sys.stdin.read()
"""
    url = f"{nats_server.broker_url}/{namespace}?visibility_timeout={TIMEOUT}"
    with subprocess.Popen(
        [sys.executable, "-c", code, url],
        env=python_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        wait_out(2 * TIMEOUT)
        assert take_all(connection, WORK) == []
        process.kill()
        killed_at = time.monotonic()

    received = Received(connection.channel(), WORK)
    received.consume()
    assert sorted(received.wait(5, within=5 * TIMEOUT)) == list(range(5))
    assert time.monotonic() - killed_at < 2.5 * TIMEOUT
    assert all(m.delivery_info["redelivered"] for m in received.messages)


def test_an_ack_after_the_connection_was_cut_is_taken(
    nats_proxy: TcpProxy, own: Connect, namespace: str, ledger_is_empty: Callable[[str], bool]
) -> None:
    """The task ran through the outage; its message is settled through the next connection."""
    connection, other = own(nats_proxy.broker_url), own()
    received = held(connection, "long")
    idle = Received(other.channel(), WORK, ack=False)
    idle.consume()

    nats_proxy.cut()
    with pytest.raises(connection.recoverable_connection_errors):
        drain_quiet(connection, 5)
    connection.collect()
    connection.ensure_connection()
    wait_out(2.5 * TIMEOUT, other)
    received.messages[0].ack()

    eventually(lambda: ledger_is_empty(namespace), within=2)
    wait_out(1.5 * TIMEOUT, other)
    assert idle.bodies == []


def test_an_ack_while_there_is_no_connection_is_sent_with_the_next(
    nats_proxy: TcpProxy, own: Connect, namespace: str, ledger_is_empty: Callable[[str], bool]
) -> None:
    connection, other = own(nats_proxy.broker_url), own()
    received = held(connection, "long")
    nats_proxy.down()
    with pytest.raises(connection.recoverable_connection_errors):
        drain_quiet(connection, 5)
    connection.collect()

    received.messages[0].ack()
    nats_proxy.resume()
    connection.ensure_connection()

    eventually(lambda: ledger_is_empty(namespace), within=2)
    assert take_all(other, WORK) == []


def test_acks_lost_in_a_cut_are_sent_again(
    nats_proxy: TcpProxy, own: Connect, namespace: str, ledger_is_empty: Callable[[str], bool]
) -> None:
    """A socket takes bytes for a peer that is not there any more."""
    connection, other = own(nats_proxy.broker_url), own()
    received = held(connection, *range(10))
    nats_proxy.freeze(up=True, down=False)

    for message in received.messages:
        message.ack()
    nats_proxy.cut()
    nats_proxy.resume()
    with pytest.raises(connection.recoverable_connection_errors):
        drain_quiet(connection, 5)
    connection.collect()
    connection.ensure_connection()

    eventually(lambda: ledger_is_empty(namespace), within=2)
    assert take_all(other, WORK) == []


def test_what_was_dropped_in_a_loss_comes_back_at_once(nats_proxy: TcpProxy, own: Connect) -> None:
    """Celery drops what it had reserved and not begun; nobody can settle it any more."""
    connection, other = (
        own(nats_proxy.broker_url, visibility_timeout=30.0),
        own(visibility_timeout=30.0),
    )
    received = held(connection, *range(6))
    kept = received.messages[0]
    nats_proxy.cut()
    with pytest.raises(connection.recoverable_connection_errors):
        drain_quiet(connection, 5)
    connection.collect()
    received.messages.clear()
    received.channel = None
    gc.collect()

    start = time.monotonic()
    connection.ensure_connection()
    idle = Received(other.channel(), WORK)
    idle.consume()

    assert sorted(idle.wait(5, within=5)) == [1, 2, 3, 4, 5]
    assert time.monotonic() - start < 3
    kept.ack()
    drain_quiet(other, 0.5)
    assert len(idle) == 5


def test_a_held_message_outlives_a_restart_of_the_server(
    nats_server: NatsServer, own: Connect, namespace: str, ledger_is_empty: Callable[[str], bool]
) -> None:
    connection = own(visibility_timeout=3.0)
    received = held(connection, "long")
    nats_server.kill()
    nats_server.start()
    with pytest.raises(connection.recoverable_connection_errors):
        drain_quiet(connection, 5)
    connection.collect()
    connection.ensure_connection()
    again = Received(connection.channel(), WORK)
    again.consume()

    wait_out(4.5, connection)
    assert again.bodies == []
    received.messages[0].ack()

    eventually(lambda: ledger_is_empty(namespace), within=2)
    send(connection, "next", to=WORK)
    assert again.wait(1) == ["next"]


def test_confirmed_acks_are_known_to_the_server_when_ack_returns(
    nats_server: NatsServer, own: Connect, namespace: str
) -> None:
    received = held(own(ack_confirm=True), *range(5))

    for number, message in enumerate(received.messages):
        message.ack()
        info = api_request(nats_server.url, f"CONSUMER.INFO.{namespace}_medium.work")
        assert info["num_ack_pending"] == 4 - number


def test_a_forked_child_holds_nothing(
    own: Connect, nats_server: NatsServer, namespace: str
) -> None:
    """A prefork worker's children neither renew nor settle what their parent holds."""
    declare(own(), WORK)
    send(own(), "held", to=WORK)
    code = f"""
import os, sys, time, kombu, kombu_jetstream
connection = kombu.Connection(sys.argv[1])
held = []
queue = kombu.Queue("work", no_declare=True)
consumer = connection.Consumer([queue], on_message=held.append, prefetch_count=5)
consumer.consume()
while not held:
    connection.drain_events(timeout=5)
if not (child := os.fork()):
    time.sleep({3 * TIMEOUT})
    os._exit(0)
os.waitpid(child, 0)
time.sleep({TIMEOUT})
held[0].ack()
connection.close()
"""
    url = f"{nats_server.broker_url}/{namespace}?visibility_timeout={TIMEOUT}"
    done = subprocess.run(
        [sys.executable, "-c", code, url],
        env=python_env(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    wait_out(1.5 * TIMEOUT)
    assert take_all(own(), WORK) == []


def test_a_requeued_message_after_a_loss_comes_back_once(
    nats_proxy: TcpProxy, own: Connect
) -> None:
    connection, other = own(nats_proxy.broker_url), own()
    received = held(connection, "x")
    nats_proxy.cut()
    with pytest.raises(connection.recoverable_connection_errors):
        drain_quiet(connection, 5)
    connection.collect()
    connection.ensure_connection()

    received.messages[0].requeue()

    def is_back() -> bool:
        return bool(take_all(other, WORK) == ["x"])

    eventually(is_back, within=2)
    wait_out(1.5 * TIMEOUT)
    assert take_all(other, WORK) == []
    assert count(other, WORK) == 0


def test_a_redelivery_that_crosses_the_acknowledgement_is_not_handed_on(
    nats_proxy: TcpProxy, own: Connect, ledger_is_empty: Callable[[str], bool], namespace: str
) -> None:
    connection = own(nats_proxy.broker_url)
    received = held(connection, "x")
    nats_proxy.freeze()  # no lease is extended, and what the server sends waits
    wait_out(1.5 * TIMEOUT)

    received.messages[0].ack()
    nats_proxy.resume()

    wait_out(TIMEOUT, connection)
    assert [message.payload for message in received.messages] == ["x"]
    eventually(lambda: ledger_is_empty(namespace), within=5)
