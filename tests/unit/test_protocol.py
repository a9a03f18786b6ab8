from __future__ import annotations

import json

import pytest

from kombu_jetstream import protocol
from kombu_jetstream.errors import ProtocolError
from kombu_jetstream.protocol import (
    MAX_INFO_BYTES,
    MAX_LINE_BYTES,
    MAX_MESSAGE_BYTES,
    OK,
    PING,
    PONG,
    Err,
    Info,
    Msg,
    Parser,
    encode_connect,
    encode_headers,
    encode_pub,
    encode_sub,
    encode_unsub,
    is_publish_subject,
    is_subscription_subject,
    parse_headers,
    status_code,
)

HEADERS = b"NATS/1.0\r\nA: 1\r\n\r\n"


@pytest.mark.parametrize(
    ("wire", "event"),
    [
        pytest.param(b"PING\r\n", PING, id="ping"),
        pytest.param(b"PONG\r\n", PONG, id="pong"),
        pytest.param(b"+OK\r\n", OK, id="ok"),
        pytest.param(b"-ERR 'Stale Connection'\r\n", Err("Stale Connection"), id="err"),
        pytest.param(b"-ERR\r\n", Err(""), id="err-without-text"),
        pytest.param(b"MSG a.b 7 2\r\nhi\r\n", Msg(7, b"a.b", b"", b"", b"hi"), id="msg"),
        pytest.param(b"MSG a 1 r.1 2\r\nhi\r\n", Msg(1, b"a", b"r.1", b"", b"hi"), id="msg-reply"),
        pytest.param(b"MSG a 1 0\r\n\r\n", Msg(1, b"a", b"", b"", b""), id="msg-empty"),
        pytest.param(
            b"MSG a 1 8\r\n\r\nPING\r\n\r\n",
            Msg(1, b"a", b"", b"", b"\r\nPING\r\n"),
            id="msg-of-protocol",
        ),
        pytest.param(b"MSG  a\t1   2\r\nhi\r\n", Msg(1, b"a", b"", b"", b"hi"), id="msg-spaces"),
        pytest.param(
            b"HMSG a 1 18 20\r\n" + HEADERS + b"hi\r\n",
            Msg(1, b"a", b"", HEADERS, b"hi"),
            id="hmsg",
        ),
        pytest.param(
            b"HMSG a 1 r 18 18\r\n" + HEADERS + b"\r\n",
            Msg(1, b"a", b"r", HEADERS, b""),
            id="hmsg-reply-without-payload",
        ),
    ],
)
def test_parser_reads(wire: bytes, event: protocol.Event) -> None:
    assert Parser().feed(wire) == [event]


def test_info_says_what_the_server_is() -> None:
    info = {
        "server_id": "NAB",
        "server_name": "n1",
        "version": "2.12.0-RC.1",
        "headers": True,
        "max_payload": 2048,
        "tls_available": True,
        "auth_required": True,
        "jetstream": True,
        "nonce": "abc",
        "connect_urls": ["10.0.0.1:4222", "[::1]:4222"],
        "ldm": True,
        "domain": "hub",
        "api_lvl": 2,
        "cluster": "c1",
    }

    [event] = Parser().feed(b"INFO %b \r\n" % json.dumps(info).encode())

    assert event == Info(
        server_id="NAB",
        server_name="n1",
        version=(2, 12, 0),
        headers=True,
        max_payload=2048,
        tls_required=False,
        tls_available=True,
        auth_required=True,
        jetstream=True,
        nonce="abc",
        connect_urls=("10.0.0.1:4222", "[::1]:4222"),
        lame_duck=True,
        domain="hub",
        api_level=2,
        cluster="c1",
        raw=info,
    )


def test_info_of_an_old_server_has_defaults() -> None:
    [info] = Parser().feed(b'INFO {"version":"2.9.10","connect_urls":null}\r\n')

    assert isinstance(info, Info)
    assert (info.version, info.api_level, info.connect_urls) == ((2, 9, 10), 0, ())
    assert (info.nonce, info.domain, info.lame_duck) == (None, None, False)


def test_a_server_that_does_not_say_its_api_level_has_that_of_its_version() -> None:
    levels = [
        Info.from_json(b'{"version":"%b"}' % version).api_level
        for version in (b"2.9.10", b"2.10.26", b"2.11.0", b"2.11.11", b"")
    ]

    assert levels == [0, 0, 1, 1, 0]


