"""The seam between channels and what stores messages.

A channel knows deliveries and how to settle them; it does not know whether JetStream, a core NATS
subscription or a Redis list made them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = ["Counts", "Delivery", "Outcome", "Settler"]

#: How a delivery is settled: done; to be delivered again; never to be delivered again.
#: "progress" settles nothing, it extends the lease.
Outcome = Literal["ack", "nak", "term", "progress"]


class Settler(Protocol):
    """Whoever made a delivery and can settle it.  Callable from any thread."""

    def settle(self, delivery: Delivery, outcome: Outcome, delay: float | None = None) -> None:
        """Settle *delivery*; a "nak" makes it available again after *delay* seconds, or at once.

        Raises ConnectionLost if the outcome could not be sent.
        """


@dataclass(slots=True, eq=False)
class Delivery:
    """One handing-out of a message, with what is needed to settle it."""

    queue: str
    level: int
    payload: bytes
    #: what the store settles it by
    token: bytes
    settler: Settler
    #: 1 for the first delivery of the message
    attempt: int = 1
    #: monotonic time of the last lease: the delivery itself, then each extension
    leased_at: float = 0.0
    #: monotonic time of the delivery
    received_at: float = 0.0
    #: seconds since the epoch when the message was stored, 0 if unknown
    published_at: float = 0.0
    source: Any = None
    #: AMQP delivery tag, given by the channel that holds it
    tag: int = 0
    #: the message object handed to the application, to see whether anybody can still settle it
    message: weakref.ref[Any] | None = None
    #: Celery's request, if it waited in the worker for its eta when its connection was lost
    request: weakref.ref[Any] | None = None
    settled: bool = False
    #: whatever else the store needs
    extra: Any = None


@dataclass(frozen=True, slots=True)
class Counts:
    """What is in a queue."""

    ready: int
    in_flight: int
    waiting_pulls: int = 0
