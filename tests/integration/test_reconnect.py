"""The connection goes, kombu makes another one, and everything goes on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from kombu.common import Broadcast
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.message import Message
from kombu.mixins import ConsumerMixin

from kombu_jetstream.errors import ApiError, ConnectionLost
from kombu_jetstream.server import NatsServer
from tests.messaging import Received, declare, drain_quiet, send, take_all
from tests.proxy import TcpProxy
from tests.servers import NatsCluster, api_request, eventually, run_nats_server

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]

WORK = Queue("work", Exchange("work"), "work")

#: Of nats-server's errors.json.
NO_SUITABLE_PEERS = 10005

#: Retry policy of `Producer.publish` that ends soon.
QUICK = {"interval_start": 0.05, "interval_step": 0.05, "interval_max": 0.2, "max_retries": 60}


class Worker(ConsumerMixin):
    """A consumer in a thread of its own, as kombu's users write them."""

    connect_max_retries = 100

    def __init__(self, connection: Connection, *queues: Queue, prefetch: int = 5) -> None:
        self.connection = connection
        self.queues = queues or (WORK,)
        self.prefetch = prefetch
        self.got: list[Any] = []
        self.redelivered: list[Any] = []
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> Worker:
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.should_stop = True
        self.thread.join(15)
        assert not self.thread.is_alive()

    def _run(self) -> None:
        try:
            self.run()
        except BaseException as exc:
            self.errors.append(exc)

    def get_consumers(self, consumer_class: Any, channel: Any) -> list[Any]:
        made = consumer_class(self.queues, on_message=self.on_task, prefetch_count=self.prefetch)
        return [made]

    def on_task(self, message: Message) -> None:
        body = message.decode()
        if message.delivery_info["redelivered"]:
            self.redelivered.append(body)
        self.got.append(body)
        message.ack()

    def has(self, count: int) -> bool:
        return len(set(self.got)) >= count

    def wait(self, count: int, within: float = 10.0) -> None:
        eventually(partial(self.has, count), within)

    def restart_interval(self) -> float:
        return 0.1


def resend(connection: Connection, *bodies: Any, **options: Any) -> None:
    """Publish with kombu's retries, as Celery does."""
    with connection.Producer() as producer:
        for body in bodies:
            producer.publish(body, retry=True, retry_policy=QUICK, **options)


@pytest.fixture
def own(nats_server: NatsServer, namespace: str) -> Iterator[Connect]:
    """Opens connections to a server that is stopped and killed."""
    opened: list[Connection] = []

    def connect(url: str | None = None, **options: Any) -> Connection:
        base = url if url is not None else nats_server.broker_url
        connection = Connection(f"{base}/{namespace}", transport_options=options)
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        connection.collect()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_consumer_goes_on_after_a_restart(
    nats_server: NatsServer, own: Connect, end: str
) -> None:
    sending = own()
    declare(sending, WORK)
    with Worker(own()) as worker:
        send(sending, *range(50), to=WORK)
        worker.wait(50)

        getattr(nats_server, end)()
        assert worker.thread.is_alive()
        nats_server.start()
        returned = time.monotonic()
        resend(sending, *range(50, 100), routing_key="work")
        worker.wait(100, within=5)

    assert time.monotonic() - returned < 5
    assert not worker.errors
    assert Counter(worker.got) == dict.fromkeys(range(100), 1)


def test_consumers_and_producers_work_through_several_cuts(
    nats_proxy: TcpProxy, own: Connect
) -> None:
    total = 600
    # What was under way to a connection that is cut comes back after the timeout.
    options = {"visibility_timeout": 2.0}
    sending = own(nats_proxy.broker_url, **options)
    declare(sending, WORK)
    with Worker(own(nats_proxy.broker_url, **options)) as worker:
        thread = threading.Thread(
            target=resend, args=(sending, *range(total)), kwargs={"routing_key": "work"}
        )
        thread.start()
        for part in (100, 250, 400):
            eventually(partial(worker.has, part), within=20)
            nats_proxy.cut()
        thread.join(30)
        worker.wait(total, within=20)

    assert not worker.errors
    # Every message came, and none twice but for what was being handed out when it was cut.
    counts = Counter(worker.got)
    assert set(counts) == set(range(total))
    twice = {body for body, times in counts.items() if times > 1}
    assert twice <= set(worker.redelivered)
    assert len(twice) <= 3 * 5


