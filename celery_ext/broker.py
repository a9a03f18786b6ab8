"""The broker behind an application, for programs in which nothing is hot.

Commands, probes and exporters speak to JetStream through nats-py's asyncio client.  `connect` makes
one from the application's own settings, so that they need none of their own, and turns everything
that can go wrong into the errors of `kombu_jetstream.errors`::

    async with connect(app) as broker:
        answer = await broker.api("STREAM.INFO.celery_dlq")

A `Broker` lives for one piece of work.  It does not reconnect: what loses its connection fails, and
says so, and the caller begins again.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import nats.errors
from kombu.utils.uuid import uuid
from nats.aio.client import Client
from nats.aio.msg import Msg

from kombu_jetstream import topology
from kombu_jetstream.endpoint import ConnectionSettings, Server, certificate_error
from kombu_jetstream.errors import (
    ApiError,
    AuthenticationFailed,
    ConnectionLost,
    JetStreamTransportError,
    JetStreamUnavailable,
    MessageTooLarge,
    NoResponders,
    NoServers,
    OptionsError,
    PermissionDenied,
    ProtocolError,
    PublishRejected,
    RequestTimeout,
    TLSNotOffered,
)
from kombu_jetstream.jetstream import (
    API_TIMEOUT,
    CLUSTER_NOT_AVAILABLE,
    CONSUMER_NOT_FOUND,
    NOT_ENABLED,
    NOT_ENABLED_FOR_ACCOUNT,
    STREAM_NOT_FOUND,
)
from kombu_jetstream.options import Options
from kombu_jetstream.protocol import Info, parse_headers
from kombu_jetstream.topology import Names
from kombu_jetstream.transport import Transport

__all__ = [
    "Ack",
    "Broker",
    "Stored",
    "connect",
    "gather",
    "open_client",
    "options_of",
    "run",
    "settings_of",
]

A = TypeVar("A")
T = TypeVar("T")

#: Messages asked for at once when a stream is read.
BATCH = 500

#: Requests under way at once in `gather`; the server answers in order, more would only wait.
CONCURRENCY = 64

#: Code of nats-server's errors.json.
NO_MESSAGE = 10037

#: Seconds for the end of a connection that was refused.
ABORT_TIMEOUT = 0.2

#: Seconds after which the server forgets a reader that died.
READER_THRESHOLD = 30.0

_DENIED = re.compile(r'permissions violation for (\w+) to "([^"]+)"', re.IGNORECASE)
_REFUSED = re.compile(r"authorization violation|authentication|user .*expired", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stored:
    """A message as a stream keeps it."""

    seq: int
    subject: str
    headers: Mapping[str, str]
    #: Empty when only headers were asked for; `size` has its bytes all the same.
    payload: bytes
    #: When it was stored, nanoseconds since the epoch: with `seq` the identity of a message,
    #: as a stream that was deleted and made again counts from 1.
    stored_ns: int
    size: int

    @property
    def stored_at(self) -> float:
        """When it was stored, in seconds since the epoch."""
        return self.stored_ns / 1e9


@dataclass(frozen=True, slots=True)
class Ack:
    """The stream's confirm of a publish."""

    seq: int
    duplicate: bool


def settings_of(connection: Any) -> tuple[Options, ConnectionSettings]:
    """Return what a kombu `Connection` is configured with; `OptionsError` if it is not ours."""
    transport = connection.transport
    if not isinstance(transport, Transport):
        raise OptionsError(
            f"expected broker_url to be jetstream://…, got {connection.as_uri()}", "broker_url"
        )
    return transport.settings()


def options_of(app: Any) -> Options:
    """Return the options of an *app*; `OptionsError` if its broker is not ours."""
    with app.connection_for_write() as connection:
        return settings_of(connection)[0]


