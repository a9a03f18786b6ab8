"""Redis lists by themselves: what is taken, held, given back and reclaimed."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import quote

import kombu
import pytest
import redis
import trustme

from celery_ext.fallback_health import examine
from kombu_jetstream.backend import Delivery
from kombu_jetstream.errors import FallbackLost, OptionsError
from kombu_jetstream.options import Options
from kombu_jetstream.redis_lists import MAX_TAKE, ListReader, RedisLists
from tests.servers import RedisServer, eventually, free_port

pytestmark = pytest.mark.redis


def options(server: RedisServer, **more: Any) -> Options:
    return Options(fallback_url=server.url, **more)


@pytest.fixture
def lists(redis_server: RedisServer) -> Iterator[RedisLists]:
    made = RedisLists(options(redis_server, fallback_liveness_timeout=1.0))
    yield made
    made.close()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url) as made:
        yield made


class Taker:
    """A channel's part: takes whatever there is, and waits for the socket alone."""

    def __init__(self, lists: RedisLists, queues: list[str], limit: int = MAX_TAKE) -> None:
        self.lists = lists
        self.limit = limit
        self.found: list[Delivery] = []
        self.missed = 0
        self.wakes = 0
        self.fd: int | None = None
        self.reader = ListReader(
            lists, arrived=self._arrived, pushed=self._pushed, watch=self._watch
        )
        for queue in queues:
            self.reader.add(queue)

    def _arrived(self, deliveries: list[Delivery], asked: int) -> None:
        self.found += deliveries
        self.missed += asked - len(deliveries)

    def _pushed(self) -> None:
        self.wakes += 1

    def _watch(self, old: int | None, new: int | None) -> None:
        self.fd = new

    def run(self, done: Any, within: float = 5.0) -> None:
        deadline = time.monotonic() + within
        while not done():
            left = deadline - time.monotonic()
            assert left > 0, f"{len(self.found)} found"
            if self.reader.can_take:
                self.reader.take(self.reader.limited(self.limit))
            if self.fd is not None:
                select.select([self.fd], [], [], min(left, 0.2))
            self.reader.read()

    def run_idle(self) -> None:
        """Run until nothing is asked for and nothing is known to be there."""
        self.run(lambda: not self.reader.asked and not self.reader.has_backlog)

    def payloads(self) -> list[bytes]:
        return [delivery.payload for delivery in self.found]


@pytest.fixture
def take(lists: RedisLists) -> Iterator[Any]:
    takers: list[Taker] = []

    def make(*queues: str, limit: int = MAX_TAKE, of: RedisLists = lists) -> Taker:
        takers.append(Taker(of, list(queues), limit))
        return takers[-1]

    yield make
    for taker in takers:
        taker.reader.close()


def push(lists: RedisLists, queue: str, *payloads: bytes, priority: int = 0) -> None:
    for payload in payloads:
        lists.push([queue], payload, priority)


# Reading


def test_messages_come_in_the_order_they_were_pushed(lists: RedisLists, take: Any) -> None:
    sent = [b"%d" % number for number in range(200)]
    push(lists, "q", *sent)

    taker = take("q")
    taker.run(lambda: len(taker.found) == 200)

    assert taker.payloads() == sent


def test_a_push_wakes_a_reader_that_waits(lists: RedisLists, take: Any) -> None:
    taker = take("q", "other")
    taker.run_idle()
    timer = threading.Timer(0.2, push, (lists, "other", b"late"))
    timer.start()
    started = time.monotonic()

    taker.run(lambda: taker.found)

    assert taker.payloads() == [b"late"]
    assert time.monotonic() - started < 1.0, "not by a poll"


@pytest.mark.parametrize("queue_count", [1, 50])
def test_an_idle_reader_sends_nothing(take: Any, client: redis.Redis, queue_count: int) -> None:
    taker = take(*(f"q{number}" for number in range(queue_count)))
    taker.run_idle()
    before = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls")

    select.select([taker.fd], [], [], 1.0)
    taker.reader.tick(time.monotonic())
    taker.reader.read()

    assert client.info("commandstats").get("cmdstat_evalsha", {}).get("calls") == before
    assert len(client.client_list()) < 6, "one connection, however many queues"


