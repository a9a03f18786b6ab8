"""What a worker costs a server that has nothing for it, and what it leaves behind."""

from __future__ import annotations

import json
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import Connection

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import POOLS, Site, start_all
from tests.servers import (
    CeleryWorker,
    api_request,
    eventually,
    free_port,
    run_nats_server,
    run_python,
)

pytestmark = pytest.mark.nats29

#: Seconds a worker is watched while nothing happens.
IDLE = 10.0

QUEUES = [f"idle {n}" for n in range(5)]
LEVELS = 3

#: A worker that says nothing by itself: Celery's heartbeats and gossip are tasks' events, too.
QUIET = ["--without-heartbeat", "--without-gossip"]


#: Asks all workers for a sign of life, and for results over ``rpc://``.
CLIENT = """
import sys
from celery import group
from tests.acceptance.app import app

workers = sys.argv[1:]
answers = app.control.inspect(timeout=10, limit=len(workers)).ping()
assert sorted(answers) == workers, answers
results = group(app.tasks["echo"].s(n) for n in range(20))().get(timeout=10)
assert results == list(range(20)), results
"""


class Monitored:
    """A nats-server and its monitoring page."""

    def __init__(self, server: NatsServer, http_port: int) -> None:
        self.server = server
        self._http_port = http_port

    def page(self, path: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self._http_port}/{path}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return dict(json.load(answer))

    def requests(self) -> int:
        """Messages the server got from clients so far; PINGs are none."""
        return int(self.page("varz")["in_msgs"])

    def left_behind(self, namespace: str) -> dict[str, Any]:
        """All that can be left in the server, by kind."""
        streams = [
            (stream["config"]["name"], stream["state"])
            for stream in api_request(self.server.url, "STREAM.LIST")["streams"]
        ]
        with Connection(f"{self.server.broker_url}/{namespace}") as connection:
            registry = connection.default_channel.connection.registry
            registry.load()
            known = {"queues": sorted(registry.queues), "bindings": len(registry.table.bindings())}
        return {
            **known,
            "consumers": {name: state["consumer_count"] for name, state in streams},
            # The registry's own are looked into above: what it forgets leaves a mark for a minute.
            "messages": {
                name: state["messages"] for name, state in streams if "registry" not in name
            },
            "subscriptions": self.page("subsz")["num_subscriptions"],
            "connections": self.page("connz")["num_connections"],
        }


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    port = free_port()
    config = {"http": f"127.0.0.1:{port}"}
    with run_nats_server(tmp_path_factory.mktemp("nats store"), config=config) as server:
        yield Monitored(server, port)


@pytest.fixture(scope="module")
def site(monitored: Monitored, make_site: Callable[..., Site]) -> Site:
    return make_site(monitored.server.broker_url)


@pytest.fixture(scope="module")
def idle_worker(site: Site) -> CeleryWorker:
    worker = site.worker("idle", queues=",".join(QUEUES), args=QUIET)
    start_all([worker])
    return worker


@pytest.mark.usefixtures("idle_worker")
def test_idle_worker_asks_less_than_once_per_queue_and_level_in_ten_seconds(
    site: Site, monitored: Monitored
) -> None:
    # The queues are known and the pulls are out when a task has come through each.
    for queue in QUEUES:
        site.wait_ended(site.send("noop", 1, queue=queue), within=10)
    before = monitored.requests()

    time.sleep(IDLE)

    asked = monitored.requests() - before
    assert asked < len(QUEUES) * LEVELS * IDLE / 10


@pytest.mark.usefixtures("idle_worker")
def test_task_for_an_idle_worker_starts_at_once(site: Site) -> None:
    """The exact time is a benchmark's matter; here it is told apart from any polling."""
    delays = []
    for _ in range(20):
        sent_at = time.monotonic()
        task_id = site.send("noop", 1, queue=QUEUES[0])[0]
        site.wait_started([task_id], within=5)
        started_at = next(e.at for e in site.ledger.entries() if e.task_id == task_id)
        delays.append(started_at - sent_at)

    assert statistics.median(delays) < 0.1


def test_remote_control_and_replies_leave_nothing_behind(
    monitored: Monitored, make_site: Callable[..., Site]
) -> None:
    """Streams, consumers, messages and subscriptions are as before."""
    site = make_site(
        f"{monitored.server.broker_url}/trace",
        "trace",
        result_backend="rpc://",
    )
    # prefork, whose pidbox has the connection of the tasks, and gevent, which opens one for it.
    workers = [site.worker(pool, pool=pool, concurrency=1) for pool in ("prefork", "gevent")]
    start_all(workers)
    hostnames = sorted(worker.hostname for worker in workers)

    def use() -> None:
        done = run_python(CLIENT, site.env(), args=hostnames)
        assert done.returncode == 0, done.stderr

    def is_as_before() -> bool:
        assert monitored.left_behind("trace") == before
        return True

    def is_used() -> bool:
        use()
        return True

    # What the first use makes, such as connections of the pool's processes, stays.  A gevent worker
    # is ready before the greenlet that answers is.
    eventually(is_used, within=60, every=0.5)
    before = _settled(monitored)
    assert before["queues"] == ["celery"]
    assert set(before["messages"].values()) == {0}

    for _ in range(3):
        use()

    eventually(is_as_before, within=10, every=0.1)


def _settled(monitored: Monitored) -> dict[str, Any]:
    """What is there, once it is the same twice."""
    seen: list[dict[str, Any]] = []

    def is_the_same_again() -> bool:
        seen.append(monitored.left_behind("trace"))
        return len(seen) > 1 and seen[-1] == seen[-2]

    eventually(is_the_same_again, within=10, every=0.3)
    return seen[-1]


@pytest.mark.pools
@pytest.mark.parametrize("pool", [pool for pool in POOLS if pool not in ("prefork", "gevent")])
def test_worker_answers_on_every_pool(
    monitored: Monitored, make_site: Callable[..., Site], pool: str
) -> None:
    site = make_site(f"{monitored.server.broker_url}/{pool}", pool)
    worker = site.worker(pool, pool=pool)
    start_all([worker])

    answers = site.client.control.inspect([worker.hostname], timeout=10).ping()

    assert answers == {worker.hostname: {"ok": "pong"}}
