"""The payload is kombu's own: its Redis transport reads it, and we read what that writes."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kombu.connection import Connection
from kombu.serialization import dumps
from kombu.utils.json import dumps as kombu_dumps
from kombu.utils.json import loads as kombu_loads

from kombu_jetstream import envelope
from kombu_jetstream.errors import MalformedMessage

PROPERTIES = {"delivery_info": {"exchange": "e", "routing_key": "k"}, "delivery_tag": "t-1"}


def made(body: Any = "x", encoding: str | None = "utf-8", **headers: Any) -> envelope.Envelope:
    """An envelope as `Outgoing.prepare` makes it."""
    text, body_encoding = envelope.encode_body(body, encoding)
    return {
        "body": text,
        "content-type": "application/json",
        "content-encoding": encoding,
        "headers": headers,
        "properties": {**PROPERTIES, "priority": 0, "body_encoding": body_encoding},
    }


def body_of(decoded: envelope.Envelope) -> Any:
    body = envelope.decode_body(decoded["body"], decoded["properties"].get("body_encoding"))
    return body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)
any_text = st.text(alphabet=st.characters(codec=None, exclude_categories=()))
bodies = st.binary() | any_text


def as_bytes(body: bytes | str) -> bytes:
    return body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body


@given(bodies, st.sampled_from(["utf-8", "us-ascii", "binary", "latin-1", None]))
@example(b"\xff\xfe", "utf-8")
@example("\ud800", "utf-8")
@example(b"", None)
def test_bodies_arrive_as_they_were(body: bytes | str, encoding: str | None) -> None:
    decoded = envelope.decode(envelope.encode(made(body, encoding)))

    assert body_of(decoded) == as_bytes(body)


@given(st.dictionaries(st.text(), json_values, max_size=5))
@settings(max_examples=60)
def test_headers_and_properties_arrive_as_they_were(fields: dict[str, Any]) -> None:
    sent = made("x", **{f"h{key}": value for key, value in fields.items()})
    sent["properties"]["more"] = fields

    decoded = envelope.decode(envelope.encode(sent))

    if '"__type__"' not in json.dumps(fields):
        assert decoded == sent


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone.utc),
        UUID("12345678123456781234567812345678"),
        Decimal("1.50"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_has_no_form_for_arrives_as_kombu_has_it(value: Any) -> None:
    decoded = envelope.decode(envelope.encode(made("x", when=value)))

    assert decoded["headers"]["when"] == value


def test_text_is_not_made_larger() -> None:
    text = json.dumps({"args": ["hello"] * 100})

    sent = made(text)

    assert sent["body"] == text
    assert sent["properties"]["body_encoding"] == "utf-8"
    assert made(b"\x80", "binary")["properties"]["body_encoding"] == "base64"


def test_the_payload_is_ascii_json() -> None:
    payload = envelope.encode(made("grüße\n\0", h="ü"))

    assert payload.isascii()
    assert json.loads(payload)["body"] == "grüße\n\0"
    assert list(json.loads(payload)) == [
        "body",
        "content-type",
        "content-encoding",
        "headers",
        "properties",
    ]


# kombu's own


@pytest.fixture
def virtual() -> Iterator[Any]:
    """A channel of kombu's virtual transport, which the Redis one is made of."""
    with Connection("memory://") as connection, connection.channel() as channel:
        yield channel


BODIES: tuple[Any, ...] = ({"args": ["grüße", 1, None]}, [], "text")
SERIALIZED: list[tuple[str, Any]] = [
    (name, body) for name in ("json", "pickle", "yaml", "msgpack") for body in BODIES
]


@pytest.mark.parametrize(("serializer", "body"), SERIALIZED)
def test_kombu_reads_what_we_write(virtual: Any, serializer: str, body: Any) -> None:
    content_type, content_encoding, data = dumps(body, serializer=serializer)
    text, body_encoding = envelope.encode_body(data, content_encoding)
    payload = envelope.encode(
        {
            "body": text,
            "content-type": content_type,
            "content-encoding": content_encoding,
            "headers": {"task": "t", "id": "i"},
            "properties": {**PROPERTIES, "priority": 5, "body_encoding": body_encoding},
        }
    )

    message = virtual.Message(kombu_loads(payload), channel=virtual)

    message.accept = {content_type}
    assert message.decode() == body
    assert message.headers == {"task": "t", "id": "i"}
    assert message.delivery_info["routing_key"] == "k"
    assert message.delivery_tag == "t-1"


@pytest.mark.parametrize("body_encoding", ["base64", None])
@pytest.mark.parametrize(("serializer", "body"), SERIALIZED)
def test_we_read_what_kombu_writes(
    virtual: Any, serializer: str, body: Any, body_encoding: str | None
) -> None:
    content_type, content_encoding, data = dumps(body, serializer=serializer)
    virtual.body_encoding = body_encoding
    raw = virtual.prepare_message(
        data, 5, content_type, content_encoding, {"task": "t"}, {"reply_to": "r"}
    )
    virtual._inplace_augment_message(raw, "e", "k")

    decoded = envelope.decode(kombu_dumps(raw).encode())

    assert body_of(decoded) == as_bytes(data)
    assert decoded["headers"] == {"task": "t"}
    assert decoded["properties"]["reply_to"] == "r"
    assert decoded["content-type"] == content_type


def test_both_write_the_same_keys(virtual: Any) -> None:
    raw = virtual.prepare_message("x", 0, "application/json", "utf-8", {}, {})
    virtual._inplace_augment_message(raw, "e", "k")

    assert set(made()) == set(raw)
    assert set(made()["properties"]) == set(raw["properties"])


# Anything else