BROKEN = [
    pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", "one of MSG", id="http"),
    pytest.param(b"\r\n", "one of MSG", id="empty-line"),
    pytest.param(b"\x16\x03\x01\x00\xee\r\n", "one of MSG", id="tls"),
    pytest.param(b"msg a 1 2\r\nhi\r\n", "one of MSG", id="lower-case"),
    pytest.param(b"PINGS\r\n", "one of MSG", id="longer-verb"),
    pytest.param(b"MSG a 1\r\n", "and sizes", id="msg-too-short"),
    pytest.param(b"MSG a 1 r x 2\r\nhi\r\n", "sizes", id="msg-too-long"),
    pytest.param(b"HMSG a 1 2\r\n", "sizes", id="hmsg-too-short"),
    pytest.param(b"MSG a 1 -2\r\n", "a number from 0", id="negative"),
    pytest.param(b"MSG a 1 +2\r\nhi\r\n", "a number from 0", id="signed"),
    pytest.param(b"MSG a 1 1_0\r\n", "a number from 0", id="underscore"),
    pytest.param(b"MSG a 1 0x2\r\n", "a number from 0", id="hexadecimal"),
    pytest.param(b"MSG a 1 9999999999\r\n", "a number from 0", id="huge"),
    pytest.param(b"MSG a 1 " + b"9" * 5000 + b"\r\n", "a number from 0", id="huge-number"),
    pytest.param(b"MSG a 1 %d\r\n" % (MAX_MESSAGE_BYTES + 1), "a number from 0", id="one-too-many"),
    pytest.param(b"MSG a x 2\r\nhi\r\n", "a number from 0", id="sid"),
    pytest.param(b"MSG a " + b"9" * 5000 + b" 2\r\nhi\r\n", "a number from 0", id="huge-sid"),
    pytest.param(b"MSG a 1 2\r\nhiPING\r\n", "CRLF after", id="trailer"),
    pytest.param(b"MSG a 1 2\r\nhi\n\n", "CRLF after", id="trailer-lf"),
    pytest.param(b"MSG a 1 2\r\nhi\rx\r\n", "CRLF after", id="trailer-cr"),
    pytest.param(
        b"HMSG a 1 20 18\r\n" + HEADERS + b"\r\n", "a number from 0 to 18", id="hmsg-sizes"
    ),
    pytest.param(b"HMSG a 1 4 6\r\nabcdhi\r\n", "begin with NATS/1.0", id="hmsg-no-headers"),
    pytest.param(b"INFO {\r\n", "JSON in INFO", id="info-cut"),
    pytest.param(b"INFO []\r\n", "JSON in INFO", id="info-list"),
    pytest.param(b'INFO {"max_payload":"x"}\r\n', "JSON in INFO", id="info-number"),
    pytest.param(b'INFO {"connect_urls":3}\r\n', "JSON in INFO", id="info-urls"),
    pytest.param(b"INFO \xff\r\n", "JSON in INFO", id="info-utf8"),
    pytest.param(b"INFO " + b"[" * 100_000 + b"\r\n", "JSON in INFO", id="info-deep"),
]


@pytest.mark.parametrize(("wire", "message"), BROKEN)
def test_what_is_not_nats_is_a_protocol_error(wire: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        Parser().feed(wire)


@pytest.mark.parametrize(("wire", "message"), BROKEN)
def test_what_came_before_an_error_is_delivered_first(wire: bytes, message: str) -> None:
    parser = Parser()

    assert parser.feed(b"PING\r\n" + wire) == [PING]

    assert isinstance(parser.error, ProtocolError)
    with pytest.raises(ProtocolError, match=message):
        parser.feed(b"PING\r\n")
    with pytest.raises(ProtocolError, match=message):
        parser.feed(b"")


def test_an_error_quotes_little_of_what_came() -> None:
    with pytest.raises(ProtocolError) as caught:
        Parser().feed(b"x" * 5000 + b"\r\n")

    assert len(str(caught.value)) < 300


def feed_for_ever(parser: Parser, chunk: bytes) -> None:
    """Feed *chunk* again and again, or fail when the parser keeps too much of it."""
    for _ in range(100_000):
        parser.feed(chunk)
        assert parser.buffered <= MAX_INFO_BYTES + len(chunk)


@pytest.mark.parametrize("size", [100, 65536, 10_000_000])
def test_endless_line_is_refused_in_bounded_memory(size: int) -> None:
    parser = Parser()

    with pytest.raises(ProtocolError, match="a line of at most 65536 bytes"):
        feed_for_ever(parser, b"x" * size)

    assert parser.buffered <= MAX_LINE_BYTES + size
    with pytest.raises(ProtocolError, match="a line of at most 65536 bytes"):
        parser.feed(b"")


def test_endless_info_is_refused_in_bounded_memory() -> None:
    parser = Parser()
    parser.feed(b"INFO {")

    with pytest.raises(ProtocolError, match="a line of at most 1048576 bytes"):
        feed_for_ever(parser, b" " * 65536)


@pytest.mark.parametrize("end", [b"", b"\r", b"\r\n"], ids=["open", "half-open", "whole"])
def test_lines_may_be_as_long_as_the_limit(end: bytes) -> None:
    longest = b"-ERR '" + b"x" * (MAX_LINE_BYTES - 7) + b"'"

    Parser().feed(longest + end)

    if end == b"\r\n":
        with pytest.raises(ProtocolError, match="a line of at most"):
            Parser().feed(b" " + longest + end)


def test_info_may_be_longer_than_other_lines() -> None:
    info = {"connect_urls": [f"10.0.0.{i}:4222" for i in range(20_000)]}

    [event] = Parser().feed(b"INFO %b\r\n" % json.dumps(info).encode())

    assert isinstance(event, Info)
    assert len(event.connect_urls) == 20_000


def test_limit_of_a_message_can_be_chosen() -> None:
    wire = b"MSG a 1 10\r\n0123456789\r\n"

    assert len(Parser(max_message_bytes=10).feed(wire)) == 1
    with pytest.raises(ProtocolError, match="a number from 0 to 9"):
        Parser(max_message_bytes=9).feed(wire)


def test_large_payload_is_read_from_small_pieces() -> None:
    payload = bytes(range(256)) * 4096 * 8
    wire = memoryview(b"MSG a 1 %d\r\n%b\r\n" % (len(payload), payload))
    parser = Parser()

    events = [
        event
        for start in range(0, len(wire), 1000)
        for event in parser.feed(bytes(wire[start : start + 1000]))
    ]

    assert events == [Msg(1, b"a", b"", b"", payload)]
    assert parser.buffered == 0


def test_commands_are_what_the_protocol_says() -> None:
    assert encode_pub(b"a.b", b"hi") == b"PUB a.b  2\r\nhi\r\n"
    assert encode_pub(b"a", b"hi", b"r") == b"PUB a r 2\r\nhi\r\n"
    assert encode_pub(b"a", b"hi", b"r", HEADERS) == b"HPUB a r 18 20\r\n" + HEADERS + b"hi\r\n"
    assert encode_sub(b"a.*", 3) == b"SUB a.*  3\r\n"
    assert encode_sub(b"a.>", 3, b"q") == b"SUB a.> q 3\r\n"
    assert encode_unsub(3) == b"UNSUB 3\r\n"
    assert encode_unsub(3, 5) == b"UNSUB 3 5\r\n"
    assert encode_connect({"verbose": False, "name": "é"}) == (
        b'CONNECT {"verbose":false,"name":"\\u00e9"}\r\n'
    )


def test_headers_are_encoded_in_order() -> None:
    block = encode_headers([("Nats-Msg-Id", "1"), ("Text", "grün"), ("Empty", "")])

    assert block == "NATS/1.0\r\nNats-Msg-Id: 1\r\nText: grün\r\nEmpty: \r\n\r\n".encode()
    assert encode_headers([]) == b""


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\r\nb", "ä", "a\n", "\x00"])
def test_header_names_that_break_the_block_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a header name"):
        encode_headers([(name, "x")])


@pytest.mark.parametrize("value", ["a\r\nEvil: 1", "a\rb", "a\n", "\r"])
def test_header_values_with_line_breaks_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="without line breaks"):
        encode_headers([("A", value)])