def test_a_reader_takes_no_more_than_it_asks_for(
    lists: RedisLists, take: Any, client: redis.Redis
) -> None:
    push(lists, "q", *[b"%d" % number for number in range(10)])

    taker = take("q", limit=3)
    taker.run(lambda: taker.found)

    assert len(taker.found) == 3
    assert client.llen("q") == 7
    assert client.hlen(lists.held_key) == 3


@pytest.mark.parametrize(
    ("order", "expected"),
    [("amqp", [9, 6, 0, 3]), ("redis", [0, 3, 6, 9])],
)
def test_lists_are_taken_in_the_order_of_priority(
    redis_server: RedisServer, take: Any, order: str, expected: list[int]
) -> None:
    lists = RedisLists(options(redis_server, priority_order=order))
    for priority in (0, 3, 6, 9):
        push(lists, "q", b"%d" % priority, priority=priority)

    taker = take("q", of=lists)
    taker.run(lambda: len(taker.found) == 4)

    assert taker.payloads() == [b"%d" % priority for priority in expected]
    levels = [delivery.level for delivery in taker.found]
    assert levels == sorted(levels)
    lists.close()


def test_queues_take_turns(lists: RedisLists, take: Any) -> None:
    push(lists, "a", *[b"a"] * 6)
    push(lists, "b", *[b"b"] * 6)

    taker = take("a", "b", limit=1)
    taker.run(lambda: len(taker.found) == 6)

    assert sorted(taker.payloads()) == [b"a"] * 3 + [b"b"] * 3


def test_reader_goes_on_after_a_restart_of_redis(
    redis_server: RedisServer, lists: RedisLists, take: Any
) -> None:
    taker = take("q")
    taker.run_idle()
    redis_server.restart()

    def found() -> bool:
        _pings(lists)  # as the keeper does
        taker.reader.tick(time.monotonic())
        return bool(taker.found)

    eventually(lambda: _pings(lists))
    push(lists, "q", b"after")
    taker.run(found)

    assert taker.payloads() == [b"after"]


def _pings(lists: RedisLists) -> bool:
    try:
        lists.ping()
    except FallbackLost:
        return False
    return True


