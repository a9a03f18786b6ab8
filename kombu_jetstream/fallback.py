"""Redis beside JetStream: which of the two a connection uses, and what they share in a process.

With ``fallback_url`` set, kombu gets one of two sessions:

- `DualSession`: JetStream is there.  Producers write what ``migration_phase`` says, workers read
  both stores under one prefetch limit, remote control and events go through NATS.
- `RedisSession`: JetStream has been away for ``fallback_after`` seconds.  Everything goes through
  Redis lists; remote control and events are absent meanwhile.  A probe looks for JetStream, and
  when it answers the session says it is lost: kombu and Celery connect again, as after any loss,
  and get a `DualSession`.  There is no other way back and forth.

Workers read both stores in every phase.  So nobody copies anything back after an outage, a phase
can be undone while messages wait in either store, and producers and workers may be restarted in
any order.

Nothing here is imported unless ``fallback_url`` is set.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import select
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from . import envelope
from .connection import ConnectionSettings, NatsConnection
from .deadletter import DeadLetter, death_id
from .errors import (
    ConnectionLost,
    ConnectionRejected,
    FallbackLost,
    JetStreamTransportError,
    JetStreamUnavailable,
    MalformedMessage,
    NoResponders,
    PermissionDenied,
)
from .failover import Event, Failover, State
from .fallback_channels import AbsentQueue, DualChannel, RedisChannel
from .jetstream import API_TIMEOUT, NOT_ENABLED, NOT_ENABLED_FOR_ACCOUNT
from .leases import ledger_of
from .publishing import CLUSTER_NOT_AVAILABLE, Publisher, Unconfirmed
from .redis_lists import BEATS_PER_LIVENESS, RETRY_INTERVAL, ListReader, RedisLists
from .session import TICK, Session, in_loop
from .topology import Names, decode_token

if TYPE_CHECKING:
    import kombu

    from .backend import Delivery
    from .options import Options
    from .transient import TransientQueue

__all__ = [
    "DualSession",
    "Fallback",
    "RedisSession",
    "counters",
    "fallback_of",
    "open_session",
]

logger = logging.getLogger(__name__)

#: Seconds between probes for a JetStream that is away, and for one probe.
PROBE_INTERVAL = 1.0
PROBE_TIMEOUT = 2.0

#: Seconds between tries to connect while there is patience left.
RECONNECT_INTERVAL = 0.1

#: Seconds any try to connect has, however little patience is left.
MIN_CONNECT_TIMEOUT = 0.5

#: Seconds for which the keeper goes on without a connection, so that a process whose connections
#: all failed still learns that JetStream is back.
LINGER = 60.0

#: Seconds between looks at deliveries whose channel is gone.
ORPHAN_INTERVAL = 0.2

#: Message ids remembered because it is unknown whether JetStream stored them.
REMEMBERED_UNSURE = 10_000

#: Dead letters that one new connection takes over.
MAX_FORWARDED = 1000

#: Phases in which producers write to Redis first.
REDIS_PHASES = frozenset({"redis", "dual-write"})


def wait_readable(fds: Iterable[int], timeout: float) -> None:
    """Wait until one of *fds* can be read, at most *timeout* seconds."""
    poll = getattr(select, "poll", None)  # eventlet takes it away, gevent has its own
    if poll is None:
        select.select(list(fds), [], [], timeout)
        return
    poller = poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    poller.poll(math.ceil(timeout * 1000))


def check_jetstream(connection: NatsConnection, options: Options, timeout: float) -> None:
    """Return if JetStream can take messages of this namespace, or may not be asked.

    A stream that does not exist is no obstacle, it will be made; one without a leader is.
    Raises `ConnectionLost` or a kind of it.
    """
    domain = options.jetstream_domain
    prefix = f"$JS.{domain}.API." if domain else "$JS.API."
    subject = f"{prefix}STREAM.INFO.{Names(options.namespace).stream('medium')}"
    try:
        msg = connection.request(subject.encode(), timeout=timeout)
    except PermissionDenied:
        return
    except NoResponders as exc:
        raise JetStreamUnavailable(str(connection.server)) from exc
    answer = json.loads(msg.payload)
    error = answer.get("error") or {}
    code = error.get("err_code")
    if code in (NOT_ENABLED, NOT_ENABLED_FOR_ACCOUNT):
        raise JetStreamUnavailable(str(connection.server), str(error.get("description", "")))
    cluster = answer.get("cluster") or {}
    if code == CLUSTER_NOT_AVAILABLE or (cluster.get("name") and not cluster.get("leader")):
        raise NoResponders(subject)


class Fallback:
    """What the connections of one process share, and the thread that looks after it."""

    def __init__(self, options: Options, settings: ConnectionSettings) -> None:
        self.options = options
        self.lists = RedisLists(options)
        self.writes_redis = options.migration_phase in REDIS_PHASES
        # While Redis is where messages go anyway, nobody has to wait for NATS to come.
        self.failover = Failover(0.0 if self.writes_redis else options.fallback_after)
        #: seconds any one answer of the server is waited for
        self.patience = max(options.fallback_after, MIN_CONNECT_TIMEOUT)
        #: why JetStream is away
        self.cause = ""
        #: types of exchanges and durable queues declared in this process
        self.exchange_types: dict[str, str] = {}
        self.queues: set[str] = set()
        #: messages written to Redis because JetStream was away, and those of them that may be
        #: in JetStream as well
        self.diverted = self.ambiguous = 0
        #: copies that did not reach the mirror, with ``migration_phase`` "dual-write"
        self.mirror_failures = 0
        #: monotonic time until which no copy is tried, as the last one was not answered
        self.mirror_rests_until = float("-inf")
        self._settings = replace(settings, connect_timeout=PROBE_TIMEOUT)
        self._unsure: OrderedDict[str, None] = OrderedDict()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._used_at = 0.0
        self.lists.wake = self._wake.set
        self.lists.needed_because = self._why_away

    def happened(self, event: Event, exc: Exception | None = None) -> State:
        """Tell the state machine what came of a try; *exc* says what went wrong."""
        if exc is not None:
            self.cause = str(exc)
        before = self.failover.state
        state = self.failover.happened(event, time.monotonic(), exc)
        if state is not before:
            self._wake.set()
        return state

    def _why_away(self) -> str:
        return self.cause if self.failover.state is not State.JETSTREAM else ""

    # -- writing -------------------------------------------------------------------------------

    def unsure(self, message_id: str) -> None:
        """Remember a message of which nobody knows whether JetStream stored it."""
        with self._lock:
            self._unsure[message_id] = None
            if len(self._unsure) > REMEMBERED_UNSURE:
                self._unsure.popitem(last=False)

    def write(
        self,
        queues: Iterable[str],
        message: envelope.Envelope,
        payload: bytes,
        *,
        bucket: int | None = None,
    ) -> None:
        """Append a message to the lists of *queues*; *bucket* is for ``migrate compare``.

        Raises `FallbackLost`, with why JetStream is away if it is.
        """
        properties = message["properties"]
        self.lists.push(queues, payload, properties.get("priority"), bucket=bucket)
        if self.writes_redis:
            return
        self.diverted += 1
        with self._lock:
            if self._unsure.pop(str(properties.get("delivery_tag")), self) is None:
                self.ambiguous += 1

    def divert(self, message: Unconfirmed) -> None:
        """Write a pipelined message to Redis whose confirm did not come."""
        words = message.subject.decode().split(".")
        queue = decode_token(words[3] if words[2] == "@delay" else words[2])
        try:
            decoded = envelope.decode(message.payload)
        except MalformedMessage:  # it was made by us
            logger.exception("cannot divert a message of queue %r", queue)
            return
        self.unsure(str(decoded["properties"].get("delivery_tag")))
        self.write([queue], decoded, message.payload)

    # -- dead letters --------------------------------------------------------------------------

    def keep_letter(self, letter: DeadLetter, payload: bytes, death: str) -> None:
        """Keep a dead letter in Redis until JetStream is back."""
        record = {
            "letter": asdict(letter),
            "payload": base64.b64encode(payload).decode(),
            "death": death,
        }
        self.lists.keep_letter(json.dumps(record).encode())

    def forward_letters(self, session: DualSession) -> None:
        """Write the kept dead letters to JetStream; each once, whoever else does the same.

        The id is that of the death, so what two processes write at once is stored once.
        """
        try:
            for _ in range(MAX_FORWARDED):
                raw = self.lists.next_letter() if self.lists.available else None
                if raw is None:
                    return
                record = json.loads(raw)
                session.write_dead_letter(
                    DeadLetter(**record["letter"]),
                    base64.b64decode(record["payload"]),
                    record["death"],
                )
                self.lists.drop_letter(raw)
        except FallbackLost as exc:
            logger.debug("dead letters of the outage, if any, wait in Redis: %s", exc)
        except JetStreamTransportError as exc:
            logger.warning("dead letters of the outage wait in Redis: %s", exc)

    # -- the keeper ----------------------------------------------------------------------------

    def attach(self, session: Session | None = None) -> None:
        """Look after *session*, or at least for JetStream, from now on."""
        with self._lock:
            self._used_at = time.monotonic()
            if session is not None:
                self._sessions.add(session)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name="kombu-jetstream-fallback", daemon=True
                )
                self._thread.start()

    def detach(self, session: Session) -> None:
        self._sessions.discard(session)
        self._wake.set()

    def _run(self) -> None:
        lists = self.lists
        liveness = self.options.fallback_liveness_timeout / BEATS_PER_LIVENESS
        next_beat = next_probe = 0.0
        while not self._is_over():
            now = time.monotonic()
            if self.failover.is_degraded and now >= next_probe:
                self._probe()
                next_probe = time.monotonic() + PROBE_INTERVAL
            if now >= next_beat or (lists.wants_beat and lists.available):
                is_alive = self._keep(lists.beat if not lists.is_idle else lists.ping)
                next_beat = now + (liveness if is_alive else min(liveness, RETRY_INTERVAL))
            if lists.available and lists.has_waiting:
                self._keep(lambda now=now: lists.settle_waiting(now))
            until = [next_beat]
            if self.failover.is_degraded:
                until.append(next_probe)
            if lists.has_waiting:
                until.append(now + ORPHAN_INTERVAL)
            self._wake.wait(max(0.0, min(until) - time.monotonic()))
            self._wake.clear()

    def _keep(self, duty: Any) -> bool:
        try:
            duty()
        except JetStreamTransportError as exc:
            logger.debug("fallback: %s", exc)
            return False
        except Exception:
            logger.exception("fallback: a beat failed, the next one tries again")
            return False
        return True

    def _probe(self) -> None:
        connection = NatsConnection(self._settings)
        try:
            connection.connect()
            check_jetstream(connection, self.options, PROBE_TIMEOUT)
        except (ConnectionLost, ConnectionRejected, OSError) as exc:
            self.cause = str(exc)
        except Exception:
            logger.exception("fallback: a probe failed, the next one tries again")
        else:
            self.happened(Event.ANSWERED)
        finally:
            connection.close()

    def _is_over(self) -> bool:
        """End the thread when nothing is connected and nothing is held."""
        with self._lock:
            lingers = self.failover.is_degraded and time.monotonic() - self._used_at < LINGER
            if len(self._sessions) or lingers or not self.lists.is_idle:
                return False
            self._thread = None
        self._keep(self.lists.farewell)
        return True


#: One for each broker and process; see `leases.ledger_of`.
_fallbacks: dict[tuple[int, Options], Fallback] = {}
_fallbacks_lock = threading.Lock()


def fallback_of(options: Options, settings: ConnectionSettings) -> Fallback:
    """Return this process's fallback for the broker *options* names."""
    key = os.getpid(), options
    with _fallbacks_lock:
        fallback = _fallbacks.get(key)
        if fallback is None:
            for other in [other for other in _fallbacks if other[0] != key[0]]:
                del _fallbacks[other]  # inherited through a fork; the parent looks after it
            fallback = _fallbacks[key] = Fallback(options, settings)
        return fallback


