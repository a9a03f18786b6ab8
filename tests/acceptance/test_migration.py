"""docs/how-to/migrate-from-redis.md, step by step, under load, forth and back."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import Site
from tests.servers import ROOT, CeleryWorker, RedisServer, eventually

pytestmark = [pytest.mark.redis, pytest.mark.slow]

HOW_TO = (ROOT / "docs" / "how-to" / "migrate-from-redis.md").read_text("utf-8")

#: The phases of the how-to, in its order.
PHASES = ("redis", "dual-write", "dual-read", "jetstream")


def settings_of_the_how_to() -> list[dict[str, Any]]:
    """The ``broker_transport_options`` of each step, as they are printed there."""
    blocks = re.findall(r"(?s)```python\n(.*?)```", HOW_TO)
    found = []
    for block in blocks:
        namespace: dict[str, Any] = {}
        exec(compile(ast.parse(block), "how-to", "exec"), namespace)
        found.append(namespace["broker_transport_options"])
    return found


def commands_of_the_how_to() -> list[str]:
    """The commands it shows, in their order."""
    blocks = re.findall(r"(?s)```console\n(.*?)```", HOW_TO)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_the_how_to_goes_through_all_phases() -> None:
    assert [step["migration_phase"] for step in settings_of_the_how_to()] == list(PHASES)


class Rolling:
    """Workers and producers of one application, replaced one by one while tasks are sent."""

    def __init__(
        self, make_site: Callable[..., Site], nats_server: NatsServer, redis_server: RedisServer
    ) -> None:
        self._redis_url = redis_server.url
        self._nats_url = f"{nats_server.broker_url}/shop"
        self._make_site = make_site
        self._sites: dict[str, Site] = {}
        self._workers: list[CeleryWorker] = []
        self._number = 0
        self.task_ids: list[str] = []
        self.errors: list[Exception] = []
        self._producer = self.site("plain").client
        self._over = threading.Event()

    def site(self, phase: str) -> Site:
        """The application as one step has it; "plain" is kombu's Redis transport."""
        if phase not in self._sites:
            if phase == "plain":
                site = self._make_site(self._redis_url)
            else:
                options = settings_of_the_how_to()[PHASES.index(phase)]
                assert options["fallback_url"] == "redis://redis.example:6379/0"
                options = {**options, "fallback_url": self._redis_url}
                site = self._make_site(self._nats_url, broker_transport_options=options)
            if self._sites:
                site.ledger = next(iter(self._sites.values())).ledger
            self._sites[phase] = site
        return self._sites[phase]

    def roll(self, phase: str) -> None:
        """Bring everything to *phase*: a new worker for each old one, then the producers."""
        for old in list[Any](self._workers) or [None, None]:
            self._number += 1
            new = self.site(phase).worker(f"w{self._number}-{phase}")
            new.start().wait_ready()
            self._workers.append(new)
            if old is not None:
                assert old.warm_shutdown() == 0, old.tail()
                self._workers.remove(old)
        self._producer = self.site(phase).client
        before = len(self.task_ids)
        eventually(lambda: len(self.task_ids) > before + 50, within=20)

    @contextmanager
    def under_load(self, rate: float) -> Iterator[None]:
        """Send *rate* tasks a second, every tenth through a countdown or with a priority."""
        thread = threading.Thread(target=self._produce, args=(rate,))
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _produce(self, rate: float) -> None:
        kinds: list[dict[str, Any]] = [{}] * 8 + [{"priority": 9}, {"countdown": 1.5}]
        while not self._over.wait(1 / rate):
            options = kinds[len(self.task_ids) % len(kinds)]
            try:
                task = self._producer.tasks["noop"]
                self.task_ids.append(task.apply_async(**options).id)
            except Exception as exc:  # none is expected, whatever its class
                self.errors.append(exc)

    def run(self, phase: str, line: str) -> str:
        """Run a command of the how-to as the application of *phase*."""
        assert line in commands_of_the_how_to(), line
        words = shlex.split(line.replace("-A shop", "-A tests.acceptance.app"))
        assert words[0] == "celery"
        done = subprocess.run(
            [sys.executable, "-m", *words],
            env=self.site(phase).env(),
            cwd=self.site(phase).folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, phase: str) -> dict[str, Any]:
        site = self.site(phase)
        command = "-A tests.acceptance.app jetstream migrate status --json"
        done = subprocess.run(
            [sys.executable, "-m", "celery", *command.split()],
            env=site.env(),
            cwd=site.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return dict(json.loads(done.stdout))

    def wait_all_ended(self) -> None:
        self.site("plain").wait_ended(list(self.task_ids), within=40)


@pytest.mark.timeout(400)
def test_the_whole_way_and_back_loses_nothing_and_runs_nothing_twice(
    make_site: Callable[..., Site], nats_server: NatsServer, redis_server: RedisServer
) -> None:
    rolling = Rolling(make_site, nats_server, redis_server)
    status = "celery -A shop jetstream migrate status"
    with rolling.under_load(rate=50):
        rolling.roll("plain")
        rolling.roll("redis")
        assert "migration_phase 'redis'" in rolling.run("redis", status)
        rolling.roll("dual-write")
        said = rolling.run("dual-write", "celery -A shop jetstream migrate compare")
        assert "same" in said
        rolling.roll("dual-read")
        rolling.run("dual-read", "celery -A shop jetstream migrate drain --dry-run")
        rolling.run("dual-read", "celery -A shop jetstream migrate drain --unacked --force")
        rolling.run("dual-read", status)
        rolling.roll("jetstream")
        eventually(lambda: not _in_redis(rolling.status("jetstream")), within=10, every=0.5)

        for phase in ("dual-read", "dual-write", "redis"):
            rolling.roll(phase)
        eventually(lambda: not _in_jetstream(rolling.status("redis")), within=20, every=0.5)
        rolling.roll("plain")
    rolling.wait_all_ended()

    assert rolling.errors == []
    assert len(rolling.task_ids) > 500
    rolling.site("plain").assert_each_ran_once(rolling.task_ids)


def _in_redis(status: dict[str, Any]) -> int:
    waiting = sum(queue["redis"] for queue in status["queues"])
    return int(waiting + status["held"] + status["unacked"] + status["draining"])


def _in_jetstream(status: dict[str, Any]) -> int:
    return int(sum(queue["jetstream"] + queue["in_flight"] for queue in status["queues"]))


def test_nothing_else_in_redis_is_touched(
    make_site: Callable[..., Site], nats_server: NatsServer, redis_server: RedisServer
) -> None:
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.set("celery-task-meta-1", "a result")
        client.lpush("shop:orders", "an order")
        client.hset("unacked_orders", "1", "theirs")
        rolling = Rolling(make_site, nats_server, redis_server)
        site = rolling.site("dual-read")
        site.send("noop", 3)
        with site.worker():
            pass
        rolling.run("dual-read", "celery -A shop jetstream migrate drain --unacked --force")

        assert client.get("celery-task-meta-1") == b"a result"
        assert client.lrange("shop:orders", 0, -1) == [b"an order"]
        assert client.hgetall("unacked_orders") == {b"1": b"theirs"}
