"""Each of Celery's pools: every task runs exactly once, however long it takes or waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from kombu_jetstream.server import NatsServer
from tests.acceptance.site import POOLS, Site
from tests.servers import CeleryWorker

pytestmark = [pytest.mark.pools, pytest.mark.nats29]

#: Seconds; everything below that waits longer than three times this has to be extended.
VISIBILITY_TIMEOUT = 1.0


@dataclass
class Running:
    site: Site
    worker: CeleryWorker


@pytest.fixture(scope="module", params=POOLS)
def running(
    request: pytest.FixtureRequest,
    shared_nats_server: NatsServer,
    make_site: Callable[..., Site],
) -> Iterator[Running]:
    """A worker on this pool for the whole module, with a short visibility_timeout."""
    pool = request.param
    site = make_site(
        f"{shared_nats_server.broker_url}/{pool}",
        pool,
        broker_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT},
    )
    with site.worker(pool=pool) as worker:
        yield Running(site, worker)


def test_a_thousand_tasks_run_exactly_once(running: Running) -> None:
    task_ids = running.site.send("noop", 1000)

    running.site.wait_ended(task_ids, within=60)
    running.site.assert_each_ran_once(task_ids)


@pytest.mark.parametrize("task_name", ["nap", "nap_late"], ids=["early ack", "late ack"])
def test_task_longer_than_the_visibility_timeout_runs_once(
    running: Running, task_name: str
) -> None:
    task_ids = running.site.send(task_name, 1, 3.3 * VISIBILITY_TIMEOUT)

    # A task sent afterwards ends afterwards only where there is one slot.
    running.site.wait_ended(task_ids, within=20)
    last = running.site.send("noop", 1)
    running.site.wait_ended(last, within=20)
    running.site.assert_each_ran_once(task_ids)