@asynccontextmanager
async def connect(app: Any, *, timeout: float = API_TIMEOUT) -> AsyncIterator[Broker]:
    """Connect to the broker of a Celery *app*; closed at the end of the block.

    The servers of the URL are tried in turn, then those of the next URL if ``broker_url`` has
    several.  *timeout* is seconds for one request.  Raises `OptionsError`, `NoServers`, or what a
    server has against us: `AuthenticationFailed`, `TLSNotOffered`, `CertificateRejected`.
    """
    with app.connection_for_write() as connection:
        for left in reversed(range(max(1, len(connection.alt)))):
            options, settings = settings_of(connection)
            settings = replace(settings, connect_timeout=min(settings.connect_timeout, timeout))
            try:
                client, server = await open_client(settings)
            except ConnectionLost:
                if not left:
                    raise
                connection.maybe_switch_next()
            else:
                break
    broker = Broker(client, options, server, timeout)
    try:
        yield broker
    finally:
        await client.close()


def run(app: Any, work: Callable[[Broker], Awaitable[T]], *, timeout: float = API_TIMEOUT) -> T:
    """Connect, do *work*, close, and return what it returned; for callers without a loop."""

    async def connected() -> T:
        async with connect(app, timeout=timeout) as broker:
            return await work(broker)

    return asyncio.run(connected())


