"""Each of Celery's pools: every task runs exactly once, however long it takes or waits.

All pools work at the same time, each in a namespace of its own, so that the long tasks of all
of them take as long as those of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import POOLS, Site, start_all
from tests.servers import CeleryWorker

pytestmark = [pytest.mark.pools, pytest.mark.nats29]

#: Seconds; all that takes longer has to be extended, or it would run again.
VISIBILITY_TIMEOUT = 1.0
LONG = 3.3 * VISIBILITY_TIMEOUT

OPTIONS = {"visibility_timeout": VISIBILITY_TIMEOUT}

#: Far enough that no countdown of these tests is one for the server.
HELD_BY_THE_WORKER = {**OPTIONS, "delay_threshold": 3600}


@dataclass
class Pool:
    site: Site
    worker: CeleryWorker
    #: what was sent, by what it shows
    sent: dict[str, list[str]] = field(default_factory=dict)
    sent_at: float = 0.0


@pytest.fixture(scope="module")
def pools(shared_nats_server: NatsServer, make_site: Callable[..., Site]) -> dict[str, Pool]:
    """One worker on each pool."""
    pools = {}
    for pool in POOLS:
        url = f"{shared_nats_server.broker_url}/{pool}"
        site = make_site(url, pool, broker_transport_options=OPTIONS)
        pools[pool] = Pool(site, site.worker(pool=pool))
    start_all(each.worker for each in pools.values())
    return pools


@pytest.mark.parametrize("pool", POOLS)
def test_a_thousand_tasks_run_exactly_once(pools: dict[str, Pool], pool: str) -> None:
    site = pools[pool].site

    task_ids = site.send("noop", 1000)

    site.wait_ended(task_ids, within=60)
    site.assert_each_ran_once(task_ids)


@pytest.fixture(scope="module")
def long_tasks(pools: dict[str, Pool]) -> dict[str, Pool]:
    """All that takes longer than three times the visibility_timeout, given enough time to end.

    Countdowns first: the solo pool looks at nothing while a task runs.
    """
    for pool in pools.values():
        site = pool.site
        pool.sent_at = time.monotonic()
        pool.sent["countdown"] = site.send("noop", 1, countdown=LONG)
        with site.new_client(broker_transport_options=HELD_BY_THE_WORKER) as client:
            held = client.tasks["noop"].apply_async(countdown=LONG)
        pool.sent["worker-held countdown"] = [held.id]
    for pool in pools.values():
        pool.site.wait_ended(pool.sent["countdown"], within=30)
        pool.site.wait_ended(pool.sent["worker-held countdown"], within=30)
    for pool in pools.values():
        pool.sent["early ack"] = pool.site.send("nap", 1, LONG)
        pool.sent["late ack"] = pool.site.send("nap_late", 1, LONG)
    for pool in pools.values():
        for what in ("early ack", "late ack"):
            pool.site.wait_ended(pool.sent[what], within=30)
    # What would have run again had its time: one more round through every worker.
    for pool in pools.values():
        pool.site.wait_ended(pool.site.send("nap", 1, VISIBILITY_TIMEOUT), within=30)
    return pools


@pytest.mark.parametrize("task", ["early ack", "late ack"])
@pytest.mark.parametrize("pool", POOLS)
def test_task_longer_than_the_visibility_timeout_runs_once(
    long_tasks: dict[str, Pool], pool: str, task: str
) -> None:
    used = long_tasks[pool]

    used.site.assert_each_ran_once(used.sent[task])


@pytest.mark.parametrize("task", ["countdown", "worker-held countdown"])
@pytest.mark.parametrize("pool", POOLS)
def test_countdown_longer_than_the_visibility_timeout_runs_once_when_due(
    long_tasks: dict[str, Pool], pool: str, task: str
) -> None:
    used = long_tasks[pool]

    used.site.assert_each_ran_once(used.sent[task])
    started = next(
        entry.at
        for entry in used.site.ledger.entries("noop")
        if entry.task_id in used.sent[task] and entry.event == "start"
    )
    assert started - used.sent_at >= LONG
