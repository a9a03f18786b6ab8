"""What is read from a Celery worker's pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from billiard.pool import ApplyResult
from celery import Celery
from celery.concurrency.prefork import TaskPool as Prefork
from celery.concurrency.solo import TaskPool as Solo
from celery.concurrency.thread import TaskPool as Threads

from kombu_jetstream.pools import has_processes, is_handing_over, process_count


@pytest.fixture
def pool() -> Any:
    """A prefork pool whose processes are not started; its jobs are Celery's own."""
    made = Prefork(limit=2, app=Celery(set_as_current=False))
    made._pool = SimpleNamespace(_cache={}, _processes=2)
    return made


def job(pool: Any, *, is_written: bool) -> ApplyResult:
    made = ApplyResult(pool._pool._cache, None)
    made._write_to = object() if is_written else None
    return made


def test_only_prefork_has_processes(pool: Any) -> None:
    assert has_processes(pool)
    assert not has_processes(Threads(limit=2))
    assert not has_processes(Solo(limit=1))
    assert not has_processes(None)


def test_a_pool_that_has_ended_has_no_count(pool: Any) -> None:
    assert process_count(pool) == 2
    pool._pool = None
    assert process_count(pool) is None


def test_a_task_is_handed_over_from_its_writing_to_the_word_of_its_process(pool: Any) -> None:
    assert not is_handing_over(pool)
    job(pool, is_written=False)
    assert not is_handing_over(pool)
    given = job(pool, is_written=True)
    assert is_handing_over(pool)
    given._ack(None, 0.0, 1, None)
    assert not is_handing_over(pool)


def test_a_pool_that_has_ended_hands_nothing_over(pool: Any) -> None:
    pool._pool = None
    assert not is_handing_over(pool)
