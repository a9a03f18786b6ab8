"""When acknowledgements leave: at once where Celery runs tasks in this process, once in a tick
where it does not; those of other consumers with the next one, soon.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from kombu.asynchronous import Hub
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.messaging import Consumer, Producer

from kombu_jetstream import leases
from kombu_jetstream.jetstream import JetStream
from kombu_jetstream.server import NatsServer
from tests.acceptance.app import make_app
from tests.servers import CeleryWorker, eventually

QUEUE = Queue("writes", Exchange("writes"), routing_key="writes")


@pytest.fixture
def connection(nats_server: NatsServer) -> Iterator[Connection]:
    with Connection(nats_server.broker_url) as connection:
        yield connection


@pytest.fixture
def other(nats_server: NatsServer) -> Iterator[Any]:
    """Another channel, to see what the server knows."""
    with Connection(nats_server.broker_url) as connection:
        yield connection.default_channel


def in_flight(channel: Any, queue_name: str) -> int:
    counts = channel.connection.jetstream.counts(queue_name)
    return int(counts.in_flight) if counts is not None else 0


def publish(channel: Any, count: int) -> None:
    QUEUE(channel).declare()
    producer = Producer(channel, exchange=QUEUE.exchange, routing_key=QUEUE.routing_key)
    for number in range(count):
        producer.publish({"number": number})


@pytest.fixture
def run_loop(connection: Connection) -> Iterator[Any]:
    """Runs an event loop that reads *connection*, until a condition holds."""
    hub = Hub()
    connection.transport.register_with_event_loop(connection.connection, hub)
    loop = hub.create_loop()

    def run(until: Any) -> None:
        def tick() -> Any:
            next(loop)
            return until()

        eventually(tick, 10)

    yield run
    connection.transport.unregister_from_event_loop(connection.connection, hub)
    hub.close()


def test_an_acknowledgement_leaves_before_the_code_after_it_runs(
    connection: Connection, other: Any, run_loop: Any
) -> None:
    publish(connection.default_channel, 2)
    seen: list[int] = []

    def on_message(message: Any) -> None:
        before = in_flight(other, "writes")
        message.ack()
        eventually(lambda: in_flight(other, "writes") == before - 1, 5)
        seen.append(message.payload["number"])

    with Consumer(connection.channel(), [QUEUE], on_message=on_message):
        run_loop(lambda: len(seen) == 2)

    assert seen == [0, 1]


@contextmanager
def at_hand(connection: Connection, count: int, on_message: Any) -> Iterator[None]:
    """Have *on_message* called with each of *count* messages, when all of them are here.

    Nothing that is held back leaves because of its age.
    """
    publish(connection.default_channel, count)
    channel: Any = connection.channel()

    def are_here() -> bool:
        channel.connection.nats.read_available()
        return len(channel.ready) == count

    with (
        mock.patch.object(leases, "SEND_DELAY", 3600.0),
        Consumer(channel, [QUEUE], on_message=on_message, prefetch_count=100),
    ):
        eventually(are_here)
        for _ in range(count):
            connection.drain_events(timeout=5)
        yield


def test_acknowledgements_of_what_is_at_hand_leave_together(
    connection: Connection, other: Any
) -> None:
    left: list[int] = []

    def on_message(message: Any) -> None:
        message.ack()
        left.append(in_flight(other, "writes"))

    with at_hand(connection, 3, on_message):
        assert left[:2] == [3, 3]
        eventually(lambda: in_flight(other, "writes") == 0)


def test_acknowledgements_of_tasks_do_not_wait_for_each_other(
    connection: Connection, other: Any
) -> None:
    left: list[int] = []

    def on_message(message: Any) -> None:
        before = in_flight(other, "writes")
        message.ack()
        eventually(lambda: in_flight(other, "writes") == before - 1, 5)
        left.append(before - 1)

    on_message.__module__ = "celery.worker.consumer.consumer"  # as that of a worker's tasks
    with at_hand(connection, 3, on_message):
        assert left == [2, 1, 0]


def test_acknowledgements_of_a_tick_leave_together_when_tasks_run_elsewhere(
    connection: Connection, other: Any, run_loop: Any
) -> None:
    publish(connection.default_channel, 3)
    channel = connection.channel()
    held: list[Any] = []

    with Consumer(channel, [QUEUE], on_message=held.append):
        channel.may_settle_late = True  # as in a worker with the prefork pool
        run_loop(lambda: len(held) == 3)
        for message in held:
            message.ack()
        assert channel.connection.is_collecting
        assert in_flight(other, "writes") == 3
        run_loop(lambda: in_flight(other, "writes") == 0)

    assert not channel.connection.is_collecting


def test_what_waits_for_the_end_of_a_tick_is_sent_when_the_loop_is_left(
    connection: Connection, other: Any, run_loop: Any
) -> None:
    publish(connection.default_channel, 1)
    channel = connection.channel()
    held: list[Any] = []

    with Consumer(channel, [QUEUE], on_message=held.append):
        channel.may_settle_late = True
        run_loop(lambda: len(held) == 1)
        held[0].ack()
        connection.transport.unregister_from_event_loop(connection.connection, None)

        eventually(lambda: in_flight(other, "writes") == 0, 5)


def test_a_result_is_handed_on_before_its_acknowledgement_leaves(
    connection: Connection, other: Any
) -> None:
    """Who asked for it waits for nothing else; without *no_ack*, that is for the program to say."""
    publish(connection.default_channel, 1)
    channel: Any = connection.channel()
    left: list[int] = []

    def on_message(message: Any) -> None:
        left.append(in_flight(other, "writes"))

    with (
        mock.patch.object(leases, "SEND_DELAY", 3600.0),
        Consumer(channel, [QUEUE], on_message=on_message, no_ack=True),
    ):
        connection.drain_events(timeout=5)
        assert left == [1]
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.01)
        eventually(lambda: in_flight(other, "writes") == 0)


def test_the_acknowledgement_of_a_result_leaves_soon_whatever_the_program_does(
    connection: Connection, other: Any
) -> None:
    publish(connection.default_channel, 1)
    got: list[Any] = []

    with Consumer(connection.channel(), [QUEUE], on_message=got.append, no_ack=True):
        connection.drain_events(timeout=5)

        eventually(lambda: in_flight(other, "writes") == 0)

    assert len(got) == 1


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in order: "pull" for each request for messages, and what the test appends."""
    events: list[str] = []
    pull = JetStream.pull

    def noted(self: JetStream, *args: Any) -> None:
        events.append("pull")
        pull(self, *args)

    monkeypatch.setattr(JetStream, "pull", noted)
    return events


