"""Channels that read Redis lists, beside JetStream or alone; see `fallback`.

*One budget.*  The prefetch limit covers both stores.  A take from Redis counts as held from the
moment it is sent, and pulls that wait on NATS are withdrawn as far as both together exceed the
limit; so the bound is the one of `pulls`, and messages that cross a withdrawal on the wire.  When
both have a backlog, each gets half of the limit, and of a limit of one they take turns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from amqp.protocol import queue_declare_ok_t

from . import envelope
from .arguments import QueueArguments
from .backend import Delivery
from .channel import Channel
from .errors import (
    ConnectionLost,
    FallbackLost,
    JetStreamTransportError,
    NoResponders,
    PreconditionFailed,
    PublishTimeout,
    RequestTimeout,
)
from .failover import Event, State
from .message import Message
from .migration import bucket_of, mirror
from .outgoing import Outgoing
from .routing import Exchange, key_subject

if TYPE_CHECKING:
    from .fallback import DualSession, Fallback, RedisSession
    from .redis_lists import ListReader

__all__ = ["AbsentQueue", "DualChannel", "RedisChannel"]

logger = logging.getLogger(__name__)

#: Seconds without copies to the mirror after one that was not answered, and seconds for the one
#: that is tried then.
MIRROR_REST = 5.0
MIRROR_TRIAL_TIMEOUT = 0.2

#: Seconds for the messages that are on their way when a consumer ends.
TAKE_TIMEOUT = 1.0

#: The ``delivery_mode`` of messages that need not survive: events, replies.
TRANSIENT = 1


class _ListsChannel(Channel):
    """What both kinds of channel have: a reader of lists."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self._fallback: Fallback = session.fallback
        self._lists = session.fallback.lists
        self._reader: ListReader | None = None
        self._lists_first = False
        #: how many messages of Redis are held
        self._from_lists = 0

    def _read_lists(self, queue: str) -> None:
        session: Any = self._session
        with session.lock:
            if self._reader is None:
                self._reader = session.new_reader(self)
            self._reader.add(queue)

    def _stop_pulling(self, queue: str) -> None:
        if self._reader is not None:
            with self._session.lock:
                self._reader.remove(queue)
                self._reader.await_take(TAKE_TIMEOUT)
        super()._stop_pulling(queue)

    def refill(self) -> bool:
        reader = self._reader
        if reader is None or self._is_closing or not (reader.has_backlog and reader.is_connected):
            return super().refill()
        pulls = self._pulls
        with self._session.lock:
            now = time.monotonic()
            room, kept = self._room(now), 0
            if pulls.has_backlog(now):
                # Of an odd limit the last one goes to who did not have it before.
                share = (pulls.limit + self._lists_first) // 2
                self._take(reader, min(share - self._from_lists, room))
                # The part of Redis is not for the others, either, while it has a backlog.
                kept = max(0, share - self._from_lists - reader.asked)
            else:
                self._take(reader, room)
            pulls.held += kept
            try:
                return super().refill()
            finally:
                pulls.held -= kept

    def _room(self, now: float) -> int:
        """Return for how many more messages there is room, whatever waits on the server."""
        return self._pulls.limit - self._pulls.held - self._pulls.under_way(now)

    def _take(self, reader: ListReader, room: int) -> None:
        """Ask Redis for as many messages as there is *room* for."""
        if room > 0 and reader.can_take:
            asked = reader.limited(room)
            self._pulls.reserve(asked)
            reader.take(asked)

    def lists_arrived(self, deliveries: list[Delivery], asked: int) -> None:
        """Take the messages of one take; *asked* is how many there might have been."""
        with self._session.lock:
            self.dirty = True
            self._pulls.held -= asked
            self._lists_first = not deliveries
            for delivery in deliveries:
                if self.closed or not self.consumers_of(delivery.queue):
                    delivery.settled = True
                    delivery.settler.settle(delivery, "nak")
                    continue
                self._pulls.held += 1
                self._from_lists += 1
                self.qos.hold(delivery)
                self.ready.push(delivery, delivery.level)
        self._session.wake_loop()

    def lists_pushed(self) -> None:
        """There may be messages."""
        self.dirty = True

    def after_read(self) -> None:
        if not self.closed:
            super().after_read()

    def _release(self, tag: int, *, to_die: bool = False) -> Delivery:
        delivery = super()._release(tag, to_die=to_die)
        self._from_lists -= delivery.settler is self._lists
        return delivery

    def _after_settle(self) -> bool:
        asked = super()._after_settle()
        if not self.closed and not self._sources and self._reader is not None:
            asked |= self.refill()
        return asked

    def lose(self) -> None:
        if self.closed:
            return
        session: Any = self._session
        super().lose()
        self._lists.adopt(d for d in self.qos.deliveries() if d.settler is self._lists)
        if self._reader is not None:
            session.drop_reader(self._reader)
            self._reader = None

    def _list_sizes(self, queue: str) -> int:
        """Return what waits in Redis; 0 while it is away."""
        return int(self._best_effort(lambda: self._lists.size(queue), 0))

    def _best_effort(self, operation: Callable[[], Any], otherwise: Any = None) -> Any:
        """Do something in Redis that is not worth failing for."""
        if not self._lists.available:
            return otherwise
        try:
            return operation()
        except FallbackLost as exc:
            logger.debug("left out: %s", exc)
            return otherwise


