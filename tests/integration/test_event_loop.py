"""When an event loop is told that the connection is lost: Celery forgets what it hands over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub

from kombu_jetstream.errors import ConnectionLost
from kombu_jetstream.server import NatsServer
from tests.pools import accept, give_job, prefork_pool
from tests.servers import eventually

Turn = Callable[[], bool]


@pytest.fixture
def channel(nats_server: NatsServer) -> Iterator[Any]:
    """A channel that consumes for a pool of processes."""
    with Connection(nats_server.broker_url) as connection:
        channel: Any = connection.channel()
        Consumer(channel, [Queue("work")], on_message=lambda message: None).consume()
        channel._processes = prefork_pool()  # as in a worker
        yield channel


@pytest.fixture
def turn(channel: Any) -> Iterator[Turn]:
    """Runs one turn of an event loop, as Celery's worker does."""
    session = channel.connection
    hub = Hub()
    hub.propagate_errors = (ConnectionLost,)
    session.register(hub)
    loop = hub.create_loop()

    def run() -> bool:
        next(loop)
        return False

    yield run
    session.unregister()
    hub.close()


def turn_until(turn: Turn, condition: Callable[[], bool]) -> None:
    eventually(lambda: turn() or condition(), 5)


def test_a_loss_is_told_at_once(channel: Any, turn: Turn, nats_server: NatsServer) -> None:
    give_job(channel._processes, is_written=False)
    accept(give_job(channel._processes))

    nats_server.kill()

    with pytest.raises(ConnectionLost):
        turn_until(turn, lambda: False)


def test_a_loss_is_told_when_no_task_is_on_its_way_to_a_process(
    channel: Any, turn: Turn, nats_server: NatsServer
) -> None:
    session = channel.connection
    job = give_job(channel._processes)

    nats_server.kill()

    turn_until(turn, lambda: not session.nats.is_open)
    for _ in range(3):
        session.tick()  # whoever finds it, and however often
        turn()
    accept(job)
    with pytest.raises(ConnectionLost):
        turn_until(turn, lambda: False)


def test_a_process_that_says_nothing_delays_the_news_by_a_moment_only(
    channel: Any, turn: Turn, nats_server: NatsServer
) -> None:
    give_job(channel._processes)

    nats_server.kill()

    with pytest.raises(ConnectionLost):
        turn_until(turn, lambda: False)
