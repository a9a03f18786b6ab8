"""An ordinary Celery app whose tasks write down when they start and end.

Imported by test and worker alike, and configured by the environment alone
(see `tests.servers.app_env`):

- ``BROKER_URL``: the broker.
- ``LEDGER``: a file; each start and each end of a task appends one line to it, with a
  single write, so that "executed exactly once" can be read off it whatever was killed.
- ``RESULT_BACKEND``: where results go; none when unset.
- ``APP_SETTINGS``: JSON object of further settings, by their names.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from celery import Celery, Task
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)


def write_ledger(task_id: str, task_name: str, event: str) -> None:
    path = os.environ.get("LEDGER")
    if not path:
        return
    line = f"{task_id}\t{task_name}\t{event}\t{os.getpid()}\t{time.monotonic():.6f}\n"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


class LedgerTask(Task):
    """Writes ``start``, then ``end`` or the name of the exception.

    Celery's own tasks, such as ``celery.chord_unlock``, are in the ledger as well.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        task_id = str(self.request.id)
        write_ledger(task_id, self.name, "start")
        try:
            result = super().__call__(*args, **kwargs)
        except BaseException as exc:
            write_ledger(task_id, self.name, type(exc).__name__)
            raise
        write_ledger(task_id, self.name, "end")
        return result


def make_app(**config: Any) -> Celery:
    """A new app with the settings of the environment and then *config*, and the tasks."""
    app = Celery("acceptance", task_cls=LedgerTask, set_as_current=False)
    settings = {
        "broker_url": os.environ.get("BROKER_URL", "jetstream://127.0.0.1:4222"),
        "result_backend": os.environ.get("RESULT_BACKEND"),
        "broker_connection_retry_on_startup": True,
        "worker_hijack_root_logger": True,
        # Tests wait for reconnects; Celery's own 2, 4, 6 seconds would add up.
        "broker_connection_timeout": 2.0,
        "task_publish_retry_policy": {
            "max_retries": 3,
            "interval_start": 0.1,
            "interval_step": 0.2,
        },
    }
    app.conf.update({**settings, **json.loads(os.environ.get("APP_SETTINGS", "{}")), **config})
    _add_tasks(app)
    return app


def _add_tasks(app: Celery) -> None:
    def task(name: str, **options: Any) -> Any:
        return app.task(name=name, shared=False, **options)

    @task("noop")
    def noop() -> None:
        return None

    @task("echo")
    def echo(value: Any = None) -> Any:
        return value

    @task("add")
    def add(x: float, y: float) -> float:
        return x + y

    @task("total")
    def total(numbers: list[float]) -> float:
        return sum(numbers)

    @task("size")
    def size(payload: Any) -> int:
        return len(payload)

    @task("nap")
    def nap(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    @task("nap_late", acks_late=True)
    def nap_late(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    @task("nap_lost", acks_late=True, reject_on_worker_lost=True)
    def nap_lost(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    @task("fail")
    def fail(message: str = "as asked") -> None:
        raise ValueError(message)

    @task("fail_late", acks_late=True, acks_on_failure_or_timeout=False)
    def fail_late(message: str = "as asked") -> None:
        raise ValueError(message)

    @task("retry_until", bind=True, max_retries=None)
    def retry_until(self: Task, attempts: int, countdown: float = 0.1) -> int:
        if self.request.retries + 1 < attempts:
            raise self.retry(countdown=countdown)
        return int(self.request.retries) + 1

    @task("kill_self", acks_late=True, reject_on_worker_lost=True)
    def kill_self() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @task("fan_out", bind=True)
    def fan_out(self: Task, task_name: str, count: int) -> list[str]:
        return [self.app.send_task(task_name).id for _ in range(count)]

    @task("where", bind=True)
    def where(self: Task) -> dict[str, Any]:
        return dict(self.request.delivery_info)

    @task("tick")
    def tick() -> None:
        return None

    @task("log")
    def log(message: str) -> None:
        logger.warning(message)


app = make_app()
