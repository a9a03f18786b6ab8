from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.exceptions import OperationalError

from kombu_jetstream.errors import (
    ConnectionLost,
    MessageTooLarge,
    PublishRejected,
    PublishTimeout,
)
from kombu_jetstream.server import NatsServer
from tests.messaging import Received, count, declare, send, take_all
from tests.proxy import TcpProxy
from tests.servers import api_request, eventually, run_python

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]

WORK = Queue("work", Exchange("work"), "work")

CONFIRMS = pytest.mark.parametrize("confirms", ["each", "pipelined"])

#: Retry policy of `Producer.publish` that ends soon.
QUICK = {"interval_start": 0.05, "interval_step": 0.05, "interval_max": 0.2, "max_retries": 60}


@pytest.fixture
def own(nats_server: NatsServer, namespace: str) -> Iterator[Callable[..., Connection]]:
    """Opens connections to a server that may be stopped or killed."""
    opened: list[Connection] = []

    def connect(url: str | None = None, **options: Any) -> Connection:
        base = url if url is not None else nats_server.broker_url
        connection = Connection(f"{base}/{namespace}", transport_options=options)
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        connection.collect()


def publish(connection: Connection, body: Any, **options: Any) -> None:
    """Publish to the queue by its exchange, and retry as Celery does."""
    with connection.Producer(exchange=WORK.exchange, routing_key="work") as producer:
        producer.publish(body, retry=True, retry_policy=QUICK, declare=[WORK], **options)


def unconfirmed(connection: Connection) -> int:
    return len(connection.connection.publisher.unconfirmed)


# Confirms


@CONFIRMS
@pytest.mark.parametrize("exchange", ["work", ""])
def test_messages_are_stored_once_each_in_order(
    connect: Connect, confirms: str, exchange: str
) -> None:
    connection = connect(publish_confirms=confirms)
    declare(connection, WORK)

    send(connection, *range(700), exchange=exchange, key="work")
    connection.connection.flush()

    assert take_all(connect(), WORK) == list(range(700))


def test_a_message_is_stored_when_publish_returns(connect: Connect) -> None:
    connection, other = connect(), connect()
    declare(connection, WORK)

    for number in range(1, 20):
        send(connection, number, to=WORK)
        assert count(other, WORK) == number


def test_pipelined_publishes_do_not_wait(
    shared_nats_server: NatsServer, connect: Connect, proxy_to: Callable[[int], TcpProxy]
) -> None:
    proxy = proxy_to(shared_nats_server.port)
    connection = connect(proxy.broker_url, publish_confirms="pipelined")
    declare(connection, WORK)
    proxy.delay = 0.1

    start = time.monotonic()
    send(connection, *range(50), to=WORK)
    assert time.monotonic() - start < 0.1
    connection.connection.flush()

    assert unconfirmed(connection) == 0
    assert time.monotonic() - start >= 0.2
    assert count(connect(), WORK) == 50


def test_the_window_bounds_what_is_unconfirmed(
    shared_nats_server: NatsServer, connect: Connect, proxy_to: Callable[[int], TcpProxy]
) -> None:
    proxy = proxy_to(shared_nats_server.port)
    connection = connect(proxy.broker_url, publish_confirms="pipelined", publish_window=10)
    declare(connection, WORK)
    proxy.delay = 0.02
    most = 0

    with connection.channel() as channel:
        producer = connection.Producer(channel)
        for number in range(100):
            producer.publish(number, routing_key="work")
            most = max(most, unconfirmed(connection))

    assert most == 10
    connection.connection.flush()
    assert take_all(connect(), WORK) == list(range(100))


def test_closing_awaits_what_is_pipelined(connect: Connect) -> None:
    connection = connect(publish_confirms="pipelined")
    declare(connection, WORK)
    send(connection, *range(200), to=WORK)

    connection.close()

    assert count(connect(), WORK) == 200


