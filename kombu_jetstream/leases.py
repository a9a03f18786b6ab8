"""Leases: held deliveries stay ours while this process lives, and outlive their connection.

The server redelivers what is not settled within ``visibility_timeout``.  One daemon thread (a
greenlet under gevent) sends ``+WPI`` for every held delivery each third of it, buffered ones too,
so that a task may run for hours and may block the main thread.

An acknowledgement is a message to a ``$JS.ACK`` subject and may come from any connection.  So when
a connection is lost, its deliveries become *orphans*: the application may still hold the message
(a running task) and settle it later, through the next connection; a message object nobody holds
any more can never be settled, so it is handed back at once.  Acknowledgements sent shortly before
the loss may not have arrived and are sent again, which is harmless.

The ledger belongs to the process, because kombu throws connections away; a forked child starts
with an empty one.  `due` is the rule, without I/O or clock; the rest is the thread around it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .backend import Delivery
from .dropped import is_dropped, note_scheduled
from .errors import ConnectionLost, JetStreamTransportError
from .options import Options

if TYPE_CHECKING:
    from .consuming import Consuming
    from .endpoint import Server
    from .jetstream import JetStream
    from .publishing import Unconfirmed
    from .qos import QoS

__all__ = ["Ledger", "due", "ledger_of"]

logger = logging.getLogger(__name__)

#: Leases are extended this often per ``visibility_timeout``.
BEATS_PER_LEASE = 3

#: Seconds between looks at orphans, whose message objects may vanish at any time.
ORPHAN_INTERVAL = 0.2

#: Seconds for which an acknowledgement or a pipelined publish may wait for the next one, to leave
#: in one write.
SEND_DELAY = 0.005

#: Seconds for which the thread goes on to look each `SEND_DELAY`: waking it for every write that is
#: held back costs as much as the write.
ALERT_TIME = 0.5

#: Seconds between looks at idle connections, whose server expects its PINGs answered.
IDLE_INTERVAL = 10.0

#: Acknowledgements remembered, and seconds for which, in case they did not arrive.
REMEMBERED_ACKS = 4096
REMEMBERED_SECONDS = 30.0


def due(
    deliveries: Iterable[Delivery], now: float, visibility_timeout: float, limit: float | None
) -> list[Delivery]:
    """Return the deliveries whose lease must be extended at this beat.

    Those leased less than half a beat ago can wait for the next one.  *limit* (``lease_limit``,
    seconds) ends the extensions: a task that is stuck moves on.
    """
    recent = now - visibility_timeout / BEATS_PER_LEASE / 2
    return [
        delivery
        for delivery in deliveries
        if not delivery.settled
        and delivery.leased_at <= recent
        and (limit is None or now - delivery.received_at < limit)
    ]


def message_of(token: bytes) -> tuple[bytes, bytes, bytes]:
    """Return stream, sequence number and time of the message *token* settles (ADR-15).

    The time, because a stream made anew begins to count anew.
    """
    words = token.split(b".")
    at = 2 if len(words) == 9 else 4
    return (words[at], words[at + 3], words[at + 5]) if len(words) >= 9 else (token, b"", b"")


def consumer_of(token: bytes) -> bytes:
    """Return stream and consumer of the delivery *token* settles, as `JetStream.consumer_key`."""
    words = token.split(b".")
    at = 2 if len(words) == 9 else 4
    return b".".join(words[at : at + 2])


def _remember(
    acked: OrderedDict[tuple[bytes, bytes, bytes], float], token: bytes, now: float
) -> None:
    """Note that the message of *token* was acknowledged, and forget the oldest of too many."""
    message = message_of(token)
    acked[message] = now
    acked.move_to_end(message)
    while len(acked) > REMEMBERED_ACKS:
        acked.popitem(last=False)


class Ledger:
    """What this process holds of one broker, and the thread that keeps it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.pid = os.getpid()
        #: connections that may carry an outcome and when they were made, the newest last
        self._links: list[tuple[float, weakref.ref[JetStream]]] = []
        self._holders: weakref.WeakSet[QoS] = weakref.WeakSet()
        self._consuming: weakref.WeakSet[Consuming] = weakref.WeakSet()
        self._orphans: dict[bytes, Delivery] = {}
        #: outcomes that wait for a connection
        self._unsent: deque[tuple[bytes, bytes]] = deque()
        #: pipelined messages whose confirm did not come before the connection was lost
        self._unconfirmed: list[Unconfirmed] = []
        self._acks: deque[tuple[float, int, bytes]] = deque(maxlen=REMEMBERED_ACKS)
        #: the same by message, and those that are not in it yet: read only for a redelivery
        self._acked: OrderedDict[tuple[bytes, bytes, bytes], float] = OrderedDict()
        self._acks_unread: deque[tuple[float, bytes]] = deque(maxlen=REMEMBERED_ACKS)
        #: messages acknowledged across a loss, and when; a killed server may not know
        self._acked_across: OrderedDict[tuple[bytes, bytes, bytes], float] = OrderedDict()
        #: monotonic time of the last loss of a connection, and whether there ever was one
        self.lost_at = float("-inf")
        self.connected_before = False
        #: servers the cluster made known, and the one that was lost last
        self._servers: dict[tuple[str, int], Server] = {}
        self._lost_server: Server | None = None
        #: differences of streams that were told already, by name and field
        self.told: set[tuple[str, str]] = set()
        #: connections that hold something back, and when it is to leave
        self._holding: dict[JetStream, None] = {}
        self._send_at = float("inf")
        #: until when the thread looks often
        self._alert_until = float("-inf")
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    # -- what the connections and channels tell ------------------------------------------------

    def attach(self, link: JetStream) -> None:
        """Take a new connection: send through it what waits, and look after its deliveries."""
        with self._lock:
            self._links.append((time.monotonic(), weakref.ref(link)))
            self.connected_before = True
        self._settle_orphans(time.monotonic(), fresh=True)
        self._start()

    def detach(self, link: JetStream, *, lost: bool) -> None:
        """Forget a connection.  *lost*: its last acknowledgements may not have arrived."""
        with self._lock:
            self._links = [entry for entry in self._links if entry[1]() not in (link, None)]
            self._servers.update(
                ((server.host, server.port), server)
                for server in link.connection.discovered_servers
            )
            if lost:
                self.lost_at = time.monotonic()
                self._lost_server = link.connection.server
                since = time.monotonic() - REMEMBERED_SECONDS
                for at, taker, token in self._acks:
                    if at > since and taker == id(link):
                        self._unsent.append((token, b"+ACK"))
                        self._note_across(token)

    def servers(self, configured: tuple[Server, ...]) -> tuple[Server, ...]:
        """Return where to connect: as *configured*, then what the cluster made known.

        The server that was lost last comes last: it may hang instead of refusing.
        """
        with self._lock:
            known = {(server.host, server.port): server for server in configured}
            for address, server in self._servers.items():
                known.setdefault(address, server)
            lost = self._lost_server
        return tuple(sorted(known.values(), key=lambda server: server == lost))

    def hold(self, holder: QoS) -> None:
        """Extend the leases of what *holder* holds, as long as it exists."""
        with self._lock:
            self._holders.add(holder)

    def release(self, holder: QoS) -> None:
        with self._lock:
            self._holders.discard(holder)

    def _held(self) -> list[Delivery]:
        """Return what the channels of this process hold."""
        with self._lock:
            holders = list(self._holders)
        return [delivery for holder in holders for delivery in holder.deliveries()]

    def note_consuming(self, channel: Consuming) -> None:
        """Remember that *channel* consumes, as long as it exists."""
        with self._lock:
            self._consuming.add(channel)

    def is_waited_for(self, queue: str, now: float) -> bool:
        """Tell whether a channel of this process is where the next message of *queue* comes to,
        and there is none now."""
        with self._lock:
            channels = list(self._consuming)
        return any(channel.is_waiting_for(queue, now) for channel in channels)

    def adopt(self, deliveries: Iterable[Delivery]) -> None:
        """Take over the deliveries of a lost connection."""
        held = [delivery for delivery in deliveries if not delivery.settled]
        note_scheduled(held)
        with self._lock:
            self._orphans.update((delivery.token, delivery) for delivery in held)
        self._wake.set()

    def keep_unconfirmed(self, messages: list[Unconfirmed]) -> None:
        """Keep pipelined messages of a lost connection for the next one to send again."""
        with self._lock:
            self._unconfirmed.extend(messages)

    def take_unconfirmed(self) -> list[Unconfirmed]:
        with self._lock:
            messages, self._unconfirmed = self._unconfirmed, []
        return messages

    def note_ack(self, link: JetStream, token: bytes) -> None:
        """Remember an acknowledgement that *link* took, but may not have carried."""
        now = time.monotonic()
        self._acks.append((now, id(link), token))
        self._acks_unread.append((now, token))

    def send_soon(self, link: JetStream) -> None:
        """Send what *link* holds back within two `SEND_DELAY`, if it does not do so by itself."""
        if link in self._holding:
            return
        now = time.monotonic()
        with self._lock:
            self._holding[link] = None
            self._send_at = min(self._send_at, now + SEND_DELAY)
            is_alert = now + SEND_DELAY < self._alert_until
            self._alert_until = now + ALERT_TIME
        if not is_alert:
            self._wake.set()

    def _send_held(self) -> None:
        with self._lock:
            holding, self._holding = self._holding, {}
            self._send_at = float("inf")
        for link in holding:
            try:
                link.connection.flush()
            except JetStreamTransportError as exc:
                logger.debug("a connection was lost with something held back: %s", exc)

    def forward(self, link: JetStream, token: bytes, payload: bytes) -> None:
        """Send an outcome that *link* did not take through a later connection.

        If the loss of *link* is news, not through one from before: whatever broke this one may
        have broken them, too, and they take a message before they notice.
        """
        with self._lock:
            is_news = any(ref() is link for _, ref in self._links)
            if is_news and not link.connection.is_open:
                self.lost_at = time.monotonic()
            self._orphans.pop(token, None)
            self._unsent.append((token, payload))
            if payload == b"+ACK":
                self._note_across(token)
        self._flush()

    def _note_across(self, token: bytes) -> None:
        """Remember an acknowledgement whose connection was lost before it; the lock is held."""
        _remember(self._acked_across, token, time.monotonic())

    def _was_acked(self, message: tuple[bytes, bytes, bytes]) -> bool:
        """Tell whether a message was acknowledged lately; the lock is held."""
        while self._acks_unread:
            at, token = self._acks_unread.popleft()
            _remember(self._acked, token, at)
        at = self._acked.get(message, float("-inf"))
        return message in self._acked_across or at > time.monotonic() - REMEMBERED_SECONDS

    # -- the beat ------------------------------------------------------------------------------

    def beat(self, now: float) -> None:
        """Extend every lease that is due; called by the thread, and by tests."""
        self._settle_orphans(now)
        self._read_neglected()
        options = self.options
        for delivery in due(self._held(), now, options.visibility_timeout, options.lease_limit):
            delivery.leased_at = now
            delivery.settler.settle(delivery, "progress")

    def _settle_orphans(self, now: float, *, fresh: bool = False) -> None:
        """Hand back orphans nobody holds, extend the others; with a *fresh* connection at once."""
        with self._lock:
            if not self._orphans and not self._unsent:
                return
            for token, delivery in list(self._orphans.items()):
                if delivery.settled:
                    del self._orphans[token]
                elif is_dropped(delivery):
                    del self._orphans[token]
                    self._unsent.append((token, b"-NAK"))
            extend = due(
                self._orphans.values(),
                now + (self.options.visibility_timeout if fresh else 0),
                self.options.visibility_timeout,
                self.options.lease_limit,
            )
        link = self._live_link()
        if link is None:
            return
        try:
            with link.connection.corked():
                for delivery in extend:
                    link.connection.publish(delivery.token, b"+WPI")
                    delivery.leased_at = now
        except ConnectionLost:
            return
        self._flush()

    def _flush(self) -> None:
        """Send the outcomes that wait, if there is a connection."""
        link = self._live_link()
        if link is None:
            return
        with self._lock:
            sent = list(self._unsent)
            handed_back = {
                consumer_of(token)
                for token, payload in sent
                if payload.startswith(b"-NAK") and token.startswith(b"$JS.ACK.")
            }
            try:
                link.drop_withdrawn(handed_back)
                with link.connection.corked():
                    for token, payload in sent:
                        link.connection.publish(token, payload)
            except ConnectionLost:
                logger.debug("lost the connection with %d outcomes unsent", len(sent))
                return
            for token, payload in sent:
                self._unsent.popleft()
                if payload == b"+ACK":
                    self.note_ack(link, token)

    def _live_link(self) -> JetStream | None:
        """Return the newest connection, if it was made after the last loss of one."""
        with self._lock:
            for attached_at, ref in reversed(self._links):
                link = ref()
                if link is not None and link.connection.is_open and attached_at >= self.lost_at:
                    return link
        return None

    # -- the thread ----------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._run, name="kombu-jetstream-leases", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        beat_interval = self.options.visibility_timeout / BEATS_PER_LEASE
        next_beat = time.monotonic() + beat_interval
        next_idle = time.monotonic() + IDLE_INTERVAL
        while True:
            now = time.monotonic()
            wait = min(next_beat, next_idle, self._send_at) - now
            if now < self._alert_until:
                wait = min(wait, SEND_DELAY)
            if self._orphans or self._unsent:
                wait = min(wait, ORPHAN_INTERVAL)
            self._wake.wait(max(wait, 0.0))
            self._wake.clear()
            now = time.monotonic()
            try:
                if now >= self._send_at:
                    self._send_held()
                if now >= next_beat:
                    next_beat = now + beat_interval
                    self.beat(now)
                else:
                    self._settle_orphans(now)
                if now >= next_idle:
                    next_idle = now + IDLE_INTERVAL
                    self._serve_idle(now)
            except JetStreamTransportError as exc:
                logger.debug("leases: %s", exc)
            except Exception:
                logger.exception("leases: a beat failed, the next one tries again")
            if self._is_over():
                return

    def _read_neglected(self) -> None:
        """Take in what a blocked main thread (solo pool) leaves in the socket.

        Its lease runs since the server sent it, and cannot be extended before it is read.
        """
        for _, ref in list(self._links):
            link = ref()
            if link is None or not link.connection.is_open:
                continue
            try:
                link.connection.read_neglected()
            except JetStreamTransportError as exc:
                logger.debug("a connection was lost while nobody read it: %s", exc)

    @property
    def is_wary(self) -> bool:
        """Whether a first delivery may be none, either: after the loss of a connection.

        A server that is killed forgets what it delivered in its last moments.
        """
        across = self._acked_across
        if across and time.monotonic() - across[next(reversed(across))] > self._wary_for:
            across.clear()
        return bool(across or self._orphans)

    @property
    def _wary_for(self) -> float:
        return 2 * self.options.visibility_timeout + REMEMBERED_SECONDS

    def held_again(self, token: bytes) -> bool:
        """Tell whether a message is one this process holds, and hold it by *token*.

        The server gave it up while the process was stopped or too busy to read, or forgot that it
        had delivered it.  One that was acknowledged meanwhile is acknowledged again: it had left
        the server before the acknowledgement came there.
        """
        message = message_of(token)
        with self._lock:
            if self._was_acked(message):
                self._unsent.append((token, b"+ACK"))
                self._wake.set()
                return True
        for delivery in self._held():
            if not delivery.settled and message_of(delivery.token) == message:
                if self._moves_on(delivery):
                    return False
                delivery.token = token
                return True
        with self._lock:
            for known, delivery in list(self._orphans.items()):
                if not delivery.settled and message_of(known) == message:
                    if self._moves_on(delivery):
                        return False
                    del self._orphans[known]
                    delivery.token = token
                    self._orphans[token] = delivery
                    return True
        return False

    def _moves_on(self, delivery: Delivery) -> bool:
        """Tell whether a delivery was held for so long that its message is for somebody else."""
        limit = self.options.lease_limit
        return limit is not None and time.monotonic() - delivery.received_at >= limit

    def _serve_idle(self, now: float) -> None:
        """Answer the PINGs of connections whose owner is busy or idle."""
        for _, ref in list(self._links):
            link = ref()
            if link is None or not link.connection.is_open:
                continue
            try:
                link.connection.keepalive(now)
            except JetStreamTransportError as exc:
                logger.debug("an idle connection was lost: %s", exc)

    def _is_over(self) -> bool:
        """End the thread when nothing is connected and nothing is held."""
        with self._lock:
            self._links = [entry for entry in self._links if entry[1]() is not None]
            if self._links or self._orphans or self._unsent:
                return False
            self._thread = None
            return True


#: One ledger per broker and process.  It cannot hang on a kombu connection, which is thrown away
#: at each reconnect, nor on a transport, for the same reason.
_ledgers: dict[tuple[int, Options], Ledger] = {}
_ledgers_lock = threading.Lock()


def ledger_of(options: Options) -> Ledger:
    """Return this process's ledger for the broker *options* names."""
    key = os.getpid(), options
    with _ledgers_lock:
        ledger = _ledgers.get(key)
        if ledger is None:
            for other in [other for other in _ledgers if other[0] != key[0]]:
                del _ledgers[other]  # inherited through a fork; the parent looks after it
            ledger = _ledgers[key] = Ledger(options)
        return ledger
