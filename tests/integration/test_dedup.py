"""``dedup_id``: one message per id within ``dedup_window``, and nothing lost by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import celery
import pytest
from celery import chord, group
from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from kombu_jetstream.errors import NotSupported
from kombu_jetstream.server import NatsServer
from tests.acceptance.app import make_app
from tests.acceptance.letters import Letterbox
from tests.acceptance.sites import Site
from tests.messaging import Received, declare, send, take_all
from tests.servers import eventually, run_nats_server

Connect = Callable[..., Connection]


@pytest.fixture
def work(connection: Connection) -> Queue:
    queue = Queue("work")
    declare(connection, queue)
    return queue


@pytest.fixture
def box(shared_nats_server: NatsServer, namespace: str) -> Letterbox:
    return Letterbox(shared_nats_server, namespace)


@pytest.fixture
def app(shared_nats_server: NatsServer, namespace: str) -> Iterator[celery.Celery]:
    app = make_app(broker_url=f"{shared_nats_server.broker_url}/{namespace}")
    yield app
    app.pool.force_close_all()
    app.close()


@pytest.fixture
def site(shared_nats_server: NatsServer, namespace: str, folder: Path) -> Iterator[Site]:
    with Site(folder, f"{shared_nats_server.broker_url}/{namespace}", {}) as site:
        yield site


def test_an_id_is_stored_once(connection: Connection, work: Queue) -> None:
    for body in ("first", "second"):
        send(connection, body, to=work, headers={"dedup_id": "invoice-17"})
    send(connection, "other", to=work, headers={"dedup_id": "invoice-18"})

    assert take_all(connection, work) == ["first", "other"]


def test_an_id_stays_known_after_its_message_is_done(connection: Connection, work: Queue) -> None:
    send(connection, "first", to=work, headers={"dedup_id": "i"})
    assert take_all(connection, work) == ["first"]

    send(connection, "second", to=work, headers={"dedup_id": "i"})

    assert take_all(connection, work) == []


def test_the_id_is_the_message_id(connection: Connection, work: Queue, box: Letterbox) -> None:
    send(connection, "x", to=work, headers={"dedup_id": "invoice-17"})

    assert [stored.headers["Nats-Msg-Id"] for stored in box.stored("medium")] == ["invoice-17"]


def test_the_same_message_twice_is_two_messages_without_an_id(
    connection: Connection, work: Queue
) -> None:
    for headers in ({}, {"dedup_id": None}, {"dedup_id": ""}):
        send(connection, "x", "x", to=work, headers=headers)

    assert take_all(connection, work) == ["x"] * 6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a\r\nNats-Expected-Stream: nowhere", "a\r\nNats-Expected-Stream: somewhere"),
        ("ä" * 50, "ä" * 49 + "ö"),
        ("x" * 5000 + "1", "x" * 5000 + "2"),
        (" a", "a"),
        (17, 18),
        (17, "18"),
    ],
    ids=["line break", "no ASCII", "long", "blank", "number", "number and text"],
)
def test_any_id_will_do(
    connection: Connection, work: Queue, one: str | int, other: str | int
) -> None:
    for dedup_id in (one, one, other, other):
        send(connection, dedup_id, to=work, headers={"dedup_id": dedup_id})

    assert take_all(connection, work) == [one, other]


def test_the_window_is_an_option(connect: Connect) -> None:
    connection, work = connect(dedup_window=1.0, publish_timeout=1.0), Queue("work")
    declare(connection, work)
    send(connection, "first", to=work, headers={"dedup_id": "i"})
    send(connection, "swallowed", to=work, headers={"dedup_id": "i"})
    assert take_all(connection, work) == ["first"]

    def is_taken() -> bool:
        send(connection, "later", to=work, headers={"dedup_id": "i"})
        return take_all(connection, work) == ["later"]

    since = time.monotonic()
    eventually(is_taken, within=5, every=0.1)
    assert time.monotonic() - since > 0.5


def test_each_queue_of_an_exchange_gets_its_message(connection: Connection) -> None:
    both = Exchange("both", type="fanout")
    queues = [Queue(name, both) for name in ("q1", "q2")]
    declare(connection, *queues)

    for _ in range(2):
        send(connection, "x", exchange="both", headers={"dedup_id": "i"})

    assert [take_all(connection, queue) for queue in queues] == [["x"], ["x"]]


@pytest.mark.requires_nats("2.12")
def test_a_delayed_message_counts(connection: Connection, work: Queue) -> None:
    send(connection, "delayed", to=work, headers={"dedup_id": "i"}, DelaySeconds=1.0)
    send(connection, "now", to=work, headers={"dedup_id": "i"})

    received = Received(connection.channel(), work.name)
    received.consume()
    assert received.wait(1) == ["delayed"]


def test_an_id_is_known_after_a_restart_while_its_message_is_stored(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What a single server forgets is told in the reference: ids of messages that are done."""
    work = Queue("work")
    with run_nats_server(tmp_path_factory.mktemp("nats store")) as server:
        with Connection(server.broker_url) as connection:
            declare(connection, work)
            send(connection, "first", to=work, headers={"dedup_id": "i"})
        server.kill()
        server.start()
        with Connection(server.broker_url) as connection:
            send(connection, "second", to=work, headers={"dedup_id": "i"})
            assert take_all(connection, work) == ["first"]


# Celery


def test_a_task_is_sent_once(app: celery.Celery, box: Letterbox) -> None:
    for _ in range(3):
        app.tasks["noop"].apply_async(headers={"dedup_id": "invoice-17"})

    assert len(box.stored("medium")) == 1


def test_retries_of_a_task_with_an_id_are_not_swallowed(site: Site) -> None:
    with site.worker(pool="solo"):
        results = [
            site.client.tasks["retry_until"].apply_async((4, 0.1), headers={"dedup_id": "i"})
            for _ in range(2)
        ]
        assert results[0].get(timeout=20) == 4
        noop = site.client.tasks["noop"].delay()
        noop.get(timeout=20)

    assert site.ledger.starts("retry_until") == {results[0].id: 4}


def test_one_id_for_a_group_is_refused(app: celery.Celery, box: Letterbox) -> None:
    """The server would keep one of its tasks and drop the others without a word."""
    tasks = group(app.tasks["add"].si(n, 0) for n in range(3))

    with pytest.raises(NotSupported, match=r"several tasks of a group .* give each its own"):
        tasks.apply_async(headers={"dedup_id": "i"})

    assert len(box.stored("medium")) == 1


def test_each_task_of_a_group_may_have_an_id(app: celery.Celery, box: Letterbox) -> None:
    for numbers in (range(3), range(1, 4)):
        group(
            app.tasks["add"].si(n, 0).set(headers={"dedup_id": f"i{n}"}) for n in numbers
        ).apply_async()

    ids = [stored.headers["Nats-Msg-Id"] for stored in box.stored("medium")]
    assert ids == ["i0", "i1", "i2", "i3"]


def test_a_chord_with_an_id_runs_once_and_ends(site: Site) -> None:
    """The task that waits for the others gets the chord's options from Celery, its id as well."""
    add, total = site.client.tasks["add"], site.client.tasks["total"]
    with site.worker(pool="solo"):
        results = [
            chord([add.si(20, 22)], total.s()).apply_async(headers={"dedup_id": "i"})
            for _ in range(2)
        ]
        assert results[0].get(timeout=30) == 42

    assert site.ledger.starts("add").total() == 1
    assert site.ledger.starts("total").total() == 1
