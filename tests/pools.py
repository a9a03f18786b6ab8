"""Celery's prefork pool without its processes, to see what is read from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from billiard.pool import ApplyResult
from celery import Celery
from celery.concurrency.prefork import TaskPool


def prefork_pool(processes: int = 2) -> Any:
    """Return a pool that has no processes yet; its jobs are Celery's own."""
    pool = TaskPool(limit=processes, app=Celery(set_as_current=False))
    pool._pool = SimpleNamespace(_cache={}, _processes=processes)
    return pool


def give_job(pool: Any, *, is_written: bool = True) -> ApplyResult:
    """Give *pool* a job, which is written to a process or waits for one."""
    job = ApplyResult(pool._pool._cache, None)
    job._write_to = object() if is_written else None
    return job


def accept(job: ApplyResult) -> None:
    """Have the process say that it has the job."""
    job._ack(None, 0.0, 1, None)
