from __future__ import annotations

import threading
import time

from celery_ext.stats import OUTCOMES, Stats


def test_executions_are_counted_by_task_queue_and_outcome() -> None:
    stats = Stats()
    stats.ended("pay", "orders", "retried")
    stats.ended("pay", "orders", "succeeded")
    stats.ended("pay", "rush", "failed")
    stats.ended("mail", "orders", "succeeded")

    tasks = stats.report()["tasks"]

    assert list(tasks) == ["mail", "pay"]
    assert tasks["pay"]["orders"] == {
        "processed": 2,
        "succeeded": 1,
        "failed": 0,
        "retried": 1,
        "rejected": 0,
        "requeued": 0,
        "ignored": 0,
        "revoked": 0,
        "dead_lettered": 0,
    }
    assert tasks["pay"]["rush"]["failed"] == 1


def test_a_dead_letter_is_no_execution() -> None:
    stats = Stats()
    stats.ended("pay", "orders", "failed")
    stats.dead_lettered("pay", "orders", "task_failed")

    row = stats.report()["tasks"]["pay"]["orders"]

    assert row["processed"] == row["failed"] == row["dead_lettered"] == 1


def test_dead_letters_of_no_task_are_counted_by_reason_only() -> None:
    stats = Stats()
    stats.dead_lettered(None, "orders", "malformed")

    report = stats.report()

    assert report["dead_letters"] == {"malformed": 1}
    assert report["tasks"] == {}


def test_hook_errors_and_the_start_are_told() -> None:
    before = time.time()
    stats = Stats()
    stats.hook_failed()

    report = stats.report()

    assert report["hook_errors"] == 1
    assert before <= report["since"] <= time.time()


def test_threads_lose_no_count() -> None:
    stats = Stats()

    def count() -> None:
        for _ in range(2_000):
            for outcome in OUTCOMES:
                stats.ended("t", "q", outcome)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    row = stats.report()["tasks"]["t"]["q"]
    assert row["processed"] == 4 * 2_000 * len(OUTCOMES)
    assert row["revoked"] == 8_000
