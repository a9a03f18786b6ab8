"""Transient queues: core NATS subscriptions, buffered in the connection that declared them.

Celery's pidbox, its reply and event queues and Broadcast queues live here.  Nothing is stored on
the server: binding is a subscription, NATS routes, and a publish reaches a thousand workers at
once.  What arrives waits in a buffer for a consumer of this connection; a process that declares
such a queue without ever consuming it (Celery's producers do) keeps only the newest messages.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .backend import Delivery, Outcome
from .connection import NatsConnection
from .protocol import Msg
from .routing import matcher, subjects_of
from .topology import Names, decode_token

__all__ = ["TransientQueue"]

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Bound:
    """One binding: its subscriptions, and whether a routing key is for it."""

    exchange: str
    key: str
    covers: Callable[[str], bool]
    sids: list[int]


class TransientQueue:
    """A queue of one connection; deliveries of it are settled in memory."""

    def __init__(
        self,
        name: str,
        connection: NatsConnection,
        names: Names,
        *,
        limit: int,
        arrived: Callable[[TransientQueue], None],
        auto_delete: bool = False,
        expires: float | None = None,
        message_ttl: float | None = None,
    ) -> None:
        self.name = name
        self.auto_delete = auto_delete
        self.consumers = 0
        self.dropped = 0
        self._connection = connection
        self._names = names
        self._limit = limit
        self._arrived = arrived
        self._expires = expires
        self._message_ttl = message_ttl
        self._used_at = time.monotonic()
        self._buffer: deque[tuple[float, bytes, int]] = deque()
        self._bound: list[_Bound] = []
        self._sid = connection.subscribe(names.transient_queue(name).encode(), self._on_default)

    def __len__(self) -> int:
        return len(self._buffer)

    def bind(self, exchange: str, exchange_type: str, key: str) -> None:
        """Subscribe to what *key* of *exchange* means; binding twice is binding once."""
        if any(bound.exchange == exchange and bound.key == key for bound in self._bound):
            return
        suffixes, _ = subjects_of(exchange_type, key)
        subjects = [self._names.exchange(exchange, suffix).encode() for suffix in suffixes]
        bound = _Bound(exchange, key, matcher(exchange_type, key), [])
        self._bound.append(bound)
        prefix_words = len(self._names.exchange(exchange, "").split("."))

        def on_message(msg: Msg) -> None:
            words = msg.subject.decode().split(".")[prefix_words:]
            key = ".".join(decode_token(word) for word in words)
            # A queue gets one copy however many of its bindings match: the first one's.
            first = next(b for b in self._bound if b.exchange == exchange and b.covers(key))
            if first is bound:
                self._push(msg.payload)

        def deliver(msg: Msg) -> None:
            try:
                on_message(msg)
            except StopIteration:  # a wider subscription than the pattern, or unbound meanwhile
                return
            except ValueError:  # a subject that is not ours: anybody may publish there
                logger.debug("ignored a message on %r", msg.subject)

        for subject in subjects:
            bound.sids.append(self._connection.subscribe(subject, deliver))

    def unbind(self, exchange: str, key: str) -> None:
        for bound in [b for b in self._bound if b.exchange == exchange and b.key == key]:
            self._bound.remove(bound)
            for sid in bound.sids:
                self._connection.unsubscribe(sid)

    def is_bound_to(self, exchange: str) -> bool:
        return any(bound.exchange == exchange for bound in self._bound)

    def close(self) -> None:
        """Unsubscribe; what is buffered is gone, as with any transient queue."""
        for bound in list(self._bound):
            self.unbind(bound.exchange, bound.key)
        self._connection.unsubscribe(self._sid)
        self._buffer.clear()

    def purge(self) -> int:
        count = len(self._buffer)
        self._buffer.clear()
        return count

    def is_expired(self, now: float) -> bool:
        """Tell whether ``x-expires`` is over: nobody consumed for that many seconds."""
        return (
            self._expires is not None and not self.consumers and now - self._used_at > self._expires
        )

    def touch(self) -> None:
        self._used_at = time.monotonic()

    def pop(self) -> Delivery | None:
        """Return the next delivery, or None."""
        while self._buffer:
            at, payload, attempt = self._buffer.popleft()
            now = time.monotonic()
            if self._message_ttl is not None and now - at > self._message_ttl:
                continue
            return Delivery(
                self.name, 0, payload, b"", self, attempt, leased_at=float("inf"), received_at=at
            )
        return None

    def settle(self, delivery: Delivery, outcome: Outcome, delay: float | None = None) -> None:
        """Put a refused delivery back in front; the other outcomes need nothing."""
        if outcome == "nak":
            self._buffer.appendleft((delivery.received_at, delivery.payload, delivery.attempt + 1))
            self._arrived(self)

    def _on_default(self, msg: Msg) -> None:
        self._push(msg.payload)

    def _push(self, payload: bytes) -> None:
        if len(self._buffer) >= self._limit:
            self._buffer.popleft()
            if not self.dropped:
                logger.warning(
                    "transient queue %r has %d messages and no consumer takes them; "
                    "the oldest are dropped (transient_buffer)",
                    self.name,
                    self._limit,
                )
            self.dropped += 1
        self._buffer.append((time.monotonic(), payload, 1))
        self._arrived(self)
