"""The server goes away and comes back: nothing confirmed is lost, nothing long runs twice."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import POOLS, Site, start_all
from tests.proxy import TcpProxy
from tests.servers import CeleryWorker, eventually, run_nats_server

pytestmark = pytest.mark.nats29

#: Seconds a late-ack task runs, and that the server is away in the midst of it.
TASK = 8.0
DOWN = 3.0

#: Seconds until the server would hand out again what nobody gave back (the default).
VISIBILITY_TIMEOUT = 30.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server for one test, which kills and freezes it."""
    with run_nats_server(tmp_path / "nats store") as server:
        yield server


class LongTasks:
    """A late-ack task on every pool, running while something happens to the connection."""

    def __init__(self, make_site: Callable[..., Site], broker_url: str) -> None:
        self.sites = {pool: make_site(f"{broker_url}/{pool}", pool) for pool in POOLS}
        self.workers = {pool: site.worker(pool=pool) for pool, site in self.sites.items()}
        self.sent: dict[str, list[str]] = {}
        #: answers to ``inspect ping`` afterwards
        self.answers: dict[str, object] = {}

    def start(self, seconds: float) -> None:
        start_all(self.workers.values())
        for pool, site in self.sites.items():
            self.sent[pool] = site.send("nap_late", 1, seconds)
        for pool, site in self.sites.items():
            site.wait_started(self.sent[pool], within=10)

    def wait_for_another_round(self) -> None:
        """Return when each pool has run a later task, too: what came back had its chance."""
        for pool, site in self.sites.items():
            site.wait_ended(self.sent[pool], within=TASK + 10)
        later = {pool: site.send("noop", 1) for pool, site in self.sites.items()}
        for pool, site in self.sites.items():
            site.wait_ended(later[pool], within=15)
        for pool, site in self.sites.items():
            hostname = self.workers[pool].hostname
            self.answers[pool] = site.client.control.inspect([hostname], timeout=5).ping()


@pytest.fixture(scope="module")
def through_a_restart(
    tmp_path_factory: pytest.TempPathFactory, make_site: Callable[..., Site]
) -> Iterator[LongTasks]:
    """Tasks during which the server was killed, and started again after `DOWN` seconds."""
    with run_nats_server(tmp_path_factory.mktemp("nats store")) as server:
        tasks = LongTasks(make_site, server.broker_url)
        tasks.start(TASK)
        server.kill()
        time.sleep(DOWN)
        server.start()
        tasks.wait_for_another_round()
        yield tasks
        for worker in tasks.workers.values():
            worker.kill9()


@pytest.fixture(scope="module")
def through_a_cut(
    tmp_path_factory: pytest.TempPathFactory, make_site: Callable[..., Site]
) -> Iterator[LongTasks]:
    """Tasks during which each connection was reset."""
    with (
        run_nats_server(tmp_path_factory.mktemp("nats store")) as server,
        TcpProxy(server.port) as proxy,
    ):
        tasks = LongTasks(make_site, proxy.broker_url)
        tasks.start(3.0)
        assert proxy.cut() >= len(POOLS)
        tasks.wait_for_another_round()
        yield tasks
        for worker in tasks.workers.values():
            worker.kill9()


@pytest.mark.pools
@pytest.mark.parametrize("pool", POOLS)
def test_late_ack_task_that_runs_through_a_restart_of_the_server_runs_once(
    through_a_restart: LongTasks, pool: str
) -> None:
    through_a_restart.sites[pool].assert_each_ran_once(through_a_restart.sent[pool])


@pytest.mark.pools
@pytest.mark.parametrize("pool", POOLS)
def test_late_ack_task_whose_connection_is_cut_runs_once(
    through_a_cut: LongTasks, pool: str
) -> None:
    through_a_cut.sites[pool].assert_each_ran_once(through_a_cut.sent[pool])


@pytest.mark.pools
@pytest.mark.parametrize("pool", POOLS)
def test_remote_control_works_again_after_a_loss(
    through_a_restart: LongTasks, through_a_cut: LongTasks, pool: str
) -> None:
    for tasks in (through_a_restart, through_a_cut):
        assert tasks.answers[pool] == {tasks.workers[pool].hostname: {"ok": "pong"}}


@pytest.mark.pools
@pytest.mark.parametrize("fault", ["restart", "cut"])
def test_reserved_tasks_come_back_at_once_after_a_loss(
    server: NatsServer,
    proxy_to: Callable[[int], TcpProxy],
    make_site: Callable[..., Site],
    fault: str,
) -> None:
    """What a busy worker had reserved, another one gets long before the lease is over."""
    proxy = proxy_to(server.port)
    site = make_site(proxy.broker_url if fault == "cut" else server.broker_url, "reserved")
    busy = site.worker("busy", concurrency=1)
    start_all([busy])
    running = site.send("nap_late", 1, TASK)
    site.wait_started(running, within=10)
    reserved = site.send("nap_late", 3, 0.0)
    eventually(lambda: _reserved(site, busy) == set(reserved), within=5)
    free = site.worker("free", concurrency=1)
    start_all([free])

    if fault == "cut":
        proxy.cut()
    else:
        server.kill()
        server.start()
    lost_at = time.monotonic()

    site.wait_ended(reserved, within=VISIBILITY_TIMEOUT / 3)
    assert time.monotonic() - lost_at < VISIBILITY_TIMEOUT / 3
    site.wait_ended(running, within=TASK + 10)
    site.assert_each_ran_once([*running, *reserved])


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_short_late_ack_tasks_run_once_although_the_connection_is_cut_again_and_again(
    server: NatsServer, make_site: Callable[..., Site], pool: str
) -> None:
    """At any moment a task is on its way to a process, which Celery forgets with a connection."""
    with TcpProxy(server.port) as proxy:
        # What was on the wire when it was cut comes back when its lease ends.
        options = {"visibility_timeout": 2}
        site = make_site(proxy.broker_url, "short", broker_transport_options=options)
        with site.worker(pool=pool, concurrency=4):
            task_ids = site.send("nap_late", 800, 0.01)
            ended = 0
            for _ in range(8):
                ended += 60
                eventually(lambda: len(site.ledger.ends()) > ended, within=20)  # noqa: B023
                proxy.cut()

            site.wait_ended(task_ids, within=20)
            site.assert_each_ran_once(task_ids)