def counters() -> dict[str, Any]:
    """Return what the fallbacks of this process did so far; empty without one."""
    found = [fallback for (pid, _), fallback in list(_fallbacks.items()) if pid == os.getpid()]
    if not found:
        return {}
    return {
        "state": [fallback.failover.state.value for fallback in found],
        "redis_available": all(fallback.lists.available for fallback in found),
        "failovers": sum(fallback.failover.failovers for fallback in found),
        "diverted": sum(fallback.diverted for fallback in found),
        "ambiguous": sum(fallback.ambiguous for fallback in found),
        "mirror_failures": sum(fallback.mirror_failures for fallback in found),
        "held": sum(fallback.lists.holds for fallback in found),
    }


def open_session(
    client: kombu.Connection, options: Options, settings: ConnectionSettings
) -> Session:
    """Connect to JetStream, or to Redis when JetStream stays away for ``fallback_after``.

    Raises `FallbackLost` with both causes if there is neither; `ConnectionRejected` if the server
    is there and refuses us, which no fallback may hide.
    """
    fallback = fallback_of(options, settings)
    while not fallback.failover.is_degraded:
        left = fallback.failover.patience_left(time.monotonic())
        timeout = max(MIN_CONNECT_TIMEOUT, min(settings.connect_timeout, left))
        try:
            session = DualSession(
                client, options, replace(settings, connect_timeout=timeout), fallback
            )
        except ConnectionLost as exc:
            if fallback.happened(Event.FAILED, exc) is not State.DEGRADED:
                time.sleep(RECONNECT_INTERVAL)
        else:
            fallback.happened(Event.WORKED)
            fallback.forward_letters(session)
            return session
    fallback.attach()
    return RedisSession(client, options, fallback)