def test_transient_queues_are_there_again(nats_server: NatsServer, own: Connect) -> None:
    replies = Queue("replies", Exchange("t", type="topic"), "r.#", exclusive=True)
    sending = own()
    with Worker(own(), replies, Broadcast("all")) as worker:
        eventually(lambda: worker.thread.is_alive() and _reaches(sending, worker, "r.first"))
        nats_server.kill()
        nats_server.start()

        eventually(lambda: _reaches(sending, worker, "r.second"), within=5, every=0.1)
        resend(sending, "to all", exchange="all")
        eventually(lambda: "to all" in worker.got)

    assert not worker.errors


def _reaches(sending: Connection, worker: Worker, key: str) -> bool:
    resend(sending, key, exchange="t", routing_key=key)
    return key in worker.got


def test_queues_and_bindings_declared_before_are_used_after(
    nats_server: NatsServer, own: Connect
) -> None:
    connection = own()
    declare(connection, WORK, Queue("topic", Exchange("t", type="topic"), "a.#"))
    nats_server.kill()
    nats_server.start()

    resend(connection, 1, exchange="work", routing_key="work")
    resend(connection, 2, exchange="t", routing_key="a.b")

    assert take_all(own(), WORK) == [1]
    assert take_all(own(), "topic") == [2]


def test_a_server_that_lost_its_store_gets_everything_again(
    nats_server: NatsServer, own: Connect, namespace: str
) -> None:
    """As a server with ``stream_storage="memory"`` after a restart."""
    options = {"stream_storage": "memory"}
    sending = own(**options)
    with Worker(own(**options)) as worker:
        eventually(lambda: _has_consumer(nats_server, namespace))
        nats_server.kill()
        nats_server.start()

        eventually(lambda: _has_consumer(nats_server, namespace), within=8, every=0.1)
        resend(sending, 1, routing_key="work", declare=[WORK])
        worker.wait(1)

    assert not worker.errors


def _has_consumer(server: NatsServer, namespace: str) -> bool:
    answer = api_request(server.url, f"CONSUMER.INFO.{namespace}_medium.work")
    return "error" not in answer


@pytest.mark.parametrize("pause", ["frozen network", "frozen server"])
def test_a_dead_peer_is_noticed(
    nats_server: NatsServer, nats_proxy: TcpProxy, own: Connect, pause: str
) -> None:
    connection = own(nats_proxy.broker_url, ping_interval=0.5)
    received = Received(connection.channel(), WORK)
    received.consume()
    drain_quiet(connection, 0.1)
    if pause == "frozen network":
        nats_proxy.freeze()
    else:
        nats_server.pause()

    start = time.monotonic()
    with pytest.raises(ConnectionLost, match="left 2 pings unanswered") as caught:
        drain_quiet(connection, 20)
    took = time.monotonic() - start
    nats_server.resume()

    assert 1.0 <= took < 6
    assert isinstance(caught.value, connection.recoverable_connection_errors)


def test_the_second_server_of_the_url_is_used(own: Connect, tmp_path: Any) -> None:
    with run_nats_server(tmp_path / "one") as one, run_nats_server(tmp_path / "two") as two:
        url = f"jetstream://127.0.0.1:{one.port},127.0.0.1:{two.port}"
        connection = own(url)
        declare(connection, WORK)
        assert connection.connection.nats.server.port == one.port
        one.kill()

        resend(connection, 1, routing_key="work", declare=[WORK])

        assert connection.connection.nats.server.port == two.port
        assert take_all(connection, WORK) == [1]


