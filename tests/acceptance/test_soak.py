"""Minutes of faults under load; run with ``pytest -m soak``."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import Site, start_all
from tests.proxy import TcpProxy
from tests.servers import CeleryWorker, RedisServer, run_nats_server

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0), pytest.mark.nats29]

#: Seconds of faults, and the seed of their order; both can be set for a longer or the same run.
SECONDS = float(os.environ.get("SOAK_SECONDS", "120"))
SEED = int(os.environ.get("SOAK_SEED", "1"))

#: Seconds between two faults.
PAUSE = 2.0

VISIBILITY_TIMEOUT = 3.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with run_nats_server(tmp_path / "nats store") as server:
        yield server


class Publisher(threading.Thread):
    """Publishes until told to stop; `confirmed` are the tasks that must run."""

    def __init__(self, site: Site) -> None:
        super().__init__(name="publisher", daemon=True)
        self.confirmed: list[str] = []
        self.failures = 0
        self.over = threading.Event()
        self._site = site

    def run(self) -> None:
        with self._site.new_client() as client:
            while not self.over.wait(0.01):
                try:
                    self.confirmed.append(client.tasks["nap_late"].delay(0.01).id)
                except OperationalError:
                    self.failures += 1


class Faults:
    """What can happen to a server, a network and workers."""

    def __init__(self, server: NatsServer, proxy: TcpProxy, workers: list[CeleryWorker]) -> None:
        self.server, self.proxy, self.workers = server, proxy, workers
        self.random = random.Random(SEED)
        self.all: list[Callable[[], None]] = [
            self.kill_server,
            self.restart_server,
            self.freeze_server,
            self.cut_connections,
            self.freeze_network,
            self.kill_worker,
            self.restart_worker,
        ]

    def kill_server(self) -> None:
        self.server.kill()
        time.sleep(self.random.random())
        self.server.start()

    def restart_server(self) -> None:
        self.server.restart()

    def freeze_server(self) -> None:
        self.server.pause()
        time.sleep(self.random.random())
        self.server.resume()

    def cut_connections(self) -> None:
        self.proxy.cut()

    def freeze_network(self) -> None:
        self.proxy.freeze()
        time.sleep(self.random.random())
        self.proxy.resume()

    def kill_worker(self) -> None:
        worker = self.random.choice(self.workers)
        worker.kill9()
        worker.start()

    def restart_worker(self) -> None:
        worker = self.random.choice(self.workers)
        worker.warm_shutdown(within=60)
        worker.start()


def suffer(site: Site, faults: Faults) -> tuple[Publisher, list[str]]:
    """Publish while one fault follows the other; return who published, and what happened."""
    start_all(faults.workers)
    publisher = Publisher(site)
    publisher.start()
    happened = []
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            time.sleep(PAUSE)
            fault = faults.random.choice(faults.all)
            happened.append(fault.__name__)
            fault()
    finally:
        publisher.over.set()
        publisher.join(30)
    assert len(publisher.confirmed) > SECONDS
    return publisher, happened


def assert_all_ran(site: Site, publisher: Publisher, happened: list[str]) -> None:
    site.wait_ended(publisher.confirmed, within=10 * VISIBILITY_TIMEOUT)
    repeated = [n for n in site.ledger.ends().values() if n > 1]
    print(
        f"{len(publisher.confirmed)} tasks, {publisher.failures} refused, "
        f"{len(repeated)} ran more than once, after {happened}"
    )
    # A worker or a server that is killed forgets acknowledgements of its last moments, no more.
    assert len(repeated) < len(publisher.confirmed) / 20


def test_every_confirmed_task_runs_whatever_fails(
    server: NatsServer, proxy_to: Callable[[int], TcpProxy], make_site: Callable[..., Site]
) -> None:
    proxy = proxy_to(server.port)
    site = make_site(
        proxy.broker_url,
        "soak",
        broker_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT, "publish_timeout": 3},
    )
    workers = [site.worker(pool, pool=pool) for pool in ("prefork", "threads", "gevent")]

    publisher, happened = suffer(site, Faults(server, proxy, workers))

    assert_all_ran(site, publisher, happened)


@pytest.mark.redis
def test_with_a_fallback_every_task_is_taken_and_runs_whatever_fails(
    server: NatsServer,
    redis_server: RedisServer,
    proxy_to: Callable[[int], TcpProxy],
    make_site: Callable[..., Site],
) -> None:
    proxy = proxy_to(server.port)
    site = make_site(
        proxy.broker_url,
        "soak",
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT,
            "fallback_url": redis_server.url,
            "fallback_after": 0.5,  # some faults last longer, some do not
            "fallback_liveness_timeout": VISIBILITY_TIMEOUT,
        },
    )
    workers = [site.worker(pool, pool=pool) for pool in ("prefork", "threads", "gevent")]

    publisher, happened = suffer(site, Faults(server, proxy, workers))

    assert publisher.failures == 0
    assert_all_ran(site, publisher, happened)
