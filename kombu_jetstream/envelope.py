"""A kombu message as bytes, and back.

The payload is the JSON document that kombu's Redis transport writes, key for key, so that a queue
can move between the two: ``body``, ``content-type``, ``content-encoding``, ``headers`` and
``properties`` with ``delivery_info``, ``delivery_tag`` and ``body_encoding``.  Text bodies stay
text (``body_encoding`` "utf-8", which the Redis transport reads as such); anything else is base64.

NATS headers repeat what operators and other tools look at.  They are never read back: the
payload alone is the message.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator
from types import NoneType
from typing import Any, TypeAlias

from kombu.utils import json as kombu_json

from .errors import MalformedMessage

__all__ = [
    "MAX_DEPTH",
    "Envelope",
    "decode",
    "decode_body",
    "encode",
    "encode_body",
    "headers_of",
    "is_too_deep",
]

Envelope: TypeAlias = dict[str, Any]

_encode_json = json.JSONEncoder(
    separators=(",", ":"), default=kombu_json.JSONEncoder().default, check_circular=False
).encode
_decode_json = json.JSONDecoder().decode
_decode_tagged = json.JSONDecoder(object_hook=kombu_json.object_hook).decode

#: Levels of lists and objects in a message.  What is nested deeper can be decoded and not be given
#: to a process of a pool: pickle's recursion ends between 300 and 500, and the worker with it.
MAX_DEPTH = 200

#: Longest value copied into a NATS header; the envelope has the whole.
MAX_HEADER_VALUE = 200


def encode_body(body: Any, content_encoding: str | None) -> tuple[str, str]:
    """Return *body* as text and the name of the encoding that undoes it."""
    if isinstance(body, str):
        return body, "utf-8"
    if content_encoding in ("utf-8", "us-ascii", "ascii"):
        try:
            return str(body, "utf-8"), "utf-8"
        except (UnicodeDecodeError, TypeError):
            pass
    return base64.b64encode(body).decode("ascii"), "base64"


def decode_body(body: Any, body_encoding: str | None) -> Any:
    """Undo `encode_body`.  Raises `MalformedMessage` for broken base64 and unknown encodings."""
    if not body_encoding or body_encoding.lower() == "utf-8":
        return body
    if body_encoding != "base64":
        raise MalformedMessage(f"unknown body_encoding {body_encoding!r}")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise MalformedMessage(f"the body is not base64: {exc}") from exc


def encode(envelope: Envelope) -> bytes:
    """Return the payload of *envelope*, whose body must be text by now."""
    return _encode_json(envelope).encode("utf-8", "surrogatepass")


def decode(payload: bytes) -> Envelope:
    """Return the envelope in *payload*, with headers in any case.

    Raises `MalformedMessage` when it is not one: any client may publish to our subjects.
    """
    try:
        text = payload.decode("utf-8")
        # kombu tags dates, UUIDs and the like; without a tag the hook would only cost time.
        envelope = _decode_tagged(text) if '"__type__"' in text else _decode_json(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedMessage(f"not a JSON document: {exc}") from exc
    except Exception as exc:  # kombu's hook raises anything for a bad tagged value, with the value
        raise MalformedMessage(f"not a JSON document: {type(exc).__name__}") from exc
    if not isinstance(envelope, dict):
        raise MalformedMessage("not a message envelope: not a JSON object")
    _check(envelope, _PARTS)
    properties = envelope["properties"]
    _check(properties, _PROPERTIES)
    _check(properties["delivery_info"], _DELIVERY_INFO)
    priority = properties.get("priority")
    if isinstance(priority, float) and not math.isfinite(priority):
        raise MalformedMessage(f"not a message envelope: 'priority' is {priority}")
    if is_too_deep(envelope, text):
        raise MalformedMessage(f"not a message envelope: nested deeper than {MAX_DEPTH}")
    if not envelope.get("headers"):
        envelope["headers"] = {}
    return envelope


def is_too_deep(value: Any, text: str | bytes) -> bool:
    """Tell whether *value*, which was written as *text*, is nested deeper than `MAX_DEPTH`."""
    if isinstance(text, str):
        if text.count("[") + text.count("{") <= MAX_DEPTH:
            return False
    elif len(text) <= MAX_DEPTH:  # of any codec each level takes a byte
        return False
    depth, containers = 0, [value]
    while containers:
        depth += 1
        if depth > MAX_DEPTH:
            return True
        containers = [
            child
            for container in containers
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list, tuple))
        ]
    return False


_Types: TypeAlias = "tuple[tuple[str, tuple[type, ...]], ...]"

#: Of each part the types it may have; what may be None may be absent.
_PARTS: _Types = (
    ("body", (str, bytes)),  # kombu's Redis transport with body_encoding None tags bytes
    ("content-type", (str, NoneType)),
    ("content-encoding", (str, NoneType)),
    ("headers", (dict, NoneType)),
    ("properties", (dict,)),
)
_PROPERTIES: _Types = (
    ("delivery_info", (dict,)),
    ("body_encoding", (str, NoneType)),
    ("priority", (int, float, NoneType)),
)
_DELIVERY_INFO: _Types = (
    ("exchange", (str, NoneType)),
    ("routing_key", (str, NoneType)),
)


def _check(part: dict[str, Any], types: _Types) -> None:
    for name, allowed in types:
        value = part.get(name)
        if not isinstance(value, allowed):
            what = "missing" if value is None else f"of type {type(value).__name__}"
            raise MalformedMessage(f"not a message envelope: {name!r} is {what}")


def headers_of(message_id: str, envelope: Envelope) -> Iterator[tuple[str, str]]:
    """Yield the NATS headers of an envelope about to be published."""
    yield "Nats-Msg-Id", message_id
    headers = envelope["headers"]
    content_type = envelope.get("content-type")
    if content_type:
        yield "Content-Type", _header_value(content_type)
    task = headers.get("task")
    if task:
        yield "Celery-Task", _header_value(task)
        yield "Celery-Task-Id", _header_value(headers.get("id"))
    trace = headers.get("traceparent")
    if trace:
        yield "traceparent", _header_value(trace)


def _header_value(value: Any) -> str:
    """Return *value* fit for one header line: printable ASCII, cut."""
    text = str(value)
    if not (text.isascii() and text.isprintable()):
        text = text.encode("unicode_escape").decode("ascii")
    return text[:MAX_HEADER_VALUE]
