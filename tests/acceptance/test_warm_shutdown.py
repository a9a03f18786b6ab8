"""SIGTERM in the middle of a run: every task runs once, on this worker or on another."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import POOLS, Site, start_all
from tests.servers import CeleryWorker, eventually

pytestmark = [pytest.mark.pools, pytest.mark.nats29]

#: How many tasks of how many seconds.  Celery's prefork pool forgets a task that a process has
#: got, but has not said so yet, when its worker stops (`AsynPool.flush`); whatever the broker, it
#: is run and given back.  So prefork gets tasks that are long against that moment.
TASKS = {pool: (300, 0.01) for pool in POOLS} | {"prefork": (24, 0.5)}

#: Seconds in which a process has told its worker about its task.
TOLD = 0.15

#: The server's default: what a worker did not give back would come back only after this.
VISIBILITY_TIMEOUT = 30.0


@pytest.fixture(scope="module")
def sites(shared_nats_server: NatsServer, make_site: Callable[..., Site]) -> dict[str, Site]:
    return {pool: make_site(f"{shared_nats_server.broker_url}/{pool}", pool) for pool in POOLS}


@pytest.fixture(scope="module")
def workers(sites: dict[str, Site]) -> dict[str, tuple[CeleryWorker, CeleryWorker]]:
    """Two workers on every pool."""
    workers = {
        pool: (
            site.worker("leaves", pool=pool, concurrency=2),
            site.worker("stays", pool=pool, concurrency=2),
        )
        for pool, site in sites.items()
    }
    start_all(worker for pair in workers.values() for worker in pair)
    return workers


@pytest.mark.parametrize("pool", POOLS)
def test_warm_shutdown_of_one_of_two_workers_loses_and_repeats_nothing(
    sites: dict[str, Site],
    workers: dict[str, tuple[CeleryWorker, CeleryWorker]],
    pool: str,
) -> None:
    site, (leaves, stays) = sites[pool], workers[pool]
    count, seconds = TASKS[pool]
    # Some are acknowledged when they start, some when they end.
    task_ids = [site.send(("nap", "nap_late")[n % 2], 1, seconds)[0] for n in range(count)]
    wanted = set(task_ids)

    eventually(lambda: _is_in_the_middle(site, task_ids, seconds), within=20)
    ended_before = set(site.ledger.ends())
    stopped_at = time.monotonic()
    assert leaves.warm_shutdown(within=15) == 0
    assert "Traceback" not in leaves.log, leaves.tail()

    site.wait_ended(task_ids, within=VISIBILITY_TIMEOUT / 2)
    assert time.monotonic() - stopped_at < VISIBILITY_TIMEOUT - 5
    site.assert_each_ran_once(task_ids)
    assert wanted - ended_before, "it was not the middle of the run"
    assert stays.is_running


def _is_in_the_middle(site: Site, task_ids: list[str], seconds: float) -> bool:
    """Some tasks are over, and of long ones those that run have not just begun."""
    entries = [entry for entry in site.ledger.entries() if entry.task_id in set(task_ids)]
    started = max((entry.at for entry in entries if entry.event == "start"), default=0.0)
    ended = sum(entry.event == "end" for entry in entries)
    return ended > len(task_ids) / 6 and (
        seconds < TOLD or TOLD < time.monotonic() - started < seconds - TOLD
    )


def test_worker_that_leaves_alone_keeps_nothing_back(
    shared_nats_server: NatsServer, make_site: Callable[..., Site]
) -> None:
    """The next worker gets the rest at once, not after the lease of the one before."""
    site = make_site(f"{shared_nats_server.broker_url}/alone", "alone")
    task_ids = site.send("nap", 20, 0.5)
    first = site.worker("first").start().wait_ready()
    eventually(lambda: _is_in_the_middle(site, task_ids, 0.5), within=20)

    first.warm_shutdown()
    left = set(task_ids) - set(site.ledger.ends())
    second = site.worker("second", pool="threads", concurrency=20).start().wait_ready()
    started_at = time.monotonic()

    assert len(left) > 8
    site.wait_ended(task_ids, within=10)
    assert time.monotonic() - started_at < 10
    site.assert_each_ran_once(task_ids)
    assert second.is_running
