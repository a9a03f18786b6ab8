"""Dead letters are stored once, and wait for a broker that is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError

from celery_ext import burials
from celery_ext.burials import Burials, Remains
from kombu_jetstream.deadletter import DeadLetter
from kombu_jetstream.errors import OptionsError
from kombu_jetstream.server import NatsServer
from tests.acceptance.letters import Letterbox
from tests.servers import eventually

pytestmark = pytest.mark.nats29


@pytest.fixture
def app(nats_server: NatsServer) -> Iterator[Celery]:
    app = Celery("burials", broker=f"{nats_server.broker_url}/ns", set_as_current=False)
    app.conf.broker_connection_timeout = 1.0
    yield app
    app.pool.force_close_all()
    app.close()


@pytest.fixture
def letters(nats_server: NatsServer) -> Letterbox:
    return Letterbox(nats_server, "ns")


@pytest.fixture
def undertaker(app: Celery) -> Iterator[Burials]:
    burials = Burials(app, retry_interval=0.1)
    yield burials
    burials.close()


def remains(number: int = 1) -> Remains:
    letter = DeadLetter(reason="task_failed", queue="q", task="t", task_id=str(number))
    return Remains(letter, b'{"n":%d}' % number, f"dead.{number}")


def numbers(letters: Letterbox) -> list[str]:
    return [each.headers["Dlq-Task-Id"].strip('"') for each in letters.stored()]


def test_a_dead_letter_is_stored_in_a_stream_that_is_made_for_it(
    undertaker: Burials, letters: Letterbox
) -> None:
    undertaker.store(remains())

    (stored,) = letters.stored()
    assert stored.subject == "ns.dlq.q"
    assert stored.payload == b'{"n":1}'
    assert stored.headers["Nats-Msg-Id"] == "dead.1"


def test_the_same_death_is_stored_once(undertaker: Burials, letters: Letterbox) -> None:
    for _ in range(3):
        undertaker.store(remains())

    assert numbers(letters) == ["1"]


def test_a_stream_that_was_deleted_is_made_again(
    undertaker: Burials, letters: Letterbox, app: Celery
) -> None:
    undertaker.store(remains(1))
    with app.connection_for_write() as connection:
        connection.default_channel.connection.jetstream.request("STREAM.DELETE.ns_dlq")

    undertaker.store(remains(2))

    assert numbers(letters) == ["2"]


def test_what_cannot_be_stored_raises_in_reasonable_time(
    undertaker: Burials, nats_server: NatsServer
) -> None:
    undertaker.store(remains(1))
    nats_server.kill()

    with pytest.raises(OperationalError, match="no NATS server could be reached"):
        undertaker.store(remains(2))


def test_dead_letters_wait_for_the_broker_and_keep_their_order(
    undertaker: Burials, nats_server: NatsServer, letters: Letterbox
) -> None:
    undertaker.store(remains(0))
    nats_server.kill()
    for number in range(1, 6):
        undertaker.store_later(remains(number))
    assert len(undertaker) == 5

    nats_server.start()

    eventually(lambda: len(undertaker) == 0, 20)
    assert numbers(letters) == ["0", "1", "2", "3", "4", "5"]


def test_the_thread_ends_when_nothing_waits_and_begins_again(
    undertaker: Burials, letters: Letterbox
) -> None:
    for number in (1, 2):
        undertaker.store_later(remains(number))
        eventually(lambda: undertaker._thread is None, 10)

    assert numbers(letters) == ["1", "2"]


def test_close_tries_once_more(app: Celery, letters: Letterbox) -> None:
    undertaker = Burials(app, retry_interval=3600)
    undertaker.store_later(remains())

    undertaker.close()

    assert numbers(letters) == ["1"]


def test_close_says_what_is_lost(
    app: Celery, nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    undertaker = Burials(app, retry_interval=3600)
    nats_server.kill()
    undertaker.store_later(remains())

    with caplog.at_level(logging.ERROR):
        undertaker.close()

    assert "the dead letter of t[1] could not be stored and is lost" in caplog.text


def test_more_than_memory_is_for_are_lost_aloud(
    app: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(burials, "MAX_WAITING", 2)
    undertaker = Burials(app, retry_interval=3600)
    for number in (1, 2, 3):
        undertaker.store_later(remains(number))

    assert len(undertaker) == 2
    assert "too many dead letters wait, lost that of t[1]" in caplog.text
    undertaker.close()


# Messages that are put back for later


def test_a_message_put_back_for_later_comes_after_the_delay(nats_server: NatsServer) -> None:
    with Connection(f"{nats_server.broker_url}/ns") as connection:
        queue = connection.SimpleQueue("later")
        queue.put("hello")
        message = queue.get(timeout=5)
        put_back_at = time.monotonic()
        message.requeue_later(0.6)

        again = queue.get(timeout=5)

        assert 0.6 <= time.monotonic() - put_back_at < 3
        assert again.payload == "hello"
        assert again.attempt == 2
        with pytest.raises(message.MessageStateError, match="REQUEUED"):
            message.requeue_later(1)
        again.ack()
        with pytest.raises(message.MessageStateError, match="ACK"):
            again.requeue_later(1)
        queue.close()


def test_bad_options_are_not_tried_again(app: Celery) -> None:
    app.conf.broker_transport_options = {"visibilty_timeout": 5}

    with pytest.raises(OptionsError, match="did you mean"):
        Burials(app).store(remains())