class DualChannel(_ListsChannel):
    """A channel of JetStream and of Redis."""

    def __init__(self, session: DualSession) -> None:
        super().__init__(session)
        self._outgoing = DualOutgoing(session)

    def exchange_declare(
        self, exchange: str = "", type: str = "direct", *args: Any, **kwargs: Any
    ) -> None:
        super().exchange_declare(exchange, type, *args, **kwargs)
        if not kwargs.get("passive"):
            self._fallback.exchange_types[exchange] = type or "direct"

    def _make_durable(
        self, queue: str, auto_delete: bool, arguments: dict[str, Any] | None
    ) -> queue_declare_ok_t:
        self._fallback.queues.add(queue)
        return self._with_lists(super()._make_durable(queue, auto_delete, arguments))

    def _declared(self, queue: str) -> queue_declare_ok_t:
        return self._with_lists(super()._declared(queue))

    def _with_lists(self, ok: queue_declare_ok_t) -> queue_declare_ok_t:
        if ok.queue in self._session.transient:
            return ok
        return ok._replace(message_count=ok.message_count + self._list_sizes(ok.queue))

    def queue_bind(
        self, queue: str, exchange: str = "", routing_key: str = "", *args: Any, **kwargs: Any
    ) -> None:
        super().queue_bind(queue, exchange, routing_key, *args, **kwargs)
        if exchange and queue not in self._session.transient:
            kind = self._known_exchange(exchange).type
            self._best_effort(lambda: self._lists.bind(exchange, kind, routing_key, queue))

    def queue_unbind(
        self, queue: str, exchange: str = "", routing_key: str = "", *args: Any, **kwargs: Any
    ) -> None:
        super().queue_unbind(queue, exchange, routing_key, *args, **kwargs)
        if queue not in self._session.transient:
            self._best_effort(lambda: self._lists.unbind(exchange, queue, routing_key))

    def queue_purge(self, queue: str, nowait: bool = False, **kwargs: Any) -> int:
        removed = super().queue_purge(queue, nowait, **kwargs)
        if queue in self._session.transient:
            return removed
        return removed + int(self._best_effort(lambda: self._lists.purge(queue), 0))

    def queue_delete(
        self,
        queue: str,
        if_unused: bool = False,
        if_empty: bool = False,
        nowait: bool = False,
        **kwargs: Any,
    ) -> int:
        is_transient = queue in self._session.transient
        if if_empty and not is_transient and self._list_sizes(queue):
            raise PreconditionFailed(f"queue {queue!r} is not empty")
        bound = self._session.registry.table.bindings(queue=queue)
        removed = super().queue_delete(queue, if_unused, if_empty, nowait, **kwargs)
        if is_transient:
            return removed
        self._fallback.queues.discard(queue)
        for exchange in {binding.exchange for binding in bound}:
            self._best_effort(partial(self._lists.unbind, exchange, queue))
        return removed + int(self._best_effort(lambda: self._lists.purge(queue), 0))

    def _start_pulling(self, queue: str) -> None:
        super()._start_pulling(queue)
        self._read_lists(queue)

    def _arrived_message(self, *args: Any) -> None:
        super()._arrived_message(*args)
        self._lists_first = True

    def _get_one(self, queue: str) -> Delivery | None:
        delivery = super()._get_one(queue)
        if delivery is None:
            found: Delivery | None = self._best_effort(lambda: self._lists.take_one(queue))
            return found
        return delivery


