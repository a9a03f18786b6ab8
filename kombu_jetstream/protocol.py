"""The NATS client protocol: bytes in, events out; commands to bytes.

No socket, no clock, no logging: `connection` has those.  What a server sends is lines ended by
CRLF; only MSG and HMSG are followed by as many bytes as their line says, and another CRLF.

Three rules hold the parser:

1. The same bytes give the same events, however the network cuts them.  An error comes after the
   events before it, and is the last thing: a stream that broke once cannot be trusted again.
2. The work is linear in the bytes: one ``find`` for each line, a payload is copied once or twice,
   and an unfinished message is not looked at again until all of it is there.
3. The memory is bounded, whatever the peer sends: `MAX_LINE_BYTES`, `MAX_INFO_BYTES`,
   `MAX_MESSAGE_BYTES`.

Everything on the hot path stays ``bytes``; subjects are decoded by who wants to read them.

Sources: https://docs.nats.io/reference/reference-protocols/nats-protocol, ADR-4 (headers).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

from .errors import ProtocolError

__all__ = [
    "CMD_PING",
    "CMD_PONG",
    "OK",
    "PING",
    "PONG",
    "Err",
    "Event",
    "Headers",
    "Info",
    "Msg",
    "Parser",
    "Signal",
    "encode_connect",
    "encode_headers",
    "encode_pub",
    "encode_sub",
    "encode_unsub",
    "is_publish_subject",
    "is_subscription_subject",
    "parse_headers",
    "status_code",
]

#: Bytes of one line.  The server's own limit for lines it accepts (max_control_line) is 4 KiB,
#: what it sends has a subject, a reply and three numbers: a longer line is not NATS.
MAX_LINE_BYTES: Final = 64 * 1024

#: Bytes of an INFO line, which lists every server of a cluster.
MAX_INFO_BYTES: Final = 1024 * 1024

#: Bytes of headers and payload of one message.  A server refuses a max_payload over 64 MiB; it
#: may add headers of its own to what a client sent.
MAX_MESSAGE_BYTES: Final = 65 * 1024 * 1024

#: Servers number no subscriptions, we do; and no number of this protocol has more digits.
_MAX_SID: Final = 10**18
_MAX_DIGITS: Final = 19

_CRLF: Final = b"\r\n"
_HEADERS_START: Final = b"NATS/1.0"


class Msg(NamedTuple):
    """A message for subscription *sid*.

    *headers* is the raw block, ``b"NATS/1.0…\\r\\n\\r\\n"``, or empty; `parse_headers` and
    `status_code` read it.  *reply* is empty when the sender expects no answer.
    """

    sid: int
    subject: bytes
    reply: bytes
    headers: bytes
    payload: bytes


class Signal(Enum):
    """The events that say nothing but that they came."""

    PING = "PING"
    PONG = "PONG"
    OK = "+OK"


PING: Final = Signal.PING
PONG: Final = Signal.PONG
OK: Final = Signal.OK


@dataclass(frozen=True, slots=True)
class Err:
    """The server's ``-ERR``, without its quotes, spelled as the server spelled it."""

    message: str


@dataclass(frozen=True, slots=True)
class Info:
    """What the server says of itself, on connect and when its cluster changes."""

    server_id: str = ""
    server_name: str = ""
    version: tuple[int, ...] = ()
    headers: bool = False
    max_payload: int = 1024 * 1024
    tls_required: bool = False
    tls_available: bool = False
    auth_required: bool = False
    jetstream: bool = False
    nonce: str | None = None
    connect_urls: tuple[str, ...] = ()
    lame_duck: bool = False
    domain: str | None = None
    #: Level of the JetStream API (ADR-44), 0 before 2.11.
    api_level: int = 0
    cluster: str | None = None
    #: The INFO as it came, for what has no field here.
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, text: bytes) -> Info:
        """Read the JSON of an INFO line; ValueError or TypeError when it is not an INFO."""
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise TypeError("expected a JSON object")
        return cls(
            server_id=str(raw.get("server_id", "")),
            server_name=str(raw.get("server_name", "")),
            version=_version(str(raw.get("version", ""))),
            headers=bool(raw.get("headers")),
            max_payload=int(raw.get("max_payload", 1024 * 1024)),
            tls_required=bool(raw.get("tls_required")),
            tls_available=bool(raw.get("tls_available")),
            auth_required=bool(raw.get("auth_required")),
            jetstream=bool(raw.get("jetstream")),
            nonce=raw.get("nonce") or None,
            connect_urls=tuple(map(str, raw.get("connect_urls") or ())),
            lame_duck=bool(raw.get("ldm")),
            domain=raw.get("domain") or None,
            api_level=int(raw.get("api_lvl") or _level_of(_version(str(raw.get("version", ""))))),
            cluster=raw.get("cluster") or None,
            raw=raw,
        )


