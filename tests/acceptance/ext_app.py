"""`tests.acceptance.app` with tasks that fail, and settings for what then happens."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore, Reject

import celery_ext
from tests.acceptance.app import make_app

#: Seconds; no jitter, so that a test can tell one delay from another.
BACKOFF_BASE = 0.3

SETTINGS: dict[str, Any] = {
    "jetstream_retry": {
        "max_attempts": 3,
        "backoff_base": BACKOFF_BASE,
        "backoff_max": 5.0,
        "jitter": False,
        "unrecoverable": ["KeyError", "tests.acceptance.ext_app.BadCard"],
        "tasks": {"patient": {"max_attempts": 5}, "once": None},
    },
    "jetstream_priorities": {"urgent": "high", "idle*": "low"},
}


class BadCard(Exception):
    """Cannot be unpickled, as it wants a keyword."""

    def __init__(self, number: int, *, bank: str) -> None:
        super().__init__(f"card {number} of {bank}")


def make_ext_app(**config: Any) -> Celery:
    of_the_environment = json.loads(os.environ.get("APP_SETTINGS", "{}"))
    app = make_app(**{**SETTINGS, **of_the_environment, **config})
    _add_tasks(app)
    return app


def count(name: str) -> int:
    """Return how often this was called with *name*, in whatever process, this time included."""
    path = Path(os.environ["LEDGER"]).parent / f"count {name}"
    with open(path, "a") as file:
        file.write("x")
    return path.stat().st_size


def _add_tasks(app: Celery) -> None:
    def task(name: str, **options: Any) -> Any:
        return app.task(name=name, shared=False, **options)

    @task("flaky", bind=True)
    def flaky(self: Task, failures: int, value: int = 1) -> int:
        if self.request.retries < failures:
            raise OSError(f"attempt {self.request.retries + 1}")
        return value

    @task("flaky_late", bind=True, acks_late=True)
    def flaky_late(self: Task, failures: int) -> int:
        if self.request.retries < failures:
            raise OSError(f"attempt {self.request.retries + 1}")
        return 1

    @task("patient", bind=True)
    def patient(self: Task) -> int:
        if self.request.retries < 4:
            raise OSError("not yet")
        return int(self.request.retries)

    @task("once")
    def once(message: str = "once") -> None:
        raise OSError(message)

    @task("once_late", acks_late=True)
    def once_late(message: str = "once") -> None:
        raise KeyError(message)

    @task("rejecting_failure", acks_late=True, acks_on_failure_or_timeout=False)
    def rejecting_failure() -> None:
        raise KeyError("refused")

    @task("busy", bind=True)
    def busy(self: Task, seconds: float) -> int:
        if not self.request.retries:
            error = OSError("busy")
            error.retry_after = seconds  # type: ignore[attr-defined]
            raise error
        return 1

    @task("bad_card")
    def bad_card() -> None:
        raise BadCard(7, bank="ours")

    @task("mend")
    def mend(path: str, value: int) -> int:
        """Fails for good until the file is there: what an operator mends before a replay."""
        if not os.path.exists(path):
            raise KeyError(path)
        return value

    @task("changes_its_arguments")
    def changes_its_arguments(values: list[int], *, options: dict[str, int]) -> None:
        values.clear()
        options["changed"] = 1
        raise KeyError("changed")

    @task("autoretry", bind=True, autoretry_for=(OSError,), max_retries=1, retry_backoff=False,
          default_retry_delay=0)  # fmt: skip
    def autoretry(self: Task) -> None:
        raise OSError("own policy")

    @task("own_retry", bind=True)
    def own_retry(self: Task) -> None:
        raise self.retry(exc=OSError("own retry"), countdown=0, max_retries=1)

    @task("expected", throws=(LookupError,))
    def expected() -> None:
        raise KeyError("expected")

    @task("unkept", dead_letter=False)
    def unkept() -> None:
        raise KeyError("unkept")

    @task("ignoring")
    def ignoring() -> None:
        raise Ignore

    @task("rejecting", acks_late=True)
    def rejecting() -> None:
        raise Reject("no thanks", requeue=False)

    @task("nacking", bind=True, acks_late=True)
    def nacking(self: Task, times: int, delay: float) -> int:
        attempt = count(str(self.request.id))
        if attempt <= times:
            celery_ext.nack(delay)
        return attempt

    @task("nacking_with_autoretry", bind=True, acks_late=True, autoretry_for=(Exception,))
    def nacking_with_autoretry(self: Task) -> int:
        attempt = count(str(self.request.id))
        if attempt == 1:
            celery_ext.nack()
        return int(self.request.retries)

    @task("nacking_early")
    def nacking_early() -> None:
        celery_ext.nack(1)

    @task("burying")
    def burying() -> None:
        celery_ext.dead_letter("the card was stolen")

    @task("burying_late", acks_late=True)
    def burying_late() -> None:
        celery_ext.dead_letter("the card was stolen")

    @task("soft_limit", soft_time_limit=1)
    def soft_limit() -> None:
        time.sleep(30)

    @task("hard_limit", time_limit=1)
    def hard_limit() -> None:
        time.sleep(30)

    @task("hard_limit_requeued", bind=True, time_limit=1, acks_late=True,
          acks_on_failure_or_timeout=False)  # fmt: skip
    def hard_limit_requeued(self: Task) -> int:
        attempt = count(str(self.request.id))
        if attempt == 1:
            time.sleep(30)
        return attempt

    @task("suicide")
    def suicide() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @task("suicide_once", bind=True, acks_late=True, reject_on_worker_lost=True)
    def suicide_once(self: Task) -> int:
        attempt = count(str(self.request.id))
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return attempt

    @task("sleep_and_fail")
    def sleep_and_fail(seconds: float) -> None:
        time.sleep(seconds)
        raise KeyError("slept")

    @task("urgent")
    def urgent() -> None:
        return None

    @task("trace_of", bind=True)
    def trace_of(self: Task) -> Any:
        from opentelemetry import trace

        return format(trace.get_current_span().get_span_context().trace_id, "032x")


app = make_ext_app()