class DualOutgoing(Outgoing):
    """Writes where ``migration_phase`` says, and to Redis while JetStream is away."""

    def __init__(self, session: DualSession) -> None:
        super().__init__(session)
        self._dual = session
        self._fallback = session.fallback
        self._mirrors = session.options.migration_phase == "dual-write"

    def publish(
        self,
        message: envelope.Envelope,
        exchange: str,
        routing_key: str,
        mandatory: bool,
        timeout: float | None,
    ) -> bool:
        fallback = self._fallback
        if fallback.writes_redis:
            return self._publish_to_redis(message, exchange, routing_key, mandatory)
        if fallback.failover.is_degraded:  # another connection found out, or this one did
            queues = self._dual.known_routes(exchange, routing_key)
            if not queues:
                raise ConnectionLost("JetStream is away, Redis takes over")
            fallback.write(queues, message, self._payload(message, exchange, routing_key))
            return True
        is_open = self._session.nats.is_open
        patience = fallback.patience
        try:
            is_routed = super().publish(
                message,
                exchange,
                routing_key,
                mandatory,
                min(timeout, patience) if timeout is not None else patience,
            )
            if fallback.failover.state is State.RECOVERING:
                fallback.happened(Event.WORKED)
            return is_routed
        except (PublishTimeout, RequestTimeout, NoResponders) as exc:
            return self._give_up(message, exchange, routing_key, exc)
        except ConnectionLost:
            # kombu connects anew and publishes again: under the same id if JetStream is there.
            if is_open:
                fallback.unsure(str(message["properties"]["delivery_tag"]))
            raise

    def _give_up(
        self, message: envelope.Envelope, exchange: str, routing_key: str, exc: ConnectionLost
    ) -> bool:
        """The server is frozen, or its stream has no leader: the patience is spent."""
        fallback = self._fallback
        fallback.happened(Event.GAVE_UP, exc)
        queues = self._dual.known_routes(exchange, routing_key)
        if not queues:
            raise exc
        fallback.unsure(str(message["properties"]["delivery_tag"]))
        fallback.write(queues, message, self._payload(message, exchange, routing_key))
        return True

    def _payload(self, message: envelope.Envelope, exchange: str, routing_key: str) -> bytes:
        message["properties"]["delivery_info"] = {"exchange": exchange, "routing_key": routing_key}
        return envelope.encode(message)

    def _publish_to_redis(
        self, message: envelope.Envelope, exchange: str, routing_key: str, mandatory: bool
    ) -> bool:
        """Write to the lists; what is for transient queues goes through NATS as always."""
        session, fallback = self._dual, self._fallback
        properties = message["properties"]
        queues = session.durable_routes(exchange, routing_key)
        if exchange:
            kind = fallback.exchange_types.get(exchange, "direct")
            there = fallback.lists.route(exchange, kind, routing_key)
            queues = tuple(dict.fromkeys([*queues, *there]))
        elif not queues and properties.get("delivery_mode") != TRANSIENT:
            queues = (routing_key,)  # a queue of kombu's Redis transport needs no declaration
        if not queues or exchange:
            heard = self._to_transient(message, exchange, routing_key, mandatory and not queues)
            if not queues:
                return heard
        payload = self._payload(message, exchange, routing_key)
        if self._mirrors:
            bucket = bucket_of(time.time())
            fallback.write(queues, message, payload, bucket=bucket)
            self._mirror(queues, message, payload, bucket)
        else:
            fallback.write(queues, message, payload)
        return True

    def _to_transient(
        self, message: envelope.Envelope, exchange: str, routing_key: str, mandatory: bool
    ) -> bool:
        names, nats = self._session.jetstream.names, self._session.nats
        if exchange:
            subject = names.exchange(exchange, key_subject(routing_key)).encode()
        else:
            subject = names.transient_queue(routing_key).encode()
        payload = self._payload(message, exchange, routing_key)
        if mandatory:
            return self._heard(subject, payload)
        nats.publish(subject, payload)
        return True

    def _mirror(
        self, queues: tuple[str, ...], message: envelope.Envelope, payload: bytes, bucket: int
    ) -> None:
        fallback = self._fallback
        now = time.monotonic()
        if now < fallback.mirror_rests_until:
            fallback.mirror_failures += 1
            return
        # A server that was frozen a moment ago gets no more patience for a copy.
        is_trial = fallback.mirror_rests_until > 0
        timeout = MIRROR_TRIAL_TIMEOUT if is_trial else self.options.fallback_after
        try:
            for queue in queues:
                mirror(self._dual, queue, message, payload, bucket, timeout)
            fallback.mirror_rests_until = float("-inf")
        except (JetStreamTransportError, OSError) as exc:
            # The message is in Redis: this is not worth failing for, `migrate compare` shows it.
            if not fallback.mirror_failures:
                logger.warning("a message did not reach the mirror: %s", exc)
            fallback.mirror_failures += 1
            if isinstance(exc, (PublishTimeout, RequestTimeout)):
                fallback.mirror_rests_until = time.monotonic() + MIRROR_REST


