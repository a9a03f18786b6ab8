"""Tasks with an eta or a countdown wait in the broker, and come at their time."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import chain

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import Site, start_all
from tests.servers import (
    CeleryWorker,
    NatsCluster,
    api_request,
    eventually,
    run_nats_server,
    session_members,
)

pytestmark = pytest.mark.requires_nats("2.12")

#: Seconds after its due time within which a task starts, where the load allows it.
PROMPT = 0.5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with run_nats_server(tmp_path_factory.mktemp("nats store")) as server:
        yield server


class Appointments:
    """Tasks that are due at known moments, and how well they kept them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        #: seconds since the epoch by task id
        self.due: dict[str, float] = {}

    def make(self, count: int, first: float, last: float) -> None:
        """Send *count* tasks, due between *first* and *last* seconds from now."""
        options = {**self.site.config.get("broker_transport_options", {})}
        options["publish_confirms"] = "pipelined"
        with self.site.new_client(broker_transport_options=options) as client:
            noop = client.tasks["noop"]
            now = time.time()
            with client.producer_pool.acquire(block=True) as producer:
                for _ in range(count):
                    due = now + random.uniform(first, last)
                    eta = datetime.fromtimestamp(due, timezone.utc)
                    task_id = noop.apply_async(eta=eta, producer=producer).id
                    self.due[task_id] = eta.timestamp()
                producer.channel.flush()

    def lateness(self) -> list[float]:
        """Seconds between due and start of each execution of these tasks, sorted."""
        to_epoch = time.time() - time.monotonic()
        return sorted(
            entry.at + to_epoch - self.due[entry.task_id]
            for entry in self.site.ledger.entries("noop")
            if entry.event == "start" and entry.task_id in self.due
        )

    def wait(self, grace: float) -> list[float]:
        """Wait until *grace* seconds after the last one is due; each was kept once."""
        ids = list(self.due)
        self.site.wait_ended(ids, within=max(self.due.values()) - time.time() + grace)
        self.site.assert_each_ran_once(ids)
        return self.lateness()


def held(worker: CeleryWorker, site: Site) -> list[Any]:
    """What a worker itself holds for later or has reserved."""
    inspect = site.client.control.inspect([worker.hostname], timeout=2, limit=1)
    # celery_ext adds what waits in the server; of that no worker is named.
    scheduled = [
        entry
        for entry in inspect.scheduled()[worker.hostname]
        if entry["request"]["hostname"] is not None
    ]
    return scheduled + list(inspect.reserved()[worker.hostname])


def waiting(server: NatsServer, namespace: str) -> int:
    """How many messages wait in the server for their time."""
    request = {"subjects_filter": f"{namespace}.*.@delay.>"}
    streams = (f"{namespace}_{level}" for level in ("high", "medium", "low"))
    infos = [api_request(server.url, f"STREAM.INFO.{stream}", request) for stream in streams]
    return sum(len(info["state"].get("subjects") or {}) for info in infos)


def memory(worker: CeleryWorker) -> int:
    """Bytes of memory that the processes of a worker have to themselves."""
    total = 0
    for pid in session_members(worker.pid):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Dirty:", "Private_Clean:")):
                total += int(line.split()[1]) * 1024
    return total


def assert_prompt(late: Sequence[float], share: float = 0.99, within: float = PROMPT) -> None:
    assert late[0] >= 0, f"{sum(x < 0 for x in late)} early, by up to {-late[0]:.3f} s"
    on_time = sum(x <= within for x in late) / len(late)
    assert on_time >= share, f"{on_time:.1%} within {within:g} s, the last after {late[-1]:.2f} s"


