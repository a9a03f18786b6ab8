from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kombu_jetstream import resp

CASES: list[tuple[bytes, Any]] = [
    (b"+OK\r\n", b"OK"),
    (b":-12\r\n", -12),
    (
        b"(3492890328409238509324850943850943825024385\r\n",
        3492890328409238509324850943850943825024385,
    ),
    (b"$5\r\na\r\nbc\r\n", b"a\r\nbc"),
    (b"$0\r\n\r\n", b""),
    (b"$-1\r\n", None),
    (b"*-1\r\n", None),
    (b"_\r\n", None),
    (b"#t\r\n", True),
    (b",1.5\r\n", 1.5),
    (b"*0\r\n", []),
    (b"*2\r\n$1\r\na\r\n*1\r\n:1\r\n", [b"a", [1]]),
    (b"%1\r\n+key\r\n:1\r\n", [b"key", 1]),
    (b"~2\r\n:1\r\n:2\r\n", [1, 2]),
    (b"=7\r\ntxt:abc\r\n", b"txt:abc"),
    (b">2\r\n+invalidate\r\n*1\r\n$1\r\nq\r\n", [b"invalidate", [b"q"]]),
]


@pytest.mark.parametrize(("raw", "value"), CASES, ids=[repr(raw)[2:20] for raw, _ in CASES])
def test_each_kind_of_value_is_read(raw: bytes, value: Any) -> None:
    assert resp.Parser().feed(raw) == [value]


def test_a_push_can_be_told_from_a_reply() -> None:
    push, reply = resp.Parser().feed(b">1\r\n+invalidate\r\n*1\r\n+invalidate\r\n")

    assert isinstance(push, resp.Push)
    assert not isinstance(reply, resp.Push)


def test_an_error_is_a_value() -> None:
    (error,) = resp.Parser().feed(b"-NOSCRIPT No matching script\r\n")

    assert isinstance(error, resp.ReplyError)
    assert str(error) == "NOSCRIPT No matching script"


def test_what_is_not_redis_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a RESP value, got 'H'"):
        resp.Parser().feed(b"HTTP/1.1 400 Bad Request\r\n")


@given(st.lists(st.sampled_from(CASES), max_size=8), st.data())
def test_values_do_not_depend_on_how_the_bytes_are_cut(
    cases: list[tuple[bytes, Any]], data: st.DataObject
) -> None:
    raw = b"".join(case[0] for case in cases)
    parser, found = resp.Parser(), []

    while raw:
        cut = data.draw(st.integers(1, len(raw)))
        found += parser.feed(raw[:cut])
        raw = raw[cut:]

    assert found == [case[1] for case in cases]


def test_a_command_is_an_array_of_bulk_strings() -> None:
    assert resp.encode("LPUSH", "käse", b"\r\n", 7) == (
        b"*4\r\n$5\r\nLPUSH\r\n$5\r\nk\xc3\xa4se\r\n$2\r\n\r\n\r\n$1\r\n7\r\n"
    )
