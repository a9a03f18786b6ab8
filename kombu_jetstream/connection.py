"""One connection to a NATS server: synchronous, over one non-blocking socket.

What a caller must know:

1. **Handlers run in the thread that happens to read**: inside `wait`, `request` and
   `read_available`, and inside a `publish` that finds the socket full.  They note what came and
   return; one that blocks holds up every other waiter.
2. **Any thread may write.**  A command is sent whole, or the connection is lost.
3. **There is no reconnect.**  After a failure every use raises the first error again, and the
   caller makes a new `NatsConnection`.

How it works:

- ``_lock`` guards the socket, the bytes to be written and the parser; it is never held while
  waiting or while a handler runs.  (An `SSLSocket` must not be used by two threads at once.)
- A signal handler or a finaliser may come in the middle of all that, in the same thread.  What it
  writes is sent by the call it interrupted.  When it raises (Celery's soft time limit does) in the
  middle of a socket call the connection is lost, as nobody knows how far that got.
- ``_reader`` is a role.  Its holder alone polls for reading, reads and dispatches, so that what
  came keeps its order; the others who `wait` sleep until ``_turns`` moves, then look again.
- ``_writer`` is the thread that waits for room in a full socket.  One is enough, and eventlet
  allows one waiter for each direction of a socket.
- gevent and eventlet replace `socket`, `select` and `threading` after this was imported, so all
  three are used by their module's name, at the time of use.
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import os
import re
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Final, TypeAlias

from . import protocol
from .endpoint import (
    BLOCKED,
    ConnectionSettings,
    Credentials,
    Server,
    certificate_error,
    dial,
    encrypt,
    poll_socket,
)
from .errors import (
    AuthenticationFailed,
    ConnectionLost,
    ConnectionRejected,
    MessageTooLarge,
    NoResponders,
    NoServers,
    PermissionDenied,
    ProtocolError,
    RequestTimeout,
    TLSNotOffered,
)
from .protocol import Err, Info, Msg, Signal

__all__ = ["ConnectionSettings", "Credentials", "NatsConnection", "Server"]

logger = logging.getLogger(__name__)

#: Bytes asked of the socket at once.
READ_BYTES: Final = 64 * 1024

#: Bytes that collect while corked, and that other threads may leave to the one that waits for
#: room in the socket.
CORK_BYTES: Final = 64 * 1024

#: Pings without an answer after which the server counts as dead.
MAX_PINGS_OUT: Final = 2

#: Denied subjects that are kept for `NatsConnection.check`.
MAX_DENIALS: Final = 16

#: Seconds a wait looks at the socket again and again before it sleeps.
SPIN: Final = 100e-6

#: Waits in a row that may do so in vain, and the first one of how many tries it again then.
SPIN_TRUST: Final = 4
SPIN_TRIAL: Final = 64

_CORES: Final = os.cpu_count()

NO_RESPONDERS: Final = 503

_DENIED: Final = re.compile(
    r'permissions violation for (publish|subscription)[^"]*"([^"]*)"', re.IGNORECASE
)

#: The other errors after which the server goes on; all the rest are its last words (client.go).
_HARMLESS: Final = re.compile(
    r"permissions violation|maximum subscriptions exceeded|invalid (publish )?subject",
    re.IGNORECASE,
)

_LOGIN: Final = re.compile(r"authorization|authentication", re.IGNORECASE)

Handler: TypeAlias = Callable[[Msg], None]
ReplyHandler: TypeAlias = "Callable[[Msg | PermissionDenied], None]"


class NatsConnection:
    """A client of one NATS server; the head of this module has the rules."""

    def __init__(
        self,
        settings: ConnectionSettings,
        *,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self.settings = settings
        #: Gets every error of the server that left the connection open, in the reading thread;
        #: they are logged without it.
        self.on_error = on_error
        #: The process that may use this connection.
        self.pid = os.getpid()
        self.server: Server | None = None
        self.info = Info()
        #: Bytes that headers and payload of one message may have together.
        self.max_payload = self.info.max_payload
        self._inbox = f"{settings.inbox_prefix}.{os.urandom(11).hex()}".encode()
        self._reset()

    def _reset(self) -> None:
        """Begin from nothing, as for each server that is tried."""
        _connections.add(self)
        self._make_locks()
        self._sock: socket.socket | None = None
        self._failure: ConnectionLost | ConnectionRejected | None = None
        self._is_accepted = False
        self._parser = protocol.Parser()
        self._events: deque[protocol.Event] = deque()
        self._out = bytearray()
        self._corks = 0
        self._is_kept = False  # what is in _out waits for the next write
        self._pings: deque[Callable[[], None]] = deque()  # what each PONG to come is for
        self._handlers: dict[int, Handler] = {}
        self._subjects: dict[int, bytes] = {}
        self._sids = itertools.count(1)
        self._tokens = itertools.count(1)
        self._inbox_sid = 0
        self._requests: dict[bytes, tuple[bytes, ReplyHandler]] = {}
        self._denials: deque[PermissionDenied] = deque(maxlen=MAX_DENIALS)
        self._heard = True
        self._reads = self._reads_seen = 0
        self._waits = self._spins_left = 0
        #: Monotonic time of the last look at the socket.
        self.read_at = 0.0
        self._ping_due = 0.0
        self._pings_out = 0

    def _make_locks(self) -> None:
        self._lock = threading.RLock()
        self._is_sending = self._is_receiving = False
        self._changed = threading.Condition(self._lock)
        self._reader = threading.RLock()
        self._writer: int | None = None
        self._turns = self._sleepers = self._pollers = 0

    # What it is

    @property
    def is_open(self) -> bool:
        """Whether the connection can be used, as far as is known without trying."""
        return self._is_accepted and self._failure is None  # set in a forked child, too

    @property
    def discovered_servers(self) -> tuple[Server, ...]:
        """The servers of the settings, and those the cluster has made known by now."""
        here = self.server
        known = {(server.host, server.port): server for server in self.settings.servers}
        for url in self.info.connect_urls if here is not None else ():
            assert here is not None
            with suppress(ValueError):
                server = Server.parse(url, tls=here.tls)
                if _is_address(server.host) and not _is_address(here.host):
                    server = replace(server, tls_name=here.tls_name or here.host)
                known.setdefault((server.host, server.port), server)
        return tuple(known.values())

    def fileno(self) -> int:
        """Return the socket's descriptor for an event loop, which calls `read_available`."""
        return self._usable().fileno()

    def check(self) -> None:
        """Raise the failure of the connection, or the oldest denied subject not raised yet."""
        self._usable()
        if self._denials:
            raise self._denials.popleft()

    def denial(self, prefix: bytes) -> PermissionDenied | None:
        """Return, once, that this user may not publish to a subject that begins with *prefix*.

        For what is published without being a request; a request gets it as its answer.
        """
        if not self._denials:
            return None
        for error in list(self._denials):
            # The server may spell the subject in lower case.
            is_it = error.subject.lower().startswith(prefix.decode().lower())
            if is_it and error.operation == "publish":
                self._denials.remove(error)
                return error
        return None

    def _usable(self) -> socket.socket:
        """Return the socket, or raise why there is none."""
        if self._failure is not None:  # in a forked child, too: `_leave_all_to_parent`
            raise self._failure.with_traceback(None)
        if self._sock is None:
            raise ConnectionLost("not connected, call connect() first")
        return self._sock

    # Connecting

    def connect(self) -> None:
        """Connect to the first of the settings' servers that lets us in.

        Raises `AuthenticationFailed`, `TLSNotOffered` or `CertificateRejected` when each of them
        gave that, else `NoServers` with the cause for each.
        """
        if self._sock is not None:
            self._usable()
            raise RuntimeError(f"already connected to {self.server}")
        causes: list[tuple[str, Exception]] = []
        for server in self.settings.servers:
            try:
                self._connect_to(server)
            except (ConnectionLost, ConnectionRejected, OSError) as exc:
                causes.append((str(server), exc))
            else:
                logger.debug(
                    "connected to %s, nats-server %s", server, self.info.raw.get("version")
                )
                return
        first = causes[0][1] if causes else None
        if isinstance(first, ConnectionRejected) and len({type(exc) for _, exc in causes}) == 1:
            raise first
        raise NoServers(causes) from first

    def _connect_to(self, server: Server) -> None:
        settings = self.settings
        context = settings.tls_context(server)
        deadline = time.monotonic() + settings.connect_timeout
        self._reset()
        self.pid, self.server, self.info = os.getpid(), server, Info()
        self._sock = dial(server, deadline)
        try:
            if context is not None and settings.tls_handshake_first:
                self._sock = encrypt(self._sock, server, context, settings, deadline)
            self._expect("INFO", lambda: bool(self.info.raw), deadline)
            if context is not None and not settings.tls_handshake_first:
                if not (self.info.tls_required or self.info.tls_available):
                    raise TLSNotOffered(str(server))
                if self._parser.buffered:
                    raise ProtocolError("expected nothing between INFO and the TLS handshake")
                self._sock = encrypt(self._sock, server, context, settings, deadline)
            elif context is None and self.info.tls_required:
                raise ConnectionLost(
                    f"server {server} demands TLS; use jetstreams:// or broker_use_ssl"
                )
            self._write(protocol.encode_connect(self._connect_options(server, context is not None)))
            self._ping(self._accept)
            self._expect("PONG", lambda: self._is_accepted, deadline)
        except BaseException:
            self._sock.close()
            self._sock = None
            raise

    def _connect_options(self, server: Server, is_secure: bool) -> dict[str, object]:
        return {
            "verbose": False,
            "pedantic": False,
            "lang": "python-kombu-jetstream",
            "version": _version(),
            "protocol": 1,  # the server may send INFO again
            "headers": True,
            "no_responders": True,
            "echo": True,
            "name": self.settings.name,
            "tls_required": is_secure,
            **self.settings.credentials.connect_options(server, self.info.nonce),
        }

    def _accept(self) -> None:
        self._is_accepted = True

    def _expect(self, what: str, ready: Callable[[], bool], deadline: float) -> None:
        """Wait for a part of the handshake."""
        if not self.wait(ready, max(0.0, deadline - time.monotonic())):
            hint = ""
            if what == "INFO" and not self.settings.tls_handshake_first:
                hint = "; one that begins with TLS needs tls_handshake_first"
            raise ConnectionLost(
                f"expected {what} from server {self.server} within "
                f"{self.settings.connect_timeout:g} s, nothing came{hint}"
            )

    # Subscriptions and messages

    def subscribe(self, subject: bytes, handler: Handler, queue: bytes = b"") -> int:
        """Give *handler* each message for *subject*; return the subscription's number.

        A subject this user may not read raises `PermissionDenied` from the next `wait`,
        `round_trip` or `check`.
        """
        if not protocol.is_subscription_subject(subject):
            raise ValueError(f"expected a subject to subscribe to, got {subject!r}")
        sid = next(self._sids)
        self._handlers[sid], self._subjects[sid] = handler, subject
        self._write(protocol.encode_sub(subject, sid, queue))
        return sid

    def unsubscribe(self, sid: int) -> None:
        """End a subscription; what the server sent before it knew still reaches the handler."""
        if sid in self._handlers:
            self._write(protocol.encode_unsub(sid))
            self._ping(partial(self._forget, sid))

    def _forget(self, sid: int) -> None:
        self._handlers.pop(sid, None)
        self._subjects.pop(sid, None)

    def publish(
        self, subject: bytes, payload: bytes, reply: bytes = b"", headers: bytes = b""
    ) -> None:
        """Send a message; nobody says whether it arrived.

        MessageTooLarge if headers and payload exceed `max_payload`, before anything is sent: the
        server would close the connection.
        """
        if len(headers) + len(payload) > self.max_payload:
            raise MessageTooLarge(len(headers) + len(payload), self.max_payload)
        if not protocol.is_publish_subject(subject):
            raise ValueError(f"expected a subject to publish to, got {subject!r}")
        self._write(protocol.encode_pub(subject, payload, reply, headers))

    def write(self, raw: bytes) -> None:
        """Send whole commands, as `protocol` encodes them; they are not checked."""
        self._write(raw)

    # Requests

    def new_inbox(self) -> bytes:
        """Return a subject of our own, to subscribe to."""
        return b"%b.%d.in" % (self._inbox, next(self._tokens))

    def request(
        self, subject: bytes, payload: bytes = b"", headers: bytes = b"", *, timeout: float
    ) -> Msg:
        """Send a message and return the answer.

        Raises `NoResponders`, `PermissionDenied`, `RequestTimeout` after *timeout* seconds.
        """
        answers: list[Msg | PermissionDenied] = []
        token = self.request_nowait(subject, payload, headers, answers.append)
        try:
            if not self.wait(lambda: bool(answers), timeout):
                raise RequestTimeout(subject.decode(), timeout)
        finally:
            self.cancel(token)
        answer = answers[0]
        if isinstance(answer, PermissionDenied):
            raise answer
        if not answer.payload and protocol.status_code(answer.headers) == NO_RESPONDERS:
            raise NoResponders(subject.decode())
        return answer

    def request_nowait(
        self, subject: bytes, payload: bytes, headers: bytes, callback: ReplyHandler
    ) -> bytes:
        """Send a message; *callback* gets its answer, once, in the reading thread.

        An answer is a `Msg`, with status 503 when nobody listens, or `PermissionDenied`.  None
        comes when the connection is lost first.  Returns a token for `cancel`.
        """
        if not self._inbox_sid:
            self._subscribe_inbox()
        token = b"%d" % next(self._tokens)
        self._requests[token] = subject, callback
        try:
            self.publish(subject, payload, b"%b.%b" % (self._inbox, token), headers)
        except BaseException:
            self.cancel(token)
            raise
        return token

    def cancel(self, token: bytes) -> None:
        """Forget a request; its callback is not called any more."""
        self._requests.pop(token, None)

    def _subscribe_inbox(self) -> None:
        with self._lock:
            if self._inbox_sid:
                return
            sid = self._inbox_sid = next(self._sids)
            self._handlers[sid], self._subjects[sid] = self._on_reply, self._inbox + b".*"
            self._out += protocol.encode_sub(self._subjects[sid], sid)

    def _on_reply(self, msg: Msg) -> None:
        request = self._requests.pop(msg.subject[len(self._inbox) + 1 :], None)
        if request is not None:
            request[1](msg)

    def _refuse(self, error: PermissionDenied, subject: bytes | None = None) -> bool:
        """Answer the requests on *subject*, or all, with *error*; return whether any waited."""
        waiting = [
            (token, callback)
            for token, (requested, callback) in list(self._requests.items())
            if subject is None or requested.lower() == subject
        ]
        for token, callback in waiting:
            self.cancel(token)
            callback(error)
        return bool(waiting)

    # Writing

    def cork(self) -> None:
        """Collect what is written until `uncork`, up to 64 KiB; calls nest."""
        with self._lock:
            self._corks += 1

    def uncork(self, *, keep: int = 0) -> bool:
        """End a `cork`; the last one sends what was collected.

        Up to *keep* bytes of it stay for whatever is written next, `flush` or `wait`; True is
        returned if there are any.  A read does not send them.
        Does not raise for a connection that was lost before: the next use does.
        """
        with self._lock:
            self._corks -= 1
            if self._corks or not self._out or self._failure is not None:
                return False
            if len(self._out) <= keep:
                self._is_kept = True
                return True
            if self._send():
                return False
        self._wait_for_room()
        return False

    @contextmanager
    def corked(self) -> Iterator[None]:
        """Collect what is written in the block, and send it at the end."""
        self.cork()
        try:
            yield
        finally:
            self.uncork()

    def flush(self) -> None:
        """Hand everything written to the kernel, corked or not."""
        with self._lock:
            if self._send():
                return
        self._wait_for_room()

    def _write(self, raw: bytes, on_pong: Callable[[], None] | None = None) -> None:
        with self._lock:
            if self._failure is not None or self._sock is None:
                self._usable()
            self._out += raw
            if on_pong is not None:
                self._pings.append(on_pong)  # under the lock, in the order of the PINGs
            if (self._corks and len(self._out) <= CORK_BYTES) or self._send():
                return
        self._wait_for_room()

    def _ping(self, on_pong: Callable[[], None]) -> None:
        """Have *on_pong* called when the server has dealt with all that was sent before."""
        self._write(protocol.CMD_PING, on_pong)

    def _send(self) -> bool:
        """Write what the socket takes; return whether that was all.  The lock is held."""
        sock, out = self._usable(), self._out
        if self._is_sending:
            return True  # the call we interrupted sends this too
        self._is_kept = False
        try:
            self._is_sending = True
            while out:
                # OpenSSL must see what it could not send again, with more behind it or not:
                # `out` grows at its end only.
                sent = sock.send(out)
                if not sent:  # gevent's SSLSocket does not raise
                    return False
                del out[:sent]
        except BLOCKED:
            return False
        except OSError as exc:
            # What the server said before it closed tells more than EPIPE does.
            more, lost = True, None
            while more:
                more, lost = self._receive()
            self._fail(lost if lost is not None else self._explain(exc))
            self._usable()
        except BaseException:
            self._fail(ConnectionLost("interrupted while writing, nobody knows how far"))
            raise
        finally:
            self._is_sending = False
        return True

    def _wait_for_room(self) -> None:
        """Wait until the socket took all there is to write, and read meanwhile.

        A peer may stop to read from who does not read.
        """
        me = threading.get_ident()
        deadline, before = 0.0, -1
        while True:
            with self._lock:
                done = self._send()
                left, now = len(self._out), time.monotonic()
                if left != before:
                    deadline, before = now + self.settings.write_timeout, left
                if self._writer in (None, me):
                    self._writer = None if done else me
                elif left <= CORK_BYTES:
                    return  # that thread sends it
                if done:
                    return
                if now >= deadline:
                    self._writer = None
                    timeout = self.settings.write_timeout
                    self._fail(ConnectionLost(f"{self.server} took no byte for {timeout:g} s"))
                    self._usable()
                if self._writer != me:
                    self._sleep(deadline - now)
                    continue
            try:
                if self._reader.acquire(blocking=False):
                    self._lead(deadline - now, writing=True)
                else:
                    self._poll(deadline - now, reading=False, writing=True)
            finally:
                with self._lock:
                    self._writer = None
                    self._next_turn()

    # Reading

    def read_available(self) -> bool:
        """Read and dispatch what is there, without waiting; return whether there was anything.

        ConnectionLost when the server closed the connection, after what it had sent before.
        While another thread reads, that one dispatches, and this returns False.
        """
        return self._reader.acquire(blocking=False) and self._lead(0.0)

    def wait(self, ready: Callable[[], bool], timeout: float | None) -> bool:
        """Read and dispatch until *ready*, at most *timeout* seconds; return whether it is.

        *ready* is asked at the beginning and whenever something was dispatched, not in between.
        Raises ConnectionLost, and PermissionDenied for a subscription the server refused.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._out:
            self.flush()
        left, is_last = None, False
        while True:
            turns = self._turns
            if ready():
                return True
            if self._failure is not None:
                self._usable()
            if self._denials:
                self._raise_denied_subscription()
            if is_last:
                return False
            if deadline is not None:
                left = max(0.0, deadline - time.monotonic())
                is_last = left == 0.0
            if self._reader.acquire(blocking=False):
                self._lead(left, turns)
            else:
                with self._lock:
                    if self._turns == turns:
                        self._sleep(left)

    def dispatch_received(self) -> None:
        """Dispatch what came before the connection was lost and nobody was told of yet.

        A write may have found the loss, and read what the server had sent until then.
        """
        if self._reader.acquire(blocking=False):
            try:
                self._dispatch()
            finally:
                self._reader.release()

    def round_trip(self, timeout: float) -> None:
        """Return when the server has dealt with all that was sent before.

        RequestTimeout after *timeout* seconds; PermissionDenied for a subject it refused.
        """
        answers: list[bool] = []
        self._ping(partial(answers.append, True))
        if not self.wait(lambda: bool(answers), timeout):
            raise RequestTimeout("PING", timeout)
        self.check()

    def keepalive(self, now: float) -> None:
        """Ping a server that was silent for `ping_interval`; ConnectionLost when it is dead.

        Call it from time to time, from any thread, with a clock that does not jump.  It reads
        only while the server is silent, so that it takes no message from who waits for them.
        """
        if self._heard:
            self._heard, self._pings_out = False, 0
        elif now < self._ping_due or self.read_available():
            return
        elif self._pings_out < MAX_PINGS_OUT:
            self._pings_out += 1
            self._ping(_nothing)
        else:
            with self._lock:
                self._fail(ConnectionLost(f"{self.server} left {self._pings_out} pings unanswered"))
            self._usable()
        self._ping_due = now + self.settings.ping_interval

    def read_neglected(self) -> None:
        """Read what is there if nobody did since the last call: its reader does something long.

        Call it from time to time, from another thread than the one that reads.
        """
        if self._reads == self._reads_seen and self.read_available():
            # It may wait in an event loop by now, for bytes that are read: the PONG wakes it.
            self._ping(_nothing)
        self._reads_seen = self._reads

    def _lead(self, timeout: float | None, turns: int | None = None, writing: bool = False) -> bool:
        """Wait once for the socket, read and dispatch; return whether anything came.

        The caller has taken the reader's role, which ends here.  *turns* is the one the caller
        looked at last: after a later one it should look again before it waits.
        """
        try:
            if turns is not None and turns != self._turns:
                return False
            if self._events:  # a handler raised, or waits itself
                return self._dispatch()
            if timeout != 0:
                if not writing and self._spin():
                    return True
                if not self._poll(timeout, reading=True, writing=writing):
                    return False
            return self._read()
        finally:
            self._reader.release()
            with self._lock:
                self._next_turn()

    def _spin(self) -> bool:
        """Look again and again for a moment before sleeping; return whether something came.

        A server next door confirms a publish within less time than it takes to sleep, to be woken
        and to find the caches cold.  While that does not work, it is not tried but now and then.
        """
        self._waits += 1
        if not self._spins_left and self._waits % SPIN_TRIAL:
            return False
        if _CORES == 1 or socket.socket.__module__ != "socket":
            return False  # the server, or the other greenlets, would only wait for us
        end = time.monotonic() + SPIN
        while time.monotonic() < end:
            if self._read():
                self._spins_left = SPIN_TRUST
                return True
        if self._spins_left:
            self._spins_left -= 1
        return False

    def _next_turn(self) -> None:
        self._turns += 1
        if self._sleepers:
            self._changed.notify_all()

    def _sleep(self, timeout: float | None) -> None:
        """Wait for the next turn; the lock is held, and released meanwhile."""
        self._sleepers += 1
        try:
            self._changed.wait(timeout)
        finally:
            self._sleepers -= 1

    def _poll(self, timeout: float | None, *, reading: bool, writing: bool) -> bool:
        """Wait for the socket; return whether there is something to read."""
        with self._lock:
            sock = self._usable()
            self._pollers += 1
        try:
            readable, _ = poll_socket(sock.fileno(), reading, writing, timeout)
            return readable
        finally:
            with self._lock:
                self._pollers -= 1
                self._close_if_over()

    def _read(self) -> bool:
        """Read until the socket has no more, and dispatch; the reader's role is held."""
        found = False
        while True:
            with self._lock:
                if self._out and not self._is_kept:
                    self._send()
                more, lost = self._receive()
            found |= self._dispatch()
            if lost is not None:
                with self._lock:
                    self._fail(lost)
                self._usable()
            if not more:
                return found

    def _receive(self) -> tuple[bool, ConnectionLost | ConnectionRejected | None]:
        """Take bytes once; return whether there may be more, and why there never will.

        The lock is held.  TLS is asked until it wants the socket again: OpenSSL may hold bytes
        the descriptor does not show.
        """
        sock = self._usable()
        if self._is_receiving:
            return False, None  # the call we interrupted reads it
        self._reads += 1
        self.read_at = time.monotonic()
        try:
            self._is_receiving = True
            data = sock.recv(READ_BYTES)
            if data:
                self._heard = True
                self._events.extend(self._parser.feed(data))
                if self._parser.error is not None:
                    return False, self._parser.error
                return len(data) == READ_BYTES or isinstance(sock, ssl.SSLSocket), None
        except BLOCKED:
            return False, None
        except ProtocolError as exc:
            return False, exc
        except OSError as exc:
            return False, self._explain(exc)
        except BaseException:
            self._fail(ConnectionLost("interrupted while reading, something is missing"))
            raise
        finally:
            self._is_receiving = False
        return False, self._explain(None)

    # What came

    def _dispatch(self) -> bool:
        """Give events to whom they are for, in their order; return whether there were any.

        A handler may end up here again, by waiting itself: it goes on where this one was.
        """
        events, handlers = self._events, self._handlers
        found = bool(events)
        while events:
            event = events.popleft()
            if type(event) is Msg:
                handler = handlers.get(event.sid)
                if handler is not None:
                    handler(event)
            else:
                self._react(event)
        return found

    def _react(self, event: protocol.Event) -> None:
        if event is Signal.PING:
            if self._failure is None:  # not in the way of the messages behind it
                self._write(protocol.CMD_PONG)
        elif event is Signal.PONG:
            if self._pings:
                self._pings.popleft()()
        elif isinstance(event, Info):
            self.info, self.max_payload = event, event.max_payload
        elif isinstance(event, Err):
            self._on_error(event.message)

    def _on_error(self, message: str) -> None:
        """Give a ``-ERR`` to the call that caused it, or fail."""
        denied = _DENIED.match(message)
        if denied is not None:
            self._on_denied(denied[1].lower() == "publish", denied[2])
        elif _HARMLESS.match(message):
            self._tell(ConnectionLost(f"server {self.server} says {message!r}"))
        else:
            with self._lock:
                self._fail(self._last_words(message))
            self._usable()

    def _on_denied(self, is_publish: bool, subject: str) -> None:
        error = PermissionDenied("publish" if is_publish else "subscribe", subject)
        # The server may spell the subject in lower case.
        lowered = subject.lower().encode()
        if is_publish:
            is_known = self._refuse(error, lowered)
        else:
            is_known = False
            for sid, subscribed in list(self._subjects.items()):
                if subscribed.lower() == lowered:
                    self._forget(sid)
                    if sid == self._inbox_sid:
                        self._inbox_sid = 0
                        is_known = self._refuse(error)
        if not is_known:
            self._denials.append(error)
        self._tell(error)

    def _raise_denied_subscription(self) -> None:
        for error in self._denials:
            if error.operation == "subscribe":
                self._denials.remove(error)
                raise error

    def _tell(self, error: Exception) -> None:
        if self.on_error is not None:
            self.on_error(error)
        else:
            logger.warning("%s", error)

    # The end

    def close(self) -> None:
        """Close the connection, after one try to send what was written."""
        with self._lock:
            if self._failure is None and self._sock is not None:
                with suppress(ConnectionLost, ConnectionRejected):
                    self._send()
            self._fail(ConnectionLost("closed by this client"))

    def _fail(self, failure: ConnectionLost | ConnectionRejected) -> None:
        """Close the connection for a reason, the first one counts; the lock is held."""
        if self._failure is None:
            self._failure = failure
            if self._sock is not None:
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)  # wakes who polls
            self._close_if_over()
            self._next_turn()

    def _close_if_over(self) -> None:
        # Not while a thread polls: the number could be another file's by the time it does.
        if self._failure is not None and self._sock is not None and not self._pollers:
            self._sock.close()

    def _explain(self, exc: OSError | None) -> ConnectionLost | ConnectionRejected:
        """Return our error for the socket's, or for its end (None)."""
        for event in self._events:
            if isinstance(event, Err) and not _HARMLESS.match(event.message):
                return self._last_words(event.message)
        if exc is None:
            return ConnectionLost(f"server {self.server} closed it")
        assert self.server is not None
        return certificate_error(self.server, exc) or ConnectionLost(
            f"server {self.server}: {exc.strerror or exc}"
        )

    def _last_words(self, message: str) -> ConnectionLost | ConnectionRejected:
        """Return our error for the one with which the server closes the connection."""
        if not self._is_accepted and _LOGIN.search(message):
            return AuthenticationFailed(str(self.server), message)
        return ConnectionLost(f"server {self.server} closed it: {message!r}")

    def _leave_to_parent(self) -> None:
        """In a forked child: drop the inherited socket, without a word on the wire.

        Its number stays taken, by the null device, until the process ends: an event loop may
        know it, and must not find another file there.  TLS says no farewell, it would be the
        parent's.
        """
        if self._failure is None:
            self._failure = ConnectionLost(
                f"it was made by process {self.pid}, a forked one needs its own"
            )
            if self._sock is not None and self._sock.fileno() >= 0:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, self._sock.detach(), inheritable=False)
                os.close(null)
        self.pid = os.getpid()


#: The connections of this process, for its children.  It keeps none alive.
_connections: weakref.WeakSet[NatsConnection] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    # At once and not at the first use: while any child holds the socket, the server takes a dead
    # parent for alive, and goes on giving it messages.
    for connection in list(_connections):
        connection._make_locks()  # another thread of the parent may have held them
        connection._leave_to_parent()
    _connections.clear()


os.register_at_fork(after_in_child=_leave_all_to_parent)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _version() -> str:
    try:
        return metadata.version("kombu-jetstream")
    except metadata.PackageNotFoundError:
        return "0"


def _nothing() -> None:
    pass
