"""When a message is due, and for how long it is of use.

Celery puts ``eta`` and ``expires`` into the message headers as ISO 8601, and the ``expiration``
property in milliseconds; kombu's ``DelaySeconds`` property is what its SQS and pgmq transports take.  The
server's forms are ``Nats-Schedule: @at <RFC 3339>`` and ``Nats-TTL: <n>s``, whole seconds of at
least 1 (facts 2 and 3).  Pure: ``now`` is seconds since the epoch and comes in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

__all__ = ["due_time", "schedule_header", "ttl_header", "ttl_of"]


def due_time(headers: Mapping[str, Any], properties: Mapping[str, Any], now: float) -> float | None:
    """Return when the message is due, in seconds since the epoch, or None for at once.

    An ``eta`` without an offset is in the application's time zone, which only Celery knows: None,
    and the worker holds the message as it always did.
    """
    delay = properties.get("DelaySeconds")
    if delay is not None:
        try:
            return now + float(delay)
        except (TypeError, ValueError):
            return None
    eta = headers.get("eta")
    if not eta:
        return None
    moment = eta if isinstance(eta, datetime) else _parse(str(eta))
    if moment is None or moment.tzinfo is None:
        return None
    return moment.timestamp()


def _parse(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None


def ttl_of(properties: Mapping[str, Any], queue_ttl: float | None) -> float | None:
    """Return the seconds a message may wait: its ``expiration`` or its queue's, the shorter."""
    expiration = properties.get("expiration")
    try:
        own = float(expiration) / 1000 if expiration is not None else None
    except (TypeError, ValueError):
        own = None
    candidates = [ttl for ttl in (own, queue_ttl) if ttl is not None]
    return min(candidates) if candidates else None


def schedule_header(due: float) -> str:
    """Return ``Nats-Schedule``'s value for a moment; rounded up, as nothing may be early."""
    micros = math.ceil(due * 1e6)
    moment = datetime.fromtimestamp(micros // 1_000_000, timezone.utc)
    return f"@at {moment:%Y-%m-%dT%H:%M:%S}.{micros % 1_000_000:06d}Z"


def ttl_header(ttl: float) -> str:
    """Return ``Nats-TTL``'s value: whole seconds, at least 1, rounded up."""
    return f"{max(1, math.ceil(ttl))}s"