def test_a_user_without_tracking_looks_once_a_second(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    rights = ["+@all", "-client", "+client|setname"]  # Redis 6.2 cannot subtract a subcommand
    client.execute_command("ACL", "SETUSER", "poor", "on", ">geheim", "~*", *rights)
    url = redis_server.url.replace("redis://", "redis://poor:geheim@")
    lists = RedisLists(Options(fallback_url=url))
    taker = Taker(lists, ["q"])
    taker.run_idle()
    push(lists, "q", b"x")

    def found() -> bool:
        taker.reader.tick(time.monotonic())
        return bool(taker.found)

    taker.run(found, within=3.0)

    assert taker.payloads() == [b"x"]
    taker.reader.close()
    lists.close()


# Settling


def taken(lists: RedisLists, queue: str = "q") -> Delivery:
    delivery = lists.take_one(queue)
    assert delivery is not None
    return delivery


def test_acked_message_is_gone(lists: RedisLists, client: redis.Redis) -> None:
    push(lists, "q", b"x")
    delivery = taken(lists)
    assert client.hvals(lists.held_key) == [b"x"]

    lists.settle(delivery, "ack")

    assert client.hlen(lists.held_key) == 0
    assert lists.take_one("q") is None
    assert lists.holds == 0


def test_nacked_message_is_the_next_one_and_counts_its_attempts(lists: RedisLists) -> None:
    push(lists, "q", b"first", b"second", priority=5)
    first = taken(lists)

    lists.settle(first, "nak")

    again = taken(lists)
    assert (again.payload, again.attempt) == (b"first", 2)
    lists.settle(again, "nak")
    assert taken(lists).attempt == 3
    assert taken(lists).attempt == 1, "the other message"


def test_acked_message_leaves_no_attempts_behind(lists: RedisLists, client: redis.Redis) -> None:
    push(lists, "q", b"x")
    lists.settle(taken(lists), "nak")

    lists.settle(taken(lists), "ack")

    assert client.hlen(lists.attempts_key) == 0


def test_delayed_nack_waits(lists: RedisLists, client: redis.Redis) -> None:
    push(lists, "q", b"x")
    delivery = taken(lists)

    lists.settle(delivery, "nak", 5.0)

    lists.settle_waiting(time.monotonic() + 4.0)
    assert client.llen("q") == 0
    assert client.hlen(lists.held_key) == 1, "held meanwhile: it is not lost with the process"
    lists.settle_waiting(time.monotonic() + 5.1)
    assert client.llen("q") == 1


def test_outcome_waits_for_redis(
    redis_server: RedisServer, lists: RedisLists, client: redis.Redis
) -> None:
    push(lists, "q", b"x", b"y")
    first, second = taken(lists), taken(lists)
    redis_server.kill()

    lists.settle(first, "ack")
    lists.settle(second, "nak")
    assert not lists.available
    redis_server.start()
    eventually(lambda: _pings(lists))
    lists.settle_waiting(time.monotonic())

    assert client.hlen(lists.held_key) == 0
    assert client.lrange("q", 0, -1) == [b"y"]


def test_delivery_nobody_can_settle_any_more_goes_back(
    lists: RedisLists, client: redis.Redis
) -> None:
    push(lists, "q", b"dropped", b"kept")
    dropped, kept = taken(lists), taken(lists)
    message = {b"kept"}  # anything a weak reference can point to
    kept.message = weakref.ref(message)

    lists.adopt([dropped, kept])
    lists.settle_waiting(time.monotonic())

    assert client.lrange("q", 0, -1) == [b"dropped"]
    assert client.hvals(lists.held_key) == [b"kept"]


# Death of a worker


def test_messages_of_a_dead_worker_come_back_in_order(
    redis_server: RedisServer, lists: RedisLists, client: redis.Redis
) -> None:
    dead = RedisLists(options(redis_server, fallback_liveness_timeout=0.3))
    push(lists, "q", b"1", b"2", b"3", priority=6)
    for _ in range(2):
        taken(dead)
    lists.beat()
    assert lists.size("q") == 1, "it is alive"

    eventually(lambda: lists.reclaim() == 2, within=2.0, every=0.05)

    found = [taken(lists) for _ in range(3)]
    assert [delivery.payload for delivery in found] == [b"1", b"2", b"3"]
    assert [delivery.attempt for delivery in found] == [2, 2, 1]
    assert lists.reclaim() == 0, "once"
    assert client.smembers(lists.workers_key) == {lists.worker.encode()}
    dead.close()


def test_a_living_worker_loses_nothing(lists: RedisLists, redis_server: RedisServer) -> None:
    other = RedisLists(options(redis_server))
    push(lists, "q", b"x")
    taken(lists)
    end = time.monotonic() + 2.5  # the liveness timeout is 1 s

    def beaten() -> bool:
        lists.beat()
        assert other.reclaim() == 0
        return time.monotonic() > end

    eventually(beaten, within=5.0, every=0.3)
    other.close()


def test_take_whose_reply_is_lost_goes_back(
    lists: RedisLists, take: Any, client: redis.Redis
) -> None:
    taker = take("q")
    taker.run_idle()
    push(lists, "q", b"x")
    eventually(lambda: (taker.reader.read(), taker.reader.can_take)[1])
    taker.reader.take(5)
    eventually(lambda: client.hlen(lists.held_key) == 1)

    taker.reader._lose(ConnectionResetError("a cut cable"))

    assert taker.missed >= 5, "the credit is given back"
    lists.beat()
    assert client.lrange("q", 0, -1) == [b"x"]
    assert client.hlen(lists.held_key) == 0


def test_take_under_way_while_a_beat_looks_is_left_alone(
    lists: RedisLists, client: redis.Redis
) -> None:
    push(lists, "q", b"x")
    lists.lost_take(lists.begin_take())
    delivery = taken(lists)

    lists.beat()

    assert client.hvals(lists.held_key) == [b"x"]
    lists.settle(delivery, "ack")


# The same lists as kombu's


def test_keys_are_those_of_kombu(lists: RedisLists, redis_server: RedisServer) -> None:
    with kombu.Connection(redis_server.url) as connection:
        channel = connection.channel()
        for priority in range(10):
            push(lists, "q", b"%d" % priority, priority=priority)
            key = channel._q_for_pri("q", priority)
            assert channel.client.lrange(key, 0, 0) == [b"%d" % priority]


@pytest.mark.parametrize("prefix", ["", "shop:"])
def test_what_kombu_wrote_is_taken(redis_server: RedisServer, prefix: str) -> None:
    lists = RedisLists(options(redis_server, global_keyprefix=prefix))
    with kombu.Connection(
        redis_server.url, transport_options={"global_keyprefix": prefix}
    ) as connection:
        producer = connection.Producer()
        for priority in (0, 3, 9):
            producer.publish({"n": priority}, routing_key="q", priority=priority)

    found = [taken(lists) for _ in range(3)]

    assert [d.queue for d in found] == ["q", "q", "q"]
    bodies = [json.loads(d.payload)["properties"]["priority"] for d in found]
    assert bodies == [9, 0, 3]
    lists.close()


@pytest.mark.parametrize(
    ("kind", "bound", "key", "is_reached"),
    [
        ("direct", "a.b", "a.b", True),
        ("direct", "a.b", "a", False),
        ("topic", "a.*", "a.b", True),
        ("topic", "a.#", "a.b.c", True),
        ("topic", "a.*", "a.b.c", False),
    ],
)
def test_bindings_are_shared_with_kombu(
    lists: RedisLists, redis_server: RedisServer, kind: str, bound: str, key: str, is_reached: bool
) -> None:
    """Either side routes by what the other has bound."""
    exchange = kombu.Exchange("x", kind)
    with kombu.Connection(redis_server.url) as connection:
        kombu.Queue("theirs", exchange, bound)(connection.channel()).declare()
        assert (lists.route("x", kind, key) == ("theirs",)) is is_reached
        lists.bind("x", kind, bound, "ours")

        connection.Producer(exchange=exchange).publish("hello", routing_key=key)

        assert lists.size("ours") == lists.size("theirs") == is_reached
        lists.unbind("x", "ours", bound)
        assert "ours" not in lists.route("x", kind, key)


# Redis away


def test_error_names_redis_and_no_password(redis_server: RedisServer) -> None:
    port = free_port()
    lists = RedisLists(Options(fallback_url=f"redis://ann:geheim@127.0.0.1:{port}/0"))

    with pytest.raises(FallbackLost, match=r"the fallback Redis cannot be reached .*refused") as e:
        lists.push(["q"], b"x", 0)

    assert "geheim" not in str(e.value)
    lists.close()


def test_wrong_password_is_told(redis_server: RedisServer, client: redis.Redis) -> None:
    client.config_set("requirepass", "richtig")
    lists = RedisLists(Options(fallback_url=redis_server.url.replace("//", "//:falsch@")))

    with pytest.raises(FallbackLost, match="password") as e:
        lists.ping()

    assert "falsch" not in str(e.value)
    lists.close()


# TLS


@contextmanager
def tls_in_front_of(port: int, context: ssl.SSLContext) -> Iterator[int]:
    """A port that speaks TLS and hands everything on; redis-server's wheel has none built in."""

    ports: SimpleQueue[int] = SimpleQueue()
    over = threading.Event()

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.put(listening.getsockname()[1])
            listening.settimeout(0.1)
            threads = []
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    plain, _ = listening.accept()
                    plain.settimeout(10)
                    near = stack.enter_context(context.wrap_socket(plain, server_side=True))
                    far = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    for ends in ((near, far), (far, near)):
                        threads.append(threading.Thread(target=carry, args=ends))
                        threads[-1].start()
            for thread in threads:
                thread.join()

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield ports.get(timeout=5)
    finally:
        over.set()
        server.join()


@pytest.mark.tls
def test_tls_with_a_password_in_the_url(
    redis_server: RedisServer, client: redis.Redis, folder: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    client.execute_command("ACL", "SETUSER", "ann", "on", ">geheim", "~*", "+@all")
    with tls_in_front_of(redis_server.port, context) as port:
        authorities = quote(str(folder / "ca.pem"))
        url = f"rediss://ann:geheim@127.0.0.1:{port}/0?ssl_ca_certs={authorities}"
        lists = RedisLists(Options(fallback_url=url))
        taker = Taker(lists, ["q"])
        taker.run_idle()

        # More than one TLS record: OpenSSL has bytes the descriptor does not show.
        sent = [b"%d" % number * 10_000 for number in range(40)]
        push(lists, "q", *sent)
        taker.run(lambda: len(taker.found) == 40)

        assert taker.payloads() == sent
        taker.reader.close()
        lists.close()


# What an operator is told


def test_a_fallback_that_can_take_over_needs_no_remark(redis_server: RedisServer) -> None:
    assert examine(options(redis_server)) == []
    assert examine(Options()) == []


def test_what_is_wrong_with_the_fallback_is_told(
    redis_server: RedisServer, client: redis.Redis, lists: RedisLists
) -> None:
    client.config_set("appendonly", "no")
    client.config_set("maxmemory", "100mb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    lists.keep_letter(b"{}")

    said = [remark.message for remark in examine(options(redis_server))]

    assert [" ".join(message.split()[:6]) for message in said] == [
        "the fallback Redis has no append-only",
        "the fallback Redis may drop queues",
        "1 dead letters of an outage",
    ]
    redis_server.kill()
    (away,) = examine(options(redis_server))
    assert away.severity == "error"
    assert "refused" in away.message


def test_the_living_lose_nothing_when_redis_was_away_for_long(
    lists: RedisLists, redis_server: RedisServer, client: redis.Redis
) -> None:
    other = RedisLists(options(redis_server, fallback_liveness_timeout=1.0))
    push(lists, "q", b"x")
    taken(lists)
    lists.beat()
    other.beat()

    client.delete(lists.alive_key, other.alive_key)  # their time was over meanwhile
    other.beat()  # the first one back looks for the dead
    lists.beat()

    other.beat()
    assert client.hvals(lists.held_key) == [b"x"]
    assert client.llen("q") == 0
    other.close()


@pytest.mark.parametrize("exchange", ["celery.pidbox", "reply.celery.pidbox", "celeryev"])
def test_what_plain_workers_hear_by_pubsub_goes_to_no_list(
    lists: RedisLists, exchange: str
) -> None:
    lists.bind(exchange, "fanout", "", "w@host.celery.pidbox")

    assert lists.route(exchange, "fanout", "") == ()


def test_a_command_that_is_refused_does_not_make_redis_away(
    lists: RedisLists, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    lists.needed_because = lambda: "no server"
    client.config_set("maxmemory", "1")

    with pytest.raises(FallbackLost) as caught:
        lists.push(["q"], b"x", 0)

    told = str(caught.value)
    assert "neither JetStream nor the fallback Redis can be used" in told
    assert "no server" in told
    assert "maxmemory" in told
    assert lists.available
    assert "is away" not in caplog.text


@pytest.mark.parametrize(
    "user",
    ["+@all -@dangerous", "+@all -@dangerous -@connection +ping +hello +auth"],
    ids=["no dangerous commands", "no CLIENT at all"],
)
def test_a_user_without_administrative_commands_can_use_it(
    redis_server: RedisServer, client: redis.Redis, user: str
) -> None:
    client.execute_command("ACL", "SETUSER", "shop", "on", ">geheim", "~*", *user.split())
    url = redis_server.url.replace("//", "//shop:geheim@")
    lists = RedisLists(Options(fallback_url=url))

    push(lists, "q", b"x")
    assert taken(lists).payload == b"x"
    (remark,) = examine(Options(fallback_url=url))
    assert remark.severity == "warning"
    assert "allow INFO" in remark.remedy
    lists.close()


@pytest.mark.parametrize(
    "url",
    ["redis://127.0.0.1:notaport/0", "redis://127.0.0.1/0?socket_timeoutt=3"],
    ids=["port", "parameter"],
)
def test_a_url_redis_cannot_read_is_a_bad_option(url: str) -> None:
    with pytest.raises(OptionsError, match="expected 'fallback_url' to be a Redis URL") as caught:
        RedisLists(Options(fallback_url=url))

    assert caught.value.option == "fallback_url"


@pytest.mark.parametrize("name", ["CERT_NONE", "CERT_REQUIRED", "none", "required"])
def test_certificates_are_asked_for_by_both_names(name: str) -> None:
    lists = RedisLists(Options(fallback_url=f"rediss://127.0.0.1:1/0?ssl_cert_reqs={name}"))

    with pytest.raises(FallbackLost, match="refused"):
        lists.ping()
    lists.close()