@pytest.mark.parametrize(
    ("raw", "status", "description", "fields"),
    [
        pytest.param(
            b"NATS/1.0\r\nA: 1\r\nB:2\r\n\r\n", None, "", {"A": "1", "B": "2"}, id="plain"
        ),
        pytest.param(b"NATS/1.0\r\nA: 1\r\nA: 2\r\n\r\n", None, "", {"A": "1"}, id="first-wins"),
        pytest.param(b"NATS/1.0\r\na: b: c\r\n\r\n", None, "", {"a": "b: c"}, id="colon-in-value"),
        pytest.param(b"NATS/1.0\r\nfoo\r\n: x\r\n\r\n", None, "", {}, id="no-header"),
        pytest.param(b"NATS/1.0\r\nA: \xff\r\n\r\n", None, "", {"A": "�"}, id="bad-utf8"),
        pytest.param(b"NATS/1.0 503\r\n\r\n", 503, "", {}, id="status"),
        pytest.param(b"NATS/1.0 404 No Messages\r\n\r\n", 404, "No Messages", {}, id="described"),
        pytest.param(
            b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 1\r\n\r\n",
            100,
            "Idle Heartbeat",
            {"Nats-Last-Consumer": "1"},
            id="status-and-fields",
        ),
        pytest.param(b"", None, "", {}, id="none"),
    ],
)
def test_headers_are_read(
    raw: bytes, status: int | None, description: str, fields: dict[str, str]
) -> None:
    headers = parse_headers(raw)

    assert (headers.status, headers.description, headers.fields) == (status, description, fields)
    assert status_code(raw) == (status or 0)


@pytest.mark.parametrize(
    ("subject", "publish", "subscribe"),
    [
        (b"a", True, True),
        (b"a.b-c_d.$JS/@", True, True),
        ("grün.ö".encode(), True, True),
        (b"a.*", False, True),
        (b"a.*.b", False, True),
        (b">", False, True),
        (b"a.>", False, True),
        (b">.a", False, False),
        (b"", False, False),
        (b"a.", False, False),
        (b".a", False, False),
        (b"a..b", False, False),
        (b"a b", False, False),
        (b"a\tb", False, False),
        (b"a\r\nPUB b 0", False, False),
        (b"a\n", False, False),
        (b"a\x00", False, False),
        (b"a\x7f", False, False),
    ],
)
def test_subjects_are_checked(subject: bytes, publish: bool, subscribe: bool) -> None:
    assert is_publish_subject(subject) is publish
    assert is_subscription_subject(subject) is subscribe