def test_a_message_that_is_alone_is_handed_on_before_more_is_asked_for(
    connection: Connection, other: Any, run_loop: Any, written: list[str]
) -> None:
    """Somebody may wait for its task."""
    channel: Any = connection.channel()

    def on_message(message: Any) -> None:
        written.append("message")

    # Each of three levels is asked for one message, so two more may be asked for.
    with Consumer(channel, [QUEUE], on_message=on_message, prefetch_count=5):
        channel._processes = SimpleNamespace(num_processes=2)  # as in a worker
        publish(other, 1)
        written.clear()
        run_loop(lambda: "message" in written and "pull" in written)

    assert written == ["message", "pull"]


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_acknowledges_early_whatever_its_tasks_do(
    folder: Path, nats_server: NatsServer, other: Any, pool: str
) -> None:
    app = make_app(broker_url=nats_server.broker_url)
    with CeleryWorker(folder, nats_server.broker_url, pool=pool, concurrency=1) as worker:
        app.tasks["nap"].delay(5)
        eventually(lambda: worker.ledger.starts().total() == 1, 20)

        eventually(lambda: in_flight(other, "celery") == 0, 3)

        assert worker.ledger.ends().total() == 0


@pytest.fixture
def pipelined(nats_server: NatsServer) -> Iterator[Any]:
    """A channel whose publishes do not wait for their confirms."""
    options = {"publish_confirms": "pipelined"}
    with Connection(nats_server.broker_url, transport_options=options) as connection:
        yield connection.default_channel
        connection.default_channel.flush()


def test_a_pipelined_message_that_is_alone_leaves_at_once(
    pipelined: Any, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SEND_DELAY", 3600.0)

    publish(pipelined, 1)

    eventually(lambda: ready(other, "writes") == 1)


def test_pipelined_messages_leave_soon_whatever_the_program_does(
    pipelined: Any, other: Any
) -> None:
    publish(pipelined, 5)

    eventually(lambda: ready(other, "writes") == 5)


def ready(channel: Any, queue_name: str) -> int:
    counts = channel.connection.jetstream.counts(queue_name)
    return int(counts.ready) if counts is not None else 0
