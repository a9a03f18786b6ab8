"""The protocol against random input, and against nats-py's as the oracle."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.protocol import command as theirs
from nats.protocol.parser import Parser as TheirParser

from kombu_jetstream import protocol
from kombu_jetstream.errors import ProtocolError
from kombu_jetstream.protocol import (
    CMD_PING,
    CMD_PONG,
    MAX_LINE_BYTES,
    Err,
    Msg,
    Parser,
    Signal,
    encode_headers,
    encode_pub,
    encode_sub,
    encode_unsub,
    parse_headers,
)

SUBJECTS = st.lists(st.text("abcXYZ019-_$@", min_size=1, max_size=8), min_size=1, max_size=4).map(
    ".".join
)
NAMES = st.text("abcXYZ-_0189", min_size=1, max_size=12)
# What surrounds a value is not kept by anybody who reads it.
VALUES = st.text(
    st.characters(exclude_characters="\r\n", exclude_categories=["Cs", "Cc"]), max_size=20
).map(str.strip)
FIELDS = st.dictionaries(NAMES, VALUES, min_size=1, max_size=4)
PAYLOADS = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"\r\n", b"PING\r\n", b"MSG a 1 1\r\nx\r\n", b"\r", b"\n\r\n"]),
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, protocol.Event]:
    subject = draw(SUBJECTS).encode()
    reply = draw(st.one_of(st.just(""), SUBJECTS)).encode()
    sid = draw(st.integers(1, 10**9))
    headers = draw(st.one_of(st.just(b""), FIELDS.map(lambda f: encode_headers(f.items()))))
    payload = draw(PAYLOADS)
    words = [b"HMSG" if headers else b"MSG", subject, b"%d" % sid, reply]
    words += [b"%d" % len(headers)] if headers else []
    words += [b"%d" % (len(headers) + len(payload))]
    line = b" ".join(filter(None, words))
    wire = line + b"\r\n" + headers + payload + b"\r\n"
    return wire, Msg(sid, subject, reply, headers, payload)


@st.composite
def others(draw: st.DrawFn) -> tuple[bytes, protocol.Event]:
    signal = draw(st.sampled_from([*Signal, None]))
    if signal is not None:
        return signal.value.encode() + b"\r\n", signal
    text = draw(st.text('abc DEF"', max_size=20)).strip()
    return f"-ERR '{text}'\r\n".encode(), Err(text)


STREAMS = st.lists(st.one_of(messages(), others()), max_size=8)


def read_all(chunks: list[bytes]) -> tuple[list[protocol.Event], bool]:
    """Return the events of *chunks*, and whether an error came after them."""
    parser = Parser()
    events: list[protocol.Event] = []
    try:
        for chunk in chunks:
            events += parser.feed(chunk)
        parser.feed(b"")
    except ProtocolError:
        return events, True
    return events, False


def cut(wire: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(wire) + 1) for place in places), len(wire)]
    return [wire[start:stop] for start, stop in pairwise(bounds)]


@given(STREAMS, st.lists(st.integers(0, 10**6), max_size=30))
def test_events_do_not_depend_on_how_bytes_are_cut(
    stream: list[tuple[bytes, protocol.Event]], places: list[int]
) -> None:
    wire = b"".join(part for part, _ in stream)
    expected = [event for _, event in stream]

    assert read_all([wire]) == (expected, False)
    assert read_all(cut(wire, places)) == (expected, False)
    assert read_all([wire[i : i + 1] for i in range(len(wire))]) == (expected, False)


@given(STREAMS, st.binary(max_size=60), st.lists(st.integers(0, 10**6), max_size=30))
@example([], b"MSG a 1 -1\r\n", [3, 9])
@example([], b"HMSG a 1 9 3\r\nNATS/1.0\r\n", [20])
def test_errors_do_not_depend_on_how_bytes_are_cut(
    stream: list[tuple[bytes, protocol.Event]], garbage: bytes, places: list[int]
) -> None:
    wire = b"".join(part for part, _ in stream) + garbage

    assert read_all(cut(wire, places)) == read_all([wire])


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=50),
            st.sampled_from(
                [b"MSG a 1 ", b"HMSG a 1 r ", b"INFO {", b"\r\n", b"-ERR ", b"NATS/1.0"]
            ),
            st.integers(-(10**12), 10**12).map(lambda n: b"%d" % n),
        ),
        max_size=30,
    )
)
def test_any_bytes_give_events_or_a_protocol_error(parts: list[bytes]) -> None:
    parser = Parser(max_message_bytes=1000)

    try:
        for part in parts:
            parser.feed(part)
            assert parser.buffered <= MAX_LINE_BYTES + 1000
    except ProtocolError:
        with pytest.raises(ProtocolError):
            parser.feed(b"PING\r\n")


class Recorder:
    """Stands where nats-py's client is, and notes what its parser found."""

    def __init__(self) -> None:
        self.events: list[protocol.Event] = []

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None
    ) -> None:
        self.events.append(Msg(sid, subject, reply, headers or b"", payload))

    async def _process_err(self, message: str) -> None:
        self.events.append(Err(message.strip("'")))

    async def _process_ping(self) -> None:
        self.events.append(Signal.PING)

    async def _process_pong(self) -> None:
        self.events.append(Signal.PONG)


