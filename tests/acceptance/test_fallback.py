"""Redis beside JetStream: an outage of either costs nobody a task and stops no worker."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from kombu.exceptions import OperationalError

from kombu_jetstream import fallback
from kombu_jetstream.errors import ConnectionLost
from kombu_jetstream.options import Options
from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import POOLS, Site
from tests.servers import CeleryWorker, RedisServer, celery_workers, eventually

pytestmark = pytest.mark.redis

FALLBACK_AFTER = 1.0
LIVENESS = 3.0


@pytest.fixture
def site(
    make_site: Callable[..., Site], nats_server: NatsServer, redis_server: RedisServer
) -> Site:
    """An app whose workers and producers have a fallback."""
    return make_site(
        nats_server.broker_url,
        broker_transport_options={
            "fallback_url": redis_server.url,
            "fallback_after": FALLBACK_AFTER,
            "fallback_liveness_timeout": LIVENESS,
        },
    )


@pytest.fixture
def lists(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


def waiting(client: redis.Redis) -> int:
    """How many messages wait in Redis, or are held by a worker."""
    keys = client.keys("celery*") + client.keys("_kombu_jetstream.held.*")
    return sum(
        client.llen(key) if client.type(key) == b"list" else client.hlen(key) for key in keys
    )


def fallback_of(site: Site) -> fallback.Fallback:
    """What this process knows of the outage."""
    options = Options.parse(site.broker_url, site.config["broker_transport_options"])
    return next(value for (_, o), value in fallback._fallbacks.items() if o == options)


@dataclass
class Producing:
    """What one thread did that calls ``delay()`` at a steady rate."""

    task_ids: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    longest: float = 0.0


@contextmanager
def producing(site: Site, rate: float, task: str = "noop") -> Iterator[Producing]:
    """Call ``delay()`` *rate* times a second from two threads, until the end of the block."""
    made = Producing()
    over = threading.Event()
    signature = site.client.tasks[task]

    def produce() -> None:
        next_at = time.monotonic()
        while not over.wait(max(0.0, next_at - time.monotonic())):
            started = time.monotonic()
            try:
                made.task_ids.append(signature.delay().id)
            except OperationalError as exc:
                made.errors.append(exc)
            now = time.monotonic()
            made.longest = max(made.longest, now - started)
            next_at = max(next_at + 2 / rate, now)  # what was missed is not made up for

    threads = [threading.Thread(target=produce) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        over.set()
        for thread in threads:
            thread.join()


def longest_pause(site: Site, since: float, until: float) -> float:
    """The longest time between two ends of tasks, from *since* to *until* (monotonic)."""
    ends = [entry.at for entry in site.ledger.entries() if entry.event == "end"]
    moments = [since, *sorted(at for at in ends if since < at < until), until]
    return max(b - a for a, b in itertools.pairwise(moments))


def pass_time(seconds: float) -> None:
    """Let an outage last; the load goes on meanwhile, and the ledger is what is looked at."""
    threading.Event().wait(seconds)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_no_task_is_lost_while_nats_is_killed_and_frozen(
    site: Site, nats_server: NatsServer, lists: redis.Redis
) -> None:
    workers = [site.worker(f"w{number}") for number in (1, 2)]
    with celery_workers(*workers):
        with producing(site, rate=200) as made:
            pass_time(2)
            began = time.monotonic()
            nats_server.kill()
            pass_time(20)
            nats_server.start()
            pass_time(5)
            nats_server.pause()
            pass_time(20)
            nats_server.resume()
            returned = time.monotonic()
            pass_time(3)
        site.wait_ended(made.task_ids, within=30)
        eventually(lambda: waiting(lists) == 0, within=returned + 10 - time.monotonic())

    assert made.errors == []
    assert made.longest < FALLBACK_AFTER + 2, "no delay() waits for publish_timeout"
    assert longest_pause(site, began, returned) <= FALLBACK_AFTER + 3
    twice = {task_id for task_id, number in site.ledger.starts().items() if number > 1}
    # A killed server has forgotten what was acknowledged in its last moments, whatever comes after.
    first_start = {e.task_id: e.at for e in reversed(site.ledger.entries()) if e.event == "start"}
    forgotten = {task_id for task_id in twice if began - 0.5 < first_start[task_id] < began + 0.1}
    assert len(twice - forgotten) <= fallback_of(site).ambiguous
    for worker in workers:
        assert worker.log.count("Redis takes over") == 2
        assert worker.log.count("JetStream is back, it was away for") == 2


def test_a_producer_changes_over_within_the_patience_and_back_by_itself(
    site: Site, nats_server: NatsServer, lists: redis.Redis
) -> None:
    site.send("noop", 1)
    nats_server.kill()

    started = time.monotonic()
    site.send("noop", 1)
    first = time.monotonic() - started
    site.send("noop", 20)
    rest = time.monotonic() - started - first

    assert lists.llen("celery") == 21
    assert first < FALLBACK_AFTER + 0.8
    assert rest < 1.0, "once known, nobody waits again"
    nats_server.start()

    def goes_to_jetstream() -> bool:
        before = lists.llen("celery")
        site.send("noop", 1)
        return bool(lists.llen("celery") == before)

    eventually(goes_to_jetstream, within=5.0, every=0.2)


def test_redis_dying_beside_jetstream_is_a_warning_and_no_more(
    site: Site, redis_server: RedisServer
) -> None:
    with site.worker() as worker:
        site.wait_ended(site.send("noop", 5), within=10)
        redis_server.kill()

        with producing(site, rate=50) as made:
            worker.wait_log("the fallback Redis is away", within=10)
            pass_time(2)
        site.wait_ended(made.task_ids, within=10)
        redis_server.start()
        worker.wait_log("the fallback Redis is back", within=10)

        assert made.errors == []
        site.assert_each_ran_once(made.task_ids)
        assert worker.log.count("the fallback Redis is away") == 1
        assert "Connection to broker lost" not in worker.log
        assert "Traceback" not in worker.log


def test_with_both_away_the_error_names_both_and_nothing_has_to_be_restarted(
    site: Site, nats_server: NatsServer, redis_server: RedisServer
) -> None:
    with site.worker():
        site.wait_ended(site.send("noop", 5), within=10)
        nats_server.kill()
        redis_server.kill()

        with pytest.raises(OperationalError, match=r"JetStream: .*refused.*; Redis: .*refused"):
            site.send("noop", 1)
        redis_server.start()
        through_redis = _send_when_possible(site)
        site.wait_ended(through_redis, within=30)
        nats_server.start()
        pass_time(2)
        through_jetstream = _send_when_possible(site)

        site.wait_ended(through_jetstream, within=15)
        site.assert_each_ran_once(through_redis + through_jetstream)


def _send_when_possible(site: Site) -> list[str]:
    def send() -> list[str]:
        try:
            return site.send("noop", 3)
        except OperationalError as exc:
            raise AssertionError(exc) from exc

    return eventually(send, within=15, every=0.2)


def test_messages_of_a_killed_worker_are_reclaimed_within_the_liveness_time(
    site: Site, nats_server: NatsServer, lists: redis.Redis
) -> None:
    site.send("noop", 1)
    nats_server.kill()
    task_ids = site.send("nap_late", 4, 60)
    with site.worker("doomed", concurrency=2) as doomed:
        site.wait_started(task_ids[:1], within=15)
        eventually(lambda: lists.llen("celery") == 0, within=5)
        quick = site.send("noop", 6)
        eventually(lambda: waiting(lists) > 6, within=5)
        doomed.kill9()
    died = time.monotonic()

    other = site.worker("other", concurrency=10)
    with other:
        site.wait_started(task_ids + quick, within=LIVENESS + 10)

        latest = max(e.at for e in site.ledger.entries("noop") if e.task_id in quick)
        assert latest - died < max(LIVENESS, other_ready_at(other) - died) + 1.5


def other_ready_at(worker: CeleryWorker) -> float:
    """About now: a worker that was just started may have come after the liveness time."""
    assert worker.is_running
    return time.monotonic()


def test_a_task_that_runs_through_the_change_over_runs_once(
    site: Site, nats_server: NatsServer
) -> None:
    """Late acks of JetStream deliveries, and of Redis deliveries, outlive their connection."""
    with site.worker(concurrency=4) as worker:
        before = site.send("nap_late", 2, 6.0)
        site.wait_started(before, within=10)
        nats_server.kill()
        meanwhile = site.send("nap_late", 2, 6.0)
        site.wait_started(meanwhile, within=10)
        nats_server.start()
        worker.wait_log("JetStream is back", within=10)

        site.wait_ended(before + meanwhile, within=20)
        site.wait_ended(site.send("noop", 10), within=10)
        site.assert_each_ran_once(before + meanwhile)


@pytest.fixture
def plain(make_site: Callable[..., Site], redis_server: RedisServer, site: Site) -> Site:
    """The same app on kombu's own Redis transport."""
    made = make_site(redis_server.url)
    made.ledger = site.ledger
    return made