def variant(**changes: Any) -> bytes:
    """A sound envelope with something changed; `...` leaves a part out."""
    whole: dict[str, Any] = made()
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        at = whole["properties"] if part == "properties" else whole
        if value is ...:
            del at[key]
        else:
            at[key] = value
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"not json",
        b'{"body":',
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b'"text"',
        b"17",
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        variant(body=...),
        variant(body=None),
        variant(body={"a": 1}),
        variant(body=17),
        variant(headers=[]),
        variant(headers="x"),
        variant(properties=...),
        variant(properties=[]),
        variant(properties=None),
        variant(properties__delivery_info=...),
        variant(properties__delivery_info="x"),
        variant(properties__delivery_info={"exchange": 1}),
        variant(properties__delivery_info={"routing_key": []}),
        variant(properties__body_encoding=5),
        variant(properties__priority="high"),
        variant(properties__priority=math.nan),
        variant(properties__priority=math.inf),
        variant(headers={"a": json.loads("[" * 201 + "]" * 201)}),
        variant(**{"content-type": 5}),
        variant(**{"content-encoding": ["utf-8"]}),
        b'{"__type__": "datetime", "__value__": "not one"}',
        b'{"__type__": "uuid", "__value__": {"hex": 5}}',
        b'{"__type__": [], "__value__": {}}',
        b'{"__type__": {"a": 1}, "__value__": null}',
        b'{"__type__": "datetime"}',
    ],
    ids=lambda payload: repr(payload[:40]),
)
def test_what_is_no_message_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedMessage) as caught:
        envelope.decode(payload)

    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "payload",
    [
        variant(),
        variant(headers=...),
        variant(headers=None),
        variant(properties__body_encoding=...),
        variant(properties__delivery_info={}),
        variant(properties__priority=None),
        variant(**{"content-type": ..., "content-encoding": None}),
    ],
)
def test_what_may_be_missing(payload: bytes) -> None:
    decoded = envelope.decode(payload)

    assert decoded["headers"] == {}
    assert decoded["body"] == "x"


@pytest.mark.parametrize("value", [json.loads("[" * 150 + "]" * 150), [[]] * 500], ids=len)
def test_what_is_nested_or_wide_within_reason_is_a_message(value: Any) -> None:
    assert envelope.decode(variant(headers={"a": value}))["headers"] == {"a": value}


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_random_bytes_raise_nothing_else(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        envelope.decode(payload)


tagged = st.fixed_dictionaries(
    {
        "__type__": st.sampled_from(["datetime", "uuid", "decimal", "bytes", "base64"])
        | json_values,
        "__value__": json_values,
    }
)


@given(st.dictionaries(st.sampled_from([*made(), "__type__", "__value__"]), json_values | tagged))
@settings(max_examples=100)
def test_random_documents_raise_nothing_else(document: dict[str, Any]) -> None:
    try:
        decoded = envelope.decode(json.dumps(document).encode())
    except MalformedMessage:
        return
    assert isinstance(decoded["properties"]["delivery_info"], dict)
    assert isinstance(decoded["headers"], dict)


@given(json_values, st.sampled_from(["headers", "body", "properties", "content-type"]))
def test_a_random_part_raises_nothing_else(value: Any, part: str) -> None:
    payload = json.dumps({**made(), part: value}).encode()
    try:
        decoded = envelope.decode(payload)
        envelope.decode_body(decoded["body"], decoded["properties"].get("body_encoding"))
    except MalformedMessage:
        return


@pytest.mark.parametrize(
    ("body", "encoding"),
    [("%%%", "base64"), ("YQ", "base64"), ("ü", "base64"), ("x", "rot13"), ("x", "utf-16")],
)
def test_bodies_that_cannot_be_undone_are_malformed(body: str, encoding: str) -> None:
    with pytest.raises(MalformedMessage):
        envelope.decode_body(body, encoding)


def test_bodies_as_other_transports_encode_them() -> None:
    encoded = base64.b64encode(b"\xff\0").decode()

    assert envelope.decode_body(encoded, "base64") == b"\xff\0"
    assert envelope.decode_body("text", None) == "text"
    assert envelope.decode_body("text", "UTF-8") == "text"


# NATS headers


def nats_headers(**headers: Any) -> dict[str, str]:
    return dict(envelope.headers_of("id-1", made("x", **headers)))


def test_nats_headers_say_what_operators_look_for() -> None:
    assert nats_headers(task="shop.pay", id="t-1", traceparent="00-ab-cd-01", other=1) == {
        "Nats-Msg-Id": "id-1",
        "Content-Type": "application/json",
        "Celery-Task": "shop.pay",
        "Celery-Task-Id": "t-1",
        "traceparent": "00-ab-cd-01",
    }
    assert nats_headers() == {"Nats-Msg-Id": "id-1", "Content-Type": "application/json"}


@given(json_values, json_values, json_values)
def test_nats_headers_are_single_lines_whatever_the_message_says(
    task: Any, task_id: Any, trace: Any
) -> None:
    for value in nats_headers(task=task, id=task_id, traceparent=trace).values():
        assert value.isascii()
        assert value.isprintable()
        assert len(value) <= envelope.MAX_HEADER_VALUE


def test_a_content_type_is_a_single_line_too() -> None:
    message = {**made("x"), "content-type": "application/json\r\nNats-TTL: 1s"}

    assert dict(envelope.headers_of("id-1", message))["Content-Type"].isprintable()


def test_numbers_json_has_no_form_for_arrive() -> None:
    """Python's JSON writes and reads them; kombu does so, too."""
    decoded = envelope.decode(envelope.encode(made("x", a=math.inf, b=math.nan)))

    assert decoded["headers"]["a"] == math.inf
    assert math.isnan(decoded["headers"]["b"])