def read_by_nats_py(wire: bytes) -> list[protocol.Event]:
    recorder = Recorder()
    asyncio.run(TheirParser(recorder).parse(wire))
    return recorder.events


@given(st.lists(messages(), max_size=5))
def test_nats_py_reads_the_same_messages(stream: list[tuple[bytes, protocol.Event]]) -> None:
    wire = b"".join(part for part, _ in stream)

    assert Parser().feed(wire) == read_by_nats_py(wire)


@given(SUBJECTS, st.one_of(st.just(""), SUBJECTS), PAYLOADS, st.one_of(st.just({}), FIELDS))
def test_nats_py_writes_the_same_messages(
    subject: str, reply: str, payload: bytes, fields: dict[str, str]
) -> None:
    block = encode_headers(fields.items())

    ours = encode_pub(subject.encode(), payload, reply.encode(), block)

    if fields:
        assert ours == theirs.hpub_cmd(subject, reply, block, payload)
    else:
        assert ours == theirs.pub_cmd(subject, reply, payload)


@given(SUBJECTS, st.one_of(st.just(""), SUBJECTS), st.integers(1, 10**6))
def test_nats_py_writes_the_same_subscriptions(subject: str, queue: str, sid: int) -> None:
    assert encode_sub(subject.encode(), sid, queue.encode()) == theirs.sub_cmd(subject, queue, sid)
    assert encode_unsub(sid, 3) == theirs.unsub_cmd(sid, 3)
    # nats-py leaves a space where no limit is
    assert encode_unsub(sid).split() == theirs.unsub_cmd(sid, 0).split()


def test_nats_py_reads_our_pings() -> None:
    assert read_by_nats_py(CMD_PING + CMD_PONG) == [Signal.PING, Signal.PONG]


def headers_read_by_nats_py(block: bytes) -> dict[str, str] | None:
    return asyncio.run(Client()._process_headers(block))


@given(FIELDS)
def test_nats_py_reads_our_headers(fields: dict[str, str]) -> None:
    assert headers_read_by_nats_py(encode_headers(fields.items())) == fields


@given(FIELDS)
def test_we_read_the_headers_nats_py_writes(fields: dict[str, str]) -> None:
    written: list[bytes] = []

    class Silent(Client):
        async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
            written.append(bytes(cmd))

    async def publish() -> None:
        client = Silent()
        client._flush_queue = None
        client.stats = {"out_msgs": 0, "out_bytes": 0}
        await client._send_publish("a", "", b"hi", 2, fields)

    asyncio.run(publish())

    # What a client sends comes back as MSG with a subscription number.
    wire = written[0].replace(b"HPUB a  ", b"HMSG a 1 ", 1)
    [msg] = Parser().feed(wire)
    assert isinstance(msg, Msg)
    assert parse_headers(msg.headers).fields == fields
    assert msg.payload == b"hi"


@pytest.mark.parametrize(
    "block",
    [
        b"NATS/1.0 404 No Messages\r\n\r\n",
        b"NATS/1.0 503\r\n\r\n",
        b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 7\r\n\r\n",
        b"NATS/1.0 409 Message Size Exceeds MaxBytes\r\nNats-Pending-Messages: 1\r\n\r\n",
    ],
)
def test_nats_py_reads_the_same_status(block: bytes) -> None:
    headers = parse_headers(block)

    found = {"Status": str(headers.status), "Description": headers.description, **headers.fields}
    assert {name: text for name, text in found.items() if text} == headers_read_by_nats_py(block)
