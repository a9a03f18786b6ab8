"""Servers that cannot wait for tasks: nats-server before 2.12, and any with ``stream_max_bytes``.

Workers hold such tasks, as on any other broker, and say so once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import Site, start_all
from tests.servers import eventually, nats_server_version

pytestmark = pytest.mark.nats29


@pytest.fixture
def site(shared_nats_server: NatsServer, namespace: str, make_site: Callable[..., Site]) -> Site:
    return make_site(
        f"{shared_nats_server.broker_url}/{namespace}",
        broker_transport_options={"stream_max_bytes": 50_000_000, "visibility_timeout": 3},
    )


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_countdown_is_held_by_the_worker_and_this_is_said_once(site: Site, pool: str) -> None:
    """Longer than the visibility timeout, and by more tasks than the worker may prefetch."""
    worker = site.worker(pool=pool)
    start_all([worker])
    to_epoch = time.time() - time.monotonic()
    sent_at = time.time()

    waiting = site.send("noop", 20, countdown=5.0)
    others = site.send("noop", 5)

    site.wait_ended(others, within=4)
    assert not set(waiting) & set(site.ledger.starts())
    site.wait_ended(waiting, within=20)
    site.assert_each_ran_once([*waiting, *others])
    starts = [e.at + to_epoch for e in site.ledger.entries() if e.task_id in set(waiting)]
    assert min(starts) - sent_at >= 5.0
    assert worker.log.count("no schedules here") == 1
    assert "workers hold tasks with an eta or countdown until they are due" in worker.log


def test_what_a_killed_worker_held_comes_back(site: Site) -> None:
    worker = site.worker(pool="solo")
    start_all([worker])
    waiting = site.send("noop", 5, countdown=5.0)
    eventually(lambda: worker.log.count("Task noop[") == 5, within=5)

    worker.kill9()
    start_all([site.worker("second", pool="solo")])

    site.wait_ended(waiting, within=20)
    site.assert_each_ran_once(waiting)


def test_expired_tasks_do_not_run(site: Site) -> None:
    over = time.time() + 0.5
    (expired,) = site.send("noop", 1, expires=0.5)
    eventually(lambda: time.time() > over)
    worker = site.worker(pool="solo")
    start_all([worker])

    (other,) = site.send("noop", 1)
    site.wait_ended([other], within=10)

    assert expired not in site.ledger.starts()
    with site.client.connection_for_read() as connection:
        left = connection.default_channel.queue_declare("celery", passive=True).message_count
    assert left == 0, "it is not in its queue any more"
    if nats_server_version() < (2, 11):
        assert worker.log.count("no message TTL here") == 1


def test_messages_of_protocol_1_are_held_by_the_worker(
    shared_nats_server: NatsServer, namespace: str, make_site: Callable[..., Site]
) -> None:
    """Their eta is in the body, which only the worker reads."""
    site = make_site(f"{shared_nats_server.broker_url}/{namespace}", task_protocol=1)
    start_all([site.worker(pool="solo")])
    to_epoch = time.time() - time.monotonic()
    sent_at = time.time()

    (waiting,) = site.send("noop", 1, countdown=2.0)
    results = [site.client.tasks["add"].delay(n, 1) for n in range(3)]

    assert [result.get(timeout=15) for result in results] == [1, 2, 3]
    site.wait_ended([waiting], within=15)
    starts = [e.at + to_epoch for e in site.ledger.entries() if e.task_id == waiting]
    assert starts[0] - sent_at >= 2.0