class AbsentQueue:
    """A transient queue while JetStream is away: remote control, events, replies."""

    def __init__(self, name: str, auto_delete: bool) -> None:
        self.name = name
        self.auto_delete = auto_delete
        self.consumers = 0

    def __len__(self) -> int:
        return 0

    def touch(self) -> None:
        pass

    def bind(self, exchange: str, exchange_type: str, key: str) -> None:
        pass

    def unbind(self, exchange: str, key: str) -> None:
        pass

    def purge(self) -> int:
        return 0

    def pop(self) -> None:
        return None


class RedisChannel(_ListsChannel):
    """A channel of Redis alone."""

    def __init__(self, session: RedisSession) -> None:
        super().__init__(session)
        self._redis_session = session
        self._outgoing = RedisOutgoing(session)

    def _open(self) -> Any:
        session = super()._open()
        self._redis_session.check()
        return session

    # -- exchanges and queues ------------------------------------------------------------------

    def exchange_declare(
        self,
        exchange: str = "",
        type: str = "direct",
        durable: bool = False,
        auto_delete: bool = False,
        arguments: dict[str, Any] | None = None,
        nowait: bool = False,
        passive: bool = False,
        **kwargs: Any,
    ) -> None:
        self._open()
        if not passive:
            self._fallback.exchange_types[exchange] = type or "direct"

    def _known_exchange(self, exchange: str) -> Exchange:
        return Exchange(exchange, self._fallback.exchange_types.get(exchange, "direct"))

    def exchange_delete(
        self, exchange: str, if_unused: bool = False, nowait: bool = False, **kwargs: Any
    ) -> None:
        """Do nothing: what JetStream's registry knows cannot be changed now."""
        self._open()

    def _make_durable(
        self, queue: str, auto_delete: bool, arguments: dict[str, Any] | None
    ) -> queue_declare_ok_t:
        self._fallback.queues.add(queue)
        return queue_declare_ok_t(queue, self._list_sizes(queue), 0)

    def _declared(self, queue: str) -> queue_declare_ok_t:
        return queue_declare_ok_t(queue, self._list_sizes(queue), 0)

    def _is_auto_delete(self, queue: str) -> bool:
        return False

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> queue_declare_ok_t:
        self._open()
        if passive:
            return self._declared(queue)
        parsed = QueueArguments.parse(queue, arguments)
        self._decide(but=queue)
        if queue in self._session.transient:
            return queue_declare_ok_t(queue, 0, 0)
        if exclusive or (not durable and parsed.expires is not None):
            self._make_transient(queue, auto_delete, parsed)
            return queue_declare_ok_t(queue, 0, 0)
        if auto_delete and queue not in self._fallback.queues:
            self._undecided[queue] = {"arguments": arguments, "parsed": parsed}
            return queue_declare_ok_t(queue, 0, 0)
        return self._make_durable(queue, auto_delete, arguments)

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        session = self._open()
        if not exchange:
            return
        kind = self._known_exchange(exchange).type
        undecided = self._undecided.get(queue)
        if undecided is not None and kind == "fanout":
            del self._undecided[queue]
            self._make_transient(queue, True, undecided["parsed"])
        self._decide()
        if queue not in session.transient:
            self._lists.bind(exchange, kind, routing_key, queue)

    def queue_unbind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
        nowait: bool = False,
        **kwargs: Any,
    ) -> None:
        session = self._open()
        if queue not in session.transient:
            self._lists.unbind(exchange, queue, routing_key)

    def queue_purge(self, queue: str, nowait: bool = False, **kwargs: Any) -> int:
        session = self._open()
        return 0 if queue in session.transient else int(self._lists.purge(queue))

    def queue_delete(
        self,
        queue: str,
        if_unused: bool = False,
        if_empty: bool = False,
        nowait: bool = False,
        **kwargs: Any,
    ) -> int:
        session = self._open()
        self._undecided.pop(queue, None)
        transient = session.transient.get(queue)
        if transient is not None:
            session.forget_transient(transient)
            return 0
        if if_empty and self._lists.size(queue):
            raise PreconditionFailed(f"queue {queue!r} is not empty")
        self._fallback.queues.discard(queue)
        return int(self._lists.purge(queue))

    def get_bindings(self) -> list[dict[str, str]]:
        return []

    # -- consuming -----------------------------------------------------------------------------

    def _start_pulling(self, queue: str) -> None:
        self._read_lists(queue)
        self.refill()

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Message | None:
        session = self._open()
        self._decide()
        message: Message | None = None
        while message is None and queue not in session.transient:
            delivery = self._lists.take_one(queue)
            if delivery is None:
                return None
            self._hold(delivery)
            message = self._to_message(delivery, None)
            if message is not None and no_ack:
                self.basic_ack(delivery.tag)
        return message

    def tick(self, now: float) -> None:
        self.refill()

    # -- what is given up on -------------------------------------------------------------------

    def _forward(self, delivery: Delivery, decoded: envelope.Envelope | None) -> bool:
        return False  # the queue's arguments are in JetStream

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        if self.closed:
            return
        for consumer_tag in list(self._consumers):
            self.basic_cancel(consumer_tag)
        for tag in self.qos.up_to(0):
            self._settle(tag, "nak")
        self.lose()


class RedisOutgoing(Outgoing):
    """Writes to Redis alone; messages for transient queues are dropped, nobody can hear them."""

    def __init__(self, session: RedisSession) -> None:
        super().__init__(session)
        self._fallback = session.fallback

    def publish(
        self,
        message: envelope.Envelope,
        exchange: str,
        routing_key: str,
        mandatory: bool,
        timeout: float | None,
    ) -> bool:
        properties = message["properties"]
        queues = self._session.durable_routes(exchange, routing_key)
        if not exchange and properties.get("delivery_mode") == TRANSIENT:
            # A reply, for a queue that is a NATS subscription: in a list it would stay for ever.
            queues = tuple(queue for queue in queues if queue in self._fallback.queues)
        if not queues:
            return not mandatory
        properties["delivery_info"] = {"exchange": exchange, "routing_key": routing_key}
        self._fallback.write(queues, message, envelope.encode(message))
        return True