@pytest.mark.pools
@pytest.mark.parametrize("pool", POOLS)
def test_a_task_the_worker_holds_for_its_eta_runs_once_after_a_loss(
    server: NatsServer, make_site: Callable[..., Site], pool: str
) -> None:
    """Celery drops it with the connection, but not the objects that would say so."""
    options = {"delay_threshold": 3600, "visibility_timeout": VISIBILITY_TIMEOUT}
    site = make_site(server.broker_url, "held", broker_transport_options=options)
    worker = site.worker(pool=pool, concurrency=1)
    start_all([worker])
    task_ids = site.send("noop", 2, countdown=TASK / 2)
    eventually(
        lambda: all(f"[{task_id}] received" in worker.log for task_id in task_ids), within=10
    )

    server.kill()
    server.start()

    site.wait_ended(task_ids, within=VISIBILITY_TIMEOUT / 2)
    site.assert_each_ran_once(task_ids)


def _reserved(site: Site, worker: CeleryWorker) -> set[str]:
    answers = site.client.control.inspect([worker.hostname], timeout=1).reserved() or {}
    return {task["id"] for tasks in answers.values() for task in tasks}


def test_worker_goes_on_within_five_seconds_of_the_servers_return(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    """Every task whose publish was confirmed is executed, whatever the server lost of its acks."""
    site = make_site(
        server.broker_url,
        "busy",
        task_publish_retry=False,
        broker_transport_options={"visibility_timeout": 2, "publish_timeout": 2},
    )
    worker = site.worker(concurrency=2)
    start_all([worker])
    confirmed: list[str] = []
    over = threading.Event()

    def publish() -> None:
        with site.new_client() as client:
            while not over.is_set():
                try:
                    confirmed.append(client.tasks["nap"].delay(0.005).id)
                except OperationalError:
                    time.sleep(0.05)

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        eventually(lambda: len(site.ledger.ends()) > 100, within=20)
        server.kill()
        time.sleep(2.0)
        before = len(confirmed)
        server.start()
        back_at = time.monotonic()
        ended_before = set(site.ledger.ends())
        eventually(lambda: set(site.ledger.ends()) - ended_before, within=10)
        resumed_after = time.monotonic() - back_at
        eventually(lambda: len(confirmed) > before + 50, within=20)
    finally:
        over.set()
        publisher.join()

    assert resumed_after < 5.0
    site.wait_ended(confirmed, within=30)


def test_nothing_is_lost_or_repeated_when_the_server_freezes(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    """A virtual machine that is moved, a disk that stalls: connections stay, nothing answers."""
    site = make_site(server.broker_url, "frozen")
    start_all([site.worker(concurrency=2)])
    task_ids = site.send("nap_late", 200, 0.02)
    eventually(lambda: len(site.ledger.ends()) > 30, within=20)

    server.pause()
    time.sleep(DOWN)
    server.resume()

    site.wait_ended(task_ids, within=20)
    site.assert_each_ran_once(task_ids)


def test_all_late_ack_tasks_of_a_killed_worker_come_back(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    visibility_timeout = 2.0
    site = make_site(
        server.broker_url,
        "killed",
        broker_transport_options={"visibility_timeout": visibility_timeout},
    )
    victim = site.worker("victim", concurrency=2)
    start_all([victim])
    task_ids = site.send("nap_late", 20, 60.0)
    site.wait_started(task_ids[:2], within=10)
    eventually(lambda: len(_reserved(site, victim)) >= 6, within=5)
    started = Counter(site.ledger.starts())

    victim.kill9()
    killed_at = time.monotonic()
    rescuer = site.worker("rescuer", pool="threads", concurrency=20)
    rescuer.start().wait_ready()

    eventually(
        lambda: all(site.ledger.starts()[each] > started[each] for each in task_ids),
        within=visibility_timeout + 10,
        what="every task has started (again)",
    )
    again = {e.task_id: e.at for e in site.ledger.entries("nap_late") if e.at > killed_at}
    # Not before the lease is over: the server cannot know that the worker is dead.
    assert min(again[each] for each in started) - killed_at > visibility_timeout / 2


def test_worker_whose_server_is_away_at_its_start_waits_for_it(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(server.broker_url, "early")
    server.kill()
    worker = site.worker("early").start()
    worker.wait_log("Trying again", within=15)

    server.start()

    worker.wait_ready(within=15)
    site.wait_ended(site.send("noop", 5), within=10)