def test_a_plain_redis_worker_runs_what_the_fallback_wrote(
    site: Site, plain: Site, nats_server: NatsServer
) -> None:
    site.send("noop", 1)
    nats_server.kill()
    task_ids = site.send("echo", 5, "text and ünïcode") + site.send("noop", 5)

    with plain.worker("plain"):
        plain.wait_ended(task_ids, within=15)

    plain.assert_each_ran_once(task_ids)


def test_we_run_what_a_plain_redis_producer_wrote(site: Site, plain: Site) -> None:
    with site.worker():
        task_ids = plain.send("echo", 20, "text and ünïcode") + plain.send("noop", 20)

        site.wait_ended(task_ids, within=15)
        site.assert_each_ran_once(task_ids)


def test_the_priorities_of_a_plain_redis_producer_hold(
    make_site: Callable[..., Site], site: Site, plain: Site
) -> None:
    """kombu's Redis transport takes 0 first, and so does ``priority_order`` "redis"."""
    options = {**site.config["broker_transport_options"], "priority_order": "redis"}
    ours = make_site(site.broker_url, broker_transport_options=options)
    ours.ledger = site.ledger
    low = plain.send("nap", 3, 0.05, priority=9)
    middle = plain.send("nap", 3, 0.05, priority=6)
    high = plain.send("nap", 3, 0.05, priority=0)

    with ours.worker(pool="solo", args=["--prefetch-multiplier", "1"]):
        ours.wait_ended(low + middle + high, within=15)

    order = [e.task_id for e in site.ledger.entries("nap") if e.event == "start"]
    assert order == [*high, *middle, *low]


