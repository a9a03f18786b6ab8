"""Where the servers are and how to get in: addresses, credentials, TCP and TLS.

Everything here is about one attempt to connect, and bounded by a deadline of the monotonic
clock; only name resolution is the system's, and takes the time it takes.

Sockets never block.  Whoever waits does it in `poll_socket`, which asks for ``select.poll`` when
it is called: gevent replaces it and eventlet takes it away, both after this was imported.
"""

from __future__ import annotations

import base64
import errno
import math
import os
import re
import select
import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .errors import AuthenticationFailed, CertificateRejected, ConnectionLost

__all__ = [
    "BLOCKED",
    "ConnectionSettings",
    "Credentials",
    "Server",
    "certificate_error",
    "dial",
    "encrypt",
    "poll_socket",
]

DEFAULT_PORT: Final = 4222

#: What a non-blocking socket raises when it has to wait.
BLOCKED: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

#: Milliseconds of one poll, whose argument is a C int; a longer wait polls again.
_MAX_POLL_MS: Final = 3_600_000

_SERVER: Final = re.compile(
    r"(?:(?P<scheme>nats|tls)://)?(?:\[(?P<ip6>[^\]@]+)\]|(?P<host>[^\s:/@\[\]]+))"
    r"(?::(?P<port>\d{1,5}))?/?"
)

_JWT: Final = re.compile(r"-+BEGIN NATS USER JWT-+\s+(\S+)\s+-+END NATS USER JWT-+")
_SEED: Final = re.compile(r"-+BEGIN USER NKEY SEED-+\s+(\S+)\s+-+END USER NKEY SEED-+")

#: OpenSSL's words for a peer that does not speak TLS; they changed with its versions.
_NOT_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL"})

#: OpenSSL's words for a server that did not like our certificate, or the want of one.
_CLIENT_CERTIFICATE: Final = frozenset(
    {
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "TLSV1_ALERT_UNKNOWN_CA",
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "SSLV3_ALERT_CERTIFICATE_REVOKED",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
    }
)


@dataclass(frozen=True, slots=True)
class Server:
    """Where a NATS server listens; *tls* demands TLS."""

    host: str
    port: int = DEFAULT_PORT
    tls: bool = False
    #: The name its certificate must bear, if not *host*: what a cluster says of its servers is
    #: often bare addresses.
    tls_name: str | None = None

    @classmethod
    def parse(cls, text: str, *, tls: bool = False) -> Server:
        """Read ``host``, ``host:port``, ``[::1]:4222``, ``nats://…`` or ``tls://…``.

        ValueError for anything else, credentials too: `Credentials` has those.
        """
        match = _SERVER.fullmatch(text)
        port = int(match["port"] or DEFAULT_PORT) if match else 0
        if match is None or not 0 < port < 65536:
            shown = text.rpartition("@")[2]
            raise ValueError(f"expected a server as 'host:port', got {shown!r}")
        return cls(match["ip6"] or match["host"], port, tls or match["scheme"] == "tls")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to log in; files are read at every connect, so that they can be renewed."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    nkey_seed_file: str | None = None
    credentials_file: str | None = None

    def connect_options(self, server: Server, nonce: str | None) -> dict[str, str]:
        """Return the part of CONNECT that logs in; AuthenticationFailed if a file is no good."""
        if self.credentials_file is not None:
            what = f"credentials_file {self.credentials_file!r}"
            text = _read_text(what, self.credentials_file, server)
            jwt, seed = _JWT.search(text), _SEED.search(text)
            if not jwt or not seed:
                raise AuthenticationFailed(
                    str(server), f"expected a NATS USER JWT and a USER NKEY SEED in {what}"
                )
            return {"jwt": jwt[1], **_sign(what, seed[1], nonce, server)}
        if self.nkey_seed_file is not None:
            what = f"nkey_seed_file {self.nkey_seed_file!r}"
            seed_text = _read_text(what, self.nkey_seed_file, server).strip()
            return _sign(what, seed_text, nonce, server, public_key=True)
        if self.token is not None:
            return {"auth_token": self.token}
        if self.user is not None:
            return {"user": self.user, "pass": self.password or ""}
        return {}


def _read_text(what: str, path: str, server: Server) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not a text file"
        raise AuthenticationFailed(str(server), f"cannot read {what}: {reason}") from exc


