"""Queue arguments (``x-…``): what can be honoured becomes a value, anything else is refused.

The names are RabbitMQ's; kombu makes them from ``Queue(expires=…, message_ttl=…, …)``.  Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import NotSupported, PreconditionFailed

__all__ = ["QueueArguments"]

_REFUSED = {
    "x-max-length": "all queues of a level share one stream; limit it with stream_max_bytes",
    "x-max-length-bytes": "all queues of a level share one stream; limit it with stream_max_bytes",
    "x-overflow": "a full stream refuses new messages (stream_max_bytes)",
    "x-single-active-consumer": "run one worker for that queue",
    "x-delivery-limit": "set max_deliveries for all queues",
}
#: RabbitMQ's ways to store a queue; every queue here is durable on file (and replicated).
_WITHOUT_EFFECT = frozenset({"x-queue-mode", "x-queue-version", "x-queue-leader-locator"})
_QUEUE_TYPES = frozenset({"classic", "quorum"})


@dataclass(frozen=True, slots=True)
class QueueArguments:
    """The arguments of one queue that mean something here; seconds."""

    message_ttl: float | None = None
    expires: float | None = None
    max_priority: int | None = None
    dead_letter_exchange: str | None = None
    dead_letter_routing_key: str | None = None

    @classmethod
    def parse(cls, queue_name: str, arguments: Mapping[str, Any] | None) -> QueueArguments:
        """Read *arguments*.

        Raises `NotSupported` for what cannot be honoured, `PreconditionFailed` for bad values.
        """
        values: dict[str, Any] = {}
        if arguments and not isinstance(arguments, Mapping):
            raise PreconditionFailed(f"the arguments of queue {queue_name!r} are no mapping")
        for name, value in (arguments or {}).items():
            if name in _REFUSED:
                raise NotSupported(f"{name!r} of queue {queue_name!r}", _REFUSED[name])
            if name in _WITHOUT_EFFECT or (name == "x-queue-type" and str(value) in _QUEUE_TYPES):
                continue
            if name in ("x-message-ttl", "x-expires"):
                values[name] = _milliseconds(queue_name, name, value)
            elif name == "x-max-priority":
                values[name] = _priority(queue_name, value)
            elif name in ("x-dead-letter-exchange", "x-dead-letter-routing-key"):
                values[name] = _text(queue_name, name, value)
            elif name == "x-queue-type":
                raise NotSupported(f"queue type {value!r} of queue {queue_name!r}")
            elif name.startswith("x-"):
                raise NotSupported(f"{name!r} of queue {queue_name!r}")
        if "x-dead-letter-routing-key" in values and "x-dead-letter-exchange" not in values:
            raise PreconditionFailed(
                f"'x-dead-letter-routing-key' of queue {queue_name!r} "
                "needs an 'x-dead-letter-exchange'"
            )
        if "x-message-ttl" in values and "x-dead-letter-exchange" in values:
            raise NotSupported(
                f"'x-message-ttl' with 'x-dead-letter-exchange' of queue {queue_name!r}",
                "JetStream removes an expired message without telling anybody; "
                "use a countdown for a delay",
            )
        return cls(
            message_ttl=values.get("x-message-ttl"),
            expires=values.get("x-expires"),
            max_priority=values.get("x-max-priority"),
            dead_letter_exchange=values.get("x-dead-letter-exchange"),
            dead_letter_routing_key=values.get("x-dead-letter-routing-key"),
        )


def _milliseconds(queue_name: str, name: str, value: Any) -> float:
    least = 1 if name == "x-expires" else 0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise PreconditionFailed(
            f"expected {name!r} of queue {queue_name!r} to be milliseconds >= {least}, "
            f"got {value!r}"
        )
    return value / 1000


def _text(queue_name: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise PreconditionFailed(
            f"expected {name!r} of queue {queue_name!r} to be text, got {value!r}"
        )
    return value


def _priority(queue_name: str, value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
        raise PreconditionFailed(
            f"expected 'x-max-priority' of queue {queue_name!r} to be 0 to 255, got {value!r}"
        )
    return value or None  # RabbitMQ: with 0 the queue has no priorities
