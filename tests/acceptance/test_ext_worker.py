"""Tasks that fail, on each of Celery's pools: tried again, given back, or kept as dead letters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import AsyncResult

from kombu_jetstream.server import NatsServer
from tests.acceptance.ext_app import BACKOFF_BASE, make_ext_app
from tests.acceptance.letters import Letterbox
from tests.acceptance.sites import Site, start_all
from tests.servers import CeleryWorker, eventually

pytestmark = [pytest.mark.pools, pytest.mark.nats29]

APP = "tests.acceptance.ext_app"
POOLS = ("prefork", "threads", "solo", "gevent")

#: Seconds a due task may be late: the server's schedules, a busy machine.
LATE = 3.0


@dataclass
class Pool:
    site: Site
    worker: CeleryWorker
    letters: Letterbox

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        return self.site.client.tasks[name].apply_async(args, **options)

    def starts_of(self, task_id: str) -> list[float]:
        entries = self.site.ledger.entries()
        return [e.at for e in entries if e.task_id == task_id and e.event == "start"]

    def stats(self, task: str) -> dict[str, int]:
        """The counters of a task in the queue ``celery``."""
        inspect = self.site.client.control.inspect(timeout=5.0, limit=1)
        (answer,) = inspect._request("jetstream_stats").values()
        assert answer["hook_errors"] == 0
        row = answer["tasks"].get(task, {}).get("celery", {})
        return {name: number for name, number in row.items() if number}


@pytest.fixture(scope="module")
def pools(shared_nats_server: NatsServer, make_site: Callable[..., Site]) -> dict[str, Pool]:
    """One worker on each pool."""
    pools = {}
    for pool in POOLS:
        site = make_site(
            f"{shared_nats_server.broker_url}/{pool}",
            pool,
            make_app=make_ext_app,
            result_chord_retry_interval=0.2,
        )
        letters = Letterbox(shared_nats_server, pool)
        pools[pool] = Pool(site, site.worker(pool=pool, app=APP), letters)
    start_all(each.worker for each in pools.values())
    return pools


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest, pools: dict[str, Pool]) -> Pool:
    return pools[request.param]


@pytest.fixture
def prefork(pools: dict[str, Pool]) -> Pool:
    """For what only processes have, or has nothing to do with the pool."""
    return pools["prefork"]


# Retries


def test_a_task_that_fails_twice_succeeds_on_the_third_attempt(pool: Pool) -> None:
    before = pool.stats("flaky")
    result = pool.send("flaky", 2)

    assert result.get(timeout=20, interval=0.05) == 1
    first, second, third = pool.starts_of(result.id)
    assert BACKOFF_BASE <= second - first <= BACKOFF_BASE + LATE
    assert 2 * BACKOFF_BASE <= third - second <= 2 * BACKOFF_BASE + LATE
    assert pool.letters.of(result.id) == []
    after = eventually(lambda: pool.stats("flaky"), 5)
    assert after["processed"] - before.get("processed", 0) == 3
    assert after["retried"] - before.get("retried", 0) == 2
    assert after["succeeded"] - before.get("succeeded", 0) == 1


@pytest.mark.parametrize("task", ["flaky", "flaky_late"])
def test_after_the_last_attempt_the_task_is_a_dead_letter(pool: Pool, task: str) -> None:
    result = pool.send(task, 99)

    letter = pool.letters.wait_for(result.id)

    assert len(pool.starts_of(result.id)) == 3
    assert (letter.reason, letter.error, letter.message) == ("task_failed", "OSError", "attempt 3")
    assert letter.attempts == 3
    with pytest.raises(OSError, match="attempt 3"):
        result.get(timeout=5, interval=0.05)


def test_an_unrecoverable_error_is_a_dead_letter_at_once(pool: Pool) -> None:
    sent_at = time.time()
    result = pool.send("bad_card")

    letter = pool.letters.wait_for(result.id)

    assert len(pool.starts_of(result.id)) == 1
    assert letter.reason == "unrecoverable_error"
    assert letter.error == "tests.acceptance.ext_app.BadCard"
    assert "card 7 of ours" in str(letter.message)
    assert 'raise BadCard(7, bank="ours")' in str(letter.traceback)
    assert (letter.task, letter.queue, letter.level) == ("bad_card", "celery", "medium")
    assert (letter.attempts, letter.replayed) == (1, 0)
    assert letter.worker == pool.worker.hostname
    assert letter.published_at is not None
    assert sent_at - 1 <= letter.published_at <= letter.died_at <= time.time()


def test_a_late_acknowledged_message_is_gone_after_its_dead_letter(pool: Pool) -> None:
    result = pool.send("once_late")
    pool.letters.wait_for(result.id)

    def left() -> list[str]:
        return [each.headers["Celery-Task-Id"] for each in pool.letters.stored("medium")]

    eventually(lambda: result.id not in left(), 10, every=0.1)
    assert len(pool.starts_of(result.id)) == 1


def test_a_policy_of_one_tasks_own(prefork: Pool) -> None:
    patient, once = prefork.send("patient"), prefork.send("once")

    assert patient.get(timeout=30, interval=0.05) == 4
    assert prefork.letters.wait_for(once.id).attempts == 1


def test_an_exception_that_says_when_is_obeyed(prefork: Pool) -> None:
    result = prefork.send("busy", 1.7)

    assert result.get(timeout=20, interval=0.05) == 1
    first, second = prefork.starts_of(result.id)
    assert 1.7 <= second - first <= 1.7 + LATE


@pytest.mark.parametrize("task", ["autoretry", "own_retry"])
def test_tasks_with_a_policy_of_their_own_keep_it(pool: Pool, task: str) -> None:
    result = pool.send(task)

    letter = pool.letters.wait_for(result.id)

    assert len(pool.starts_of(result.id)) == letter.attempts == 2
    assert (letter.reason, letter.error) == ("task_failed", "OSError")


# Canvas


def test_chain_group_and_chord_go_on_after_retries(pool: Pool) -> None:
    tasks = pool.site.client.tasks
    flaky, add, total = tasks["flaky"], tasks["add"], tasks["total"]

    in_chain = chain(flaky.s(1, 5), add.s(2)).apply_async()
    in_group = group(flaky.s(n, n) for n in range(3)).apply_async()
    in_chord = chord([flaky.s(n, 10) for n in range(3)], total.s()).apply_async()

    assert in_chain.get(timeout=30, interval=0.05) == 7
    assert in_group.get(timeout=30, interval=0.05) == [0, 1, 2]
    assert in_chord.get(timeout=30, interval=0.05) == 30


# Manual control


def test_nack_delivers_the_same_task_again_after_the_delay(pool: Pool) -> None:
    result = pool.send("nacking", 2, 0.7)

    assert result.get(timeout=20, interval=0.05) == 3
    first, second, third = pool.starts_of(result.id)
    assert 0.7 <= second - first <= 0.7 + LATE
    assert 0.7 <= third - second <= 0.7 + LATE
    assert pool.letters.of(result.id) == []


def test_nack_passes_autoretry(prefork: Pool) -> None:
    assert prefork.send("nacking_with_autoretry").get(timeout=20, interval=0.05) == 0


def test_nack_in_a_task_that_acknowledges_early_is_an_error(pool: Pool) -> None:
    result = pool.send("nacking_early", retry=False)

    with pytest.raises(RuntimeError, match="set acks_late=True"):
        result.get(timeout=20, interval=0.05)


@pytest.mark.parametrize("task", ["burying", "burying_late"])
def test_dead_letter_ends_the_task(pool: Pool, task: str) -> None:
    result = pool.send(task)

    letter = pool.letters.wait_for(result.id)

    assert (letter.reason, letter.message, letter.error) == (
        "rejected",
        "the card was stolen",
        None,
    )
    eventually(lambda: result.state == "FAILURE", 5)
    assert len(pool.starts_of(result.id)) == 1


# What is kept


def test_soft_time_limit(prefork: Pool) -> None:
    result = prefork.send("soft_limit")

    letter = prefork.letters.wait_for(result.id, within=30)

    assert letter.error == "billiard.exceptions.SoftTimeLimitExceeded"
    assert letter.attempts == 3  # a failure like any other


@pytest.mark.parametrize("kind", ["prefork", "gevent"])
def test_hard_time_limit(pools: dict[str, Pool], kind: str) -> None:
    result = pools[kind].send("hard_limit")

    letter = pools[kind].letters.wait_for(result.id)

    assert letter.error == "billiard.exceptions.TimeLimitExceeded"
    assert (letter.reason, letter.attempts) == ("task_failed", 1)
    assert pools[kind].stats("hard_limit") == {"processed": 1, "failed": 1, "dead_lettered": 1}


def test_a_lost_process(prefork: Pool) -> None:
    result = prefork.send("suicide")

    letter = prefork.letters.wait_for(result.id)

    assert letter.error == "billiard.exceptions.WorkerLostError"
    assert prefork.stats("suicide") == {"processed": 1, "failed": 1, "dead_lettered": 1}


def test_what_celery_puts_back_is_no_dead_letter(prefork: Pool) -> None:
    results = [prefork.send("suicide_once"), prefork.send("hard_limit_requeued")]

    prefork.site.wait_ended([result.id for result in results], within=30)
    for result, task in zip(results, ("suicide_once", "hard_limit_requeued"), strict=True):
        assert prefork.letters.of(result.id) == []
        ended = {"processed": 2, "requeued": 1, "succeeded": 1}
        assert eventually(lambda: prefork.stats(task) == ended, 5), task  # noqa: B023


def test_a_failure_that_is_to_be_rejected_is_one_dead_letter(prefork: Pool) -> None:
    result = prefork.send("rejecting_failure")

    letter = prefork.letters.wait_for(result.id)

    assert (letter.reason, letter.error) == ("unrecoverable_error", "KeyError")


def test_celerys_reject_is_the_transports(prefork: Pool) -> None:
    result = prefork.send("rejecting")

    assert prefork.letters.wait_for(result.id).reason == "rejected"
    assert prefork.stats("rejecting") == {"processed": 1, "rejected": 1, "dead_lettered": 1}


def test_a_task_the_worker_does_not_know(prefork: Pool) -> None:
    result = prefork.site.client.send_task("unheard.of", queue="celery")

    letter = prefork.letters.wait_for(result.id)

    assert (letter.reason, letter.task) == ("unknown_task", "unheard.of")


def test_what_is_no_failure_is_not_kept(prefork: Pool) -> None:
    names = ("expected", "unkept", "ignoring")
    results = [prefork.send(name) for name in names]
    revoked = prefork.send("nap", 30)
    eventually(lambda: prefork.starts_of(revoked.id), 10)
    revoked.revoke(terminate=True)
    fence = prefork.send("once")

    prefork.letters.wait_for(fence.id)
    eventually(lambda: prefork.stats("nap") == {"processed": 1, "revoked": 1}, 10, every=0.2)
    for result in (*results, revoked):
        assert prefork.letters.of(result.id) == []
    assert prefork.stats("expected") == {"processed": 1, "failed": 1}
    assert prefork.stats("unkept") == {"processed": 1, "failed": 1}
    assert prefork.stats("ignoring") == {"processed": 1, "ignored": 1}


def test_no_worker_has_anything_to_complain_about(pools: dict[str, Pool]) -> None:
    for each in pools.values():
        assert "celery_ext failed" not in each.worker.log
        assert "Signal handler" not in each.worker.log
        assert "Unrecoverable error" not in each.worker.log
