"""One connection to a NATS server, synchronous, over one non-blocking socket.

What a caller must know:

1. **Handlers run in the thread that happens to read**: inside `wait`, `request`,
   `read_available`, and inside a `publish` that finds the socket's buffer full.  They note what
   came and return; one that blocks holds up every other waiter.
2. **Any thread may write.**  A message is written whole, or the connection is lost.
3. **There is no reconnect.**  After a failure every use raises the error of the first one; a
   caller makes a new `NatsConnection`.

How it is built:

- ``_lock`` guards the socket, what is to be written and the parser; it is never held while
  waiting or calling a handler.  An `SSLSocket` must not be used by two threads at once.
- ``_reader`` is a role: its holder alone polls for reading, reads and dispatches, so that events
  keep their order.  The others who `wait` sleep on ``_changed`` until ``_turns`` moves.
- ``_writer`` is the thread that waits for room in a full socket.  One is enough, and eventlet
  allows only one for each direction.
- Nothing is looked up at import: gevent and eventlet may replace `socket`, `select` and
  `threading` later.
"""

from __future__ import annotations

import base64
import errno
import ipaddress
import itertools
import logging
import math
import os
import re
import select
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from typing import Any, Final, TypeAlias

from . import protocol
from .errors import (
    AuthenticationFailed,
    CertificateRejected,
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

DEFAULT_PORT: Final = 4222

#: Bytes taken from the socket at once.
_READ_BYTES: Final = 64 * 1024

#: Bytes that collect while corked, and that other threads may leave to the one that waits for
#: room in the socket.
_CORK_BYTES: Final = 64 * 1024

#: Pings without an answer after which the peer counts as dead.
_MAX_PINGS_OUT: Final = 2

#: Milliseconds of one poll; its argument is a C int.
_MAX_POLL_MS: Final = 3_600_000

Handler: TypeAlias = Callable[[Msg], None]
ReplyCallback: TypeAlias = Callable[["Msg | PermissionDenied"], None]


@dataclass(frozen=True, slots=True)
class Server:
    """Where a NATS server listens; *tls* demands TLS."""

    host: str
    port: int = DEFAULT_PORT
    tls: bool = False
    #: The name its certificate must bear, if not *host*: servers that a cluster made known are
    #: often bare addresses.
    tls_name: str | None = None

    @classmethod
    def parse(cls, text: str, *, tls: bool = False) -> Server:
        """Read ``host``, ``host:port``, ``[::1]:4222``, ``nats://…`` or ``tls://…``.

        ValueError for anything else; credentials do not belong here.
        """
        match = _SERVER.fullmatch(text)
        port = int(match["port"] or DEFAULT_PORT) if match else 0
        if match is None or not 0 < port < 65536:
            shown = text.rpartition("@")[2]
            raise ValueError(
                f"expected a server as 'host:port' or 'nats://host:port', got {shown!r}"
            )
        return cls(match["ip6"] or match["host"], port, tls or match["scheme"] == "tls")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_SERVER: Final = re.compile(
    r"(?:(?P<scheme>nats|tls)://)?(?:\[(?P<ip6>[^\]@]+)\]|(?P<host>[^\s:/@\[\]]+))"
    r"(?::(?P<port>\d{1,5}))?/?"
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to log in; files are read at every connect, so that they may be renewed."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    nkey_seed_file: str | None = None
    credentials_file: str | None = None

    def connect_options(self, server: Server, nonce: str | None) -> dict[str, str]:
        """Return the part of CONNECT that logs in; AuthenticationFailed if a file is no good."""
        if self.credentials_file is not None:
            text = _read_text("credentials_file", self.credentials_file, server)
            jwt, seed = _JWT.search(text), _SEED.search(text)
            if not jwt or not seed:
                raise AuthenticationFailed(
                    str(server),
                    f"expected credentials_file {self.credentials_file!r} to have a "
                    "'NATS USER JWT' and a 'USER NKEY SEED'",
                )
            _, signature = _sign(seed[1], nonce, server, "credentials_file", self.credentials_file)
            return {"jwt": jwt[1], **signature}
        if self.nkey_seed_file is not None:
            seed_text = _read_text("nkey_seed_file", self.nkey_seed_file, server).strip()
            public, signature = _sign(
                seed_text, nonce, server, "nkey_seed_file", self.nkey_seed_file
            )
            return {"nkey": public, **signature}
        if self.token is not None:
            return {"auth_token": self.token}
        if self.user is not None:
            return {"user": self.user, "pass": self.password or ""}
        return {}


_JWT: Final = re.compile(r"-+BEGIN NATS USER JWT-+\s+(\S+)\s+-+END NATS USER JWT-+")
_SEED: Final = re.compile(r"-+BEGIN USER NKEY SEED-+\s+(\S+)\s+-+END USER NKEY SEED-+")


def _read_text(option: str, path: str, server: Server) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not a text file"
        raise AuthenticationFailed(str(server), f"cannot read {option} {path!r}: {reason}") from exc


def _sign(
    seed: str, nonce: str | None, server: Server, option: str, path: str
) -> tuple[str, dict[str, str]]:
    """Return the public key of *seed*, and the signature of *nonce* as CONNECT has it."""
    import nkeys  # only who uses keys loads libsodium

    try:
        pair = nkeys.from_seed(bytearray(seed.encode()))
        public = pair.public_key.decode()
        # A server that asks for no credentials sends no nonce.
        signature = {"sig": base64.b64encode(pair.sign(nonce.encode())).decode()} if nonce else {}
    except Exception as exc:  # nkeys, libsodium and base64 each have their own for a bad seed
        raise AuthenticationFailed(
            str(server), f"expected a user's nkey seed ('SU…') in {option} {path!r}"
        ) from exc
    pair.wipe()
    return public, signature


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """What a connection is made of; durations are seconds."""

    servers: tuple[Server, ...] = (Server("127.0.0.1"),)
    credentials: Credentials = Credentials()
    #: Demands TLS from every server, with this context; a server's own *tls* demands it with the
    #: system's certificate authorities.
    tls: ssl.SSLContext | None = None
    tls_hostname: str | None = None
    tls_handshake_first: bool = False
    #: For one server, with name resolution, TLS and log-in.
    connect_timeout: float = 5.0
    #: How long the socket may take no byte before the connection counts as lost.
    write_timeout: float = 10.0
    ping_interval: float = 30.0
    name: str = "kombu_jetstream"
    inbox_prefix: str = "_INBOX"


class NatsConnection:
    """A client of one NATS server; see the head of this module for the rules."""

    def __init__(
        self,
        settings: ConnectionSettings,
        *,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self.settings = settings
        #: Called, in the reading thread, with each `PermissionDenied` and each other ``-ERR``
        #: that did not close the connection; without it they are logged.
        self.on_error = on_error
        self.info = Info()
        #: Bytes that headers and payload of one message may have together.
        self.max_payload = self.info.max_payload
        self.server: Server | None = None
        self.pid = os.getpid()
        self._inbox_prefix = f"{settings.inbox_prefix}.{os.urandom(11).hex()}".encode()
        self._reset()
        _connections.add(self)

    def _reset(self) -> None:
        """Begin without a socket, as for each server that is tried."""
        self._make_locks()
        self._sock: socket.socket | None = None
        self._failure: ConnectionLost | ConnectionRejected | None = None
        self._parser = protocol.Parser()
        self._out = bytearray()
        self._corks = 0
        self._events: deque[protocol.Event] = deque()
        self._infos = 0
        self._pings: deque[Callable[[], None]] = deque()  # what each PONG to come means
        self._handlers: dict[int, Handler] = {}
        self._subjects: dict[int, bytes] = {}
        self._sids = itertools.count(1)
        self._tokens = itertools.count(1)
        self._inbox_sid = 0
        self._inbox_denied: PermissionDenied | None = None
        self._requests: dict[bytes, tuple[bytes, ReplyCallback]] = {}
        self._denials: deque[PermissionDenied] = deque(maxlen=16)
        self._heard = True
        self._ping_due = 0.0
        self._pings_out = 0

    def _make_locks(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._turns = 0
        self._reader = threading.RLock()
        self._writer: int | None = None
        self._pollers = 0

    # -- state

    @property
    def is_open(self) -> bool:
        """Whether the connection can be used, as far as is known without trying."""
        return self._sock is not None and self._failure is None and self.pid == os.getpid()

    @property
    def discovered_servers(self) -> tuple[Server, ...]:
        """The settings' servers, and those the cluster has now made known."""
        known = {(server.host, server.port): server for server in self.settings.servers}
        here = self.server
        for url in self.info.connect_urls:
            with suppress(ValueError):
                server = Server.parse(url, tls=here is not None and here.tls)
                if here is not None and _is_address(server.host) and not _is_address(here.host):
                    server = replace(server, tls_name=here.tls_name or here.host)
                known.setdefault((server.host, server.port), server)
        return tuple(known.values())

    def fileno(self) -> int:
        """Return the socket's file descriptor, for an event loop; ConnectionLost if not open."""
        return self._usable().fileno()

    def check(self) -> None:
        """Raise what went wrong since the last call: a lost connection, or a denied subject."""
        self._usable()
        if self._denials:
            raise self._denials.popleft()

    def _usable(self) -> socket.socket:
        sock = self._sock
        if self._failure is None and self.pid != os.getpid():
            self._forget_parents_socket()
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if sock is None:
            raise ConnectionLost("not connected, call connect() first")
        return sock

    # -- connecting

    def connect(self) -> None:
        """Connect to the first server that lets us in, trying them in order.

        Raises `AuthenticationFailed`, `TLSNotOffered` or `CertificateRejected` when that is what
        happened with every one, else `NoServers` with each server's cause.
        """
        if self._sock is not None:
            self._usable()
            raise RuntimeError(f"already connected to {self.server}")
        causes: list[tuple[Server, Exception]] = []
        for server in self.settings.servers:
            try:
                self._open(server)
            except (ConnectionLost, ConnectionRejected, OSError) as exc:
                causes.append((server, exc))
            else:
                logger.info("connected to %s, nats-server %s", server, self.info.raw.get("version"))
                return
        first = causes[0][1] if causes else None
        if isinstance(first, ConnectionRejected) and len({type(exc) for _, exc in causes}) == 1:
            raise first
        raise NoServers([(str(server), exc) for server, exc in causes]) from first

    def _open(self, server: Server) -> None:
        settings = self.settings
        deadline = time.monotonic() + settings.connect_timeout
        context = settings.tls
        if context is None and server.tls:
            context = ssl.create_default_context()
        self._reset()
        self.pid = os.getpid()
        self.server = server
        self._sock = _dial(server, deadline, settings.connect_timeout)
        try:
            if context is not None and settings.tls_handshake_first:
                self._start_tls(context, deadline)
            self._expect(lambda: self._infos > 0, deadline, "INFO")
            info = self.info
            if context is not None and not settings.tls_handshake_first:
                if not (info.tls_required or info.tls_available):
                    raise TLSNotOffered(str(server))
                if self._parser.buffered or self._events:
                    raise ProtocolError("expected nothing between INFO and the TLS handshake")
                self._start_tls(context, deadline)
            elif context is None and info.tls_required:
                raise ConnectionLost(
                    f"server {server} demands TLS; use jetstreams:// or set broker_use_ssl"
                )
            options = {
                "verbose": False,
                "pedantic": False,
                "lang": "python-kombu-jetstream",
                "version": _version(),
                "protocol": 1,
                "headers": True,
                "no_responders": True,
                "echo": True,
                "name": settings.name,
                "tls_required": context is not None,
                **settings.credentials.connect_options(server, info.nonce),
            }
            self._write(protocol.encode_connect(options))
            accepted: list[bool] = []
            self._ping(lambda: accepted.append(True))
            self._expect(lambda: bool(accepted), deadline, "PONG")
        except BaseException:
            sock, self._sock = self._sock, None
            if sock is not None:
                sock.close()
            raise

    def _expect(self, ready: Callable[[], bool], deadline: float, what: str) -> None:
        """Wait for a part of the handshake."""
        try:
            arrived = self.wait(ready, deadline - time.monotonic())
        except ConnectionLost:
            text = self._parser.last_err.message if self._parser.last_err else ""
            if _is_about_login(text):
                raise AuthenticationFailed(str(self.server), text) from None
            raise
        if not arrived:
            hint = ""
            if what == "INFO" and not self.settings.tls_handshake_first:
                hint = "; a server with handshake_first needs tls_handshake_first"
            raise ConnectionLost(
                f"expected {what} from {self.server} within {self.settings.connect_timeout:g} s, "
                f"nothing came{hint}"
            )

    def _start_tls(self, context: ssl.SSLContext, deadline: float) -> None:
        """Replace the socket by its encrypted self; the handshake is over when this returns."""
        server, plain = self.server, self._sock
        assert server is not None
        assert plain is not None
        name = self.settings.tls_hostname or server.tls_name or server.host
        try:
            sock = context.wrap_socket(plain, server_hostname=name, do_handshake_on_connect=False)
            self._sock = sock
            while True:
                try:
                    sock.do_handshake()
                    return
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
                    wants_read = isinstance(exc, ssl.SSLWantReadError)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ConnectionLost(
                        f"expected the TLS handshake with {server} within "
                        f"{self.settings.connect_timeout:g} s"
                    )
                _poll(sock.fileno(), wants_read, not wants_read, left)
        except ssl.SSLError as exc:
            if self.settings.tls_handshake_first and exc.reason in _NOT_TLS:
                raise TLSNotOffered(str(server)) from exc
            raise self._explained(exc) from exc

    # -- subscriptions and messages

    def subscribe(self, subject: bytes, handler: Handler, queue: bytes = b"") -> int:
        """Call *handler* with each message for *subject*; return the subscription's number.

        A denied subject raises PermissionDenied from the next `wait`, `round_trip` or `check`.
        """
        if not protocol.is_subscription_subject(subject):
            raise ValueError(f"expected a subject to subscribe to, got {subject!r}")
        sid = next(self._sids)
        self._handlers[sid] = handler
        self._subjects[sid] = subject
        self._write(protocol.encode_sub(subject, sid, queue))
        return sid

    def unsubscribe(self, sid: int) -> None:
        """End a subscription; what the server sent before it knew still reaches the handler."""
        if sid in self._handlers:
            self._write(protocol.encode_unsub(sid))
            self._ping(partial(self._forget_subscription, sid))

    def _forget_subscription(self, sid: int) -> None:
        self._handlers.pop(sid, None)
        self._subjects.pop(sid, None)

    def publish(
        self, subject: bytes, payload: bytes, reply: bytes = b"", headers: bytes = b""
    ) -> None:
        """Send a message, without any word on whether somebody got it.

        MessageTooLarge when headers and payload exceed `max_payload`; nothing was sent then.
        """
        if reply and not protocol.is_publish_subject(reply):
            raise ValueError(f"expected a subject to reply to, got {reply!r}")
        self._publish(subject, payload, reply, headers)

    def _publish(self, subject: bytes, payload: bytes, reply: bytes, headers: bytes) -> None:
        # A larger one would make the server close the connection.
        size = len(headers) + len(payload)
        if size > self.max_payload:
            raise MessageTooLarge(size, self.max_payload)
        if not protocol.is_publish_subject(subject):
            raise ValueError(f"expected a subject to publish to, got {subject!r}")
        self._write(protocol.encode_pub(subject, payload, reply, headers))

    def write(self, raw: bytes) -> None:
        """Send whole commands as `protocol` encodes them; nothing is checked."""
        self._write(raw)

    # -- requests

    def new_inbox(self) -> bytes:
        """Return a subject nobody else uses, to subscribe to."""
        return b"%b.%d.i" % (self._inbox_prefix, next(self._tokens))

    def request(
        self, subject: bytes, payload: bytes = b"", headers: bytes = b"", *, timeout: float
    ) -> Msg:
        """Send a message and return the answer.

        Raises NoResponders, PermissionDenied, RequestTimeout, or ConnectionLost.
        """
        answers: list[Msg | PermissionDenied] = []
        token = self.request_nowait(subject, payload, headers, answers.append)
        try:
            if not self.wait(lambda: bool(answers), timeout):
                raise RequestTimeout(subject.decode("utf-8", "replace"), timeout)
        finally:
            self.cancel(token)
        answer = answers[0]
        if isinstance(answer, PermissionDenied):
            raise answer
        if not answer.payload and protocol.status_code(answer.headers) == 503:
            raise NoResponders(subject.decode("utf-8", "replace"))
        return answer

    def request_nowait(
        self, subject: bytes, payload: bytes, headers: bytes, callback: ReplyCallback
    ) -> bytes:
        """Send a message; *callback* gets its answer, once, in the reading thread.

        The answer is a Msg (status 503 when nobody listens) or PermissionDenied.  It never comes
        when the connection is lost first.  Returns a token for `cancel`.
        """
        if not self._inbox_sid:
            self._subscribe_inbox()
        if self._inbox_denied is not None:
            raise self._inbox_denied
        token = b"%d" % next(self._tokens)
        self._requests[token] = (subject, callback)
        try:
            self._publish(subject, payload, b"%b.%b" % (self._inbox_prefix, token), headers)
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
            self._inbox_sid = next(self._sids)
        subject = self._inbox_prefix + b".*"
        self._handlers[self._inbox_sid] = self._on_reply
        self._subjects[self._inbox_sid] = subject
        self._write(protocol.encode_sub(subject, self._inbox_sid))

    def _on_reply(self, msg: Msg) -> None:
        request = self._requests.pop(msg.subject[len(self._inbox_prefix) + 1 :], None)
        if request is not None:
            request[1](msg)

    # -- writing

    def cork(self) -> None:
        """Collect what is written until `uncork`, up to 64 KiB; calls nest."""
        with self._lock:
            self._corks += 1

    def uncork(self) -> None:
        """End one `cork`; the last sends what was collected."""
        with self._lock:
            self._corks -= 1
            if self._corks or not self._out or self._failure is not None or self._send():
                return
        self._wait_for_room()

    @contextmanager
    def corked(self) -> Iterator[None]:
        """Collect what is written in the block, and send it at its end."""
        self.cork()
        try:
            yield
        finally:
            self.uncork()

    def flush(self) -> None:
        """Hand everything written to the kernel, corked or not."""
        with self._lock:
            if not self._out or self._send():
                return
        self._wait_for_room()

    def _write(self, raw: bytes) -> None:
        with self._lock:
            if self._failure is not None or self._sock is None:
                self._usable()
            self._out += raw
            if (self._corks and len(self._out) <= _CORK_BYTES) or self._send():
                return
        self._wait_for_room()

    def _ping(self, on_pong: Callable[[], None]) -> None:
        """Send PING; *on_pong* is called when the server has dealt with all that went before."""
        with self._lock:
            self._usable()
            self._pings.append(on_pong)
            self._out += protocol.CMD_PING
            if self._corks or self._send():
                return
        self._wait_for_room()

    def _send(self) -> bool:
        """Write what the socket takes, and return whether that is all; the lock is held."""
        sock, out = self._usable(), self._out
        try:
            while out:
                del out[: sock.send(out)]
        except _BLOCKED:
            return False
        except OSError as exc:
            with suppress(OSError, ProtocolError):  # the server's -ERR says more than EPIPE
                self._receive()
            self._fail(self._explained(exc))
            self._usable()
        return True

    def _wait_for_room(self) -> None:
        """Wait until the socket has taken what is to be written; reads meanwhile.

        A server may stop to read from a client that does not read.
        """
        me = threading.get_ident()
        deadline = time.monotonic() + self.settings.write_timeout
        before = 0
        while True:
            with self._lock:
                done = self._send()
                left = len(self._out)
                if self._writer in (None, me):
                    self._writer = None if done else me
                mine = self._writer == me
                if done or (not mine and left <= _CORK_BYTES):
                    return
                if left < before:  # it moves: the time is for a peer that takes nothing
                    deadline = time.monotonic() + self.settings.write_timeout
                before = left
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    self._fail(
                        ConnectionLost(
                            f"server {self.server} took no byte for "
                            f"{self.settings.write_timeout:g} s"
                        )
                    )
                    self._usable()
                if not mine:
                    self._changed.wait(min(remaining, 0.05))
                    continue
            try:
                self._turn(remaining, for_writing=True)
            finally:
                self._writer = None

    # -- reading

    def read_available(self) -> bool:
        """Read and dispatch what is there, without waiting; return whether there was anything.

        ConnectionLost when the server closed the connection, after what it had sent before.
        When another thread is reading this returns False at once: that thread dispatches it.
        """
        return self._turn(0)

    def wait(self, ready: Callable[[], bool], timeout: float | None) -> bool:
        """Read and dispatch until *ready*, for at most *timeout* seconds; return if it is.

        Raises ConnectionLost, and PermissionDenied for a subscription the server refused.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._out:
            self.flush()
        expired = False
        while True:
            turns = self._turns
            if ready():
                return True
            self._usable()
            self._raise_denied_subscription()
            if expired:
                return False
            left = None
            if deadline is not None:
                left = max(0.0, deadline - time.monotonic())
                expired = left == 0.0
            self._turn(left, turns)

    def round_trip(self, timeout: float) -> None:
        """Return when the server has dealt with everything sent so far.

        RequestTimeout after *timeout* seconds, PermissionDenied for a subject it refused.
        """
        answered: list[bool] = []
        self._ping(lambda: answered.append(True))
        if not self.wait(lambda: bool(answered), timeout):
            raise RequestTimeout("PING", timeout)
        self.check()

    def keepalive(self, now: float) -> None:
        """Ping a server that was silent for `ping_interval`; ConnectionLost when it is dead.

        Call it any time, from any thread, with a clock that does not jump.  It reads only while
        the server is silent, so it takes no messages from the thread that waits for them.
        """
        if self._heard:
            self._heard = False
            self._pings_out = 0
            self._ping_due = now + self.settings.ping_interval
        elif now >= self._ping_due and not self.read_available():
            if self._pings_out >= _MAX_PINGS_OUT:
                with self._lock:
                    self._fail(
                        ConnectionLost(
                            f"server {self.server} left {self._pings_out} pings unanswered, "
                            f"{self.settings.ping_interval:g} s each"
                        )
                    )
            self._pings_out += 1
            self._ping_due = now + self.settings.ping_interval
            self._ping(_nothing)

    def _turn(
        self, timeout: float | None, turns: int | None = None, *, for_writing: bool = False
    ) -> bool:
        """Wait once for something to happen, and dispatch what came; return if anything did.

        The thread that gets the reader's role polls the socket; another waits until that one has
        dispatched something.  *turns* is the count the caller's knowledge is of: when it has
        moved, there is something to look at already.
        """
        reading = self._reader.acquire(blocking=False)
        if not reading and not for_writing:
            if timeout != 0:
                with self._lock:
                    if self._turns == turns and self._failure is None:
                        self._changed.wait(timeout)
            return False
        try:
            if turns is not None and self._turns != turns:
                return False
            if self._events:
                self._dispatch()
                return True
            if timeout == 0 or self._poll(timeout, reading, for_writing):
                return reading and self._read()
            return False
        finally:
            if reading:
                self._reader.release()
            with self._lock:
                self._turns += 1
                self._changed.notify_all()

    def _poll(self, timeout: float | None, reading: bool, writing: bool) -> bool:
        """Wait for the socket; return whether there may be something to read."""
        with self._lock:
            sock = self._usable()
            self._pollers += 1
        try:
            if reading and isinstance(sock, ssl.SSLSocket) and sock.pending():
                return True
            return _poll(sock.fileno(), reading, writing, timeout)
        finally:
            with self._lock:
                self._pollers -= 1
                if self._failure is not None and not self._pollers:
                    sock.close()

    def _read(self) -> bool:
        """Read until the socket has no more, dispatching; the reader's role is held."""
        heard = False
        while True:
            with self._lock:
                self._usable()
                if self._out and not self._corks:
                    self._send()
                more, lost = self._receive()
            heard |= self._dispatch()
            if lost is not None:
                with self._lock:
                    self._fail(lost)
                self._usable()
            if not more:
                return heard

    def _receive(self) -> tuple[bool, ConnectionLost | ConnectionRejected | None]:
        """Take bytes once; return if there may be more, and why there will not be any.

        The lock is held.  TLS is asked until it wants the socket: OpenSSL may hold bytes that
        the file descriptor does not show.
        """
        sock = self._usable()
        try:
            data = sock.recv(_READ_BYTES)
        except _BLOCKED:
            return False, None
        except OSError as exc:
            return False, self._explained(exc)
        if not data:
            return False, self._explained(None)
        self._heard = True
        try:
            self._events.extend(self._parser.feed(data))
        except ProtocolError as exc:
            return False, exc
        if self._parser.error is not None:
            return False, self._parser.error
        return len(data) == _READ_BYTES or isinstance(sock, ssl.SSLSocket), None

    # -- what came

    def _dispatch(self) -> bool:
        """Give the events to whom they are for; return whether there were any.

        A handler may come back here by waiting itself: the queue keeps the order.
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
            self._write(protocol.CMD_PONG)
        elif event is Signal.PONG:
            if self._pings:
                self._pings.popleft()()
        elif isinstance(event, Info):
            self.info = event
            self.max_payload = event.max_payload
            self._infos += 1
        elif isinstance(event, Err):
            self._on_err(event.message)

    def _on_err(self, message: str) -> None:
        """Give a ``-ERR`` to the call that caused it.

        Others either close the connection (the parser keeps the newest for that) or are told.
        """
        denied = _DENIED.match(message)
        if denied is None:
            self._tell(ConnectionLost(f"server {self.server} says {message!r}"))
            return
        subject = denied["subject"]
        if denied["operation"].lower() == "subscription":
            error = PermissionDenied("subscribe", subject)
            self._on_subscription_denied(subject.lower().encode(), error)
        else:
            error = PermissionDenied("publish", subject)
            if not self.publish_denied(error):
                self._denials.append(error)
        self._tell(error)

    def publish_denied(self, error: PermissionDenied) -> bool:
        """Fail the requests on a subject the server refused; return whether there were any."""
        # Older servers spell the subject in lower case.
        subject = error.subject.lower().encode()
        found = [
            (token, callback)
            for token, (requested, callback) in list(self._requests.items())
            if requested.lower() == subject
        ]
        for token, callback in found:
            self.cancel(token)
            callback(error)
        return bool(found)

    def _on_subscription_denied(self, subject: bytes, error: PermissionDenied) -> None:
        self._denials.append(error)
        for sid, subscribed in list(self._subjects.items()):
            if subscribed.lower() == subject:
                self._forget_subscription(sid)
                if sid == self._inbox_sid:
                    self._inbox_denied = error

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

    # -- the end

    def close(self) -> None:
        """Close the connection; what was written but not sent is tried once more."""
        with self._lock:
            if self._failure is None:
                if self._sock is not None and self.pid == os.getpid():
                    with suppress(ConnectionLost, ConnectionRejected):
                        self._send()
                self._fail(ConnectionLost("closed by this client"))

    def _fail(self, failure: ConnectionLost | ConnectionRejected) -> None:
        """Note why the connection is of no use any more, and close it; the lock is held."""
        if self._failure is not None:
            return
        self._failure = failure
        sock = self._sock
        if sock is not None:
            # Wakes who polls; then the last of them closes, as the number could be another
            # socket's by the time it polls.
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            if not self._pollers:
                sock.close()
        self._turns += 1
        self._changed.notify_all()

    def _explained(self, exc: OSError | None) -> ConnectionLost | ConnectionRejected:
        """Return our error for what the socket said; None is an end of file."""
        if isinstance(exc, ssl.SSLError):
            if isinstance(exc, ssl.SSLCertVerificationError):
                return CertificateRejected(str(self.server), exc.verify_message)
            if exc.reason in _CLIENT_CERTIFICATE:
                return CertificateRejected(
                    str(self.server), f"it wants another client certificate ({exc.reason})"
                )
        if (
            self._parser.last_err is not None
            and _DENIED.match(self._parser.last_err.message) is None
        ):
            return ConnectionLost(
                f"server {self.server} closed it: {self._parser.last_err.message!r}"
            )
        if exc is None:
            return ConnectionLost(f"server {self.server} closed it")
        return ConnectionLost(f"server {self.server}: {exc.strerror or exc}")

    def _forget_parents_socket(self) -> None:
        """In a forked child: drop the inherited socket without a word on the wire.

        Closing would do for a plain one.  But other objects may hold the descriptor's number (an
        event loop does), so it stays taken, by the null device, until the process ends.  TLS says
        nothing either: its farewell would be the parent's.
        """
        self._make_locks()
        self._failure = ConnectionLost(
            f"made by process {self.pid}, this is {os.getpid()}; connect anew after a fork"
        )
        if self._sock is not None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, self._sock.detach(), inheritable=False)
            os.close(null)


#: The connections of this process.  It owns none of them: it is there for the children.
_connections: weakref.WeakSet[NatsConnection] = weakref.WeakSet()


def _drop_inherited() -> None:
    # At once, not when the child uses them: as long as any child holds the socket, the server
    # takes a dead parent for alive and goes on answering its pulls.
    for connection in list(_connections):
        connection._forget_parents_socket()
    _connections.clear()


os.register_at_fork(after_in_child=_drop_inherited)


_BLOCKED: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

#: OpenSSL's words for a peer that does not speak TLS (they changed with its versions).
_NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL")

#: OpenSSL's words for a server that does not like ours; with TLS 1.3 they come with the first
#: read, as the client's part of the handshake is over by then.
_CLIENT_CERTIFICATE: Final = (
    "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    "TLSV1_ALERT_UNKNOWN_CA",
    "SSLV3_ALERT_BAD_CERTIFICATE",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    "SSLV3_ALERT_CERTIFICATE_REVOKED",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
    "SSLV3_ALERT_HANDSHAKE_FAILURE",
)

_DENIED: Final = re.compile(
    r'permissions violation for (?P<operation>publish|subscription)[^"]*"(?P<subject>[^"]*)"',
    re.IGNORECASE,
)


def _is_about_login(message: str) -> bool:
    return "authorization" in message.lower() or "authentication" in message.lower()


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


def _dial(server: Server, deadline: float, timeout: float) -> socket.socket:
    """Return a connected, non-blocking socket; OSError of the last address when none answers.

    Each address gets its share of the time, so that one that swallows packets does not use up
    what the others need.
    """
    addresses = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    problem: OSError = OSError(f"no address for {server.host!r}")
    for index, (family, kind, proto, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            share = (deadline - time.monotonic()) / (len(addresses) - index)
            _finish_connect(sock, address, share)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError as exc:
            sock.close()
            problem = exc
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise problem


def _finish_connect(sock: socket.socket, address: Any, timeout: float) -> None:
    code = sock.connect_ex(address)
    if code in (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR):
        _poll(sock.fileno(), False, True, max(timeout, 0))
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code:
            try:
                sock.getpeername()
            except OSError:
                code = errno.ETIMEDOUT
    if code:
        raise OSError(code, os.strerror(code))


def _poll(fd: int, reading: bool, writing: bool, timeout: float | None) -> bool:
    """Wait until *fd* can be read or written; return whether reading is worth a try."""
    poll = getattr(select, "poll", None)
    if poll is None:  # eventlet takes it away
        ready, _, _ = select.select([fd] * reading, [fd] * writing, [], timeout)
        return bool(ready)
    poller = poll()
    poller.register(fd, select.POLLIN * reading | select.POLLOUT * writing)
    wait_ms = None if timeout is None else min(math.ceil(timeout * 1000), _MAX_POLL_MS)
    return any(events & ~select.POLLOUT for _, events in poller.poll(wait_ms))