class Parser:
    """Turns what a server sends into events.

    `feed` returns the events that are complete.  Bytes that are not NATS give `ProtocolError`,
    at once if no event came before it, otherwise from the next call; `error` shows it before.
    """

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        #: Why no more is read, once the stream broke.
        self.error: ProtocolError | None = None
        self._max_message_bytes = max_message_bytes
        self._rest = bytearray()  # what is not a whole event yet
        self._needed = 0  # bytes the event in _rest has in all; 0 while its line is unfinished

    @property
    def buffered(self) -> int:
        """Bytes that wait for the rest of their event."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that *data* completes; ProtocolError when this is not NATS."""
        if self.error is not None:
            raise self.error
        events: list[Event] = []
        try:
            self._take(data, events)
        except ProtocolError as exc:
            self.error = exc
            if not events:
                raise
        return events

    def _take(self, data: bytes, events: list[Event]) -> None:
        """Put *data* behind what is unfinished, and read when that can bring anything."""
        rest = self._rest
        if rest:
            seen = len(rest)
            rest += data
            if len(rest) < self._needed:
                return
            if not self._needed and rest.find(_CRLF, seen - 1) < 0:
                _check_length(rest)
                return
            data = bytes(rest)
            rest.clear()
            self._needed = 0
        used = self._read(data, events)
        if used < len(data):
            rest += memoryview(data)[used:]

    def _read(self, data: bytes, events: list[Event]) -> int:
        """Append the events of *data*; return the offset of the first byte not used."""
        start, end, largest = 0, len(data), self._max_message_bytes
        while start < end:
            eol = data.find(_CRLF, start)
            if eol < 0:
                _check_length(data[start : start + MAX_INFO_BYTES + 2])
                break
            line = data[start:eol]
            if eol - start > MAX_LINE_BYTES:
                _check_length(line)
            words = line.split()
            verb = words[0] if words else b""
            fewest = _MESSAGE_WORDS.get(verb)
            if fewest is None:
                events.append(_event(verb, line))
                start = eol + 2
                continue
            if not fewest <= len(words) <= fewest + 1:
                _fail("a subject, a subscription and sizes", line)
            sid = _number(words[2], _MAX_SID, line)
            body = eol + 2
            stop = body + _number(words[-1], largest, line)
            if stop + 2 > end:
                self._needed = stop + 2 - start
                break
            text = body
            if verb == b"HMSG":
                text += _number(words[-2], stop - body, line)
                if not data.startswith(_HEADERS_START, body, text):
                    _fail("headers to begin with NATS/1.0", line)
            if data[stop : stop + 2] != _CRLF:
                _fail("CRLF after the payload", line)
            reply = words[3] if len(words) > fewest else b""
            events.append(_new(Msg, (sid, words[1], reply, data[body:text], data[text:stop])))
            start = stop + 2
        return start


Event: TypeAlias = Msg | Info | Err | Signal

#: Words of a message's line when it has no reply subject; it has one more otherwise.
_MESSAGE_WORDS: Final = {b"MSG": 4, b"HMSG": 5}

_SIGNALS: Final = {signal.value.encode(): signal for signal in Signal}

_VERBS: Final = ("MSG", "HMSG", "PING", "PONG", "+OK", "-ERR", "INFO")

#: ``Msg(…)`` without the argument handling of NamedTuple's constructor: a tenth of the parser's
#: time.
_new: Final = tuple.__new__


def _event(verb: bytes, line: bytes) -> Event:
    """Return the event of a line that has no payload."""
    signal = _SIGNALS.get(verb)
    if signal is not None:
        return signal
    if verb == b"-ERR":
        return Err(line[4:].strip().strip(b"'").decode("utf-8", "replace"))
    if verb == b"INFO":
        try:
            return Info.from_json(line[4:])
        except (ValueError, TypeError, RecursionError) as exc:
            raise ProtocolError(f"expected JSON in INFO, got {_cut(line)!r} ({exc})") from exc
    _fail(f"one of {', '.join(_VERBS)}", line)


def _number(word: bytes, limit: int, line: bytes) -> int:
    number = _natural(word)
    if not 0 <= number <= limit:
        _fail(f"a number from 0 to {limit}", line)
    return number


# Cached, as subscriptions and sizes repeat.
@lru_cache(maxsize=4096)
def _natural(word: bytes) -> int:
    """Return the natural number *word* is, or -1."""
    # `int` takes signs and underscores, and its time grows with the square of the digits.
    return int(word) if word.isdigit() and len(word) <= _MAX_DIGITS else -1


def _check_length(line: bytes | bytearray) -> None:
    """Raise ProtocolError when *line*, which may lack its end, is too long for any."""
    limit = MAX_INFO_BYTES if line.startswith(b"INFO") else MAX_LINE_BYTES
    # One more may be the first byte of CRLF.
    if len(line) > limit + line.endswith(b"\r"):
        _fail(f"a line of at most {limit} bytes", bytes(line[:64]))


