"""What a Celery worker takes for granted in a message, and a foreign client may get wrong.

Celery refuses a task it cannot decode, but it trusts the types of what it reads: an ``id`` that is
a list, or a body that is no triple, raises in the worker's main loop and ends the worker, then the
next one that gets the message (Celery 5.7, every pool).  So does an event that is no event.  Such a
message is malformed before Celery sees it.  Checked is what raises there, in
`celery.worker.strategy`, `celery.worker.request` and `celery.worker.consumer.gossip`; whatever
fails inside the task's own process fails that task alone.  Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from types import NoneType
from typing import Any, Literal, TypeAlias

from .errors import MalformedMessage, shortened

__all__ = [
    "Taker",
    "check_body",
    "check_event",
    "check_fields",
    "taker_of",
]

#: What of a worker takes the messages of a consumer, if it is a part that takes things for granted.
Taker: TypeAlias = Literal["tasks", "gossip"] | None

_TAKERS: dict[str, Taker] = {
    "celery.worker.consumer.consumer": "tasks",
    "celery.worker.consumer.gossip": "gossip",
}


def taker_of(callback: object) -> Taker:
    """Return what *callback*, as given to ``basic_consume``, hands its messages to.

    It is a method of a kombu ``Consumer``, whose ``on_message`` Celery sets.  Remote control looks
    after itself, and what users consume is theirs.
    """
    handler = getattr(getattr(callback, "__self__", None), "on_message", None)
    handler = getattr(handler, "func", handler)  # gossip's is a partial
    return _TAKERS.get(getattr(handler, "__module__", None) or "")


#: Seconds of the longest time limit, 30 years: a pool's timers count in C.
MAX_TIME_LIMIT = 1e9


def _is_id(value: object) -> bool:
    # It becomes a key of result backends, as UTF-8.
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_moment(value: object) -> bool:
    return isinstance(value, (NoneType, datetime)) or (isinstance(value, str) and bool(value))


def _is_limit(value: object) -> bool:
    return _is_number(value, MAX_TIME_LIMIT)


def _is_number(value: object, most: float = 1e18) -> bool:
    # NaN and what JSON reads as infinite are no numbers to count with, nor are integers of
    # hundreds of digits.
    return value is None or (isinstance(value, (int, float)) and abs(value) <= most)


def _is_time_limits(value: object) -> bool:
    return not value or (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_limit, value))
    )


def _is_names(value: object) -> bool:
    return not value or (
        isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    )


def _is_mapping(value: object) -> bool:
    return not value or isinstance(value, dict)


def _is_text(value: object) -> bool:
    return isinstance(value, (NoneType, str))


#: Field, what holds of its value, and in words.  A field that is absent is tested as None.
_FIELDS: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("task", lambda value: isinstance(value, str), "text"),
    ("id", _is_id, "text without control characters"),
    ("shadow", _is_text, "text"),
    ("eta", _is_moment, "an ISO 8601 time"),
    ("expires", _is_moment, "an ISO 8601 time"),
    ("timelimit", _is_time_limits, "two numbers"),
    ("stamped_headers", _is_names, "a list of names"),
    ("stamps", _is_mapping, "an object"),
)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise `MalformedMessage` unless *fields* are those of a task.

    They are the message's headers, or its body in Celery's protocol 1.
    """
    for name, is_right, expected in _FIELDS:
        value = fields.get(name)
        if not is_right(value):
            raise MalformedMessage(
                f"not a task: expected {name!r} to be {expected}, got {shortened(value)}"
            )


def check_body(headers: Mapping[str, Any], body: Any) -> None:
    """Raise `MalformedMessage` unless the decoded *body* is that of a task with these *headers*.

    A body of protocol 1 has all in it, and of that only what names a task is looked at: anything
    else Celery refuses by itself.
    """
    if isinstance(body, dict) and ("args" in body if "task" in headers else "task" in body):
        check_fields(body)
        return
    if "task" not in headers:
        return
    if not isinstance(body, (list, tuple)) or len(body) != 3:
        raise MalformedMessage("not a task: expected the body to be [args, kwargs, embed]")
    args, kwargs, embed = body
    if not isinstance(args, (list, tuple)):
        raise MalformedMessage("not a task: expected 'args' to be a list")
    if not isinstance(kwargs, dict):
        raise MalformedMessage("not a task: expected 'kwargs' to be an object")
    if not isinstance(embed, (dict, NoneType)):
        raise MalformedMessage("not a task: expected the third part of the body to be an object")


#: What `celery.events.state.Worker` computes: gossip sets an attribute for each field of an event.
_WORKER_PROPERTIES = frozenset({"alive", "heartbeat_expires", "heartbeats", "id", "status_string"})


def check_event(headers: Mapping[str, Any], body: Any) -> None:
    """Raise `MalformedMessage` unless the decoded *body* is an event of a worker."""
    if not isinstance(body, dict):
        raise MalformedMessage("not an event: not a JSON object")
    for name in ("type", "hostname"):
        if not isinstance(body.get(name), str):
            raise MalformedMessage(f"not an event: expected {name!r} to be text")
    if not _is_text(headers.get("hostname")) or not _is_text(body.get("id")):
        raise MalformedMessage("not an event: expected 'hostname' and 'id' to be text")
    if "elect" in body["type"]:
        if "id" not in body:
            raise MalformedMessage("not an event: 'id' is missing")
    elif not _WORKER_PROPERTIES.isdisjoint(body):
        raise MalformedMessage("not an event: it has fields no worker has")
    for name in ("timestamp", "clock", "utcoffset", "freq"):
        if not _is_number(body.get(name)):
            raise MalformedMessage(f"not an event: expected {name!r} to be a number")
