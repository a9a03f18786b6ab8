"""Queues as Redis lists, the ones kombu's Redis transport has: fallback, and the way in.

A queue is four lists, one for each step of priority: ``<queue>``, then ``<queue>\\x06\\x163``,
``…6`` and ``…9``, with messages of that priority and the next two.  Producers push at the head,
consumers take from the tail.  Bindings are the sets ``_kombu.binding.<exchange>``.  So a plain
``redis://`` worker reads what is written here, and the other way round.

What a worker took and did not settle is in a hash of its own, until it settles it or dies:

=====================================  =======================================================
``_kombu_jetstream.held.<worker>``     field ``<take>:<number>:<list>``, value the message
``_kombu_jetstream.alive.<worker>``    expires within ``fallback_liveness_timeout``, unless the
                                       worker renews it
``_kombu_jetstream.workers``           the workers that may hold something
``_kombu_jetstream.attempts``          SHA-1 of a message that came back, and how often
``_kombu_jetstream.letters``           dead letters that wait for JetStream
``_kombu_jetstream.written``           numbers and checksums of what ``dual-write`` wrote
=====================================  =======================================================

A hash, and not a list filled by BLMOVE: its field says which list a message came from, an ack
names it without sending the message again, and one script serves many lists in strict order, as
many messages as there is room for, where BLMOVE takes one from one list, at any later time.

*Waiting.*  A script cannot block, and need not: the connection has client-side tracking on
(``CLIENT TRACKING``, Redis 6), and the script that finds too little reads the lists it looked at,
so Redis pushes a line at the next write to any of them.  One idle connection however many queues,
nothing polled, no credit spent on waiting.  Where tracking is refused, the lists are looked at
once a second.

`RedisLists` belongs to the process, as the ledger does: it holds what was taken whatever becomes
of the connections, so a task that ran through a reconnect is settled all the same.  `ListReader`
belongs to one channel.  Nothing else imports ``redis``.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
import re
import socket
import ssl
import threading
import time
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import count
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from . import resp
from .backend import Delivery, Outcome
from .dropped import is_dropped, note_scheduled
from .endpoint import poll_socket
from .errors import FallbackLost, JetStreamTransportError, OptionsError
from .options import Options
from .routing import is_of_control, topic_matches
from .topology import LEVELS, level_of

__all__ = ["Description", "ListReader", "RedisLists", "list_name", "steps"]

logger = logging.getLogger(__name__)

#: kombu's: between the queue's name and the step of a priority.
SEPARATOR = "\x06\x16"
#: kombu's: a message of priority 4 is in the list of step 3.
PRIORITY_STEPS = (0, 3, 6, 9)

#: Seconds for one command: a Redis that takes longer is away.
COMMAND_TIMEOUT = 2.0
CONNECT_TIMEOUT = 2.0

#: Seconds between tries to reach a Redis that is away.
RETRY_INTERVAL = 1.0

#: Messages of one take; their payloads are one reply.
MAX_TAKE = 64

#: Seconds after which the lists are looked at although no push was heard of.
LOOK_INTERVAL = 10.0
#: The same where the server has no client-side tracking.
POLL_INTERVAL = 1.0

#: Seconds for the answer to a PING on the reader's connection.
PONG_TIMEOUT = 5.0

#: Signs of life, and looks for those of others, per ``fallback_liveness_timeout``.  A sign lasts
#: for all but three of them: the first look after it raises a suspicion, and the second or third
#: one confirms it, so that the dead are found within that time, and the living have one beat and a
#: half for a sign after Redis was away.
BEATS_PER_LIVENESS = 5
BEATS_OF_SUSPICION = 1.5

#: How long Redis remembers that a message came back.
ATTEMPTS_LIFETIME = 7 * 24 * 60 * 60

_CERT_REQS = re.compile(r"(ssl_cert_reqs=)CERT_(NONE|OPTIONAL|REQUIRED)\b")

_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_FAILURES = (RedisError, OSError)


def step_of(priority: Any) -> int:
    """Return kombu's step for a message's priority; 0 for none, or for one that is no number."""
    try:
        number = max(0, min(9, int(priority)))
    except (TypeError, ValueError):
        number = 0
    return PRIORITY_STEPS[bisect(PRIORITY_STEPS, number) - 1]


def list_name(queue: str, step: int) -> str:
    """Return the name of one of a queue's lists, without the key prefix."""
    return f"{queue}{SEPARATOR}{step}" if step else queue


