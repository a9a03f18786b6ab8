"""When a message is due, and for how long it is of use.

Celery puts ``eta`` and ``expires`` into the message headers as ISO 8601, and the ``expiration``
property in milliseconds; kombu's ``DelaySeconds`` property is what its SQS and pgmq transports
take.  The server's forms are ``Nats-Schedule: @at <RFC 3339>`` and ``Nats-TTL: <n>s``, whole
seconds of at least 1 (ADR-51, ADR-43).  Pure: ``now`` is seconds since the epoch and comes in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from .errors import PreconditionFailed

__all__ = ["DELAY_PROPERTY", "due_time", "schedule_header", "ttl_header", "ttl_of"]

#: Seconds a message is to wait, as kombu's SQS and pgmq transports take it.
DELAY_PROPERTY = "DelaySeconds"

#: The server counts nanoseconds in 64 bits, from 1970 to 2262; beyond, a schedule fires at once and
#: a message expires at once (seen with 2.15).
LATEST = 9_000_000_000.0

#: Seconds of the longest TTL: a hundred years.
MAX_TTL = 3_153_600_000


def due_time(headers: Mapping[str, Any], properties: Mapping[str, Any], now: float) -> float | None:
    """Return when the message is due, in seconds since the epoch, or None for at once.

    None, too, for an ``eta`` the server cannot wait for: the worker holds the message then.  One
    without an offset is UTC, as for Celery's workers.  Raises `PreconditionFailed` for a
    ``DelaySeconds`` that is no number, or more than the server can wait.
    """
    delay = properties.get(DELAY_PROPERTY)
    if delay is not None:
        due = now + _number(DELAY_PROPERTY, delay)
        if due > LATEST:
            raise PreconditionFailed(
                f"expected property {DELAY_PROPERTY!r} to end before 2255, got {delay!r}"
            )
        return due
    eta = headers.get("eta")
    if not eta:
        return None
    moment = eta if isinstance(eta, datetime) else _parse(str(eta))
    if moment is None:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    due = moment.timestamp()
    return due if due <= LATEST else None


def _number(name: str, value: Any) -> float:
    """Return the number in property *name*, which must be one that the server can take."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= MAX_TTL * 1000:
        raise PreconditionFailed(f"expected property {name!r} to be a number, got {value!r}")
    return number


def _parse(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None


def ttl_of(
    properties: Mapping[str, Any], queue_ttl: float | None, delay: float = 0.0
) -> float | None:
    """Return the seconds a message may wait in its queue, or None.

    That is its ``expiration``, which counts from now, also while it waits *delay* seconds for its
    time, or its queue's TTL, the shorter.

    Raises `PreconditionFailed` for an ``expiration`` that is no number, as RabbitMQ does.
    """
    expiration = properties.get("expiration")
    own = _number("expiration", expiration) / 1000 if expiration is not None else None
    if own is not None:
        own = max(0.0, own - delay)
    candidates = [ttl for ttl in (own, queue_ttl) if ttl is not None]
    return min(candidates) if candidates else None


def schedule_header(due: float) -> str:
    """Return ``Nats-Schedule``'s value for a moment; rounded up, as nothing may be early."""
    micros = math.ceil(due * 1e6)
    moment = datetime.fromtimestamp(micros // 1_000_000, timezone.utc)
    return f"@at {moment:%Y-%m-%dT%H:%M:%S}.{micros % 1_000_000:06d}Z"


def ttl_header(ttl: float) -> str:
    """Return ``Nats-TTL``'s value: whole seconds, at least 1, rounded up."""
    return f"{min(max(1, math.ceil(ttl)), MAX_TTL)}s"
