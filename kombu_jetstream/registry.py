"""Durable queues, exchanges and bindings, shared by all processes through one small stream.

Each is one JSON message under ``<ns>.registry.>``, last value per subject.  A connection reads the
stream once, and hears of changes by a core subscription to the same subjects, so routing costs no
round trip.  Removing something publishes an empty message, a tombstone that expires by itself
where the server can do that, and is purged at once elsewhere.

====================================================  ============================================
``<ns>.registry.queue.<queue>``                       name, auto_delete, arguments, at
``<ns>.registry.exchange.<exchange>``                 name, type, durable, auto_delete, arguments
``<ns>.registry.binding.<exchange>.<queue>.<key>``    exchange, type, queue, key
====================================================  ============================================
"""

from __future__ import annotations

import json
import logging
import random
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .arguments import QueueArguments
from .errors import JetStreamTransportError, NoResponders, PreconditionFailed, RequestTimeout
from .jetstream import API_TIMEOUT, JetStream
from .protocol import Msg, encode_headers, parse_headers, status_code
from .publishing import Publisher
from .routing import EXCHANGE_TYPES, Binding, Exchange, Table
from .topology import AUTO_DELETE_THRESHOLD, MIN_EXPIRES, Names, decode_token

__all__ = ["Queue", "Registry"]

logger = logging.getLogger(__name__)

#: Records read in one request.
PAGE = 500

#: How long a tombstone stays where the server removes it by itself.
TOMBSTONE_TTL = "60s"

#: Seconds beyond its expiry after which an unused queue is removed, at most as many as that takes:
#: clocks differ.
SWEEP_MARGIN = 60.0