def steps(options: Options) -> tuple[int, ...]:
    """Return the steps, the most urgent first.

    kombu's Redis transport takes 0 first, and so does ``priority_order`` "redis".  In AMQP's
    sense 9 is the most urgent, and 0 is what tasks without a priority have: before 3.
    """
    return PRIORITY_STEPS if options.priority_order == "redis" else (9, 6, 0, 3)


def _script(name: str) -> str:
    return (resources.files(__package__) / "lua" / f"{name}.lua").read_text("utf-8")


@dataclass(frozen=True, slots=True)
class Description:
    """A Redis, and what it has of ours beside the lists."""

    #: None if INFO is not allowed to us: then nothing is known of persistence and eviction, either
    version: str | None
    #: whether readers hear of new messages instead of looking once a second
    tracks: bool
    #: whether it has an append-only file
    persistent: bool
    #: whether it may drop keys when its memory is full, messages among them
    evicts: bool
    held: int
    letters: int


class RedisLists:
    """The lists of one Redis, and what this process took from them; usable from any thread."""

    def __init__(self, options: Options) -> None:
        assert options.fallback_url is not None
        self.options = options
        # kombu takes ssl's names, redis-py has its own.
        self._url: str = _CERT_REQS.sub(lambda m: m[1] + m[2].lower(), options.fallback_url)
        self.prefix = options.global_keyprefix
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"
        base = f"{self.prefix}_kombu_jetstream."
        self.held_prefix, self.alive_prefix = f"{base}held.", f"{base}alive."
        self.suspected_prefix = f"{base}suspected."
        self.held_key = self.held_prefix + self.worker
        self.alive_key = self.alive_prefix + self.worker
        self.workers_key, self.attempts_key = f"{base}workers", f"{base}attempts"
        self.written_key, self.letters_key = f"{base}written", f"{base}letters"
        self.take_script = _script("take")
        beat_ms = options.fallback_liveness_timeout / BEATS_PER_LIVENESS * 1000
        self.liveness_ms = max(1, int(beat_ms * (BEATS_PER_LIVENESS - 3)))
        self.suspicion_ms = max(1, int(beat_ms * BEATS_OF_SUSPICION))
        #: Numbers of takes; what a lost one moved is found by it.
        self.takes = count(1)
        #: whether the last command was answered
        self.available = True
        self.problem: Exception | None = None
        self._client = self._new_client()
        self._requeue = self._client.register_script(_script("requeue"))
        self._reclaim = self._client.register_script(_script("reclaim"))
        self._take = self._client.register_script(self.take_script)
        self._lock = threading.RLock()
        #: what this process holds, by take and number
        self._held: dict[bytes, Delivery] = {}
        self._outstanding: set[int] = set()
        self._lost_takes: set[int] = set()
        self._orphans: dict[bytes, Delivery] = {}
        self._unsent: deque[tuple[Delivery, Outcome]] = deque()
        self._later: list[tuple[float, int, Delivery]] = []
        self._order = count()
        self.readers = 0
        #: why JetStream is away, empty when it is not: for errors, which name both
        self.needed_because: Callable[[], str] = str
        #: called when the keeper has something to do before its next beat
        self.wake: Callable[[], None] = lambda: None
        #: whether that is a beat
        self.wants_beat = False
        self._routes: dict[str, tuple[float, list[tuple[str, str, str]]]] = {}

    # -- the driver ----------------------------------------------------------------------------

    def _new_client(self) -> redis.Redis:
        """Return the driver's client, which connects when it is used.

        Raises `OptionsError` for a URL it cannot read, or with a parameter it does not know.
        """
        try:
            client: redis.Redis = redis.Redis.from_url(
                self._url,
                socket_timeout=COMMAND_TIMEOUT,
                socket_connect_timeout=CONNECT_TIMEOUT,
                # A push repeated by the driver would be there twice; who calls may repeat it.
                retry=Retry(NoBackoff(), 0),
            )
            client.connection_pool.make_connection()
        except (ValueError, TypeError, RedisError) as exc:
            raise OptionsError(
                f"expected 'fallback_url' to be a Redis URL: {self.told(exc)}", "fallback_url"
            ) from exc
        return client

    def connection(self) -> Any:
        """Return a connected redis-py connection that speaks RESP3, for a reader of its own."""
        pool = redis.ConnectionPool.from_url(
            self._url,
            protocol=3,
            socket_timeout=COMMAND_TIMEOUT,
            socket_connect_timeout=CONNECT_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
        connection: Any = pool.make_connection()
        connection.connect()
        return connection

    def call(self, operation: Callable[[Any], Any]) -> Any:
        """Return *operation* of the driver's client, or raise `FallbackLost`."""
        try:
            answer = operation(self._client)
        except ResponseError as exc:
            # It is there, and refuses this one: no rights, no memory.
            raise FallbackLost(self.told(exc), self.needed_because(), refused=True) from exc
        except _FAILURES as exc:
            self.failed(exc)
            raise FallbackLost(self.told(exc), self.needed_because()) from exc
        self.worked()
        return answer

    def failed(self, exc: Exception) -> None:
        self.problem = exc
        if self.available:
            self.available = False
            logger.warning("the fallback Redis is away: %s", self.told(exc))

    def worked(self) -> None:
        if not self.available:
            self.available = True
            logger.warning("the fallback Redis is back")

    def told(self, exc: Exception) -> str:
        """Return what went wrong, in words without a password."""
        text = str(exc) or type(exc).__name__
        return re.sub(r"//[^/@\s]*@", "//**@", text)

    def script(self, name: str) -> Any:
        """Return a Lua script of ours, to be called with keys and arguments."""
        return self._client.register_script(_script(name))

    def ping(self) -> None:
        self.call(lambda client: client.ping())

    def describe(self) -> Description:
        """Return what an operator wants to know of this Redis, as far as it may be asked."""
        try:
            info = self.call(lambda client: client.info())
        except FallbackLost as exc:
            if not isinstance(exc.__cause__, NoPermissionError):
                raise
            info = {}
        connection = self.connection()
        try:
            connection.send_command("CLIENT", "TRACKING", "ON")
            tracks = connection.read_response() is not None
        except _FAILURES:
            tracks = False
        finally:
            connection.disconnect()
        return Description(
            version=str(info["redis_version"]) if info else None,
            tracks=tracks,
            persistent=bool(int(info.get("aof_enabled", 0))),
            evicts=str(info.get("maxmemory_policy", "noeviction")) != "noeviction"
            and int(info.get("maxmemory", 0)) > 0,
            held=self.held_by_all(),
            letters=self.letters(),
        )

    # -- queues --------------------------------------------------------------------------------

    def key(self, name: str) -> str:
        return self.prefix + name

    def lists_of(self, queue: str) -> list[str]:
        """Return the keys of a queue's lists, the most urgent first."""
        return [self.key(list_name(queue, step)) for step in steps(self.options)]

    def push(
        self, queues: Iterable[str], payload: bytes, priority: Any, *, bucket: int | None = None
    ) -> None:
        """Append a message to each of *queues*; with a *bucket*, count it there.

        Raises `FallbackLost` if Redis did not confirm it.
        """
        step = step_of(priority)
        keys = [(queue, self.key(list_name(queue, step))) for queue in queues]
        if len(keys) == 1 and bucket is None:
            self.call(lambda client: client.lpush(keys[0][1], payload))
            return

        def write(client: Any) -> None:
            with client.pipeline(transaction=True) as pipe:
                for queue, key in keys:
                    pipe.lpush(key, payload)
                    if bucket is not None:
                        pipe.hincrby(self.written_key, f"count:{bucket}:{queue}", 1)
                        pipe.hincrby(self.written_key, f"sum:{bucket}:{queue}", checksum(payload))
                pipe.execute()

        self.call(write)

    def size(self, queue: str) -> int:
        """Return how many messages wait in *queue*."""

        def ask(client: Any) -> list[int]:
            with client.pipeline(transaction=False) as pipe:
                for key in self.lists_of(queue):
                    pipe.llen(key)
                return list(pipe.execute())

        return sum(self.call(ask))

    def purge(self, queue: str) -> int:
        """Remove what waits in *queue*, and return how many messages it was."""

        def remove(client: Any) -> list[int]:
            with client.pipeline(transaction=True) as pipe:
                for key in self.lists_of(queue):
                    pipe.llen(key)
                    pipe.delete(key)
                return list(pipe.execute())

        return int(sum(self.call(remove)[::2]))

    def peek(self, queue: str, count: int) -> list[bytes]:
        """Return up to *count* waiting messages of each list, the next ones first."""

        def look(client: Any) -> list[list[bytes]]:
            with client.pipeline(transaction=False) as pipe:
                for key in self.lists_of(queue):
                    pipe.lrange(key, -count, -1)
                return list(pipe.execute())

        return [payload for found in self.call(look) for payload in reversed(found)]

    # -- dead letters --------------------------------------------------------------------------

    def keep_letter(self, letter: bytes) -> None:
        """Keep a dead letter until JetStream is there for it."""
        self.call(lambda client: client.rpush(self.letters_key, letter))

    def next_letter(self) -> bytes | None:
        """Return the oldest dead letter kept; it stays until `drop_letter`."""
        found: bytes | None = self.call(lambda client: client.lindex(self.letters_key, 0))
        return found

    def letters(self) -> int:
        """Return how many dead letters are kept."""
        return int(self.call(lambda client: client.llen(self.letters_key)))

    def drop_letter(self, letter: bytes) -> None:
        self.call(lambda client: client.lrem(self.letters_key, 1, letter))

    # -- bindings, as kombu keeps them ---------------------------------------------------------

    def bind(self, exchange: str, exchange_type: str, key: str, queue: str) -> None:
        pattern = _pattern(key) if exchange_type == "topic" else ""
        member = SEPARATOR.join([key, pattern, queue])

        def write(client: Any) -> None:
            with client.pipeline(transaction=True) as pipe:
                pipe.sadd(self.key(f"_kombu.binding.{exchange}"), member)
                # kombu 5.7 sweeps away tables that are not in here, too.
                pipe.sadd(self.key(f"_kombu.binding_permanent.{exchange}"), member)
                pipe.execute()

        self._routes.pop(exchange, None)
        self.call(write)

    def bound_queues(self) -> set[str]:
        """Return the queues that are bound to any exchange but those of remote control."""
        prefix = f"{self.prefix}_kombu.binding."

        def read(client: Any) -> set[str]:
            found = set()
            for table in client.scan_iter(match=f"{prefix}*", count=1000):
                if is_of_control(table.decode("utf-8", "replace")[len(prefix) :]):
                    continue
                for member in client.smembers(table):
                    found.add(member.decode("utf-8", "replace").rpartition(SEPARATOR)[2])
            return found - {""}

        queues: set[str] = self.call(read)
        return queues

    def held_by_all(self) -> int:
        """Return how many messages all our workers hold."""

        def read(client: Any) -> int:
            workers = [worker.decode() for worker in client.smembers(self.workers_key)]
            return sum(client.hlen(self.held_prefix + worker) for worker in workers)

        return int(self.call(read))

    def count(self, key: str) -> int:
        """Return the number of fields of a hash."""
        return int(self.call(lambda client: client.hlen(key)))

    def unbind(self, exchange: str, queue: str, key: str | None = None) -> None:
        """Remove the bindings of *queue*, with *key* only the one."""
        members = [
            SEPARATOR.join(member)
            for member in self._bindings(exchange, fresh=True)
            if member[2] == queue and key in (None, member[0])
        ]
        if members:
            for table in ("binding", "binding_permanent"):
                name = self.key(f"_kombu.{table}.{exchange}")
                self.call(partial(_srem, name, members))
            self._routes.pop(exchange, None)

    def route(self, exchange: str, exchange_type: str, key: str) -> tuple[str, ...]:
        """Return the queues that *key* of a named exchange reaches.

        None for remote control and events: plain workers hear those by PUBSUB, and read no list.
        """
        if is_of_control(exchange):
            return ()
        found = {
            queue: None
            for bound, pattern, queue in self._bindings(exchange)
            if exchange_type == "fanout" or (topic_matches(bound, key) if pattern else bound == key)
        }
        return tuple(found)

    def _bindings(self, exchange: str, *, fresh: bool = False) -> list[tuple[str, str, str]]:
        now = time.monotonic()
        read_at, bindings = self._routes.get(exchange, (float("-inf"), []))
        if fresh or now - read_at > 1.0:
            name = self.key(f"_kombu.binding.{exchange}")
            members = self.call(lambda client: client.smembers(name))
            parts = (member.decode("utf-8", "replace").split(SEPARATOR) for member in members)
            bindings = [(part[0], part[1], part[2]) for part in parts if len(part) == 3]
            self._routes[exchange] = now, bindings
        return bindings

    # -- deliveries ----------------------------------------------------------------------------

    def begin_take(self) -> int:
        """Return the number of a take that is about to be sent."""
        number = next(self.takes)
        with self._lock:
            self._outstanding.add(number)
        return number

    def took(self, take: int, flat: list[bytes]) -> list[Delivery]:
        """Return the deliveries of a take's reply; this process holds them from now on."""
        now = time.monotonic()
        found = [self._delivery(*flat[at : at + 3], now=now) for at in range(0, len(flat), 3)]
        with self._lock:
            self._outstanding.discard(take)
            for delivery in found:
                self._held[delivery.token] = delivery
        return found

    def lost_take(self, take: int) -> None:
        """The reply to a take will not come: what it moved, now or later, goes back."""
        with self._lock:
            self._outstanding.discard(take)
            self._lost_takes.add(take)
            self.wants_beat = True
        self.wake()

    def _delivery(self, field: bytes, payload: bytes, tries: bytes, *, now: float) -> Delivery:
        take, number, key = field.split(b":", 2)
        queue, _, step = key.decode()[len(self.prefix) :].partition(SEPARATOR)
        return Delivery(
            queue,
            LEVELS.index(level_of(int(step or 0), self.options)),
            payload,
            b"%b:%b" % (take, number),
            self,
            int(tries) + 1,
            float("inf"),  # the process gives the sign of life, not each delivery
            now,
            extra=field,
        )

    def take_one(self, queue: str) -> Delivery | None:
        """Take the next message of *queue*, if there is one."""
        take = self.begin_take()
        keys = self.take_keys(self.lists_of(queue))
        try:
            flat = self.call(
                lambda client: self._take(keys, [1, take, self.liveness_ms, self.worker, 1])
            )
        except BaseException:
            self.lost_take(take)
            raise
        found = self.took(take, flat)
        return found[0] if found else None

    def take_keys(self, lists: list[str]) -> list[str]:
        return [self.held_key, self.alive_key, self.workers_key, self.attempts_key, *lists]

    def settle(self, delivery: Delivery, outcome: Outcome, delay: float | None = None) -> None:
        """Take a message out of what this process holds: done with, or back to its list.

        Never raises: while Redis is away the outcome waits, and the keeper sends it.
        """
        if outcome == "progress":
            return
        with self._lock:
            self._orphans.pop(delivery.token, None)
            if outcome == "nak" and delay:
                heapq.heappush(self._later, (time.monotonic() + delay, next(self._order), delivery))
                self.wake()
                return
        if self.available:
            try:
                self._send(delivery, outcome)
            except JetStreamTransportError:
                pass  # said once by `failed`; sent when Redis is back
            else:
                return
        with self._lock:
            self._unsent.append((delivery, outcome))
        self.wake()

    def _send(self, delivery: Delivery, outcome: Outcome) -> None:
        if outcome == "nak":
            keys = [self.held_key, self.attempts_key]
            self.call(lambda client: self._requeue(keys, [ATTEMPTS_LIFETIME, delivery.extra]))
        else:
            self.call(lambda client: client.hdel(self.held_key, delivery.extra))
            if delivery.attempt > 1:
                digest = hashlib.sha1(delivery.payload, usedforsecurity=False).hexdigest()
                self.call(lambda client: client.hdel(self.attempts_key, digest))
        with self._lock:
            self._held.pop(delivery.token, None)

    def adopt(self, deliveries: Iterable[Delivery]) -> None:
        """Take over what a lost channel held."""
        held = [delivery for delivery in deliveries if not delivery.settled]
        note_scheduled(held)
        with self._lock:
            self._orphans.update((delivery.token, delivery) for delivery in held)
        self.wake()

    @property
    def holds(self) -> int:
        """How many deliveries this process has not settled."""
        return len(self._held)

    # -- what the keeper thread does -----------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nobody reads and nothing is held or under way."""
        return not (self.readers or self._held or self._unsent or self._lost_takes)

    def beat(self) -> None:
        """Give a sign of life, and take back what dead workers held.  Raises `FallbackLost`."""

        def give(client: Any) -> None:
            with client.pipeline(transaction=True) as pipe:
                pipe.set(self.alive_key, 1, px=self.liveness_ms)
                pipe.sadd(self.workers_key, self.worker)
                pipe.execute()

        self.wants_beat = False
        self.call(give)
        self.reclaim()
        if self._lost_takes:
            self._put_back_lost()

    def reclaim(self) -> int:
        """Put back what dead workers held, and return how many messages it was."""
        flat = self.call(
            lambda client: self._reclaim(
                [self.workers_key, self.attempts_key],
                [
                    self.alive_prefix,
                    self.held_prefix,
                    self.suspected_prefix,
                    ATTEMPTS_LIFETIME,
                    self.suspicion_ms,
                ],
            )
        )
        total = 0
        for worker, number in zip(flat[::2], flat[1::2], strict=True):
            total += number
            if number:
                logger.warning(
                    "worker %s gives no sign of life, %d of its messages go back to their lists",
                    worker.decode(),
                    number,
                )
        return total

    def _put_back_lost(self) -> None:
        """Requeue what takes moved whose reply was lost.

        A lost take may still be executed after this; the next beats look again.
        """
        fields = self.call(lambda client: client.hkeys(self.held_key))
        with self._lock:
            lost = [
                field
                for field in fields
                if b":".join(field.split(b":", 2)[:2]) not in self._held
                and int(field.split(b":", 1)[0]) in self._lost_takes
            ]
        lost.sort(key=lambda field: [int(part) for part in field.split(b":", 2)[:2]])
        if lost:
            keys = [self.held_key, self.attempts_key]
            self.call(lambda client: self._requeue(keys, [ATTEMPTS_LIFETIME, *lost]))
            logger.info("%d messages of a lost reply go back to their lists", len(lost))
        newest = max(self._lost_takes)
        with self._lock:
            # Old connections are long closed by the time a thousand more takes were made.
            self._lost_takes = {n for n in self._lost_takes if n > newest - 1000}
            if not self.readers and not lost:
                self._lost_takes.clear()

    def settle_waiting(self, now: float) -> None:
        """Send the outcomes that wait, and put back what nobody can settle any more."""
        with self._lock:
            while self._later and self._later[0][0] <= now:
                self._unsent.append((heapq.heappop(self._later)[2], "nak"))
            for token, delivery in list(self._orphans.items()):
                if delivery.settled:
                    del self._orphans[token]
                elif is_dropped(delivery):
                    del self._orphans[token]
                    delivery.settled = True
                    self._unsent.append((delivery, "nak"))
        while self._unsent:
            delivery, outcome = self._unsent[0]
            self._send(delivery, outcome)  # may raise: it stays
            self._unsent.popleft()

    @property
    def has_waiting(self) -> bool:
        return bool(self._unsent or self._orphans or self._later)

    def farewell(self) -> None:
        """Sign off: nobody has to wait for this process to be known dead."""
        if self._held or not self.available:
            return

        def leave(client: Any) -> None:
            with client.pipeline(transaction=True) as pipe:
                pipe.srem(self.workers_key, self.worker)
                pipe.delete(self.alive_key)
                pipe.execute()

        self.call(leave)

    def close(self) -> None:
        self._client.close()


def checksum(payload: bytes) -> int:
    """Return a number whose sums over two sets of messages are equal if the sets are."""
    digest = hashlib.sha1(payload, usedforsecurity=False).digest()
    return int.from_bytes(digest[:5], "big")


def _srem(name: str, members: list[str], client: Any) -> None:
    client.srem(name, *members)


def _pattern(key: str) -> str:
    """Return the regular expression kombu stores for a topic binding."""
    words = {"*": r"[^\.]+", "#": r".*?"}
    escaped = "".join(c if c.isalnum() or c in ".#*" else f"\\{c}" for c in key)
    return "^" + r"\.".join(words.get(word, word) for word in escaped.split(".")) + "$"


class ListReader:
    """Takes messages for one channel over one socket, without ever waiting.

    The owner calls everything under its lock; `read` when the socket is readable, `tick` from
    time to time.  `connect` alone may wait, `CONNECT_TIMEOUT` at most, and only for a Redis that
    answered the keeper a moment ago.
    """

    def __init__(
        self,
        lists: RedisLists,
        *,
        arrived: Callable[[list[Delivery], int], None],
        pushed: Callable[[], None],
        watch: Callable[[int | None, int | None], None],
    ) -> None:
        self._lists = lists
        #: gets the deliveries of a take, and how many were asked for
        self._arrived = arrived
        #: called when there may be messages
        self._pushed = pushed
        #: gets the old and the new file descriptor when they change
        self._watch = watch
        self.queues: list[str] = []
        #: how many messages are asked for
        self.asked = 0
        #: whether the lists may hold something
        self.has_backlog = False
        self._connection: Any = None
        self._sock: Any = None
        self._parser = resp.Parser()
        self._out = bytearray()
        self._expected: deque[Callable[[Any], None]] = deque()
        self._take = 0
        self._sha = b""
        self._tracks = True
        self._retry_at = self._look_at = self._heard_at = self._pinged_at = 0.0
        lists.readers += 1

    @property
    def is_connected(self) -> bool:
        return self._sock is not None

    def fileno(self) -> int | None:
        return self._sock.fileno() if self._sock is not None else None

    def add(self, queue: str) -> None:
        if queue not in self.queues:
            self.queues.append(queue)
            self.has_backlog = True
        if not self.is_connected:
            self.connect(time.monotonic())

    def remove(self, queue: str) -> None:
        if queue in self.queues:
            self.queues.remove(queue)

    # -- the connection ------------------------------------------------------------------------

    def connect(self, now: float) -> None:
        """Connect; if Redis is away, `tick` tries again."""
        if self.is_connected or now < self._retry_at or not self._lists.available:
            return
        self._retry_at = now + RETRY_INTERVAL
        try:
            self._connection = self._lists.connection()
        except _FAILURES as exc:
            self._lists.failed(exc)
            return
        self._lists.worked()
        self._sock = self._connection._sock
        self._sock.setblocking(False)
        self._parser = resp.Parser()
        self._out.clear()
        self._expected.clear()
        self._heard_at = self._look_at = now
        self._pinged_at = 0.0
        self.asked, self.has_backlog = 0, True
        self._watch(None, self._sock.fileno())
        # NOLOOP: of our own takes we know.
        self._send(self._on_tracking, "CLIENT", "TRACKING", "ON", "NOLOOP")
        self._send(self._on_script, "SCRIPT", "LOAD", self._lists.take_script)

    def _on_tracking(self, answer: Any) -> None:
        self._tracks = not isinstance(answer, resp.ReplyError)
        if not self._tracks:
            logger.warning(
                "Redis has no client-side tracking for us (%s), the lists are looked at each %g s",
                answer,
                POLL_INTERVAL,
            )

    def _on_script(self, answer: Any) -> None:
        if isinstance(answer, resp.ReplyError):
            self._lose(redis.ResponseError(str(answer)))
            return
        self._sha = answer
        self._pushed()

    def _lose(self, exc: Exception) -> None:
        """Forget a broken connection; what was asked for is not coming."""
        if self._sock is None:
            return
        self._lists.failed(exc)
        self._drop()

    def _drop(self) -> None:
        fd = self._sock.fileno()
        self._watch(fd if fd >= 0 else None, None)
        self._sock, self._sha = None, b""
        connection, self._connection = self._connection, None
        connection.disconnect()
        asked, self.asked = self.asked, 0
        if asked:
            self._lists.lost_take(self._take)
            self._arrived([], asked)

    def close(self) -> None:
        """Stop reading.  A take under way is given back by the keeper."""
        if self._sock is not None:
            self._drop()
        self._lists.readers -= 1
        self.queues.clear()

    # -- taking --------------------------------------------------------------------------------

    @property
    def can_take(self) -> bool:
        """Whether asking makes sense now."""
        return bool(self.has_backlog and not self.asked and self._sha and self.queues)

    def limited(self, room: int) -> int:
        """Return how many messages one `take` may ask for where there is *room*."""
        return min(room, MAX_TAKE)

    def take(self, limit: int) -> None:
        """Ask for up to *limit* messages; `arrived` is told what came of it, in any case."""
        self.asked, self._take = limit, self._lists.begin_take()
        lists = self._lists
        by_queue = [lists.lists_of(queue) for queue in self.queues]
        self.queues.append(self.queues.pop(0))  # queues take turns
        keys = lists.take_keys(
            [key for same_step in zip(*by_queue, strict=True) for key in same_step]
        )
        words: list[bytes | str | int] = [
            limit,
            self._take,
            lists.liveness_ms,
            lists.worker,
            len(by_queue),
        ]
        self._send(self._on_taken, "EVALSHA", self._sha, len(keys), *keys, *words)

    def _on_taken(self, answer: Any) -> None:
        asked, self.asked = self.asked, 0
        if isinstance(answer, resp.ReplyError):
            self._lists.lost_take(self._take)
            self._arrived([], asked)
            if "NOSCRIPT" in str(answer):  # the server was restarted, or its scripts flushed
                self._sha = b""
                self._send(self._on_script, "SCRIPT", "LOAD", self._lists.take_script)
            else:
                logger.error("Redis refused to hand out messages: %s", answer)
                self.has_backlog = False
            return
        deliveries = self._lists.took(self._take, answer)
        self.has_backlog = len(deliveries) == asked
        self._look_at = time.monotonic()
        self._arrived(deliveries, asked)

    # -- the socket ----------------------------------------------------------------------------

    def _send(self, then: Callable[[Any], None], *words: bytes | str | int) -> None:
        if self._sock is None:
            return
        self._expected.append(then)
        self._out += resp.encode(*words)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except _BLOCKED:
            return  # the rest goes with the next read or tick
        except OSError as exc:
            self._lose(exc)

    def read(self) -> None:
        """Take in what the socket has."""
        while self._sock is not None:
            try:
                data = self._sock.recv(256 * 1024)
                if not data:
                    raise ConnectionResetError("Redis closed the connection")
                values = self._parser.feed(data)
            except _BLOCKED:
                if self._out:
                    self._flush()
                return
            except (OSError, ValueError) as exc:
                self._lose(exc)
                return
            self._heard_at = time.monotonic()
            for value in values:
                self._take_in(value)

    def _take_in(self, value: Any) -> None:
        if isinstance(value, resp.Push):
            if value and value[0] == b"invalidate":
                self.has_backlog = True
                if not self.asked:
                    self._pushed()
        elif self._expected:
            self._expected.popleft()(value)

    def await_take(self, timeout: float) -> None:
        """Wait for the reply to a take, so that what it has can be handed back at once."""
        deadline = time.monotonic() + timeout
        while self.asked and self._sock is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            poll_socket(self._sock.fileno(), True, bool(self._out), left)
            self.read()

    def tick(self, now: float) -> None:
        """Connect again, look after the connection, and look at the lists now and then."""
        if not self.is_connected:
            self.connect(now)
            return
        if self._out:
            self._flush()
        silent = now - self._heard_at
        if self._pinged_at and silent > PONG_TIMEOUT and now - self._pinged_at > PONG_TIMEOUT:
            self._lose(TimeoutError(f"no answer from Redis for {silent:.0f} s"))
            return
        if (silent > LOOK_INTERVAL or self._expected) and not self._pinged_at:
            self._pinged_at = now
            self._send(self._on_pong, "PING")
        interval = LOOK_INTERVAL if self._tracks else POLL_INTERVAL
        if not self.has_backlog and now - self._look_at >= interval:
            self._look_at = now
            self.has_backlog = True
            self._pushed()

    def _on_pong(self, answer: Any) -> None:
        self._pinged_at = 0.0
