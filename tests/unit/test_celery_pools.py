"""What is read from a Celery worker's pool."""

from __future__ import annotations

from celery.concurrency.solo import TaskPool as Solo
from celery.concurrency.thread import TaskPool as Threads

from kombu_jetstream.pools import has_processes, is_handing_over, process_count
from tests.pools import accept, give_job, prefork_pool


def test_only_prefork_has_processes() -> None:
    assert has_processes(prefork_pool())
    assert not has_processes(Threads(limit=2))
    assert not has_processes(Solo(limit=1))
    assert not has_processes(None)


def test_a_pool_that_has_ended_has_no_count() -> None:
    pool = prefork_pool(2)

    assert process_count(pool) == 2
    pool._pool = None
    assert process_count(pool) is None


def test_a_task_is_handed_over_from_its_writing_to_the_word_of_its_process() -> None:
    pool = prefork_pool()

    assert not is_handing_over(pool)
    give_job(pool, is_written=False)
    assert not is_handing_over(pool)
    job = give_job(pool)
    assert is_handing_over(pool)
    accept(job)
    assert not is_handing_over(pool)


def test_a_pool_that_has_ended_hands_nothing_over() -> None:
    pool = prefork_pool()
    pool._pool = None

    assert not is_handing_over(pool)