def _sign(
    what: str, seed: str, nonce: str | None, server: Server, *, public_key: bool = False
) -> dict[str, str]:
    """Return CONNECT's proof that we have *seed*; a server without log-in sends no *nonce*."""
    import nkeys  # loads libsodium, for those who use keys

    options = {}
    try:
        pair = nkeys.from_seed(bytearray(seed.encode()))
        if public_key:
            options["nkey"] = pair.public_key.decode()
        if nonce is not None:
            options["sig"] = base64.b64encode(pair.sign(nonce.encode())).decode()
        pair.wipe()
    except Exception as exc:  # nkeys, libsodium and base64 have one each for a bad seed
        raise AuthenticationFailed(
            str(server), f"expected a user's nkey seed (SU…) in {what}"
        ) from exc
    return options


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """What a connection is made of; durations are seconds."""

    servers: tuple[Server, ...] = (Server("127.0.0.1"),)
    credentials: Credentials = Credentials()
    #: Demands TLS of every server, with this context.  A `Server` that demands it by itself gets
    #: one with the system's authorities.
    tls: ssl.SSLContext | None = None
    #: The name the certificates must bear, if not the servers' own.
    tls_hostname: str | None = None
    #: For servers that begin with TLS and not with INFO.
    tls_handshake_first: bool = False
    #: For each server: TCP, TLS and log-in together.
    connect_timeout: float = 5.0
    #: How long a server may take no byte of what we write.
    write_timeout: float = 10.0
    #: How long a server may be silent before it is asked for a sign of life.
    ping_interval: float = 30.0
    #: What the server's monitoring calls this connection.
    name: str = "kombu_jetstream"
    inbox_prefix: str = "_INBOX"

    def tls_context(self, server: Server) -> ssl.SSLContext | None:
        """Return the context to use with *server*, None for plain text."""
        if self.tls is None and server.tls:
            return ssl.create_default_context()
        return self.tls


def dial(server: Server, deadline: float) -> socket.socket:
    """Return a connected, non-blocking socket, or raise the OSError of the last address.

    Each address has its share of the time: one that swallows packets (IPv6 without a route is
    the usual one) leaves some for the next.
    """
    addresses = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    problem = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            _connect(sock, address, (deadline - time.monotonic()) / (len(addresses) - tried))
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


def _connect(sock: socket.socket, address: Any, timeout: float) -> None:
    code = sock.connect_ex(address)
    if code in (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR):
        _, writable = poll_socket(sock.fileno(), False, True, max(timeout, 0.0))
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if writable else errno.ETIMEDOUT
    if code:
        raise OSError(code, os.strerror(code))


def encrypt(
    sock: socket.socket,
    server: Server,
    context: ssl.SSLContext,
    settings: ConnectionSettings,
    deadline: float,
) -> ssl.SSLSocket:
    """Return *sock* speaking TLS, after the handshake.

    CertificateRejected when a certificate does not please, ConnectionLost for the rest.
    """
    name = settings.tls_hostname or server.tls_name or server.host
    secure = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
    try:
        while True:
            try:
                secure.do_handshake()
                return secure
            except BLOCKED as exc:
                reading = isinstance(exc, ssl.SSLWantReadError)
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConnectionLost(
                    f"expected server {server} to finish the TLS handshake within "
                    f"{settings.connect_timeout:g} s"
                )
            poll_socket(secure.fileno(), reading, not reading, left)
    except OSError as exc:
        secure.close()
        if _openssl_reason(exc) in _NOT_TLS:
            hint = "; leave out tls_handshake_first" if settings.tls_handshake_first else ""
            raise ConnectionLost(f"server {server} does not answer with TLS{hint}") from exc
        raise certificate_error(server, exc) or ConnectionLost(
            f"TLS handshake with server {server}: {exc.strerror or exc}"
        ) from exc
    except BaseException:
        secure.close()
        raise


def certificate_error(server: Server, exc: OSError) -> CertificateRejected | None:
    """Return our error if a certificate is what *exc* is about.

    With TLS 1.3 a server's refusal of ours comes with the first read: by then the handshake is
    over, as the client sees it.
    """
    if isinstance(exc, ssl.SSLCertVerificationError):
        return CertificateRejected(str(server), exc.verify_message)
    reason = _openssl_reason(exc)
    if reason in _CLIENT_CERTIFICATE:
        return CertificateRejected(
            str(server), f"the server did not accept our certificate, or wants one ({reason})"
        )
    return None


def _openssl_reason(exc: OSError) -> str | None:
    # Python's own SSLErrors, and gevent's, have none.
    return getattr(exc, "reason", None) if isinstance(exc, ssl.SSLError) else None


def poll_socket(fd: int, reading: bool, writing: bool, timeout: float | None) -> tuple[bool, bool]:
    """Wait until *fd* can be read or written; return which (both after an error on it)."""
    poll = getattr(select, "poll", None)
    if poll is None:
        readable, writable, _ = select.select([fd] * reading, [fd] * writing, [], timeout)
        return bool(readable), bool(writable)
    poller = poll()
    poller.register(fd, select.POLLIN * reading | select.POLLOUT * writing)
    wait_ms = None if timeout is None else min(math.ceil(timeout * 1000), _MAX_POLL_MS)
    ready = poller.poll(wait_ms)
    if not ready:
        return False, False
    [(_, events)] = ready
    return bool(events & ~select.POLLOUT), bool(events & ~select.POLLIN)
