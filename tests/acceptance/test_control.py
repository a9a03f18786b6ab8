"""Remote control, events and Flower, as operators use them."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import Site, celery_command, run_celery, start_all
from tests.servers import CeleryWorker, eventually, free_port

pytestmark = pytest.mark.nats29

#: Far enough that countdowns wait in the worker, where ``inspect scheduled`` shows them.
HELD_BY_THE_WORKER = {"delay_threshold": 3600}


@pytest.fixture(scope="module")
def site(shared_nats_server: NatsServer, make_site: Callable[..., Site]) -> Site:
    return make_site(shared_nats_server.broker_url, broker_transport_options=HELD_BY_THE_WORKER)


@dataclass
class Busy:
    """A worker with one slot, and what keeps it busy."""

    worker: CeleryWorker
    running: str = ""
    reserved: list[str] = field(default_factory=list)
    scheduled: str = ""
    #: what ``celery inspect …`` and ``celery status`` said of it
    said: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def busy(site: Site) -> Busy:
    """All questions are asked at the same time, as each takes Celery's second of waiting."""
    worker = site.worker("busy", concurrency=1, queues="busy")
    start_all([worker])
    busy = Busy(worker)
    busy.scheduled = site.send("noop", 1, queue="busy", countdown=60)[0]
    busy.running = site.send("nap", 1, 600, queue="busy")[0]
    site.wait_started([busy.running], within=10)
    busy.reserved = site.send("noop", 2, queue="busy")
    worker.wait_log(busy.reserved[-1])

    questions = ["ping", "active", "registered", "stats", "active_queues", "reserved", "scheduled"]
    commands = {
        name: ["inspect", "-t", "5", "-d", worker.hostname, "-j", name] for name in questions
    }
    commands["status"] = ["status", "-t", "5", "-d", worker.hostname]
    asked = {
        name: subprocess.Popen(
            celery_command(*args),
            env=site.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, args in commands.items()
    }
    for name, process in asked.items():
        busy.said[name], _ = process.communicate(timeout=30)
        assert process.returncode == 0, busy.said[name]
    return busy


def _answer(busy: Busy, question: str) -> Any:
    return json.loads(busy.said[question])[busy.worker.hostname]


def test_inspect_ping(busy: Busy) -> None:
    assert _answer(busy, "ping") == {"ok": "pong"}


def test_inspect_active(busy: Busy) -> None:
    assert [task["id"] for task in _answer(busy, "active")] == [busy.running]


def test_inspect_registered(busy: Busy) -> None:
    assert {"add", "noop", "nap_late"} <= set(_answer(busy, "registered"))


def test_inspect_stats(busy: Busy) -> None:
    stats = _answer(busy, "stats")

    assert stats["pool"]["max-concurrency"] == 1
    assert stats["broker"]["transport"] == "jetstream"


def test_inspect_active_queues(busy: Busy) -> None:
    assert [queue["name"] for queue in _answer(busy, "active_queues")] == ["busy"]


def test_inspect_reserved(busy: Busy) -> None:
    reserved = {task["id"] for task in _answer(busy, "reserved")}

    assert set(busy.reserved) <= reserved


def test_inspect_scheduled(busy: Busy) -> None:
    assert [task["request"]["id"] for task in _answer(busy, "scheduled")] == [busy.scheduled]


def test_status(busy: Busy) -> None:
    assert f"{busy.worker.hostname}: OK" in busy.said["status"]
    assert "1 node online" in busy.said["status"]


@pytest.fixture(scope="module")
def worker(site: Site) -> CeleryWorker:
    """A worker with events that the tests below give orders to."""
    worker = site.worker("orders", concurrency=1, args=["-E"])
    start_all([worker])
    return worker


def _control(site: Site, worker: CeleryWorker, *args: str) -> str:
    done = run_celery(site.env(), "control", "-t", "5", "-d", worker.hostname, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _inspect(site: Site, worker: CeleryWorker, question: str) -> Any:
    """The worker's answer; asked again as long as a slow machine gives none."""

    def answer() -> Any:
        inspect = site.client.control.inspect([worker.hostname], timeout=5)
        return (getattr(inspect, question)() or {}).get(worker.hostname)

    return eventually(answer, within=20)


def test_add_and_cancel_consumer(site: Site, worker: CeleryWorker) -> None:
    _control(site, worker, "add_consumer", "more")
    task_ids = site.send("noop", 3, queue="more")
    site.wait_ended(task_ids, within=10)

    _control(site, worker, "cancel_consumer", "more")

    queues = _inspect(site, worker, "active_queues")
    assert [queue["name"] for queue in queues] == ["celery"]
    left = site.send("noop", 1, queue="more")
    site.wait_ended(site.send("noop", 1), within=10)
    assert site.ledger.starts()[left[0]] == 0


def test_rate_limit(site: Site, worker: CeleryWorker) -> None:
    assert "new rate limit set" in _control(site, worker, "rate_limit", "echo", "4/s")

    task_ids = site.send("echo", 4)
    site.wait_ended(task_ids, within=10)

    moments = [e.at for e in site.ledger.entries("echo") if e.event == "start"]
    assert max(moments) - min(moments) > 0.7


def test_pool_grow_and_shrink(site: Site) -> None:
    worker = site.worker("pool", concurrency=1, queues="pool")
    start_all([worker])

    def processes() -> int:
        return len(_inspect(site, worker, "stats")["pool"]["processes"])

    _control(site, worker, "pool_grow", "1")
    eventually(lambda: processes() == 2, within=20)
    naps = site.send("nap", 2, 1.0, queue="pool")
    site.wait_ended(naps, within=10)
    moments = [e for e in site.ledger.entries("nap") if e.task_id in naps]
    assert [e.event for e in moments] == ["start", "start", "end", "end"]

    _control(site, worker, "pool_shrink", "1")
    eventually(lambda: processes() == 1, within=20)


def test_revoke_before_the_task_starts(site: Site, worker: CeleryWorker) -> None:
    first = site.send("nap", 1, 1.5)
    site.wait_started(first, within=10)
    waiting = site.send("noop", 1)

    site.client.control.revoke(waiting[0])

    worker.wait_log(f"Discarding revoked task: noop[{waiting[0]}]")
    assert site.ledger.starts()[waiting[0]] == 0


def test_revoke_and_terminate_a_running_task(site: Site, worker: CeleryWorker) -> None:
    task_id = site.send("nap", 1, 600)[0]
    site.wait_started([task_id], within=10)

    _control(site, worker, "terminate", "SIGTERM", task_id)

    worker.wait_log(f"Terminating {task_id}")
    site.wait_ended(site.send("noop", 1), within=10)
    assert task_id not in site.ledger.ends()


def test_events_reach_celery_events(site: Site, worker: CeleryWorker, folder: Path) -> None:
    dump = folder / "events"
    with open(dump, "wb") as out:
        events = subprocess.Popen(
            celery_command("events", "--dump"),
            env={**site.env(), "PYTHONUNBUFFERED": "1"},
            stdout=out,
            stderr=out,
        )
    try:
        # Heartbeats come every two seconds: with the first one it listens.
        eventually(lambda: f"{worker.hostname} [" in dump.read_text(), within=15)
        good, bad = site.send("noop", 1)[0], site.send("fail", 1)[0]
        said = [f"task received: noop({good})", f"task started: noop({good})"]
        said += [f"task succeeded: noop({good})", f"task failed: fail({bad})"]

        eventually(lambda: all(line in dump.read_text() for line in said), within=10)
    finally:
        events.terminate()
        events.wait(10)


@pytest.fixture
def flower(site: Site, worker: CeleryWorker, folder: Path) -> Iterator[Callable[[str], Any]]:
    """Flower's API as a function of the path."""
    port = free_port()
    with open(folder / "flower.log", "wb") as log:
        process = subprocess.Popen(
            celery_command("flower", f"--port={port}", "--address=127.0.0.1"),
            env={**site.env(), "FLOWER_UNAUTHENTICATED_API": "true"},
            cwd=folder,
            stdout=log,
            stderr=log,
        )

    def get(path: str) -> Any:
        assert process.poll() is None, (folder / "flower.log").read_text()
        with (
            suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=10) as answer,
        ):
            return json.load(answer)
        return {}

    try:
        yield get
    finally:
        process.kill()
        process.wait()


def test_flower_shows_workers_and_tasks(
    site: Site, worker: CeleryWorker, flower: Callable[[str], Any]
) -> None:
    eventually(lambda: worker.hostname in flower("workers?refresh=1"), within=20, every=0.2)
    task_id = site.send("noop", 1)[0]

    eventually(
        lambda: flower("tasks").get(task_id, {}).get("state") == "SUCCESS", within=15, every=0.2
    )


def test_shutdown(site: Site) -> None:
    worker = site.worker("leaving", pool="threads", queues="leaving")
    start_all([worker])

    site.client.control.shutdown([worker.hostname])

    assert worker.process is not None
    assert worker.process.wait(20) == 0
