"""Draining lists into JetStream exactly once, whatever interrupts it; the mirror."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kombu
import pytest
import redis

import kombu_jetstream  # noqa: F401  # registers jetstream://
from kombu_jetstream import envelope, migration
from kombu_jetstream.errors import ConnectionLost
from kombu_jetstream.fallback import DualSession
from kombu_jetstream.migration import Busy, Drain, compare, reset_mirror
from kombu_jetstream.server import NatsServer
from tests.servers import RedisServer, api_request

pytestmark = pytest.mark.redis


class Stores:
    """A connection to both stores, and what is in them."""

    def __init__(self, connection: Any, client: redis.Redis, nats_url: str) -> None:
        self.connection = connection
        self.client = client
        self.nats_url = nats_url

    @property
    def session(self) -> DualSession:
        session = self.connection.connection
        assert isinstance(session, DualSession)
        return session

    def drain(self) -> Drain:
        return Drain(self.session, self.session.fallback.lists)

    def in_jetstream(self, namespace: str) -> Counter[int]:
        """The numbers of the messages in JetStream, those that wait for their time too."""
        found: Counter[int] = Counter()
        for level in ("high", "medium", "low"):
            stream = f"{namespace}_{level}"
            last = api_request(self.nats_url, f"STREAM.INFO.{stream}")["state"]["last_seq"]
            for seq in range(1, last + 1):
                answer = api_request(self.nats_url, f"STREAM.MSG.GET.{stream}", {"seq": seq})
                if "message" not in answer or "@drained" in answer["message"]["subject"]:
                    continue
                message = envelope.decode(base64.b64decode(answer["message"]["data"]))
                encoding = message["properties"]["body_encoding"]
                found[json.loads(envelope.decode_body(message["body"], encoding))["n"]] += 1
        return found


@pytest.fixture
def stores(
    shared_nats_server: NatsServer, redis_server: RedisServer, namespace: str
) -> Callable[..., Any]:
    """Opens a connection of its own at each call, as each run of the command does."""

    @contextmanager
    def connect(**options: Any) -> Iterator[Stores]:
        options = {"fallback_url": redis_server.url, "migration_phase": "dual-read", **options}
        url = f"{shared_nats_server.broker_url}/{namespace}"
        with (
            kombu.Connection(url, transport_options=options) as connection,
            redis.Redis.from_url(redis_server.url) as client,
        ):
            connection.connect()
            yield Stores(connection, client, shared_nats_server.url)

    return connect


def write_to_redis(server: RedisServer, count: int, queue: str = "q", **options: Any) -> None:
    """Publish messages as a plain ``redis://`` producer does."""
    with kombu.Connection(server.url) as connection:
        producer = connection.Producer()
        for number in range(count):
            producer.publish({"n": number}, routing_key=queue, **options)


def test_all_that_waits_moves_with_its_priority(
    stores: Any, redis_server: RedisServer, namespace: str
) -> None:
    write_to_redis(redis_server, 3)
    write_to_redis(redis_server, 2, priority=9)

    with stores() as both:
        report = both.drain().run(["q"])

        assert report.moved == {"q": 5}
        assert both.client.llen("q") == 0
        levels = {
            level: api_request(both.nats_url, f"CONSUMER.INFO.{namespace}_{level}.q")["num_pending"]
            for level in ("high", "medium", "low")
        }
        assert levels == {"high": 2, "medium": 3, "low": 0}


def test_a_drained_message_is_received_as_it_was_sent(
    stores: Any, redis_server: RedisServer
) -> None:
    with kombu.Connection(redis_server.url) as connection:
        connection.Producer().publish(
            "käse", routing_key="q", headers={"x": 1}, correlation_id="c", serializer="json"
        )
    with stores() as both:
        both.drain().run(["q"])

        with both.connection.SimpleQueue("q") as queue:
            message = queue.get(timeout=5)
            assert message.payload == "käse"
            assert message.headers == {"x": 1}
            assert message.properties["correlation_id"] == "c"
            message.ack()


