"""One connection to the broker, as kombu sees it: what `Transport.establish_connection` returns.

A session owns the NATS connection and all that hangs on it: JetStream, the registry, the publisher,
the transient queues and the channels.  It reads the socket and lets the channels hand on what
arrived, one message per `drain_events` for blocking callers, all of them per tick in an event loop.

A lost session never comes back (kombu makes a new one); what it held goes to the ledger.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from . import extensions
from .connection import ConnectionSettings, Credentials, NatsConnection, Server
from .deadletter import RETRY_INTERVAL
from .errors import (
    ApiError,
    ConnectionLost,
    JetStreamTransportError,
    JetStreamUnavailable,
    NoServers,
    QueueMissing,
)
from .jetstream import STREAM_NOT_FOUND, JetStream
from .leases import SEND_DELAY, ledger_of
from .publishing import Publisher
from .registry import Registry
from .routing import is_of_control
from .transient import TransientQueue

if TYPE_CHECKING:
    from ssl import SSLContext

    import kombu

    from .channel import Channel
    from .deadletter import DeadLetter
    from .options import Options

__all__ = ["Session", "connection_settings", "in_loop", "tell_nothing"]

logger = logging.getLogger(__name__)

#: Seconds between looks at what needs no message to happen: silent pulls, retries, PINGs.
TICK = 1.0

#: Seconds between looks for queues that nobody uses any more; about, as all workers look.
SWEEP_INTERVAL = 300.0

#: Deliveries handed on in one tick of an event loop, so that nothing else starves.
MAX_PER_TICK = 256

#: Seconds between tries to reach a server that was there before.
RECONNECT_INTERVAL = 0.2

#: Seconds for which the registry's news need not be read again before routing: less than the round
#: trip in which another process changes it.
NEWS_INTERVAL = 0.0001

#: Seconds within which a route of remote control and events, whose messages seldom have a durable
#: queue, is not looked for twice by a round trip.
ROUTE_RECHECK = 1.0

#: Bytes that may wait for the next write: each wakes the server, which costs more than to write.
HELD_BYTES = 16 * 1024

#: Seconds since the last read after which an idle connection is looked at before it is used.
IDLE_LOOK = 1.0

#: Seconds for which a loss may go untold while a process is being given a task, and between looks.
HANDOVER_TIME = 0.5
HANDOVER_LOOK = 0.005

Work = TypeVar("Work", bound="Callable[..., None]")


def in_loop(work: Work) -> Work:
    """Make a method of a session one that an event loop calls.

    It raises the loss of the connection when Celery forgets nothing by it, see `pools`.
    """

    @wraps(work)
    def called(self: Session, *args: Any) -> None:
        try:
            work(self, *args)
        except ConnectionLost as exc:
            if not self.postpones(exc):
                raise

    return cast("Work", called)


def connection_settings(
    options: Options, tls: SSLContext | None, tls_name: str | None, connect_timeout: float | None
) -> ConnectionSettings:
    """Return the settings of the NATS connection that *options* describe."""
    return ConnectionSettings(
        servers=tuple(Server(host, port) for host, port in options.servers),
        credentials=Credentials(
            user=options.user,
            password=options.password,
            token=options.token,
            nkey_seed_file=options.nkey_seed_file,
            credentials_file=options.credentials_file,
        ),
        tls=tls,
        tls_hostname=tls_name,
        tls_handshake_first=options.tls_handshake_first,
        # Celery unsets it under gevent.
        connect_timeout=connect_timeout or ConnectionSettings().connect_timeout,
        ping_interval=options.ping_interval,
        inbox_prefix=options.inbox_prefix,
        name="kombu_jetstream",
    )


class Session:
    """A live broker connection."""

    #: what `Transport.create_channel` makes, None for its own class
    channel_class: type[Channel] | None = None

    #: what is written waits for the end of the event loop's tick
    is_collecting = False
    _loop_thread = 0
    _collected_at = 0.0
    _asks_later = False
    #: something was asked of the server, since this was last set to False
    has_asked = False
    #: a loss of which the event loop is not told yet, and until when that may be
    _loss: ConnectionLost | None = None
    _loss_waits_until = 0.0

    def __init__(
        self, client: kombu.Connection, options: Options, settings: ConnectionSettings
    ) -> None:
        self.client = client
        self.options = options
        #: held while state shared by the reading and another thread changes
        self.lock = threading.RLock()
        self.channels: list[Channel] = []
        self.transient: dict[str, TransientQueue] = {}
        #: auto-delete queues that may yet become transient, see `Channel.queue_declare`
        self.undecided: dict[str, dict[str, Any]] = {}
        self.ledger = ledger_of(options)
        self.nats = self._connect(settings)
        self.jetstream = JetStream(self.nats, options, self.ledger)
        self.publisher = self._new_publisher()
        self.registry = Registry(self.jetstream, self.publisher)
        self._loop: Any = None
        self._timer: Any = None
        self._scheduled = False
        self._closed = False
        self._dispatching = False
        self._ready_transient: dict[str, TransientQueue] = {}
        self._route_checked = float("-inf")
        self._next_tick = time.monotonic() + TICK
        #: why dead letters could not be stored, until one is again
        self._letter_failures: set[str] = set()
        self._streams_missing = False
        self._next_sweep = self._next_tick + SWEEP_INTERVAL * random.uniform(0.5, 1.0)
        try:
            # Now, so that a server without JetStream or with streams that are not ours is an
            # error of connecting, which kombu tries again at its pace.
            self.jetstream.provision()
        except BaseException:
            self.nats.close()
            raise
        self.ledger.attach(self.jetstream)
        if options.publish_confirms == "pipelined":
            try:
                self.publisher.resend(self.ledger.take_unconfirmed())
            except BaseException:
                self.abandon()  # the next one sends them
                raise
        _close_at_exit(self)

    def _new_publisher(self) -> Publisher:
        return Publisher(self.nats, self.options, self._stream_missing)

    def _connect(self, settings: ConnectionSettings) -> NatsConnection:
        """Connect, waiting for a server that was there a moment ago.

        A restart takes seconds, and kombu's own tries are few (a producer's) or ever further
        apart (a worker's, by 2 s each).  So for ``connect_timeout`` from its loss, a server this
        process knew is waited for; by a worker at every try.  With other URLs to fail over to,
        and for a server never seen, the first failure counts.
        """
        now = time.monotonic()
        patience = settings.connect_timeout if not self.client.alt else 0.0
        # Celery's worker asks for heartbeats on the connection it lives by.
        patient = self.client.heartbeat and self.ledger.connected_before
        end = now + patience if patient else self.ledger.lost_at + patience
        while True:
            connection = NatsConnection(
                replace(settings, servers=self.ledger.servers(settings.servers))
            )
            try:
                connection.connect()
            except NoServers:
                if time.monotonic() + RECONNECT_INTERVAL > end:
                    raise
                time.sleep(RECONNECT_INTERVAL)
            else:
                return connection

    # -- what kombu asks of a connection -------------------------------------------------------

    @property
    def answer_timeout(self) -> float:
        """Seconds a server may take for an answer that a publish waits for."""
        return self.options.publish_timeout

    @property
    def connected(self) -> bool:
        """Whether kombu may go on using this session.

        A lost one with consumers still says yes: `drain_events` must raise the loss, once, to
        whoever consumes.  Were it no, kombu would connect anew within ``drain_events`` by itself,
        and wait for ever on a connection without consumers.
        """
        if self._closed:
            return False
        for channel in self.channels:
            if channel.has_consumers():
                return True
        if self.nats.is_open and time.monotonic() - self.nats.read_at > IDLE_LOOK:
            # A producer that was idle may have been told long ago.
            with suppress(ConnectionLost):
                self.nats.read_available()
        return self.nats.is_open

    def drain_events(self, timeout: float | None = None) -> None:
        """Hand on one message, waiting at most *timeout* seconds (None: without end) for it.

        Raises `socket.timeout` if none came.
        """
        end = time.monotonic() + timeout if timeout is not None else None
        while not self.dispatch_one():
            now = time.monotonic()
            if now >= self._next_tick:
                self.tick(now)
            remaining = self._next_tick - now
            if end is not None:
                if now >= end and not self.has_ready():
                    # One look at the socket, so that timeout=0 finds what is there.
                    self._read()
                    self._after_read()
                    if self.dispatch_one():
                        return
                    raise TimeoutError("timed out")
                remaining = min(remaining, end - now)
            self._wait(max(0.0, remaining))
            self._after_read()

    def _read(self) -> None:
        """Read what is there, without waiting."""
        self.nats.read_available()

    def _wait(self, timeout: float) -> None:
        """Read until there is something to hand on or to act on, at most *timeout* seconds."""
        self.nats.wait(self.has_news, timeout)

    def has_news(self) -> bool:
        """Tell whether anything came: a message, or word that a pull is over."""
        return self.has_ready() or any(channel.dirty for channel in self.channels)

    def has_ready(self) -> bool:
        """Tell whether `dispatch_one` has something to hand on."""
        for channel in self.channels:
            if channel.ready.count:
                return True
        return bool(self._ready_transient)

    def dispatch_one(self) -> bool:
        """Hand one message to a consumer; return whether there was one."""
        for channel in self.channels:
            if channel.ready.count and channel.deliver():
                if len(self.channels) > 1:  # the channels take turns
                    self.channels.remove(channel)
                    self.channels.append(channel)
                return True
        return bool(self._ready_transient) and self._dispatch_transient()

    def _dispatch_transient(self) -> bool:
        for name, queue in list(self._ready_transient.items()):
            consumer = next(
                (
                    consumer
                    for channel in self.channels
                    for consumer in channel.consumers_of(name)
                    if consumer.no_ack or channel.has_room()
                ),
                None,
            )
            # Without a consumer, or without room, the messages wait in the queue; it becomes
            # ready again with the next consumer, settle or message.
            delivery = queue.pop() if consumer is not None else None
            if delivery is None or not len(queue):
                self._ready_transient.pop(name, None)
            elif consumer is not None:
                self._ready_transient[name] = self._ready_transient.pop(name)
            if delivery is not None and consumer is not None:
                queue.touch()
                consumer.channel.hand_on(delivery, consumer)
                return True
        return False

    # -- the event loop ------------------------------------------------------------------------

    def register(self, loop: Any) -> None:
        """Let an event loop (kombu's hub) read this connection from now on."""
        self._loop = loop
        self._loop_thread = threading.get_ident()
        loop.on_tick.add(self._end_collecting)  # the last thing before it waits
        loop.add_reader(self.nats.fileno(), self.on_readable)
        self._timer = loop.call_repeatedly(TICK, self.tick)
        self.wake_loop()

    def unregister(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None:
            return
        with suppress(ConnectionLost):
            self._end_collecting()
        loop.on_tick.discard(self._end_collecting)
        self._timer.cancel()
        try:
            loop.remove(self.nats.fileno())
        except (ConnectionLost, KeyError, ValueError, OSError, AttributeError):
            return  # closed before, or the hub was reset

    def postpones(self, loss: ConnectionLost) -> bool:
        """Tell whether the event loop hears of *loss* later: a process is being given a task."""
        if self._loop is None:
            return False
        if self._loss is None and self._is_handing_over():
            self._loss, self._loss_waits_until = loss, time.monotonic() + HANDOVER_TIME
            self._loop.call_later(HANDOVER_LOOK, self._tell_loss)
        return self._loss is not None

    def _is_handing_over(self) -> bool:
        return any(channel.is_handing_over for channel in self.channels)

    def _tell_loss(self) -> None:
        loss, loop = self._loss, self._loop
        if loss is None or loop is None:
            return
        if time.monotonic() >= self._loss_waits_until or not self._is_handing_over():
            self._loss = None
            raise loss
        loop.call_later(HANDOVER_LOOK, self._tell_loss)

    @in_loop
    def on_readable(self) -> None:
        """Read what is there and hand it all on."""
        self._dispatching = True  # right away: the loop's next tick has nothing to do for it
        try:
            self.nats.read_available()
        finally:
            self._dispatching = False
        self._dispatch_all()

    @in_loop
    def _dispatch_all(self) -> None:
        self._scheduled = False
        self._dispatching = True
        loop = self._loop if self._is_single() else None
        try:
            if loop is None:
                self._after_read()
            for _ in range(MAX_PER_TICK):
                if not self.dispatch_one():
                    if loop is not None:
                        # The loop writes to the pool at the end of its next turn: after that.
                        loop.call_soon(loop.call_soon, self._after_read)
                    else:
                        self._after_read()  # what a consumer read while it waited for a reply
                    return
        finally:
            self._dispatching = False
        self.wake_loop()

    @property
    def has_loop(self) -> bool:
        """Whether an event loop reads this connection."""
        return self._loop is not None

    def ask_later(self, delay: float) -> None:
        """Let the channels ask for more *delay* seconds later, if nothing makes them before."""
        if self._loop is not None and not self._asks_later:
            self._asks_later = True
            self._loop.call_later(delay, self._ask_now)

    def _ask_now(self) -> None:
        self._asks_later = False
        self._after_read()

    def _is_single(self) -> bool:
        """Tell whether one message came alone for a pool of processes: somebody may wait for it."""
        ready = [channel for channel in self.channels if channel.ready.count]
        return len(ready) == 1 and ready[0].ready.count == 1 and ready[0].has_processes

    def wake_loop(self) -> None:
        """Act on what arrived outside `on_readable` in the loop's next tick.

        A message may be read while something waits for a reply; no more bytes may ever come.
        """
        if self._loop is not None and not self._scheduled and not self._dispatching:
            self._scheduled = True
            self._loop.call_soon(self._dispatch_all)

    def begin_write(self, may_wait: bool) -> bool:
        """Collect what is written, to send it in one go: until `end_write`, which the caller calls.

        If it *may_wait* and this is an event loop's thread, until the end of the loop's tick; then
        there is nothing to call, and True is returned.
        """
        may_wait = may_wait and self._loop is not None
        if not (may_wait and threading.get_ident() == self._loop_thread):
            self.nats.cork()
            return False
        if not self.is_collecting:
            self.is_collecting = True
            self.nats.cork()
        return True

    def end_write(self, *, hold: bool = False) -> None:
        """Send what was collected, or *hold* it for the next write; the ledger sends it soon.

        Never raises for a lost connection: the ledger sends acknowledgements again, the reader
        notices.
        """
        try:
            if hold:
                self._hold_back()
                return
            self.nats.uncork()
            if self.is_collecting:  # others wait, this may not
                self.nats.flush()
        except ConnectionLost as exc:
            logger.debug("lost the connection in a write: %s", exc)

    def end_publish(self) -> None:
        """Send what a pipelined publish wrote, with the next ones if others are under way."""
        if len(self.publisher.unconfirmed) > 1:
            self._hold_back()
        else:
            self.nats.uncork()

    def _hold_back(self) -> None:
        """End a `cork`; what was collected waits for the next write, or for the ledger."""
        if self.nats.uncork(keep=HELD_BYTES):
            self.ledger.send_soon(self.jetstream)

    @in_loop
    def _end_collecting(self) -> None:
        if not self.is_collecting:
            return
        self.is_collecting = False
        now = time.monotonic()
        is_busy, self._collected_at = now - self._collected_at < SEND_DELAY, now
        self.has_asked = False
        try:
            self._after_read()
        finally:
            # While tasks end one after the other, some ticks' acknowledgements leave together.
            self.end_write(hold=is_busy and not self.has_asked)

    @in_loop
    def tick(self, now: float | None = None) -> None:
        """Do what no message triggers: renew silent pulls, retry, watch the server."""
        if self._closed:
            return
        now = now if now is not None else time.monotonic()
        self._next_tick = now + TICK
        # An event loop hears nothing of a socket that a failed write has closed.
        self.nats.fileno()
        self.nats.keepalive(now)
        for channel in self.channels:
            channel.tick(now)
        for queue in [queue for queue in self.transient.values() if queue.is_expired(now)]:
            self.forget_transient(queue)
        if self.publisher.unconfirmed:
            self.publisher.retry(now)
        if self._streams_missing:
            self._restore_streams()
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_INTERVAL
            self.registry.sweep()

    @in_loop
    def _after_read(self) -> None:
        if self.nats.is_open:
            denied = self.nats.denial(self.jetstream.pull_prefix)
            if denied is not None:
                raise denied  # a consumer would wait in silence
        for channel in list(self.channels):
            if channel.dirty:
                channel.after_read()

    # -- transient queues ----------------------------------------------------------------------

    def add_transient(self, name: str, **settings: Any) -> TransientQueue:
        """Return the transient queue *name* of this connection, making it if needed."""
        queue = self.transient.get(name)
        if queue is None:
            queue = self.transient[name] = TransientQueue(
                name,
                self.nats,
                self.jetstream.names,
                limit=self.options.transient_buffer,
                arrived=self.transient_arrived,
                **settings,
            )
        queue.touch()
        return queue

    def transient_arrived(self, queue: TransientQueue) -> None:
        if len(queue) and queue.consumers:
            self._ready_transient[queue.name] = queue
            self.wake_loop()

    def forget_transient(self, queue: TransientQueue) -> None:
        """Delete a transient queue and what is in it."""
        self.transient.pop(queue.name, None)
        self._ready_transient.pop(queue.name, None)
        if self.nats.is_open:
            queue.close()

    # -- routing -------------------------------------------------------------------------------

    def durable_routes(self, exchange: str, routing_key: str) -> tuple[str, ...]:
        """Return the durable queues a message goes to.

        What the registry said meanwhile is read first.  When nothing matches, one round trip
        makes sure that no news is under way; at most once a second for the exchanges of remote
        control and events.
        """
        self.registry.load()
        found = self._lookup(exchange, routing_key)
        if found and not exchange:
            return found
        now = time.monotonic()
        if now - self.nats.read_at > NEWS_INTERVAL:
            self.nats.read_available()
            found = self._lookup(exchange, routing_key)
        if found:
            return found
        if is_of_control(exchange):
            if now - self._route_checked <= ROUTE_RECHECK:
                return found
            self._route_checked = now
        self.nats.round_trip(self.answer_timeout)
        return self._lookup(exchange, routing_key)

    def _lookup(self, exchange: str, routing_key: str) -> tuple[str, ...]:
        if exchange:
            return self.registry.table.route(exchange, routing_key)
        return (routing_key,) if routing_key in self.registry.queues else ()

    def _stream_missing(self, subject: bytes) -> JetStreamTransportError | None:
        """Tell why a stream does not answer, or None if it only has no leader now."""
        if not self.nats.info.jetstream and not self.options.jetstream_domain:
            return JetStreamUnavailable(str(self.nats.server))
        if self.options.provision == "off":
            return None
        _, kind, *_rest = subject.decode().split(".")
        stream = f"{self.options.namespace}_{kind}"
        try:
            self.jetstream.request(f"STREAM.INFO.{stream}")
        except ApiError as exc:
            if exc.err_code == STREAM_NOT_FOUND:
                return ConnectionLost(f"stream {stream!r} is gone; queues are declared again")
        except QueueMissing:
            raise
        except JetStreamTransportError as exc:
            logger.debug("cannot ask for stream %r: %s", stream, exc)
        return None

    def degraded(self, feature: str) -> None:
        """Say once per process what this server cannot do and what happens instead."""
        if feature not in _told:
            _told.add(feature)
            needs, instead = _WITHOUT[feature]
            version = ".".join(map(str, self.nats.info.version))
            logger.warning("no %s here (nats-server %s; %s): %s", feature, version, needs, instead)

    @property
    def server_expires(self) -> bool:
        """Whether the server removes messages whose time is over."""
        return self.jetstream.has_ttl

    def announce_degraded(self) -> None:
        """Say what this server cannot do for those who consume; for others, when they ask."""
        if not self.jetstream.has_schedules:
            self.degraded("schedules")
        if not self.jetstream.has_ttl:
            self.degraded("message TTL")

    def dead_letter_written(self, failure: JetStreamTransportError | None) -> None:
        """Say once why dead letters cannot be stored, and once that they are again."""
        told = self._letter_failures
        if failure is None:
            if told:
                told.clear()
                logger.info("dead letters are stored again")
            return
        self._streams_missing = isinstance(failure, ConnectionLost)
        if str(failure) not in told:
            told.add(str(failure))
            logger.error(
                "dead letters cannot be stored, so their messages stay in the queue and are "
                "tried again every %g s: %s",
                RETRY_INTERVAL,
                failure,
            )

    def _restore_streams(self) -> None:
        """Make streams again that somebody deleted, as the option ``provision`` says."""
        self._streams_missing = False
        try:
            self.jetstream.provision(again=True)
        except ConnectionLost:
            raise
        except JetStreamTransportError as exc:
            logger.error("a stream is missing: %s", exc)

    def write_dead_letter(self, letter: DeadLetter, payload: bytes, death: str) -> None:
        """Store *payload* as a dead letter and wait for the confirm, as `publish_timeout` says.

        For what gives up on a message it got from another connection, or settled already;
        *death* names the death, see `deadletter.death_id`.  Raises as a publish does.
        """
        self.jetstream.provision()
        subject, headers = self.jetstream.address_dead_letter(letter, payload, death)
        self.publisher.publish(subject, payload, headers)
        extensions.dead_lettered(letter)

    # -- the end -------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every pipelined publish is confirmed; see `Publisher.flush`."""
        self.publisher.flush(timeout)

    def close(self) -> None:
        """Close in order: unconfirmed publishes are awaited, what is held is handed back."""
        if self._closed:
            return
        try:
            if self.nats.is_open:
                self._close_channels()
                self.publisher.flush()
        finally:
            self.abandon()

    def _close_channels(self) -> None:
        for channel in list(self.channels):
            channel.close()
        for queue in list(self.transient.values()):
            self.forget_transient(queue)

    def abandon(self) -> None:
        """Close without a word to the server; the ledger keeps what is held or unconfirmed."""
        if self._closed:
            return
        self._closed = True
        self.unregister()
        lost = bool(self.channels)
        try:
            # What came and nobody saw is handed back with the rest, not after its lease.
            self.nats.dispatch_received()
        except JetStreamTransportError as exc:
            logger.debug("while dispatching the rest: %s", exc)
        # First, or what is handed back goes through this connection, to its own waiting pulls.
        self.ledger.detach(self.jetstream, lost=lost or not self.nats.is_open)
        for channel in list(self.channels):
            channel.lose()
        self.channels.clear()
        self.ledger.keep_unconfirmed(self.publisher.take_unconfirmed())
        self.nats.close()


#: What a feature needs, and what happens without it; `Session.degraded` says it once.
_WITHOUT = {
    "schedules": (
        "they need 2.12, and no stream_max_bytes",
        "workers hold tasks with an eta or countdown until they are due",
    ),
    "message TTL": ("it needs 2.11", "what has expired is dropped by the worker that gets it"),
}
_told: set[str] = set()

#: Sessions to close when the interpreter exits; none in a child that leaves by ``os._exit``.
_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def tell_nothing() -> None:
    """Leave it to another process to say what the server cannot do: this one is its child."""
    _told.update(_WITHOUT)


def _close_at_exit(session: Session) -> None:
    """Close *session* when the interpreter exits, if nobody did.

    Programs often do not (Celery does not close its producers').  A broker notices the socket, but
    there are confirms to await, messages to hand back and auto-delete queues to remove.
    """
    if not _open_sessions:
        atexit.unregister(_close_sessions)
        atexit.register(_close_sessions)
    _open_sessions.add(session)


def _close_sessions() -> None:
    for session in list(_open_sessions):
        if session.nats.pid != os.getpid() or not session.connected:
            continue
        try:
            session.close()
        except JetStreamTransportError as exc:
            logger.error("while closing at exit, messages may not have been published: %s", exc)
