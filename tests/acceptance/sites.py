"""What the workers and the test of one case share: broker, settings, ledger and results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import celery
from kombu import pools

from tests.acceptance.app import make_app
from tests.servers import CeleryWorker, Ledger, app_env, eventually, file_backend_url, python_env

#: Celery's pools; solo and threads run tasks in the process of the worker itself.
POOLS = ("prefork", "threads", "solo", "gevent", "eventlet")

#: Slots of each pool in these tests.  solo has one whatever it is told.
CONCURRENCY = {"prefork": 2, "threads": 4, "solo": 1, "gevent": 20, "eventlet": 20}


class Site:
    """A broker URL, Celery settings, and the folder with the ledger and the results.

    *config* holds Celery settings for workers and client alike, *make_app* makes the client.
    """

    def __init__(
        self,
        folder: Path,
        broker_url: str,
        config: dict[str, Any],
        make_app: Callable[..., celery.Celery] = make_app,
    ) -> None:
        self.folder = folder
        self.broker_url = broker_url
        self.results = folder / "results"
        self.results.mkdir()
        self.result_backend = config.pop("result_backend", file_backend_url(self.results))
        self.config = config
        self.ledger = Ledger(folder / "ledger")
        self._stack = ExitStack()
        self._make_app = make_app
        self._client: celery.Celery | None = None

    def __enter__(self) -> Site:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def client(self) -> celery.Celery:
        """The app as a producer in this process; closed with the site."""
        if self._client is None:
            self._client = self._stack.enter_context(self.new_client())
        return self._client

    @contextmanager
    def new_client(self, broker_url: str | None = None, **config: Any) -> Iterator[celery.Celery]:
        """A producer of its own, closed at the end of the block.

        kombu shares connections between apps of one process by URL and options: use no other
        producer with the same ones in the block.
        """
        app = self._make_app(
            **{
                "broker_url": broker_url if broker_url is not None else self.broker_url,
                "result_backend": self.result_backend,
                **self.config,
                **config,
            }
        )
        try:
            yield app
        finally:
            app.pool.force_close_all()
            # kombu gives the next client with these settings the same pool.
            with app.connection_for_write() as connection, suppress(KeyError):
                del pools.producers[connection]
                del pools.connections[connection]
            app.close()

    def worker(
        self, name: str = "worker", *, pool: str = "prefork", **options: Any
    ) -> CeleryWorker:
        """A worker that is not started yet; killed with the site at the latest.

        It goes without Celery's mingle, which costs each start a second, unless *mingle*.
        """
        args = [] if options.pop("mingle", False) else ["--without-mingle"]
        config = {**self.config, **options.pop("config", {})}
        worker = CeleryWorker(
            self.folder,
            options.pop("broker_url", self.broker_url),
            pool=pool,
            concurrency=options.pop("concurrency", CONCURRENCY[pool]),
            name=name,
            config=config,
            ledger=self.ledger.path,
            results=self.results,
            args=[*args, *options.pop("args", [])],
            env={**self._env, **options.pop("env", {})},
            **options,
        )
        self._stack.callback(worker.kill9)
        return worker

    def env(self) -> dict[str, str]:
        """Environment for ``celery -A tests.acceptance.app …``."""
        env = app_env(self.broker_url, ledger=self.ledger.path, config=self.config)
        return python_env({**env, **self._env})

    @property
    def _env(self) -> dict[str, str]:
        # Tests in a container run as root, and some take pickle.
        return {"RESULT_BACKEND": self.result_backend, "C_FORCE_ROOT": "1"}

    def send(self, task_name: str, count: int, *args: Any, **options: Any) -> list[str]:
        """Publish *count* tasks and return their ids."""
        task = self.client.tasks[task_name]
        return [task.apply_async(args, **options).id for _ in range(count)]

    def wait_ended(self, task_ids: Sequence[str], within: float) -> None:
        """Return when each of these tasks has ended at least once."""
        wanted = set(task_ids)

        def all_ended() -> bool:
            missing = wanted - set(self.ledger.ends())
            assert not missing, f"{len(missing)} of {len(wanted)} did not end in {within:g} s"
            return True

        eventually(all_ended, within, every=0.1)

    def wait_started(self, task_ids: Sequence[str], within: float) -> None:
        """Return when each of these tasks has started at least once."""
        wanted = set(task_ids)

        def all_started() -> bool:
            missing = wanted - set(self.ledger.starts())
            assert not missing, f"{len(missing)} of {len(wanted)} did not start in {within:g} s"
            return True

        eventually(all_started, within, every=0.02)

    def assert_each_ran_once(self, task_ids: Sequence[str]) -> None:
        """Fail unless each of these tasks was started and ended once; others do not count."""
        for what, found in (("start", self.ledger.starts()), ("end", self.ledger.ends())):
            wrong = [task_id for task_id in task_ids if found[task_id] != 1]
            if wrong:
                raise AssertionError(
                    f"expected one {what} each, {len(wrong)} of {len(task_ids)} have not; "
                    f"the story of the first:\n{self.story_of(wrong[0])}"
                )

    def story_of(self, task_id: str) -> str:
        """What the ledger and the workers' logs say of one task."""
        lines = [str(entry) for entry in self.ledger.entries() if entry.task_id == task_id]
        for log in sorted(self.folder.glob("*.log")):
            found = [line[:200] for line in log.read_text().splitlines() if task_id in line]
            lines += [f"{log.name}: {line}" for line in found]
        return "\n".join(lines) or "nothing"


def celery_command(*args: str, app: str = "tests.acceptance.app") -> list[str]:
    """The command ``celery -A app …`` of this interpreter."""
    return [sys.executable, "-m", "celery", "-A", app, *args]


def run_celery(
    env: dict[str, str], *args: str, app: str = "tests.acceptance.app", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``celery -A app …`` to its end and return the process with its output as text."""
    return subprocess.run(
        celery_command(*args, app=app),
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        **options,
    )


def start_all(workers: Iterable[CeleryWorker]) -> None:
    """Start workers at the same time and return when all consume."""
    started = [worker.start() for worker in workers]
    for worker in started:
        worker.wait_ready(within=60)