@pytest.mark.requires_nats("2.12")
def test_a_task_that_is_not_due_waits_in_the_server(
    stores: Any, redis_server: RedisServer, namespace: str
) -> None:
    write_to_redis(redis_server, 1, headers={"eta": "2100-01-01T00:00:00+00:00", "id": "t"})

    with stores() as both:
        both.drain().run(["q"])

        subjects = api_request(
            both.nats_url, f"STREAM.INFO.{namespace}_medium", {"subjects_filter": ">"}
        )["state"]["subjects"]
        assert [s for s in subjects if ".@delay." in s]


class Interrupted(Exception):
    """Stands for a kill: nothing of the drain's own clean-up runs after it."""


def interrupt(drain: Drain, step: str, after: int) -> None:
    """Let *drain* die at *step* ("before" or "after" the write, or "locked") of a message."""
    count = iter(range(10_000))
    original = drain._done if step == "after" else drain._write

    def dying(*args: Any, **kwargs: Any) -> None:
        if next(count) == after:
            drain._drop_lock = lambda: None  # type: ignore[method-assign]
            raise Interrupted
        original(*args, **kwargs)

    if step == "after":
        drain._done = dying  # type: ignore[method-assign]
    else:
        drain._outgoing._session.publisher.publish = dying  # type: ignore[method-assign]


@pytest.mark.requires_nats("2.12")
@pytest.mark.parametrize("step", ["before", "after"])
def test_an_interrupted_drain_is_resumed_without_loss_or_duplicate(
    stores: Any, redis_server: RedisServer, namespace: str, step: str
) -> None:
    write_to_redis(redis_server, 10)
    # The server forgets ids at once, as after days: the mark alone has to tell.
    options = {"dedup_window": 1.0, "publish_timeout": 1.0}
    for after in (0, 3):
        with stores(**options) as both:
            drain = both.drain()
            assert drain.is_exact
            interrupt(drain, step, after)
            with pytest.raises(Interrupted):
                drain.run(["q"])
            both.client.delete("_kombu_jetstream.drain_lock")
        time.sleep(1.2)  # the dedup window passes

    with stores(**options) as both:
        report = both.drain().run(["q"])

        assert report.in_doubt == 0
        assert report.known == (1 if step == "after" else 0)
        assert both.client.hlen("_kombu_jetstream.drain") == 0
        assert both.in_jetstream(namespace) == Counter(range(10))


@pytest.mark.parametrize(
    ("decision", "left", "there"), [("keep", 1, 1), ("publish", 0, 2), ("drop", 0, 1)]
)
def test_without_batches_an_old_try_is_in_doubt_until_somebody_decides(
    stores: Any, redis_server: RedisServer, namespace: str, decision: Any, left: int, there: int
) -> None:
    write_to_redis(redis_server, 1)
    options = {"dedup_window": 1.0, "publish_timeout": 1.0}
    with stores(**options) as both:
        drain = both.drain()
        drain._batches = False
        interrupt(drain, "after", 0)
        with pytest.raises(Interrupted):
            drain.run(["q"])
        both.client.delete("_kombu_jetstream.drain_lock")
    time.sleep(1.2)  # the dedup window passes

    with stores(**options) as both:
        again = both.drain()
        again._batches = False
        report = again.run(["q"], in_doubt=decision)

        assert report.in_doubt == left
        assert both.client.hlen("_kombu_jetstream.drain") == left
        assert both.in_jetstream(namespace) == Counter({0: there})


def test_without_batches_a_recent_try_is_repeated_under_the_same_id(
    stores: Any, redis_server: RedisServer, namespace: str
) -> None:
    write_to_redis(redis_server, 3)
    with stores() as both:
        drain = both.drain()
        drain._batches = False
        interrupt(drain, "after", 1)
        with pytest.raises(Interrupted):
            drain.run(["q"])
        both.client.delete("_kombu_jetstream.drain_lock")
        again = both.drain()
        again._batches = False

        assert again.run(["q"]).in_doubt == 0

        assert both.in_jetstream(namespace) == Counter(range(3))


def test_two_drains_do_not_run_at_once(stores: Any, redis_server: RedisServer) -> None:
    with stores() as both:
        first, second = both.drain(), both.drain()
        first._take_lock()

        with pytest.raises(Busy, match="another drain runs"):
            second.run(["q"])

        first._drop_lock()
        second.run(["q"])


