"""What a dead letter records: one form for every cause.

The payload is the original one, byte for byte, so that a replay is the same task.  Everything else
is in headers, one JSON string each (so that no value can break a header line):

=====================  =========================================================
``Dlq-Reason``         one of `REASONS`
``Dlq-Queue``          the queue it died in
``Dlq-Level``          its priority level
``Dlq-Task``           task name, ``Dlq-Task-Id`` its id
``Dlq-Error``          exception class; ``Dlq-Message`` its text
``Dlq-Traceback``      at most `MAX_TRACEBACK` bytes, the end of it
``Dlq-Attempts``       deliveries or tries, whichever the writer counts
``Dlq-Worker``         who gave up on it
``Dlq-Published-At``   when the message was first stored, seconds since the epoch
``Dlq-Died-At``        when the dead letter was written
``Dlq-Replayed``       how often it was replayed before it died (again)
=====================  =========================================================

Pure; who writes it first waits for the confirm, and only then settles the original.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .protocol import encode_headers, parse_headers

__all__ = [
    "REASONS",
    "REPLAYED_HEADER",
    "RETRY_INTERVAL",
    "DeadLetter",
    "Reason",
    "death_id",
    "facts_of",
    "headers_of",
    "read_fields",
    "read_headers",
    "worker_name",
]

Reason = Literal[
    "task_failed",
    "unrecoverable_error",
    "max_deliveries_exceeded",
    "rejected",
    "unknown_task",
    "malformed",
]
REASONS: tuple[Reason, ...] = get_args(Reason)

#: Seconds after which a message that could not be written to the dead letters is tried again.
RETRY_INTERVAL = 10.0

#: Bytes of a traceback that are kept: its end, where the error is.
MAX_TRACEBACK = 8 * 1024
#: Bytes of any other text.
MAX_TEXT = 1024

#: In the envelope's headers: how often a task was replayed.
REPLAYED_HEADER = "jetstream_replayed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """Why and where a message died."""

    reason: str
    queue: str
    level: str = "medium"
    task: str | None = None
    task_id: str | None = None
    error: str | None = None
    message: str | None = None
    traceback: str | None = None
    attempts: int = 1
    worker: str | None = None
    published_at: float | None = None
    died_at: float = 0.0
    replayed: int = 0


_HEADERS = {
    "reason": "Dlq-Reason",
    "queue": "Dlq-Queue",
    "level": "Dlq-Level",
    "task": "Dlq-Task",
    "task_id": "Dlq-Task-Id",
    "error": "Dlq-Error",
    "message": "Dlq-Message",
    "traceback": "Dlq-Traceback",
    "attempts": "Dlq-Attempts",
    "worker": "Dlq-Worker",
    "published_at": "Dlq-Published-At",
    "died_at": "Dlq-Died-At",
    "replayed": "Dlq-Replayed",
}

#: What is left out, in turn, where there is no room; nothing at first.
_DISPENSABLE = ("", "traceback", "message", "error", "worker", *reversed(_HEADERS))


def headers_of(letter: DeadLetter, message_id: str, room: int) -> bytes:
    """Return the NATS headers of *letter*, at most *room* bytes.

    *message_id* names the death, not the message: writing the same death twice stores it once.
    If there is no room, the traceback goes first, then the message, and so on; a payload of the
    server's very limit is stored without headers rather than not at all.
    """
    values = {name: getattr(letter, name) for name in _HEADERS}
    if values["traceback"] is not None:
        values["traceback"] = _end_of(values["traceback"], MAX_TRACEBACK)
    for name in ("message", "error", "task", "task_id", "worker", "queue"):
        if values[name] is not None:
            values[name] = str(values[name])[:MAX_TEXT]
    for dropped in _DISPENSABLE:
        values.pop(dropped, None)
        fields = [("Nats-Msg-Id", message_id)]
        fields += [
            (_HEADERS[name], json.dumps(value))
            for name, value in values.items()
            if value is not None
        ]
        headers = encode_headers(fields)
        if len(headers) <= room:
            return headers
    return b""


def death_id(token: bytes, payload: bytes) -> str:
    """Return the id of the death of a message, the same whenever its delivery is given up on.

    A JetStream delivery's *token* names stream, sequence and time stored (ADR-15), in the older
    form or behind domain and account; of any other store's the id is a digest.
    """
    words = token.split(b".")
    if len(words) < 9:
        return f"dead.{hashlib.sha256(token + payload).hexdigest()[:32]}"
    at = 2 if len(words) == 9 else 4
    return f"dead.{words[at].decode()}.{words[at + 3].decode()}.{words[at + 5].decode()}"


def _end_of(text: str, limit: int) -> str:
    """Return the last *limit* bytes of *text*, from a character's start."""
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= limit else raw[-limit:].decode("utf-8", "ignore")


def read_headers(raw: bytes) -> DeadLetter:
    """Return the dead letter that *raw* headers describe; unreadable values are left as text."""
    return read_fields(parse_headers(raw).fields)


def read_fields(fields: Mapping[str, str]) -> DeadLetter:
    """Return the dead letter that headers, taken apart already, describe."""
    values: dict[str, Any] = {}
    for name, header in _HEADERS.items():
        text = fields.get(header)
        if text is None:
            continue
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    values.setdefault("reason", "malformed")
    values.setdefault("queue", "")
    return DeadLetter(**values)


def facts_of(envelope: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a dead letter says of the task in *envelope* (None: it cannot be read)."""
    headers = (envelope or {}).get("headers") or {}
    task, task_id, replayed = (headers.get(name) for name in ("task", "id", REPLAYED_HEADER))
    return {
        "task": task if isinstance(task, str) else None,
        "task_id": task_id if isinstance(task_id, str) else None,
        "replayed": replayed if isinstance(replayed, int) else 0,
    }


def worker_name() -> str:
    """Return who writes: host and process."""
    return f"{platform.node()}:{os.getpid()}"