async def gather(
    do: Callable[[A], Awaitable[T]], items: Iterable[A], at_once: int = CONCURRENCY
) -> list[T]:
    """Return what *do* returns for each of *items*, at most *at_once* of it at a time.

    The first error ends it.
    """
    results: dict[int, T] = {}
    left = iter(enumerate(items))

    async def work() -> None:
        for index, item in left:  # all take from the same
            results[index] = await do(item)

    tasks = [asyncio.ensure_future(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return [results[index] for index in range(len(results))]


# -- connecting ------------------------------------------------------------------------------------


class _Client(Client):
    """nats-py's client, which logs in over plain text when a server offers no TLS (facts 12)."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.info = Info()
        #: called with each permission the server denies, and with the loss of the connection
        self.failed: Callable[[PermissionDenied | ConnectionLost], None] = lambda error: None
        self.opened = False

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection:
            self.info = Info.from_json(json.dumps(info).encode())
            if "tls" in self.options and not self.options["tls_handshake_first"]:
                if not (self.info.tls_required or self.info.tls_available):
                    raise TLSNotOffered(str(self.server))
                info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def on_error(self, error: Exception) -> None:
        """Raise what happens while connecting, instead of trying the same server for ever."""
        if not self.opened:
            raise error
        found = _DENIED.search(str(error))
        if found:
            operation = "publish" if found[1].lower() == "publish" else "subscribe"
            self.failed(PermissionDenied(operation, found[2]))

    async def on_closed(self) -> None:
        """Tell that the connection is gone; nobody makes another."""
        self.failed(ConnectionLost(f"server {self.server} closed the connection"))


async def open_client(settings: ConnectionSettings) -> tuple[_Client, Server]:
    """Connect to the first server that answers; the caller closes the client."""
    causes: list[tuple[str, BaseException | str]] = []
    for server in settings.servers:
        client = _Client(server)
        try:
            await _open(client, server, settings)
        except ConnectionLost as exc:
            if isinstance(exc, ProtocolError) and len(settings.servers) == 1:
                raise
            causes.append((str(server), exc.reason))
        else:
            return client, server
    raise NoServers(causes)


async def _open(client: _Client, server: Server, settings: ConnectionSettings) -> None:
    # Reads the files, and so says what is wrong with them; nats-py would fail in its own words.
    settings.credentials.connect_options(server, "nonce")
    try:
        await asyncio.wait_for(
            client.connect(
                [f"{'tls' if settings.tls else 'nats'}://{server}"],
                error_cb=client.on_error,
                closed_cb=client.on_closed,
                allow_reconnect=False,
                reconnect_time_wait=0,
                connect_timeout=settings.connect_timeout,  # type: ignore[arg-type]
                ping_interval=settings.ping_interval,  # type: ignore[arg-type]
                name="celery jetstream",
                inbox_prefix=settings.inbox_prefix,
                **_tls(settings, server),
                **_login(settings),
            ),
            settings.connect_timeout,
        )
        client.opened = True
    except BaseException as exc:
        await _abort(client)
        if isinstance(exc, (OSError, nats.errors.Error, asyncio.TimeoutError)):
            raise _refusal(server, settings, exc) from exc
        raise


async def _abort(client: Client) -> None:
    # It never was open, and nobody is interested in how it ends.  After a failed TLS handshake
    # nats-py would wait for the transport for ever.
    with suppress(Exception):
        await asyncio.wait_for(client.close(), ABORT_TIMEOUT)


def _tls(settings: ConnectionSettings, server: Server) -> dict[str, Any]:
    context = settings.tls_context(server)
    if context is None:
        return {}
    return {
        "tls": context,
        "tls_hostname": settings.tls_hostname or server.tls_name or server.host,
        "tls_handshake_first": settings.tls_handshake_first,
    }


def _login(settings: ConnectionSettings) -> dict[str, Any]:
    credentials = settings.credentials
    if credentials.credentials_file is not None:
        return {"user_credentials": credentials.credentials_file}
    if credentials.nkey_seed_file is not None:
        return {"nkeys_seed_str": Path(credentials.nkey_seed_file).read_text().strip()}
    if credentials.token is not None:
        return {"token": credentials.token}
    if credentials.user is not None:
        return {"user": credentials.user, "password": credentials.password or ""}
    return {}


def _refusal(
    server: Server, settings: ConnectionSettings, exc: BaseException
) -> JetStreamTransportError:
    """Return our error for one of asyncio, OpenSSL or nats-py while connecting."""
    if isinstance(exc, OSError):
        rejected = certificate_error(server, exc)
        if rejected is not None:
            return rejected
        if isinstance(exc, ssl.SSLError):
            hint = "; leave out tls_handshake_first" if settings.tls_handshake_first else ""
            return ConnectionLost(f"TLS handshake with server {server}: {exc.reason}{hint}")
    if isinstance(exc, (asyncio.TimeoutError, TimeoutError)):
        return ConnectionLost(f"no answer within {settings.connect_timeout:g} s")
    if isinstance(exc, OSError):
        # asyncio puts words of its own into strerror; getaddrinfo's numbers are not errno's.
        code = exc.errno or 0
        return ConnectionLost(os.strerror(code) if code > 0 else exc.strerror or str(exc))
    text = str(exc).removeprefix("nats: ").strip("'")
    if _REFUSED.search(text):
        return AuthenticationFailed(str(server), text)
    if "INFO" in text or "json" in text:
        hint = "" if settings.tls_handshake_first else ", or a server that begins with TLS"
        return ProtocolError(f"no INFO line, it is another service{hint}")
    return ConnectionLost(text or type(exc).__name__)


# -- connected -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request under way, for the server's refusal to find."""

    subject: str
    failed: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Broker:
    """A live connection to the broker of one application and namespace."""

    def __init__(self, client: _Client, options: Options, server: Server, timeout: float) -> None:
        self.client = client
        self.options = options
        #: the one connected to
        self.server = server
        self.timeout = timeout
        self.names = Names(options.namespace)
        self.levels = topology.levels(options)
        domain = options.jetstream_domain
        self.prefix = f"$JS.{domain}.API." if domain else "$JS.API."
        self._waiting: set[_Waiting] = set()
        self._there: set[str] = set()
        client.failed = self._failed

    @property
    def info(self) -> Info:
        """What the server said of itself when the connection was made."""
        return self.client.info

    @property
    def version(self) -> str:
        return ".".join(map(str, self.info.version))

    def _failed(self, error: PermissionDenied | ConnectionLost) -> None:
        """End the requests that will get no answer.

        nats-py would let them wait: the server says separately what it denies.  Without a reply
        subject, or a connection, none is answered.
        """
        for waiting in self._waiting:
            if waiting.failed.done():
                continue
            if isinstance(error, ConnectionLost) or error.operation == "subscribe":
                waiting.failed.set_exception(error)
            elif waiting.subject.lower() == error.subject.lower():
                # nats-py hands the server's text on in lower case.
                waiting.failed.set_exception(PermissionDenied("publish", waiting.subject))

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Msg:
        """Return the answer to one request.

        Raises `RequestTimeout`, `NoResponders`, `PermissionDenied` or `ConnectionLost`.
        """
        timeout = timeout if timeout is not None else self.timeout
        waiting = _Waiting(subject)
        self._waiting.add(waiting)
        asking = asyncio.ensure_future(
            self.client.request(
                subject, payload, timeout=timeout, headers=dict(headers) if headers else None
            )
        )
        either: set[asyncio.Future[Any]] = {asking, waiting.failed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if waiting.failed.done():
                waiting.failed.result()
            return await asking
        except nats.errors.NoRespondersError as exc:
            raise NoResponders(subject) from exc
        except (nats.errors.TimeoutError, asyncio.TimeoutError) as exc:
            raise RequestTimeout(subject, timeout) from exc
        except (nats.errors.Error, OSError) as exc:
            raise ConnectionLost(str(exc).removeprefix("nats: ")) from exc
        finally:
            self._waiting.discard(waiting)
            asking.cancel()
            waiting.failed.cancel()

    async def ping(self) -> None:
        """Return when the server has answered to all that was sent; raises as `request`."""
        try:
            await self.client.flush(max(1, math.ceil(self.timeout)))
        except (nats.errors.TimeoutError, asyncio.TimeoutError) as exc:
            raise RequestTimeout("PING", self.timeout) from exc
        except (nats.errors.Error, OSError) as exc:
            raise ConnectionLost(str(exc).removeprefix("nats: ")) from exc

    async def api(self, operation: str, body: Any = None) -> dict[str, Any]:
        """Return the answer to a request to JetStream's API.

        Raises `ApiError` for what the server refuses, `JetStreamUnavailable` without JetStream,
        and as `request`.  A cluster without a leader is asked again for as long as one request may
        take.
        """
        payload = json.dumps(body).encode() if body is not None else b""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return self._unwrap(await self._ask(operation, payload))
            except ApiError as exc:
                if exc.err_code != CLUSTER_NOT_AVAILABLE or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.25)

    async def _ask(self, operation: str, payload: bytes) -> dict[str, Any]:
        try:
            answer = await self.request(self.prefix + operation, payload)
        except NoResponders:
            if not self.info.jetstream and not self.options.jetstream_domain:
                raise JetStreamUnavailable(str(self.server)) from None
            raise
        return dict(json.loads(answer.data))

    def _unwrap(self, answer: dict[str, Any]) -> dict[str, Any]:
        error = answer.get("error")
        if error is None:
            return answer
        err_code, description = error.get("err_code", 0), error.get("description", "")
        if err_code in (NOT_ENABLED, NOT_ENABLED_FOR_ACCOUNT):
            raise JetStreamUnavailable(str(self.server), description)
        raise ApiError(error.get("code", 0), err_code, description)

    async def find(self, operation: str, body: Any = None) -> dict[str, Any] | None:
        """Return the answer of `api`, or None if the stream or consumer does not exist."""
        try:
            return await self.api(operation, body)
        except ApiError as exc:
            if exc.err_code in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND):
                return None
            raise

    async def publish(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> Ack:
        """Store one message.  Raises `PublishRejected`, `MessageTooLarge`, and as `request`."""
        self.check_size(payload, headers)
        return self.ack_of(subject, await self.request(subject, payload, headers))

    def check_size(self, payload: bytes, headers: Mapping[str, str]) -> None:
        """Raise `MessageTooLarge` for what the server would end the connection for."""
        size = len(payload) + 16 + sum(len(k) + len(v.encode()) + 4 for k, v in headers.items())
        if size > self.info.max_payload:
            raise MessageTooLarge(size, self.info.max_payload)

    def ack_of(self, subject: str, answer: Msg) -> Ack:
        """Return the confirm in *answer*; `PublishRejected` if it is a refusal."""
        try:
            said = json.loads(answer.data)
        except ValueError:
            raise PublishRejected(subject, 0, f"unreadable answer {answer.data[:80]!r}") from None
        error = said.get("error")
        if error is not None:
            raise PublishRejected(subject, error.get("err_code", 0), error.get("description", ""))
        return Ack(int(said["seq"]), bool(said.get("duplicate")))

    async def publish_batch(self, messages: Sequence[tuple[str, bytes, Mapping[str, str]]]) -> int:
        """Store two messages or more in one stream, all or none, and return the last's sequence.

        They get consecutive sequences.  The stream needs ``allow_atomic`` (2.12, ADR-50).  Raises
        `PublishRejected` if any of them is refused, `MessageTooLarge`, and as `request`: then it
        is not known whether they are stored.
        """
        batch_id = uuid()
        numbered = [
            (subject, payload, {**headers, **_batch_headers(batch_id, number, len(messages))})
            for number, (subject, payload, headers) in enumerate(messages, 1)
        ]
        for _, payload, headers in numbered:
            self.check_size(payload, headers)
        (subject, payload, headers), *others = numbered
        accepted = await self.request(subject, payload, headers)
        if accepted.data:  # an empty answer says that the batch has begun
            self.ack_of(subject, accepted)
            raise PublishRejected(subject, 0, "the stream takes no atomic batches")
        for subject, payload, headers in others[:-1]:
            await self.client.publish(subject, payload, headers=dict(headers))
        subject, payload, headers = others[-1]
        return self.ack_of(subject, await self.request(subject, payload, headers)).seq

    # -- reading streams ---------------------------------------------------------------------------

    async def get(self, stream: str, **which: Any) -> Stored | None:
        """Return one message, or None: ``seq=…``, ``last_by_subj=…``, or the next from ``seq`` on
        with ``next_by_subj=…``.  A stream that does not exist has none."""
        try:
            return await self.get_strictly(stream, **which)
        except NoResponders:
            return None

    async def get_strictly(self, stream: str, **which: Any) -> Stored | None:
        """Return what `get` does; `NoResponders` without the stream, or a leader of it."""
        subject = f"{self.prefix}DIRECT.GET.{stream}"
        if not await self._answers_direct_get(stream):
            raise NoResponders(subject)
        answer = await self.request(subject, json.dumps(which).encode())
        if "Nats-Sequence" not in (answer.headers or {}):
            return None
        return _of_direct_get(answer)

    async def get_from_leader(self, stream: str, seq: int) -> Stored | None:
        """Return one message as the stream's leader has it, or None.

        `get` may be answered by a copy that has not heard of the last deletes yet.
        """
        try:
            answer = await self.find(f"STREAM.MSG.GET.{stream}", {"seq": seq})
        except ApiError as exc:
            if exc.err_code == NO_MESSAGE:
                return None
            raise
        return _of_message(answer["message"]) if answer is not None else None

    async def _answers_direct_get(self, stream: str) -> bool:
        """Tell whether ``DIRECT.GET`` can be asked about *stream*.

        Servers before 2.11 give no answer at all when it does not exist (facts 15).
        """
        if self.info.api_level or stream in self._there:
            return True
        try:
            if await self.find(f"STREAM.INFO.{stream}") is None:
                return False
        except PermissionDenied:  # a worker's: it may read the registry, and not ask whether it is
            pass
        self._there.add(stream)
        return True

    async def pages(self, stream: str, subject: str, size: int) -> AsyncIterator[list[Stored]]:
        """Yield the messages on *subject* (wildcards allowed) in order, up to *size* at a time.

        Whole messages, of a stream of any kind; nothing is made on the server for it.
        """
        seq = 1
        while True:
            page = await self._page(stream, subject, seq, size)
            if not page:
                return
            yield page
            seq = page[-1].seq + 1

    async def _page(self, stream: str, subject: str, seq: int, size: int) -> list[Stored]:
        if not await self._answers_direct_get(stream):
            return []
        ask = {"seq": seq, "next_by_subj": subject, "batch": size}
        async with self._inbox() as (inbox, arrived):
            await self.client.publish(
                f"{self.prefix}DIRECT.GET.{stream}", json.dumps(ask).encode(), reply=inbox
            )
            page: list[Stored] = []
            while True:
                msg = await self._next(arrived, f"DIRECT.GET.{stream}")
                headers = msg.headers or {}
                if "Nats-Sequence" not in headers:
                    return page  # 204 the batch's end, 404 nothing there, 503 no such stream
                page.append(_of_direct_get(msg))
                if "Nats-Num-Pending" not in headers:  # before 2.11: one message, no batches
                    return page

    async def headers(
        self,
        stream: str,
        subject: str,
        *,
        start_seq: int = 1,
        stop_seq: int | None = None,
        start_time: float | None = None,
    ) -> AsyncIterator[Stored]:
        """Yield the messages of a "limits" stream on *subject* in order, without payloads.

        From *start_seq* or, if given, from what was stored at *start_time* (seconds since the
        epoch); before *stop_seq*.  A stream that does not exist has none.
        """
        reader = await self.find(
            f"CONSUMER.CREATE.{stream}",
            {"stream_name": stream, "config": _reader_config(subject, start_seq, start_time)},
        )
        if reader is None:
            return
        left = int(reader["num_pending"])
        take = f"{self.prefix}CONSUMER.MSG.NEXT.{stream}.{reader['name']}"
        try:
            async with self._inbox() as (inbox, arrived):
                while left:
                    size = min(left, BATCH)
                    await self.client.publish(
                        take, b'{"batch":%d,"no_wait":true}' % size, reply=inbox
                    )
                    for _ in range(size):
                        msg = await self._next(arrived, take)
                        if not msg.reply:
                            return  # fewer than there were: some were deleted meanwhile
                        stored = _of_delivery(msg)
                        if stop_seq is not None and stored.seq >= stop_seq:
                            return
                        yield stored
                    left -= size
        finally:
            await self._drop_reader(stream, reader)

    async def count(self, stream: str, subject: str, *, start_time: float) -> int:
        """Return how many messages of a "limits" stream were stored since *start_time*."""
        reader = await self.find(
            f"CONSUMER.CREATE.{stream}",
            {"stream_name": stream, "config": _reader_config(subject, 1, start_time)},
        )
        if reader is None:
            return 0
        await self._drop_reader(stream, reader)
        return int(reader["num_pending"])

    async def _drop_reader(self, stream: str, reader: dict[str, Any]) -> None:
        """Delete a reader, without waiting: it would go by itself, `READER_THRESHOLD` later."""
        if self.client.is_connected:
            await self.client.publish(f"{self.prefix}CONSUMER.DELETE.{stream}.{reader['name']}")

    async def subjects(self, stream: str, subject: str) -> dict[str, int]:
        """Return the subjects of a stream that match *subject*, with their number of messages."""
        found: dict[str, int] = {}
        while True:
            answer = await self.find(
                f"STREAM.INFO.{stream}", {"subjects_filter": subject, "offset": len(found)}
            )
            if answer is None:
                return found
            page = answer["state"].get("subjects") or {}
            found.update(page)
            if not page or len(found) >= int(answer.get("total") or 0):
                return found

    @asynccontextmanager
    async def _inbox(self) -> AsyncIterator[tuple[str, asyncio.Queue[Msg]]]:
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self.client.new_inbox()
        subscription = await self.client.subscribe(inbox, cb=arrived.put)
        try:
            yield inbox, arrived
        finally:
            if self.client.is_connected:
                await subscription.unsubscribe()

    async def _next(self, arrived: asyncio.Queue[Msg], subject: str) -> Msg:
        if not arrived.empty():
            return arrived.get_nowait()
        waiting = _Waiting(subject if subject.startswith("$") else self.prefix + subject)
        self._waiting.add(waiting)
        coming = asyncio.ensure_future(arrived.get())
        either: set[asyncio.Future[Any]] = {coming, waiting.failed}
        try:
            await asyncio.wait(either, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            if waiting.failed.done():
                waiting.failed.result()
            if coming.done():
                return coming.result()
        finally:
            self._waiting.discard(waiting)
            coming.cancel()
            waiting.failed.cancel()
        if not self.client.is_connected:
            raise ConnectionLost("the server closed the connection")
        raise RequestTimeout(waiting.subject, self.timeout)


def _batch_headers(batch_id: str, number: int, size: int) -> dict[str, str]:
    fields = {"Nats-Batch-Id": batch_id, "Nats-Batch-Sequence": str(number)}
    return {**fields, "Nats-Batch-Commit": "1"} if number == size else fields


def _reader_config(subject: str, start_seq: int, start_time: float | None) -> dict[str, Any]:
    """Return the configuration of a consumer that reads headers and leaves no trace."""
    start: dict[str, Any] = {"deliver_policy": "by_start_sequence", "opt_start_seq": start_seq}
    if start_time is not None:
        moment = datetime.fromtimestamp(max(0.0, start_time)).astimezone()
        start = {"deliver_policy": "by_start_time", "opt_start_time": moment.isoformat()}
    return {
        **start,
        "ack_policy": "none",
        "replay_policy": "instant",
        "headers_only": True,
        "filter_subject": subject,
        "mem_storage": True,
        "num_replicas": 1,
        "inactive_threshold": int(READER_THRESHOLD * 1e9),
    }


def _of_direct_get(msg: Msg) -> Stored:
    headers = dict(msg.headers or {})
    return Stored(
        seq=int(headers["Nats-Sequence"]),
        subject=headers["Nats-Subject"],
        headers=headers,
        payload=msg.data,
        stored_ns=_nanoseconds(headers["Nats-Time-Stamp"]),
        size=len(msg.data),
    )


def _of_message(message: dict[str, Any]) -> Stored:
    """Return a message as ``STREAM.MSG.GET`` has it."""
    payload = base64.b64decode(message.get("data") or "")
    raw = base64.b64decode(message.get("hdrs") or "")
    return Stored(
        seq=int(message["seq"]),
        subject=message["subject"],
        headers=parse_headers(raw).fields if raw else {},
        payload=payload,
        stored_ns=_nanoseconds(message["time"]),
        size=len(payload),
    )


def _of_delivery(msg: Msg) -> Stored:
    headers = dict(msg.headers or {})
    words = msg.reply.split(".")
    at = 2 if len(words) == 9 else 4  # the newer form has domain and account (ADR-15)
    return Stored(
        seq=int(words[at + 3]),
        subject=msg.subject,
        headers=headers,
        payload=msg.data,
        stored_ns=int(words[at + 5]),
        size=int(headers.get("Nats-Msg-Size") or len(msg.data)),
    )


def _nanoseconds(text: str) -> int:
    """Return an RFC 3339 moment in UTC as nanoseconds since the epoch; datetime has micro."""
    seconds, _, fraction = text.removesuffix("Z").partition(".")
    whole = int(datetime.fromisoformat(f"{seconds}+00:00").timestamp())
    return whole * 10**9 + int(f"{fraction:0<9}"[:9])