class _ReadsLists(Session):
    """The part both sessions have: readers of lists in drain_events and in the event loop."""

    fallback: Fallback

    def __init__(self) -> None:
        self.readers: list[ListReader] = []

    def new_reader(self, channel: Any) -> ListReader:
        """Return a reader whose deliveries go to *channel*."""
        reader = ListReader(
            self.fallback.lists,
            arrived=channel.lists_arrived,
            pushed=channel.lists_pushed,
            watch=lambda old, new: self._watch(reader, old, new),
        )
        self.readers.append(reader)
        return reader

    def drop_reader(self, reader: ListReader) -> None:
        with self.lock:
            reader.close()
            if reader in self.readers:
                self.readers.remove(reader)

    def _watch(self, reader: ListReader, old: int | None, new: int | None) -> None:
        if self._loop is None:
            return
        if old is not None:
            self._loop.remove(old)
        if new is not None:
            self._loop.add_reader(new, self._lists_readable, reader)

    @in_loop
    def _lists_readable(self, reader: ListReader) -> None:
        with self.lock:
            reader.read()
        self._after_read()
        self._dispatch_all()

    def _read_lists(self) -> None:
        for reader in list(self.readers):
            with self.lock:
                reader.read()

    def _tick_lists(self, now: float) -> None:
        for reader in list(self.readers):
            with self.lock:
                reader.tick(now)
        self._after_read()

    def _list_fds(self) -> list[int]:
        fds = (reader.fileno() for reader in self.readers)
        return [fd for fd in fds if fd is not None]

    def _unwatch_lists(self, loop: Any) -> None:
        for fd in self._list_fds():
            loop.remove(fd)

    def _watch_lists(self, loop: Any) -> None:
        for reader in self.readers:
            fd = reader.fileno()
            if fd is not None:
                loop.add_reader(fd, self._lists_readable, reader)

    def _close_readers(self) -> None:
        for reader in list(self.readers):
            self.drop_reader(reader)


