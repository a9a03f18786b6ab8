"""What an ordinary Celery project does, with nothing changed but ``broker_url``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import chain, chord, group

from kombu_jetstream.server import NatsServer
from tests.acceptance.routed_app import make_routed_app
from tests.acceptance.sites import Site, run_celery, start_all
from tests.servers import CeleryWorker, RedisServer, eventually, python_env

pytestmark = pytest.mark.nats29

PROJECT = """
from celery import Celery

app = Celery("project", broker="{broker_url}")

@app.task
def greet(name):
    print("hello " + name)
"""


@pytest.fixture(scope="module")
def site(shared_nats_server: NatsServer, make_site: Callable[..., Site]) -> Site:
    serializers = ["json", "pickle", "msgpack", "yaml"]
    return make_site(
        shared_nats_server.broker_url,
        "site",
        accept_content=serializers,
        result_accept_content=serializers,
        result_chord_join_timeout=10,
    )


@pytest.fixture(scope="module")
def worker(site: Site) -> CeleryWorker:
    """One worker for the tests that need nothing special of it."""
    worker = site.worker("shared", mingle=True)
    start_all([worker])
    return worker


def test_project_that_sets_nothing_but_its_broker_url(
    shared_nats_server: NatsServer, folder: Path
) -> None:
    (folder / "project.py").write_text(
        PROJECT.format(broker_url=f"{shared_nats_server.broker_url}/project")
    )
    worker = CeleryWorker(folder, "", app="project", env={"RESULT_BACKEND": "disabled://"})
    env = python_env()

    with worker:
        called = run_celery(
            env, "call", "project.greet", "--args", '["world"]', app="project", cwd=folder
        )
        assert called.returncode == 0, called.stderr
        worker.wait_log("hello world")


@pytest.mark.usefixtures("worker")
class TestCanvas:
    def test_delay(self, site: Site) -> None:
        assert site.client.tasks["add"].delay(2, 3).get(timeout=10, interval=0.02) == 5

    def test_countdown_is_not_early(self, site: Site) -> None:
        sent_at = time.monotonic()
        result = site.client.tasks["noop"].apply_async(countdown=1.5)

        result.get(timeout=15, interval=0.02)

        started = next(e.at for e in site.ledger.entries() if e.task_id == result.id)
        assert started - sent_at >= 1.5

    def test_chain(self, site: Site) -> None:
        add = site.client.tasks["add"]

        assert chain(add.s(1, 2), add.s(3), add.s(4))().get(timeout=10, interval=0.02) == 10

    def test_group(self, site: Site) -> None:
        echo = site.client.tasks["echo"]

        assert group(echo.s(n) for n in range(20))().get(timeout=10, interval=0.02) == list(
            range(20)
        )

    def test_chord(self, site: Site) -> None:
        add, total = site.client.tasks["add"], site.client.tasks["total"]

        assert (
            chord([add.s(n, n) for n in range(10)])(total.s()).get(timeout=20, interval=0.02) == 90
        )

    def test_retry_with_countdown(self, site: Site) -> None:
        result = site.client.tasks["retry_until"].delay(3, countdown=0.1)

        assert result.get(timeout=10, interval=0.02) == 3
        assert site.ledger.starts()[result.id] == 3

    def test_task_that_sends_tasks(self, site: Site) -> None:
        task_ids = site.client.tasks["fan_out"].delay("noop", 30).get(timeout=10, interval=0.02)

        site.wait_ended(task_ids, within=10)
        site.assert_each_ran_once(task_ids)

    def test_failure_reaches_the_caller(self, site: Site) -> None:
        with pytest.raises(ValueError, match="no such thing"):
            site.client.tasks["fail"].delay("no such thing").get(timeout=10, interval=0.02)

    @pytest.mark.parametrize("serializer", ["json", "pickle", "msgpack", "yaml"])
    @pytest.mark.parametrize("compression", [None, "zlib", "zstd", "bzip2"])
    def test_serializer_and_compression(
        self, site: Site, serializer: str, compression: str | None
    ) -> None:
        value = {"text": "Grüße, 世界 \N{ROCKET}", "many": list(range(100)), "none": None}

        result = site.client.tasks["echo"].apply_async(
            (value,), serializer=serializer, compression=compression
        )

        assert result.get(timeout=10, interval=0.02) == value

    def test_purge_takes_what_no_worker_has(self, site: Site) -> None:
        env = {**site.env(), "BROKER_URL": f"{site.broker_url}/purge"}
        with site.new_client(broker_url=env["BROKER_URL"]) as client:
            for _ in range(7):
                client.tasks["noop"].delay()

            purged = run_celery(env, "purge", "-f")

            assert purged.returncode == 0, purged.stderr
            assert "Purged 7 messages from 1 known task queue" in purged.stdout
            assert "No messages purged" in run_celery(env, "purge", "-f").stdout


def test_results_over_rpc(shared_nats_server: NatsServer, make_site: Callable[..., Site]) -> None:
    site = make_site(f"{shared_nats_server.broker_url}/rpc", "rpc", result_backend="rpc://")
    start_all([site.worker("rpc")])

    with site.new_client() as client:
        add = client.tasks["add"]
        assert add.delay(1, 1).get(timeout=10, interval=0.02) == 2
        assert group(add.s(n, n) for n in range(50))().get(timeout=10, interval=0.02) == [
            2 * n for n in range(50)
        ]
        with pytest.raises(ValueError, match="as asked"):
            client.tasks["fail"].delay().get(timeout=10, interval=0.02)


@pytest.mark.redis
# Celery's redis backend leaves a connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_chord_over_a_redis_result_backend(
    shared_nats_server: NatsServer, make_site: Callable[..., Site], redis_server: RedisServer
) -> None:
    url = f"{shared_nats_server.broker_url}/redis"
    site = make_site(url, "redis", result_backend=redis_server.url)
    start_all([site.worker("redis")])

    with site.new_client() as client:
        add, total = client.tasks["add"], client.tasks["total"]
        result = chord([add.s(n, n) for n in range(50)])(total.s())
        assert result.get(timeout=20, interval=0.02) == 2450


def test_beat_sends_periodic_tasks(site: Site, worker: CeleryWorker, folder: Path) -> None:
    schedule = {"every half second": {"task": "tick", "schedule": 0.5}}
    env = site.env()
    env["APP_SETTINGS"] = json.dumps({**json.loads(env["APP_SETTINGS"]), "beat_schedule": schedule})
    command = [sys.executable, "-m", "celery", "-A", "tests.acceptance.app", "beat", "-l", "INFO"]
    with open(folder / "beat.log", "wb") as log:
        beat = subprocess.Popen(
            [*command, "-s", str(folder / "schedule")], env=env, cwd=folder, stdout=log, stderr=log
        )
    try:
        eventually(lambda: len(site.ledger.ends("tick")) >= 3, within=15)
        assert beat.poll() is None
    finally:
        beat.terminate()
        assert beat.wait(10) == 0, (folder / "beat.log").read_text()


@pytest.fixture(scope="module")
def routed(shared_nats_server: NatsServer, make_site: Callable[..., Site]) -> Site:
    """Two workers on all queues."""
    site = make_site(f"{shared_nats_server.broker_url}/routed", "routed", make_app=make_routed_app)
    app = "tests.acceptance.routed_app"
    start_all(site.worker(name, app=app, pool="threads") for name in ("one", "two"))
    return site


class TestQueues:
    """``task_routes``, and ``task_queues`` with topic and fanout exchanges and Broadcast."""

    def test_task_route_to_a_queue(self, routed: Site) -> None:
        delivery_info = routed.client.tasks["where"].delay().get(timeout=10, interval=0.02)

        assert (delivery_info["exchange"], delivery_info["routing_key"]) == ("", "feeds")

    @pytest.mark.parametrize(
        ("routing_key", "copies"),
        [("eu.sport.football", 2), ("eu.sport", 2), ("eu.politics", 1), ("sport", 1)],
    )
    def test_topic_exchange(self, routed: Site, routing_key: str, copies: int) -> None:
        """A task goes once to each queue whose pattern covers its key."""
        result = routed.client.tasks["echo"].apply_async(
            (routing_key,), exchange="news", routing_key=routing_key
        )

        _wait_for_count(routed, result.id, copies)

    def test_fanout_exchange(self, routed: Site) -> None:
        result = routed.client.tasks["echo"].apply_async(exchange="everyone", routing_key="any")

        _wait_for_count(routed, result.id, 2)

    def test_broadcast_reaches_every_worker(self, routed: Site) -> None:
        result = routed.client.tasks["tick"].delay()

        _wait_for_count(routed, result.id, 2)
        assert len({e.pid for e in routed.ledger.entries() if e.task_id == result.id}) == 2


def _wait_for_count(site: Site, task_id: str, count: int) -> None:
    """Wait until a task was executed *count* times, and for one that comes after it."""
    eventually(lambda: site.ledger.ends()[task_id] >= count, within=10)
    for _ in range(4):
        site.client.tasks["noop"].delay().get(timeout=10, interval=0.02)
    assert site.ledger.ends()[task_id] == count, site.story_of(task_id)