def _fail(expected: str, line: bytes) -> NoReturn:
    raise ProtocolError(f"expected {expected}, got {_cut(line)!r}")


def _cut(line: bytes) -> bytes:
    return line if len(line) <= 64 else line[:61] + b"..."


def _level_of(version: tuple[int, ...]) -> int:
    """Return the API level of a server whose INFO does not say: 2.11 has 1, and says so only in
    answer to ``$JS.API.INFO``."""
    return 1 if version >= (2, 11) else 0


def _version(text: str) -> tuple[int, ...]:
    """Return the numbers of ``2.12.0-RC.1`` as ``(2, 12, 0)``."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("-")[0]))


CMD_PING: Final = b"PING\r\n"
CMD_PONG: Final = b"PONG\r\n"


def encode_connect(options: Mapping[str, Any]) -> bytes:
    """Return the CONNECT command; *options* are the protocol's names."""
    return b"CONNECT %b\r\n" % json.dumps(options, separators=(",", ":")).encode()


def encode_pub(subject: bytes, payload: bytes, reply: bytes = b"", headers: bytes = b"") -> bytes:
    """Return PUB, or HPUB when *headers* (a block of `encode_headers`) is not empty.

    Nothing is checked here: a subject with a space would be another command.
    """
    if headers:
        size = len(headers)
        return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (
            subject,
            reply,
            size,
            size + len(payload),
            headers,
            payload,
        )
    return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(payload), payload)


def encode_sub(subject: bytes, sid: int, queue: bytes = b"") -> bytes:
    """Return SUB; of the subscriptions with the same *queue* group one gets each message."""
    return b"SUB %b %b %d\r\n" % (subject, queue, sid)


def encode_unsub(sid: int, max_msgs: int = 0) -> bytes:
    """Return UNSUB; *max_msgs* leaves the subscription until that many came in all."""
    return b"UNSUB %d %d\r\n" % (sid, max_msgs) if max_msgs else b"UNSUB %d\r\n" % sid


@dataclass(frozen=True, slots=True)
class Headers:
    """A message's headers: *fields* by name as sent, the first value if one is repeated.

    The server's own messages have a *status* (404, 408, 409, 100, 503) and a *description*.
    """

    status: int | None
    description: str
    fields: dict[str, str]


#: What a header's name may be: a token of HTTP (RFC 9110), as nats-py and the server have it.
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


def encode_headers(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return the block for HPUB, empty when there are no *fields*.

    ValueError for a name that is no token and for a value with a line break.  Spaces around a
    value are not kept by who reads them.
    """
    lines = []
    for name, value in fields:
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"expected a header name of letters, digits and '-', got {name!r}")
        if "\r" in value or "\n" in value:
            raise ValueError(f"expected header {name!r} without line breaks, got {value!r}")
        lines.append(f"{name}: {value}\r\n")
    return f"NATS/1.0\r\n{''.join(lines)}\r\n".encode() if lines else b""


def parse_headers(raw: bytes) -> Headers:
    """Read a block of headers; lines without a colon are left out, bad UTF-8 becomes U+FFFD.

    A message's headers are its sender's: whatever they are, reading them does not raise.
    """
    first, *lines = raw.split(_CRLF)
    status, _, description = (
        first[len(_HEADERS_START) :].decode("utf-8", "replace").strip().partition(" ")
    )
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if colon and name:
            fields.setdefault(name, value.strip(" \t"))
    return Headers(status_code(raw) or None, description if status.isdigit() else "", fields)


def status_code(headers: bytes) -> int:
    """Return the status of a block of headers (404 of ``NATS/1.0 404 No Messages``), or 0."""
    digits = headers[9:12]
    return int(digits) if headers[8:9] == b" " and digits.isdigit() else 0


_LITERAL: Final = rb"[^\x00-\x20\x7f*>.]+"
_PUBLISH_SUBJECT: Final = re.compile(rb"%b(?:\.%b)*" % (_LITERAL, _LITERAL))
_SUBSCRIPTION_SUBJECT: Final = re.compile(rb"(?:(?!>\.)[^\x00-\x20\x7f.]+\.)*[^\x00-\x20\x7f.]+")


# Cached, as a process publishes to few subjects: a hit costs a tenth of the match.
@lru_cache(maxsize=4096)
def is_publish_subject(subject: bytes) -> bool:
    """Whether a message may be sent to *subject*: no wildcard, space or empty token."""
    return _PUBLISH_SUBJECT.fullmatch(subject) is not None


def is_subscription_subject(subject: bytes) -> bool:
    """Whether *subject* can be subscribed to: as for publish, ``*`` and a last ``>`` allowed."""
    return _SUBSCRIPTION_SUBJECT.fullmatch(subject) is not None