class _DualPublisher(Publisher):
    """Pipelined messages whose confirm does not come go to Redis."""

    fallback: Fallback

    def retry(self, now: float) -> None:
        late = [key for key, message in self.unconfirmed.items() if now > message.deadline]
        for key in late:
            message = self.unconfirmed.pop(key)
            self.connection.cancel(message.token)
            self.fallback.happened(Event.GAVE_UP, NoResponders(message.subject.decode()))
            self.fallback.divert(message)
        super().retry(now)


class DualSession(_ReadsLists):
    """JetStream is there, and Redis is read beside it."""

    channel_class = DualChannel

    def __init__(
        self,
        client: kombu.Connection,
        options: Options,
        settings: ConnectionSettings,
        fallback: Fallback,
    ) -> None:
        self.fallback = fallback
        #: whether the stream of copies is known to exist, see `migration`
        self.mirror_is_made = False
        _ReadsLists.__init__(self)
        Session.__init__(self, client, options, settings)
        fallback.attach(self)

    def _connect(self, settings: ConnectionSettings) -> NatsConnection:
        """Connect once: `open_session` has the patience."""
        connection = NatsConnection(settings)
        connection.connect()
        try:
            check_jetstream(connection, self.options, min(settings.connect_timeout, API_TIMEOUT))
        except BaseException:
            connection.close()
            raise
        return connection

    def _new_publisher(self) -> Publisher:
        publisher = _DualPublisher(self.nats, self.options, self._stream_missing)
        publisher.fallback = self.fallback
        return publisher

    @property
    def answer_timeout(self) -> float:
        """A frozen server may hold up nobody for longer than Redis takes to take over."""
        return min(self.options.publish_timeout, self.fallback.patience)

    def known_routes(self, exchange: str, routing_key: str) -> tuple[str, ...]:
        """Return the durable queues a message goes to, as far as is known without asking."""
        return self._lookup(exchange, routing_key)

    def _read(self) -> None:
        self.nats.read_available()
        self._read_lists()

    def _wait(self, timeout: float) -> None:
        fds = self._list_fds()
        if not fds:
            self.nats.wait(self.has_news, timeout)
            return
        self.nats.flush()
        found = self.nats.read_available()
        self._read_lists()  # also while the other has something all the time
        if found or self.has_ready():
            return
        wait_readable([self.nats.fileno(), *fds], timeout)
        self._read()

    def register(self, loop: Any) -> None:
        super().register(loop)
        self._watch_lists(loop)

    def unregister(self) -> None:
        if self._loop is not None:
            self._unwatch_lists(self._loop)
        super().unregister()

    @in_loop
    def tick(self, now: float | None = None) -> None:
        if self._closed:
            return
        super().tick(now)
        self._tick_lists(now if now is not None else time.monotonic())

    def abandon(self) -> None:
        if self._closed:
            return
        super().abandon()
        self._close_readers()
        self.fallback.detach(self)