#: Abandoned queues looked for at once.
MAX_SWEPT = 20


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue as it was declared; *at* in seconds since the epoch."""

    name: str
    auto_delete: bool = False
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    at: float = field(default=0.0, compare=False)
    #: `arguments`, read
    wants: QueueArguments = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "wants", QueueArguments.parse(self.name, self.arguments))

    @property
    def inactive_after(self) -> float:
        """Seconds after which the queue goes if it is not used, 0 for never."""
        if self.wants.expires is not None:
            return max(self.wants.expires, MIN_EXPIRES)
        return AUTO_DELETE_THRESHOLD if self.auto_delete else 0.0


class Registry:
    """This connection's copy of the registry, and the way to change it."""

    def __init__(self, jetstream: JetStream, publisher: Publisher) -> None:
        self.table = Table()
        self.queues: dict[str, Queue] = {}
        self._jetstream = jetstream
        self._publisher = publisher
        self._names: Names = jetstream.names
        self._loaded = False

    # -- reading -------------------------------------------------------------------------------

    def load(self) -> None:
        """Read the registry, once per connection, and listen to changes from then on."""
        if self._loaded:
            return
        jetstream = self._jetstream
        jetstream.provision()
        # First listen, then read: what changes meanwhile is seen twice rather than not at all.
        jetstream.connection.subscribe(f"{self._names.registry}.>".encode(), self._changed)
        for subject, payload in self._read_all():
            self.apply(subject, payload)
        self._loaded = True
        self.sweep()

    def refresh(self) -> None:
        """Load the registry, or take the news that came since; before anything is changed."""
        if self._loaded:
            self._jetstream.connection.read_available()
        else:
            self.load()

    def _read_all(self) -> list[tuple[str, bytes]]:
        """Read every record through ``DIRECT.GET``, in pages where the server has them (2.11)."""
        connection = self._jetstream.connection
        subject = self._jetstream.direct_get(self._names.registry_stream)
        inbox = connection.new_inbox()
        records: list[tuple[str, bytes]] = []
        last = before = 0
        pending: int | None = None
        over = False

        def arrived(msg: Msg) -> None:
            nonlocal last, pending, over
            if status_code(msg.headers):
                over = True
                if status_code(msg.headers) == 503:
                    pending = -1
                return
            fields = parse_headers(msg.headers).fields
            last = int(fields["Nats-Sequence"])
            left = fields.get("Nats-Num-Pending")
            pending = None if left is None else int(left)
            if msg.payload:
                records.append((fields["Nats-Subject"], msg.payload))

        def is_over() -> bool:
            # An old server ignores "batch": one record without the count of those left.
            return over or (last > before and pending is None)

        sid = connection.subscribe(inbox, arrived)
        try:
            while True:
                before, over, pending = last, False, None
                request = {
                    "seq": last + 1,
                    "next_by_subj": f"{self._names.registry}.>",
                    "batch": PAGE,
                }
                connection.publish(subject, json.dumps(request).encode(), inbox)
                if not self._jetstream.wait_answered(is_over, subject, API_TIMEOUT):
                    raise RequestTimeout(subject.decode(), API_TIMEOUT)
                if pending == -1:
                    raise NoResponders(subject.decode())
                if last == before or (over and not pending):
                    return records
        finally:
            connection.unsubscribe(sid)

    def _changed(self, msg: Msg) -> None:
        self.apply(msg.subject.decode(errors="replace"), msg.payload)

    def apply(self, subject: str, payload: bytes) -> None:
        """Take one record, or its removal if *payload* is empty.

        One that cannot be read is ignored and said: anybody may have written it.
        """
        kind, *tokens = subject[len(self._names.registry) + 1 :].split(".")
        try:
            parts = [decode_token(token) for token in tokens]
            record = json.loads(payload) if payload else None
            if kind == "queue":
                (name,) = parts
                self.queues.pop(name, None)
                if record is not None:
                    self.queues[name] = _sound(Queue(**record), name=name)
            elif kind == "exchange":
                (name,) = parts
                self.table.exchanges.pop(name, None)
                if record is not None:
                    self.table.exchanges[name] = _sound(Exchange(**record), name=name)
            elif kind == "binding":
                exchange, queue, key = parts
                self.table.remove(exchange, key, queue)
                if record is not None:
                    binding = Binding(**record)
                    self.table.add(_sound(binding, exchange=exchange, queue=queue, key=key))
        except (ValueError, TypeError, RecursionError, JetStreamTransportError) as exc:
            logger.warning("ignored an unreadable registry record %s: %s", subject[:200], exc)

    def sweep(self) -> None:
        """Remove queues that are unused for as long as they may be.

        That is, auto-delete queues whose clients died, and those with ``x-expires``: the server
        removes their consumers by itself, and knows nothing of the rest.
        """
        if not self._loaded or self._jetstream.options.provision == "off":
            return
        now = time.time()
        old = [
            queue
            for queue in self.queues.values()
            if queue.inactive_after
            and queue.at + queue.inactive_after + min(queue.inactive_after, SWEEP_MARGIN) < now
        ]
        for queue in random.sample(old, min(MAX_SWEPT, len(old))):
            if self._jetstream.counts(queue.name, auto_delete=queue.auto_delete) is None:
                logger.info("removing the unused queue %r", queue.name)
                self._jetstream.delete_queue(queue.name, auto_delete=queue.auto_delete)
                self.delete_queue(queue.name)

    # -- changing ------------------------------------------------------------------------------

    def add_queue(self, queue: Queue) -> None:
        self.refresh()
        if self.queues.get(queue.name) != queue:
            self._write(
                self._names.registry_queue(queue.name),
                {
                    "name": queue.name,
                    "auto_delete": queue.auto_delete,
                    "arguments": queue.arguments,
                    "at": time.time(),
                },
            )

    def add_exchange(self, exchange: Exchange) -> None:
        """Declare an exchange.  Raises `PreconditionFailed` if it exists with another type."""
        if exchange.type not in EXCHANGE_TYPES:
            raise PreconditionFailed(
                f"exchange {exchange.name!r} has type {exchange.type!r}, "
                f"expected one of {', '.join(sorted(EXCHANGE_TYPES))}"
            )
        self.refresh()
        known = self.table.exchanges.get(exchange.name)
        if known is not None and known.type != exchange.type:
            raise PreconditionFailed(
                f"exchange {exchange.name!r} exists with type {known.type!r}, "
                f"it cannot be declared again with type {exchange.type!r}"
            )
        if known is None:
            self._write(
                self._names.registry_exchange(exchange.name),
                {
                    "name": exchange.name,
                    "type": exchange.type,
                    "durable": exchange.durable,
                    "auto_delete": exchange.auto_delete,
                    "arguments": exchange.arguments,
                },
            )

    def add_binding(self, binding: Binding) -> None:
        self.refresh()
        if not self.table.has(binding):
            self._write(
                self._names.registry_binding(binding.exchange, binding.queue, binding.key),
                {
                    "exchange": binding.exchange,
                    "key": binding.key,
                    "queue": binding.queue,
                    "type": binding.type,
                },
            )

    def remove_binding(self, exchange: str, queue: str, key: str) -> None:
        self.refresh()
        if any(b.key == key for b in self.table.bindings(queue=queue, exchange=exchange)):
            self._remove(self._names.registry_binding(exchange, queue, key))

    def delete_queue(self, queue_name: str) -> None:
        """Remove a queue's record, its bindings first: a message must not go to a queue half
        gone."""
        self.refresh()
        for binding in self.table.bindings(queue=queue_name):
            self._remove(self._names.registry_binding(binding.exchange, queue_name, binding.key))
        if queue_name in self.queues:
            self._remove(self._names.registry_queue(queue_name))

    def delete_exchange(self, exchange: str) -> None:
        self.refresh()
        for binding in self.table.bindings(exchange=exchange):
            self._remove(self._names.registry_binding(exchange, binding.queue, binding.key))
        if exchange in self.table.exchanges:
            self._remove(self._names.registry_exchange(exchange))

    def _write(self, subject: str, record: dict[str, Any]) -> None:
        payload = json.dumps(record, sort_keys=True).encode()
        self._publisher.publish(subject.encode(), payload, b"")
        self.apply(subject, payload)

    def _remove(self, subject: str) -> None:
        if self._jetstream.has_ttl:
            headers = encode_headers([("Nats-TTL", TOMBSTONE_TTL)])
            self._publisher.publish(subject.encode(), b"", headers)
        else:
            self._publisher.publish(subject.encode(), b"", b"")
            if self._jetstream.options.provision != "off":
                self._jetstream.request(
                    f"STREAM.PURGE.{self._names.registry_stream}", {"filter": subject}
                )
        self.apply(subject, b"")


R = TypeVar("R", Queue, Exchange, Binding)


def _sound(record: R, **names: str) -> R:
    """Return *record*, or raise ValueError unless it is of what its subject says."""
    for field_name, expected in names.items():
        if getattr(record, field_name) != expected:
            raise ValueError(f"{field_name!r} is not {expected!r}")
    if not isinstance(record, Queue) and record.type not in EXCHANGE_TYPES:
        raise ValueError(f"unknown exchange type {record.type!r}")
    if not isinstance(record, Binding) and not isinstance(record.arguments, dict):
        raise ValueError("'arguments' is no object")
    return record