def test_a_program_that_just_ends_has_published_what_it_pipelined(
    shared_nats_server: NatsServer, connect: Connect, namespace: str
) -> None:
    declare(connect(), WORK)

    done = run_python(
        "import sys, kombu, kombu_jetstream\n"
        "c = kombu.Connection(sys.argv[1])\n"
        "p = c.Producer()\n"
        "for i in range(150): p.publish(i, routing_key='work')\n",
        args=[f"{shared_nats_server.broker_url}/{namespace}?publish_confirms=pipelined"],
    )

    assert done.returncode == 0, done.stderr
    assert take_all(connect(), WORK) == list(range(150))


def test_messages_of_one_producer_and_of_two_are_all_different(connect: Connect) -> None:
    first, second = connect(), connect()
    declare(first, WORK)

    for connection in (first, second):
        for _ in range(3):
            send(connection, "same", to=WORK)

    assert count(first, WORK) == 6


# Faults


@CONFIRMS
def test_a_message_whose_confirm_is_lost_is_stored_once(
    nats_proxy: TcpProxy, own: Connect, confirms: str
) -> None:
    connection = own(nats_proxy.broker_url, publish_confirms=confirms)
    declare(connection, WORK)
    publish(connection, 1)
    connection.connection.flush()
    nats_proxy.freeze(down=True, up=False)  # the message arrives, its confirm does not

    def cut() -> None:
        eventually(lambda: count(own(), WORK) == 2)
        nats_proxy.cut()
        nats_proxy.resume()

    thread = threading.Thread(target=cut)
    thread.start()
    publish(connection, 2)
    thread.join()
    publish(connection, 3)
    connection.connection.flush()

    assert take_all(own(), WORK) == [1, 2, 3]


def test_a_confirm_that_is_late_does_not_make_a_second_message(
    nats_proxy: TcpProxy, own: Connect
) -> None:
    connection = own(nats_proxy.broker_url)
    declare(connection, WORK)
    producer = connection.Producer()
    producer.publish(0, routing_key="work")
    nats_proxy.delay = 1.1  # each way: later than the first wait for the confirm

    producer.publish(1, routing_key="work")

    nats_proxy.resume()
    assert take_all(own(), WORK) == [0, 1]


def test_what_was_unconfirmed_when_the_connection_was_lost_is_sent_again(
    nats_proxy: TcpProxy, own: Connect
) -> None:
    connection = own(nats_proxy.broker_url, publish_confirms="pipelined")
    declare(connection, WORK)
    publish(connection, 0)
    connection.connection.flush()
    nats_proxy.freeze()
    with connection.channel() as channel:
        producer = connection.Producer(channel)
        for number in range(1, 10):
            producer.publish(number, routing_key="work")
    assert unconfirmed(connection) == 9

    nats_proxy.cut()
    nats_proxy.resume()
    for number in (10, 11):
        publish(connection, number)
    connection.connection.flush()

    assert sorted(take_all(own(), WORK)) == list(range(12))


@CONFIRMS
def test_a_server_killed_while_publishing_loses_and_doubles_nothing(
    nats_server: NatsServer, own: Connect, confirms: str
) -> None:
    connection = own(publish_confirms=confirms)
    declare(connection, WORK)
    total, published = 1500, 0
    failures: list[BaseException] = []

    def run() -> None:
        nonlocal published
        try:
            for number in range(total):
                publish(connection, number)
                published += 1
            connection.connection.flush()
        except BaseException as exc:
            failures.append(exc)

    def has_published(part: int) -> bool:
        return published >= part or bool(failures)

    thread = threading.Thread(target=run)
    thread.start()
    for part in (300, 800):
        eventually(partial(has_published, part), within=20)
        nats_server.kill()
        nats_server.start()
    thread.join(30)

    assert not failures
    assert published == total
    assert sorted(take_all(own(), WORK)) == list(range(total))


def test_publish_timeout_holds_for_a_server_that_does_not_answer(
    nats_server: NatsServer, own: Connect
) -> None:
    connection = own(publish_timeout=1.0)
    declare(connection, WORK)
    channel = connection.channel()
    producer = connection.Producer(channel)
    nats_server.pause()

    start = time.monotonic()
    with pytest.raises(PublishTimeout, match="within 1 s") as caught:
        producer.publish(1, routing_key="work")
    took = time.monotonic() - start
    nats_server.resume()

    assert 1.0 <= took < 1.5
    assert isinstance(caught.value, connection.recoverable_connection_errors)