def test_hundreds_of_tasks_come_at_their_time(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{server.broker_url}/many")
    worker = site.worker(concurrency=2)
    start_all([worker])
    appointments = Appointments(site)

    appointments.make(500, 5.0, 8.0)

    assert held(worker, site) == []
    assert waiting(server, "many") == 500
    late = appointments.wait(grace=10)
    # On a machine that runs other tests beside this one.
    assert_prompt(late, share=0.95, within=2 * PROMPT)


def test_all_come_after_the_server_and_the_worker_were_killed(
    tmp_path: Path, make_site: Callable[..., Site]
) -> None:
    with run_nats_server(tmp_path / "nats store") as server:
        site = make_site(server.broker_url, "killed")
        worker = site.worker(concurrency=2)
        start_all([worker])
        appointments = Appointments(site)
        appointments.make(300, 4.0, 10.0)

        server.kill()
        worker.kill9()
        eventually(lambda: time.time() > min(appointments.due.values()) + 1.0, within=10)
        server.start()
        worker.start()

        late = appointments.wait(grace=20)
        worker.kill9()
    assert late[0] >= 0


@pytest.mark.cluster
@pytest.mark.slow
def test_all_come_after_the_leader_of_a_cluster_was_killed(
    nats_cluster: Callable[..., NatsCluster], make_site: Callable[..., Site]
) -> None:
    cluster = nats_cluster(3)
    site = make_site(cluster.broker_url, "cluster", broker_transport_options={"stream_replicas": 3})
    worker = site.worker(concurrency=2)
    start_all([worker])
    appointments = Appointments(site)
    appointments.make(300, 6.0, 16.0)

    leader = api_request(cluster.running[0].url, "STREAM.INFO.celery_medium")["cluster"]["leader"]
    cluster.server_named(leader).kill()

    late = appointments.wait(grace=40)
    worker.kill9()
    assert late[0] >= 0


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_twenty_thousand_tasks_ten_minutes_ahead(
    tmp_path: Path, make_site: Callable[..., Site]
) -> None:
    """They cost the worker nothing while they wait, and survive it and the server."""
    with run_nats_server(tmp_path / "nats store") as server:
        site = make_site(server.broker_url, "soak")
        worker = site.worker(concurrency=2)
        start_all([worker])
        site.wait_ended(site.send("noop", 200), within=30)
        before = memory(worker)
        appointments = Appointments(site)

        appointments.make(20_000, 600.0, 960.0)

        eventually(lambda: waiting(server, "celery") == 20_000, within=10)
        assert memory(worker) - before < 4 * 1024 * 1024  # held, they would be 100 MB
        assert held(worker, site) == []
        server.kill()
        worker.kill9()
        server.start()
        worker.start().wait_ready()
        assert waiting(server, "celery") == 20_000

        late = appointments.wait(grace=60)
        worker.kill9()
        assert_prompt(late)


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_twenty_thousand_tasks_survive_the_loss_of_a_leader(
    nats_cluster: Callable[..., NatsCluster], make_site: Callable[..., Site]
) -> None:
    cluster = nats_cluster(3)
    options = {"stream_replicas": 3}
    site = make_site(cluster.broker_url, "soak cluster", broker_transport_options=options)
    worker = site.worker(concurrency=2)
    start_all([worker])
    appointments = Appointments(site)
    appointments.make(20_000, 600.0, 960.0)
    some_are_due = min(appointments.due.values()) + 30

    eventually(lambda: time.time() > some_are_due, within=700, every=1.0)
    leader = api_request(cluster.running[0].url, "STREAM.INFO.celery_medium")["cluster"]["leader"]
    killed_at = time.time()
    cluster.server_named(leader).kill()

    late = appointments.wait(grace=120)
    worker.kill9()
    assert late[0] >= 0
    spared = [due for due in appointments.due.values() if not killed_at - 1 < due < killed_at + 30]
    assert sum(x <= PROMPT for x in late) >= 0.99 * len(spared)


# Celery's ways to say when


def start_of(site: Site, task_id: str) -> float:
    """Seconds since the epoch when a task started, once it has."""
    site.wait_started([task_id], within=15)
    to_epoch = time.time() - time.monotonic()
    entries = site.ledger.entries()
    return next(e.at for e in entries if e.task_id == task_id and e.event == "start") + to_epoch


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"timezone": "Asia/Kolkata"},
        {"timezone": "America/Los_Angeles"},
        {"timezone": "Asia/Kolkata", "enable_utc": False},
    ],
    ids=["UTC", "east", "west", "local time"],
)
def test_time_zones(
    server: NatsServer,
    make_site: Callable[..., Site],
    request: pytest.FixtureRequest,
    config: dict[str, Any],
) -> None:
    """However the app is set: a countdown, an aware eta, and a naive one, which Celery takes for
    UTC."""
    name = "zone_" + request.node.callspec.id.replace(" ", "_")
    site = make_site(f"{server.broker_url}/{name}", **config)
    worker = site.worker(pool="solo")
    start_all([worker])
    noop = site.client.tasks["noop"]
    due = datetime.now(timezone.utc) + timedelta(seconds=3)
    west = timezone(timedelta(hours=-7))

    sent = [
        noop.apply_async(eta=due).id,
        noop.apply_async(eta=due.astimezone(west)).id,
        noop.apply_async(eta=due.replace(tzinfo=None)).id,
        noop.apply_async(countdown=(due - datetime.now(timezone.utc)).total_seconds()).id,
    ]

    assert held(worker, site) == []
    assert waiting(server, name) == len(sent)
    for task_id in sent:
        assert -0.001 <= start_of(site, task_id) - due.timestamp() < 2.0