def test_a_drain_that_lost_its_lock_stops(stores: Any, redis_server: RedisServer) -> None:
    write_to_redis(redis_server, 2)
    with stores() as both:
        drain = both.drain()
        taken = drain._take_lock

        def overtaken() -> None:
            taken()
            both.client.set("_kombu_jetstream.drain_lock", "another one")

        drain._take_lock = overtaken

        with pytest.raises(ConnectionLost, match="another one may have begun"):
            drain.run(["q"])

        assert both.client.get("_kombu_jetstream.drain_lock") == b"another one"


def test_what_a_dead_plain_worker_left_moves_when_asked_for(
    stores: Any, redis_server: RedisServer, namespace: str
) -> None:
    write_to_redis(redis_server, 3)
    with kombu.Connection(redis_server.url) as connection:
        channel = connection.channel()
        channel.qos.restore_at_shutdown = False
        for _ in range(2):
            assert channel.basic_get("q") is not None
        channel.qos._delivered.clear()  # it dies without a word
    with stores() as both:
        assert both.client.hlen("unacked") == 2
        both.drain().run(["q"])
        assert both.client.hlen("unacked") == 2

        report = both.drain().run(["q"], unacked=True)

        assert report.moved == {"q": 2}
        assert both.client.hlen("unacked") == 0
        assert both.client.zcard("unacked_index") == 0
        assert both.in_jetstream(namespace) == Counter(range(3))


def test_what_is_no_message_stays_and_is_reported(stores: Any, redis_server: RedisServer) -> None:
    with stores() as both:
        both.client.lpush("q", "no message")

        report = both.drain().run(["q"])

        assert report.malformed == 1
        assert both.client.hvals("_kombu_jetstream.drain") == [b"no message"]


# The mirror

LATER = 2 * migration.BUCKET_SECONDS + migration.SETTLE_SECONDS


def write_both(both: Stores, count: int) -> None:
    producer = both.connection.Producer()
    for number in range(count):
        producer.publish({"n": number}, routing_key="q")


def test_mirror_has_what_redis_took(stores: Any, redis_server: RedisServer) -> None:
    with stores(migration_phase="dual-write") as both:
        write_both(both, 20)
        lists = both.session.fallback.lists

        (found,) = compare(both.session, lists, time.time() + LATER)

        assert (found.queue, found.written, found.mirrored) == ("q", 20, 20)
        assert found.is_same
        assert both.client.llen("q") == 20


def test_a_copy_that_is_missing_is_told_once_it_is_late(
    stores: Any, redis_server: RedisServer
) -> None:
    with stores(migration_phase="dual-write") as both:
        write_both(both, 3)
        api_request(
            both.nats_url,
            f"STREAM.MSG.DELETE.{both.session.options.namespace}_mirror",
            {"seq": 2},
        )
        lists = both.session.fallback.lists

        (now,) = compare(both.session, lists, time.time())
        (later,) = compare(both.session, lists, time.time() + LATER)

        assert (now.is_same, now.under_way) == (True, 3)
        assert (later.is_same, later.written, later.mirrored) == (False, 3, 2)


def test_comparing_begins_anew_after_a_reset(stores: Any, redis_server: RedisServer) -> None:
    with stores(migration_phase="dual-write") as both:
        lists = both.session.fallback.lists
        write_both(both, 3)
        reset_mirror(both.session, lists)
        write_both(both, 2)

        (found,) = compare(both.session, lists, time.time() + LATER)

        assert (found.written, found.mirrored, found.is_same) == (2, 2, True)


def test_a_mirror_that_fails_costs_the_task_nothing(
    stores: Any, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with stores(migration_phase="dual-write") as both:
        write_both(both, 1)
        api_request(both.nats_url, f"STREAM.DELETE.{both.session.options.namespace}_mirror")

        write_both(both, 3)

        assert both.client.llen("q") == 4
        assert both.session.fallback.mirror_failures == 3
        said = [r for r in caplog.records if "did not reach the mirror" in r.getMessage()]
        assert len(said) == 1