def test_the_second_url_is_used(own: Connect, namespace: str, tmp_path: Any) -> None:
    """kombu's own fail-over: URLs joined by ``;``."""
    with run_nats_server(tmp_path / "one") as one, run_nats_server(tmp_path / "two") as two:
        connection = Connection(
            f"{one.broker_url}/{namespace};{two.broker_url}/{namespace}",
            failover_strategy="round-robin",
        )
        declare(connection, WORK)
        one.kill()

        resend(connection, 1, routing_key="work", declare=[WORK])

        with own(two.broker_url) as there:
            assert take_all(there, WORK) == [1]
        connection.collect()


@pytest.mark.cluster
def test_servers_of_the_cluster_are_found_and_used(
    own: Connect, nats_cluster: Callable[..., NatsCluster]
) -> None:
    """The URL names one server of three; the others are known from it."""
    cluster = nats_cluster(3)
    first = cluster.servers[0]
    options = {"stream_replicas": 3, "dead_letter_max_bytes": 1024**2}
    sending = own(first.broker_url, **options)

    def can_place() -> bool:
        """An old server has a leader before it knows that the others live."""
        try:
            declare(sending, WORK)
        except ApiError as exc:
            if exc.err_code == NO_SUITABLE_PEERS:
                return False
            raise
        return True

    eventually(can_place, within=20, every=0.2)
    with Worker(own(first.broker_url, **options)) as worker:
        send(sending, *range(20), to=WORK)
        worker.wait(20)
        first.kill()

        resend(sending, *range(20, 40), routing_key="work")
        worker.wait(40, within=30)

        assert sending.connection.nats.server.port != first.port
    assert not worker.errors
    assert set(worker.got) == set(range(40))


def test_an_error_of_the_connection_is_raised_once_and_then_it_is_usable(
    nats_proxy: TcpProxy, own: Connect
) -> None:
    connection = own(nats_proxy.broker_url)
    received = Received(connection.channel(), WORK)
    received.consume()
    drain_quiet(connection, 0.1)
    nats_proxy.cut()

    with pytest.raises(connection.recoverable_connection_errors):
        drain_quiet(connection, 5)
    connection.collect()
    connection.ensure_connection()
    again = Received(connection.channel(), WORK)
    again.consume()
    send(connection, 1, to=WORK)

    assert again.wait(1) == [1]


def test_ensure_repeats_an_operation_on_a_new_connection(
    nats_proxy: TcpProxy, own: Connect
) -> None:
    connection = own(nats_proxy.broker_url)
    declare(connection, WORK)
    producer = connection.Producer()
    sure = connection.ensure(producer, producer.publish, max_retries=5, interval_start=0.05)
    sure(1, routing_key="work")

    nats_proxy.cut()
    sure(2, routing_key="work")

    assert take_all(own(), WORK) == [1, 2]


def test_a_lost_connection_leaves_no_thread_or_socket(
    nats_proxy: TcpProxy, nats_server: NatsServer, own: Connect
) -> None:
    connection = own(nats_proxy.broker_url)
    declare(connection, WORK)
    before = {t for t in threading.enumerate() if t.name.startswith("kombu-jetstream")}
    for number in range(5):
        nats_proxy.cut()
        resend(connection, number, routing_key="work")

    after = {t for t in threading.enumerate() if t.name.startswith("kombu-jetstream")}
    assert len(after) <= len(before) + 1
    assert nats_proxy.connections == 1


def test_an_idle_connection_notices_that_the_server_was_restarted(
    nats_server: NatsServer,
) -> None:
    with Connection(nats_server.broker_url) as connection:
        declare(connection, Queue("work"))
        nats_server.kill()
        nats_server.start()
        session = connection.connection
        session.nats.read_at -= 10  # it was idle for a while

        eventually(lambda: not connection.connected, within=5)

        connection.ensure_connection(max_retries=3)
        with connection.channel() as channel:
            assert channel.queue_purge("work") == 0