def test_a_timeout_of_the_call_goes_before_the_options(
    nats_server: NatsServer, own: Connect
) -> None:
    connection = own(publish_timeout=30.0)
    declare(connection, WORK)
    producer = connection.Producer(connection.channel())
    nats_server.pause()

    start = time.monotonic()
    with pytest.raises(PublishTimeout, match=r"within 0\.4 s"):
        producer.publish(1, routing_key="work", timeout=0.4)
    assert time.monotonic() - start < 0.9
    nats_server.resume()


def test_a_pipelined_publish_that_is_not_confirmed_fails_the_next_flush(
    nats_server: NatsServer, own: Connect
) -> None:
    connection = own(publish_confirms="pipelined", publish_timeout=0.6)
    declare(connection, WORK)
    producer = connection.Producer(connection.channel())
    nats_server.pause()

    producer.publish(1, routing_key="work")
    with pytest.raises(PublishTimeout):
        connection.connection.flush()
    nats_server.resume()
    producer.publish(2, routing_key="work")
    connection.connection.flush()

    assert 2 in take_all(own(), WORK)


def test_flush_ends_in_time(nats_server: NatsServer, own: Connect) -> None:
    connection = own(publish_confirms="pipelined")
    declare(connection, WORK)
    producer = connection.Producer(connection.channel())
    nats_server.pause()
    producer.publish(1, routing_key="work")

    start = time.monotonic()
    with pytest.raises(PublishTimeout, match=r"within 0\.3 s"):
        connection.connection.flush(timeout=0.3)

    assert time.monotonic() - start < 0.8
    nats_server.resume()
    connection.connection.flush()
    assert take_all(own(), WORK) == [1]


def test_publishing_without_a_server_fails_in_the_time_of_the_retry_policy(
    nats_server: NatsServer, own: Connect
) -> None:
    connection = own()
    connection.connect_timeout = 1.0
    declare(connection, WORK)
    producer = connection.Producer()
    nats_server.stop()

    start = time.monotonic()
    policy = {"max_retries": 2, "interval_start": 0.1, "interval_step": 0.1}
    with pytest.raises(OperationalError, match="could be reached"):
        producer.publish(1, routing_key="work", retry=True, retry_policy=policy)

    # A server that was there a moment ago is waited for, as long as one may take to connect.
    assert time.monotonic() - start < 2


def test_publishing_goes_on_when_the_server_is_back(nats_server: NatsServer, own: Connect) -> None:
    connection = own()
    declare(connection, WORK)
    nats_server.stop()
    timer = threading.Timer(0.5, nats_server.start)
    timer.start()

    publish(connection, 1)
    timer.join()

    assert take_all(own(), WORK) == [1]


@CONFIRMS
def test_a_deleted_stream_is_made_again(
    nats_server: NatsServer, own: Connect, namespace: str, confirms: str
) -> None:
    connection = own(publish_confirms=confirms)
    publish(connection, "lost with the stream")
    connection.connection.flush()
    api_request(nats_server.url, f"STREAM.DELETE.{namespace}_medium")

    start = time.monotonic()
    publish(connection, 1)
    if confirms == "pipelined":
        with pytest.raises(ConnectionLost, match=f"'{namespace}_medium' is gone"):
            connection.connection.flush()
        connection.collect()
    publish(connection, 2)
    connection.connection.flush()
    assert time.monotonic() - start < 5

    assert sorted(take_all(own(), WORK)) == [1, 2]


@pytest.mark.parametrize("exchange", ["work", ""])
def test_a_full_stream_refuses_messages(connect: Connect, exchange: str) -> None:
    connection = connect(stream_max_bytes=20_000)
    declare(connection, WORK)

    start = time.monotonic()
    bodies = [f"{number}" * 1000 for number in range(100)]
    with pytest.raises(PublishRejected, match=r"maximum bytes exceeded \(10077\)") as caught:
        send(connection, *bodies, exchange=exchange, key="work")
    assert time.monotonic() - start < 5

    assert caught.value.err_code == 10077
    assert isinstance(caught.value, OperationalError)
    assert not isinstance(caught.value, connection.recoverable_connection_errors)
    assert len(take_all(connection, WORK)) >= 5
    send(connection, "there is room again", to=WORK)
    assert take_all(connection, WORK) == ["there is room again"]