def test_countdown_written_to_redis_waits_in_the_worker(
    site: Site, nats_server: NatsServer
) -> None:
    site.send("noop", 1)
    nats_server.kill()
    with site.worker():
        sent = time.monotonic()
        (task_id,) = site.send("noop", 1, countdown=3.0)

        site.wait_ended([task_id], within=10)

        (entry,) = [e for e in site.ledger.entries() if e.task_id == task_id and e.event == "start"]
        assert entry.at - sent >= 3.0


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_countdown_taken_from_redis_runs_once_after_jetstream_is_back(
    site: Site, nats_server: NatsServer, lists: redis.Redis, pool: str
) -> None:
    site.send("noop", 1)
    nats_server.kill()
    with site.worker(pool=pool) as worker:
        task_ids = site.send("noop", 3, countdown=6.0)
        eventually(lambda: _received(worker, task_ids), within=10)

        nats_server.start()
        worker.wait_log("JetStream is back", within=10)

        site.wait_ended(task_ids, within=20)
        site.assert_each_ran_once(task_ids)
        eventually(lambda: waiting(lists) == 0, within=5)


def _received(worker: CeleryWorker, task_ids: list[str]) -> bool:
    log = worker.log
    return all(f"[{task_id}] received" in log for task_id in task_ids)


def test_remote_control_is_absent_meanwhile_and_comes_back(
    site: Site, nats_server: NatsServer
) -> None:
    def replies() -> Any:
        try:
            return site.client.control.inspect(timeout=1.0).ping()
        except ConnectionLost:  # it is sent on a connection of the pool, and is not repeated
            return None

    with site.worker() as worker:
        assert replies()
        nats_server.kill()
        worker.wait_log("Redis takes over", within=10)

        assert not replies()
        assert not replies(), "on the new connection, without an error"
        nats_server.start()
        worker.wait_log("JetStream is back", within=10)

        assert eventually(replies, within=10)


@pytest.mark.slow
@pytest.mark.pools
@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_changes_over_and_back(
    site: Site, nats_server: NatsServer, lists: redis.Redis, pool: str
) -> None:
    with site.worker(pool=pool) as worker:
        before = site.send("nap_late", 2, 0.5)
        nats_server.kill()
        meanwhile = site.send("noop", 20) + site.send("nap_late", 4, 0.5)
        site.wait_ended(meanwhile, within=20)
        nats_server.start()
        worker.wait_log("JetStream is back", within=15)
        eventually(lambda: fallback_of(site).failover.state.value != "degraded", within=5)
        afterwards = site.send("noop", 20)

        # One of them may have been on its way to the worker, as solo takes one at a time.
        site.wait_ended(before + afterwards, within=15)
        assert waiting(lists) == 0
        site.assert_each_ran_once(before + meanwhile + afterwards)
