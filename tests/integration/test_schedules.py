"""Messages that wait in the server for their time: when they come, and what ends them."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from kombu.connection import Connection
from kombu.entity import Queue

from kombu_jetstream.errors import NotSupported, PreconditionFailed
from kombu_jetstream.server import NatsServer
from kombu_jetstream.topology import encode_token
from tests.acceptance.letters import Letterbox
from tests.messaging import Received, count, declare, drain_quiet, send, take_all
from tests.servers import eventually, run_nats_server

pytestmark = pytest.mark.requires_nats("2.12")

Connect = Callable[..., Connection]

#: Seconds that the server may be late (facts: 250 ms), and this machine.
LATE = 1.0


@pytest.fixture
def work(connection: Connection) -> Queue:
    queue = Queue("a work.queue")
    declare(connection, queue)
    return queue


@pytest.fixture
def waiting(shared_nats_server: NatsServer, namespace: str) -> Callable[..., list[str]]:
    """The subjects below ``<namespace>.<level>.@delay`` on which something waits."""
    box = Letterbox(shared_nats_server, namespace)

    def subjects(level: str = "medium") -> list[str]:
        prefix = f"{namespace}.{level}.@delay."
        found = [stored.subject for stored in box.stored(level)]
        return [subject[len(prefix) :] for subject in found if subject.startswith(prefix)]

    return subjects


def in_seconds(seconds: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


def due(moment: datetime, task_id: str = "t1") -> dict[str, Any]:
    """Publish options of a task with an eta, as Celery writes it."""
    return {"headers": {"task": "noop", "id": task_id, "eta": moment.isoformat()}}


def receive(connection: Connection, queue: Queue, within: float = 10.0) -> float:
    """Wait for one message and return when it came, in seconds since the epoch."""
    received = Received(connection.channel(), queue.name)
    received.consume()
    received.wait(1, within)
    came = time.time()
    received.cancel()
    return came


@pytest.mark.parametrize(
    "form",
    [
        lambda moment: moment.isoformat(),
        lambda moment: moment.astimezone(timezone(timedelta(hours=5, minutes=30))).isoformat(),
        lambda moment: moment.astimezone(timezone(timedelta(hours=-8))).isoformat(),
        lambda moment: moment.isoformat().replace("+00:00", "Z"),
        lambda moment: moment.replace(tzinfo=None).isoformat(),
        lambda moment: moment,
    ],
    ids=["UTC", "east", "west", "Z", "without offset it is UTC", "datetime"],
)
def test_a_message_comes_when_its_eta_is_due(
    connection: Connection, work: Queue, form: Callable[[datetime], Any]
) -> None:
    moment = in_seconds(1.6)

    send(connection, "x", to=work, headers={"eta": form(moment)})
    came = receive(connection, work)

    assert 0 <= came - moment.timestamp() < LATE


@pytest.mark.parametrize("delay", [0.4, 1.5, "1.5"])
def test_a_message_comes_after_its_delay(
    connection: Connection, work: Queue, delay: float | str
) -> None:
    """Whatever delay_threshold says: nobody but the server holds such a message."""
    sent = time.time()

    send(connection, "x", to=work, DelaySeconds=delay)
    came = receive(connection, work)

    assert float(delay) <= came - sent < float(delay) + LATE


def test_what_is_due_within_the_threshold_goes_to_the_worker(
    connect: Connect, waiting: Callable[..., list[str]]
) -> None:
    connection, work = connect(delay_threshold=30), Queue("threshold")
    declare(connection, work)

    send(connection, "soon", to=work, **due(in_seconds(20)))
    send(connection, "later", to=work, **due(in_seconds(40)))

    assert take_all(connection, work) == ["soon"]
    assert len(waiting()) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"eta": "2500-01-01T00:00:00+00:00"},
        {"eta": "9999-12-31T23:59:59.999999"},
        {"eta": "tomorrow"},
        {"eta": None},
        {"eta": "1999-12-31T23:59:59+00:00"},
    ],
    ids=["beyond the server's clock", "end of time", "no time", "none", "past"],
)
def test_an_eta_the_server_cannot_wait_for_is_left_to_the_worker(
    connection: Connection, work: Queue, headers: dict[str, Any]
) -> None:
    """A schedule like that would fire at once, so the worker gets the message, with its eta."""
    send(connection, "x", to=work, headers=headers)

    with connection.channel() as channel:
        message = channel.basic_get(work.name)

    assert message is not None
    assert message.headers == headers


@pytest.mark.parametrize("delay", ["soon", float("nan"), float("inf"), [1], 1e30])
def test_a_delay_that_is_no_number_is_refused(
    connection: Connection, work: Queue, delay: Any
) -> None:
    with pytest.raises(PreconditionFailed, match=r"expected property 'DelaySeconds' to be a numb"):
        send(connection, "x", to=work, DelaySeconds=delay)

    assert count(connection, work) == 0


def test_it_waits_where_its_queue_task_and_message_can_be_found(
    connection: Connection, work: Queue, waiting: Callable[..., list[str]]
) -> None:
    send(connection, "x", to=work, priority=9, **due(in_seconds(600), "task 1"))

    (subject,) = waiting("high")
    queue, task, message = subject.split(".")

    assert queue == encode_token("a work.queue")
    assert task == encode_token("task 1")
    assert message
    assert count(connection, work) == 0


@pytest.mark.parametrize("task_id", ["i" * 5000, "é" * 200, ""], ids=["long", "wide", "none"])
def test_ids_that_fit_no_subject_are_no_hindrance(
    connection: Connection, work: Queue, waiting: Callable[..., list[str]], task_id: str
) -> None:
    moment = in_seconds(1.2)

    send(connection, "x", to=work, **due(moment, task_id))

    (subject,) = waiting()
    assert len(subject) < 700
    assert receive(connection, work) >= moment.timestamp()


def test_a_message_keeps_its_level(connection: Connection, work: Queue) -> None:
    moment = in_seconds(1.5)

    for priority in (1, 5, 9):
        send(connection, priority, to=work, priority=priority, **due(moment, f"t{priority}"))
    eventually(lambda: count(connection, work) == 3)

    assert take_all(connection, work) == [9, 5, 1]


def test_publishing_the_same_message_again_schedules_it_once(
    connection: Connection, work: Queue, waiting: Callable[..., list[str]]
) -> None:
    """kombu repeats a publish whose confirm was lost."""
    with connection.channel() as channel:
        message = channel.prepare_message("x", **due(in_seconds(600)))
        channel.basic_publish(message, routing_key=work.name)
        channel.basic_publish(message, routing_key=work.name)

    assert len(waiting()) == 1


def test_every_try_of_a_task_waits_for_itself(
    connection: Connection, work: Queue, waiting: Callable[..., list[str]]
) -> None:
    for retries in (1, 2):
        options = due(in_seconds(600))
        options["headers"]["retries"] = retries
        send(connection, retries, to=work, **options)

    assert len(waiting()) == 2


def test_it_is_the_message_that_was_sent(connection: Connection, work: Queue) -> None:
    moment = in_seconds(1.2)
    send(connection, {"a": [1]}, to=work, priority=7, correlation_id="c1", **due(moment))

    received = Received(connection.channel(), work.name)
    received.consume()
    received.wait(1)
    (message,) = received.messages

    assert message.decode() == {"a": [1]}
    assert message.headers == {"task": "noop", "id": "t1", "eta": moment.isoformat()}
    assert message.properties["correlation_id"] == "c1"
    assert message.delivery_info["priority"] == 7
    assert message.attempt == 1


def test_all_of_one_moment_come_in_the_order_they_were_sent(
    connection: Connection, work: Queue
) -> None:
    moment = in_seconds(2.0)
    send(connection, *range(50), to=work, headers={"eta": moment.isoformat()})

    received = Received(connection.channel(), work.name)
    received.consume()

    assert received.wait(50) == list(range(50))
    assert time.time() >= moment.timestamp()


def test_a_queue_is_reached_through_its_exchange(connection: Connection) -> None:
    first, second = (Queue(f"q{n}", exchange="both", routing_key="k") for n in (1, 2))
    with connection.channel() as channel:
        channel.exchange_declare("both", "fanout", durable=True)
        for queue in (first, second):
            channel.queue_declare(queue.name, durable=True, auto_delete=False)
            channel.queue_bind(queue.name, "both", "k")
    moment = in_seconds(1.3)

    send(connection, "x", exchange="both", key="k", headers={"eta": moment.isoformat()})

    assert [count(connection, queue) for queue in (first, second)] == [0, 0]
    eventually(lambda: [count(connection, queue) for queue in (first, second)] == [1, 1])
    assert time.time() >= moment.timestamp()


# Servers that end


def test_schedules_survive_the_server(tmp_path: Path, namespace: str) -> None:
    """Killed, not stopped: what fell due meanwhile comes at once, the rest at its time."""
    work = Queue("work")
    with run_nats_server(tmp_path / "nats store") as server:
        with Connection(f"{server.broker_url}/{namespace}") as connection:
            declare(connection, work)
            send(connection, "overdue", to=work, **due(in_seconds(1.5), "t1"))
            later = in_seconds(4.5)
            send(connection, "later", to=work, **due(later, "t2"))
        server.kill()
        time.sleep(2.0)
        server.start()

        with Connection(f"{server.broker_url}/{namespace}") as connection:
            received = Received(connection.channel(), work.name)
            received.consume()
            assert received.wait(1) == ["overdue"]
            assert time.time() < later.timestamp()
            assert received.wait(2) == ["overdue", "later"]
            assert 0 <= time.time() - later.timestamp() < LATE
            drain_quiet(connection)
            assert len(received) == 2


# Expiry


def test_what_expires_before_it_is_due_never_comes(connection: Connection, work: Queue) -> None:
    """The message stays for the least the server can, a second, after its time."""
    moment = in_seconds(1.2)
    send(connection, "x", to=work, expiration=0.3, **due(moment))

    eventually(lambda: count(connection, work) == 1, within=3)
    assert time.time() >= moment.timestamp()
    eventually(lambda: count(connection, work) == 0, within=4)


def test_expiry_counts_from_the_publish(connection: Connection, work: Queue) -> None:
    sent = time.time()
    send(connection, "x", to=work, expiration=4, **due(in_seconds(1.5)))

    eventually(lambda: count(connection, work) == 1, within=3)
    eventually(lambda: count(connection, work) == 0, within=6)
    assert 4 <= time.time() - sent < 6


def test_the_ttl_of_a_queue_counts_from_the_due_time(connection: Connection) -> None:
    work = Queue("short", message_ttl=2)
    declare(connection, work)
    moment = in_seconds(3)
    send(connection, "x", to=work, **due(moment))

    eventually(lambda: count(connection, work) == 1, within=5)
    eventually(lambda: count(connection, work) == 0, within=5)
    assert 2 <= time.time() - moment.timestamp() < 4


# Purge and delete


def test_purge_takes_the_delayed_messages_along_and_counts_them(
    connection: Connection, work: Queue, waiting: Callable[..., list[str]]
) -> None:
    other = Queue("a work")
    declare(connection, other)
    for priority in (1, 5, 9):
        send(connection, "x", to=work, priority=priority)
        send(connection, "x", to=work, priority=priority, **due(in_seconds(600), f"t{priority}"))
    send(connection, "x", to=other, **due(in_seconds(600)))

    with connection.channel() as channel:
        assert channel.queue_purge(work.name) == 6

    assert count(connection, work) == 0
    assert [len(waiting(level)) for level in ("high", "medium", "low")] == [0, 1, 0]


def test_a_queue_with_delayed_messages_is_not_empty(connection: Connection, work: Queue) -> None:
    send(connection, "x", to=work, **due(in_seconds(600)))

    with connection.channel() as channel, pytest.raises(PreconditionFailed, match="is not empty"):
        channel.queue_delete(work.name, if_empty=True)

    assert count(connection, work) == 0


def test_a_deleted_queue_leaves_nothing_that_comes_later(
    connection: Connection, work: Queue, waiting: Callable[..., list[str]]
) -> None:
    send(connection, "x", to=work, **due(in_seconds(1.5)))

    with connection.channel() as channel:
        channel.queue_delete(work.name)
    declare(connection, work)

    assert waiting() == []
    received = Received(connection.channel(), work.name)
    received.consume()
    drain_quiet(connection, quiet=2.0)
    assert received.bodies == []


# Streams without schedules


def test_without_schedules_the_worker_holds_what_has_an_eta(
    connect: Connect, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has none in a stream with a limit of its own."""
    monkeypatch.setattr("kombu_jetstream.session._told", set())
    connection, work = connect(stream_max_bytes=10_000_000), Queue("limited")
    declare(connection, work)

    for number in range(3):
        send(connection, number, to=work, **due(in_seconds(600), f"t{number}"))

    assert take_all(connection, work) == [0, 1, 2]
    told = [record.getMessage() for record in caplog.records if "schedules" in record.getMessage()]
    assert len(told) == 1
    assert "stream_max_bytes" in told[0]
    assert "workers hold tasks with an eta or countdown until they are due" in told[0]


def test_without_schedules_a_delay_is_refused(connect: Connect) -> None:
    connection, work = connect(stream_max_bytes=10_000_000), Queue("limited")
    declare(connection, work)

    with pytest.raises(NotSupported, match=r"DelaySeconds .* nats-server 2\.12 can do it"):
        send(connection, "x", to=work, DelaySeconds=5)

    assert take_all(connection, work) == []