def test_a_full_stream_fails_a_later_pipelined_publish(connect: Connect) -> None:
    connection = connect(stream_max_bytes=20_000, publish_confirms="pipelined")
    declare(connection, WORK)
    producer = connection.Producer(connection.channel())

    def fails() -> bool:
        try:
            producer.publish("x" * 4000, routing_key="work")
        except PublishRejected:
            return True
        return False

    eventually(fails, within=2, every=0.005)
    with contextlib.suppress(PublishRejected):  # those behind it
        connection.connection.flush()


@pytest.mark.parametrize("end", ["flush", "close"])
def test_a_full_stream_fails_flush_and_close(connect: Connect, end: str) -> None:
    connection = connect(stream_max_bytes=20_000, publish_confirms="pipelined")
    declare(connection, WORK)
    send(connection, *["x" * 4000] * 10, to=WORK)
    session = connection.connection

    with pytest.raises(PublishRejected):
        getattr(session, end)()


def test_a_message_too_large_leaves_the_pipeline_as_it_was(connect: Connect) -> None:
    connection = connect(publish_confirms="pipelined")
    declare(connection, WORK)
    send(connection, 1, to=WORK)

    with pytest.raises(MessageTooLarge):
        send(connection, "x" * 2_000_000, to=WORK)
    send(connection, 2, to=WORK)
    connection.connection.flush()

    assert take_all(connection, WORK) == [1, 2]


# Processes and threads


def test_publishing_in_a_forked_child_and_then_in_the_parent(
    shared_nats_server: NatsServer, connect: Connect, namespace: str
) -> None:
    connection = connect()
    declare(connection, WORK)
    code = """
import os, sys, kombu, kombu_jetstream
connection = kombu.Connection(sys.argv[1])
producer = connection.Producer()
def publish(body):
    producer.publish(body, routing_key="work", retry=True, retry_policy={"max_retries": 3})
publish("parent before")
if not (child := os.fork()):
    try:
        publish("child")
        publish("child again")
        connection.connection.flush()
    finally:
        os._exit(0)
publish("parent meanwhile")
os.waitpid(child, 0)
publish("parent after")
connection.close()
"""
    for confirms in ("each", "pipelined"):
        url = f"{shared_nats_server.broker_url}/{namespace}?publish_confirms={confirms}"
        done = run_python(code, args=[url], timeout=20)
        assert done.returncode == 0, done.stderr

        assert sorted(take_all(connection, WORK)) == [
            "child",
            "child again",
            "parent after",
            "parent before",
            "parent meanwhile",
        ]


def test_threads_with_connections_of_a_pool(connect: Connect) -> None:
    connection = connect()
    declare(connection, WORK)
    pool = connection.Pool(4)
    failures: list[BaseException] = []

    def run(thread: int) -> None:
        try:
            for number in range(50):
                with pool.acquire(block=True) as own, own.Producer() as producer:
                    producer.publish(thread * 1000 + number, routing_key="work")
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.force_close_all()

    assert not failures
    expected = [thread * 1000 + number for thread in range(8) for number in range(50)]
    assert sorted(take_all(connection, WORK)) == expected


def test_a_consumer_may_publish_while_it_handles_a_message(connect: Connect) -> None:
    """Each confirm is waited for, and messages arrive meanwhile."""
    connection = connect()
    results = Queue("results", Exchange("work"), "results")
    declare(connection, WORK, results)
    send(connection, *range(100), to=WORK)
    channel = connection.channel()
    producer = connection.Producer(channel)
    done = 0

    def on_task(body: int, message: Any) -> None:
        nonlocal done
        producer.publish(body * 2, routing_key="results")
        message.ack()
        done += 1

    with connection.Consumer([WORK], channel, callbacks=[on_task], prefetch_count=10):
        while done < 100:
            connection.drain_events(timeout=2)
    got = Received(connection.channel(), results)
    got.consume()

    assert got.wait(100) == [2 * i for i in range(100)]