class _LetterBox:
    """What there is of JetStream while it is away: dead letters are taken."""

    def __init__(self, fallback: Fallback) -> None:
        self._fallback = fallback

    def dead_letter(
        self,
        delivery: Delivery,
        letter: DeadLetter,
        then: Callable[[JetStreamTransportError | None], None],
    ) -> None:
        try:
            death = death_id(delivery.token, delivery.payload)
            self._fallback.keep_letter(letter, delivery.payload, death)
        except JetStreamTransportError as exc:
            then(exc)
        else:
            then(None)


class _AbsentNats:
    """The NATS connection there is none of."""

    is_open = False

    def round_trip(self, timeout: float) -> None:
        """Nothing is under way from there."""

    def cork(self) -> None:
        """Nothing is written."""


class RedisSession(_ReadsLists):
    """JetStream is away: everything goes through Redis."""

    channel_class = RedisChannel

    def __init__(self, client: kombu.Connection, options: Options, fallback: Fallback) -> None:
        _ReadsLists.__init__(self)
        fallback.lists.ping()
        self.client = client
        self.options = options
        self.fallback = fallback
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.channels = []
        self.transient = {}
        self.undecided = {}
        self.ledger = ledger_of(options)
        self._loop = None
        self._scheduled = self._closed = self._dispatching = False
        self._ready_transient = {}
        self._next_tick = time.monotonic() + TICK
        self._letter_failures = set()
        self.nats: Any = _AbsentNats()
        self.jetstream: Any = _LetterBox(fallback)
        self._divert_unconfirmed()
        fallback.attach(self)

    def _divert_unconfirmed(self) -> None:
        """Write the pipelined messages of the lost connection to Redis."""
        messages = self.ledger.take_unconfirmed()
        while messages:
            try:
                self.fallback.divert(messages[0])
            except FallbackLost:
                self.ledger.keep_unconfirmed(messages)
                raise
            del messages[0]

    #: lists have no TTLs, and what Celery's tasks say of theirs Celery looks at
    server_expires = True

    @property
    def is_current(self) -> bool:
        """Whether JetStream is still away."""
        return self.fallback.failover.is_degraded and self.pid == os.getpid()

    @property
    def connected(self) -> bool:
        return not self._closed and (
            self.is_current or any(channel.has_consumers() for channel in self.channels)
        )

    def check(self) -> None:
        """Raise `ConnectionLost` once JetStream is back: kombu connects anew."""
        if self._closed:
            raise ConnectionLost("the connection is closed")
        if not self.is_current:
            raise ConnectionLost("JetStream is back, Redis is left")

    def durable_routes(self, exchange: str, routing_key: str) -> tuple[str, ...]:
        if not exchange:
            return () if routing_key in self.transient else (routing_key,)
        kind = self.fallback.exchange_types.get(exchange, "direct")
        return self.fallback.lists.route(exchange, kind, routing_key)

    def add_transient(self, name: str, **settings: Any) -> TransientQueue:
        """Return a queue nothing ever arrives in: those are NATS subscriptions."""
        absent: Any = AbsentQueue(name, settings["auto_delete"])
        return self.transient.setdefault(name, absent)

    def transient_arrived(self, queue: TransientQueue) -> None:
        pass

    def forget_transient(self, queue: TransientQueue) -> None:
        self.transient.pop(queue.name, None)

    def end_write(self, *, hold: bool = False) -> None:
        """Nothing was collected: what Redis is told leaves at once."""

    def flush(self, timeout: float | None = None) -> None:
        """Return at once: Redis confirmed all that was written."""

    def write_dead_letter(self, letter: DeadLetter, payload: bytes, death: str) -> None:
        """Keep a dead letter in Redis until JetStream is back."""
        self.fallback.keep_letter(letter, payload, death)

    # -- reading -------------------------------------------------------------------------------

    def _read(self) -> None:
        self._read_lists()

    def _wait(self, timeout: float) -> None:
        if self.has_ready():
            return
        fds = self._list_fds()
        if fds:
            wait_readable(fds, timeout)
        else:
            time.sleep(timeout)
        self._read()

    def register(self, loop: Any) -> None:
        self._loop = loop
        self._watch_lists(loop)
        loop.call_repeatedly(TICK, self.tick)
        self.wake_loop()

    def unregister(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            self._unwatch_lists(loop)

    @in_loop
    def tick(self, now: float | None = None) -> None:
        if self._closed:
            return
        now = now if now is not None else time.monotonic()
        self._next_tick = now + TICK
        self.check()
        for channel in self.channels:
            channel.tick(now)
        self._tick_lists(now)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        if not self._closed:
            self._close_channels()
            self.abandon()

    def abandon(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.unregister()
        for channel in list(self.channels):
            channel.lose()
        self.channels.clear()
        self._close_readers()
        self.fallback.detach(self)