def test_countdown_of_a_retry_and_in_a_chain(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{server.broker_url}/canvas")
    worker = site.worker(pool="solo")
    start_all([worker])
    tasks = site.client.tasks
    workflow = chain(
        tasks["add"].s(1, 2),
        tasks["add"].s(4).set(countdown=2.0),
        tasks["echo"].s().set(countdown=2.0),
    )

    retried = tasks["retry_until"].apply_async((2, 3.0))
    result = workflow.apply_async()

    eventually(lambda: waiting(server, "canvas") == 2, within=5)
    assert held(worker, site) == []
    assert result.get(timeout=20) == 7
    assert retried.get(timeout=20) == 2
    starts = [e.at for e in site.ledger.entries() if e.task_id == retried.id and e.event == "start"]
    assert starts[1] - starts[0] >= 3.0


def test_what_is_due_within_the_threshold_is_held_by_the_worker(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    options = {"delay_threshold": 10.0}
    site = make_site(f"{server.broker_url}/threshold", broker_transport_options=options)
    worker = site.worker(pool="solo")
    start_all([worker])
    sent_at = time.time()

    (soon,) = site.send("noop", 1, countdown=3.0)
    site.send("noop", 1, countdown=60.0)

    eventually(lambda: len(held(worker, site)) == 1, within=5)
    assert waiting(server, "threshold") == 1
    assert start_of(site, soon) - sent_at >= 3.0


def test_a_task_revoked_while_it_waits_does_not_run(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{server.broker_url}/revoked")
    worker = site.worker(pool="solo")
    start_all([worker])
    revoked, other = site.send("noop", 2, countdown=3.0)

    site.client.control.revoke(revoked)

    site.wait_ended([other], within=15)
    worker.wait_log(f"Discarding revoked task: noop[{revoked}]")
    assert revoked not in site.ledger.starts()
    eventually(lambda: site.client.AsyncResult(revoked).state == "REVOKED", within=5)


def test_an_expired_task_does_not_run(server: NatsServer, make_site: Callable[..., Site]) -> None:
    """Neither one that expired in its queue, nor one that expires before it is due."""
    site = make_site(f"{server.broker_url}/expired")
    (in_queue,) = site.send("noop", 1, expires=1.0)
    (before_due,) = site.send("noop", 1, countdown=4.0, expires=2.0)
    (in_time,) = site.send("noop", 1, countdown=4.0, expires=60.0)
    state = f"STREAM.INFO.{site.broker_url.rpartition('/')[2]}_medium"
    eventually(lambda: api_request(server.url, state)["state"]["messages"] == 2, within=5)
    start_all([site.worker(pool="solo")])

    site.wait_ended([in_time], within=20)
    later = site.send("noop", 1)
    site.wait_ended(later, within=10)

    started = site.ledger.starts()
    assert in_queue not in started
    assert before_due not in started


def test_celery_purge_takes_the_waiting_tasks_along(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{server.broker_url}/purged")
    site.send("noop", 2)
    site.send("noop", 3, countdown=600.0)

    said = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tests.acceptance.app", "purge", "-f"],
        env=site.env(),
        cwd=site.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert "Purged 5 messages from 1 known task queue" in said.stdout
    assert waiting(server, "purged") == 0
