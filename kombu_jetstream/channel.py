"""The AMQP verbs, each a few lines: declare, bind, publish, consume, get, settle.

What they mean is elsewhere: names in `topology`, exchanges in `routing`, which queue is of which
kind in `queues`, credit in `pulls`, held deliveries in `qos`, confirms in `publishing`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from amqp.protocol import queue_declare_ok_t
from kombu.transport import base
from kombu.utils.uuid import uuid

from . import deadletter, envelope, extensions
from .arguments import QueueArguments
from .backend import Delivery
from .deadletter import DeadLetter, Reason
from .errors import (
    ConnectionLost,
    ConsumerGone,
    ExchangeMissing,
    JetStreamTransportError,
    MalformedMessage,
    NoRoute,
    NotSupported,
    PreconditionFailed,
    QueueMissing,
)
from .jetstream import parse_reply
from .message import Message
from .outgoing import Outgoing
from .protocol import Msg, parse_headers
from .pulls import IDLE_HEARTBEAT, SLOTS, WAIT_SLOT, Cancel, Pulls, Ready, Source
from .qos import QoS
from .registry import Queue
from .routing import Binding, Exchange
from .tasks import check_fields, runs_tasks
from .topology import LEVELS, decode_token

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Channel"]

logger = logging.getLogger(__name__)

#: Exchanges every AMQP broker has.
DEFAULT_EXCHANGES = {
    "amq.direct": Exchange("amq.direct"),
    "amq.fanout": Exchange("amq.fanout", "fanout"),
    "amq.topic": Exchange("amq.topic", "topic"),
}

#: Failed pulls in a row after which the consumer is looked for.
FAILURES_BEFORE_CHECK = 3

_channel_ids = count(1)


@dataclass(slots=True, eq=False)
class _Consumer:
    """One `basic_consume`."""

    tag: str
    queue: str
    callback: Callable[[Message], Any]
    no_ack: bool
    channel: Channel
    on_cancel: Callable[[str], Any] | None = None
    #: whether Celery's tasks are behind it
    is_for_tasks: bool = False


class Channel(base.StdChannel):
    """One kombu channel.  Used by one thread; only the settling verbs may come from any."""

    Message = Message

    def __init__(self, session: Session) -> None:
        #: None once closed, as kombu's virtual channels have it
        self.connection: Session | None = session
        self.channel_id = next(_channel_ids)
        self.closed = False
        self.no_ack_consumers: set[str] = set()
        self.events: dict[str, set[Callable[..., Any]]] = {"basic_return": set()}
        self._session = session
        self._outgoing = Outgoing(session)
        self._pulls = Pulls(guard=session.options.starvation_guard)
        self.ready: Ready[Delivery] = Ready(self._pulls)
        self.qos = QoS(self._pulls)
        #: something arrived or ended, so `refill` may have something to ask
        self.dirty = False
        self._consumers: dict[str, _Consumer] = {}
        self._sources: dict[bytes, Source] = {}
        #: when the server last heard that a consumer is in use
        self._touched: dict[Source, float] = {}
        #: subject prefix and subscription of the pulls, by slot
        self._inboxes: list[tuple[bytes, int] | None] = [None] * SLOTS
        self._has_pulled = False
        #: sources whose consumer the server says is deleted
        self._gone: list[tuple[Source, str]] = []
        self._undecided: dict[str, dict[str, Any]] = {}
        #: deliveries whose dead letter is not confirmed yet
        self._letters: set[Delivery] = set()

    # -- exchanges -----------------------------------------------------------------------------

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
        """Declare *exchange*; with *passive*, `ExchangeMissing` if it is not there."""
        session = self._open()
        if not exchange or exchange in DEFAULT_EXCHANGES:
            return
        if passive:
            self._known_exchange(exchange)
            return
        session.registry.add_exchange(
            Exchange(exchange, type or "direct", durable, auto_delete, arguments or {})
        )

    def _known_exchange(self, exchange: str) -> Exchange:
        registry = self._open().registry
        registry.refresh()
        known = registry.table.exchanges.get(exchange) or DEFAULT_EXCHANGES.get(exchange)
        if known is None:
            self._session.nats.round_trip(self._session.options.publish_timeout)
            known = registry.table.exchanges.get(exchange)
        if known is None:
            raise ExchangeMissing(exchange)
        return known

    def exchange_delete(
        self, exchange: str, if_unused: bool = False, nowait: bool = False, **kwargs: Any
    ) -> None:
        """Delete *exchange* and its bindings; the queues stay."""
        registry = self._open().registry
        registry.refresh()
        if if_unused and registry.table.bindings(exchange=exchange):
            raise PreconditionFailed(f"exchange {exchange!r} is in use")
        registry.delete_exchange(exchange)

    def exchange_bind(self, *args: Any, **kwargs: Any) -> None:
        raise NotSupported("binding an exchange to an exchange", "bind the queues to both")

    exchange_unbind = exchange_bind

    # -- queues --------------------------------------------------------------------------------

    def prepare_queue_arguments(
        self, arguments: dict[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        """Turn kombu's ``expires``, ``message_ttl`` … into RabbitMQ's arguments."""
        prepared: dict[str, Any] = base.to_rabbitmq_queue_arguments(arguments or {}, **kwargs)
        return prepared

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
        """Declare *queue* and return its name, ready messages and consumers.

        A queue of one connection is transient, a core NATS subscription: exclusive ones, and those
        that are not durable and expire.  All others live in JetStream.  An auto-delete queue
        becomes transient, too, if the next thing done is to bind it to a fanout exchange
        (Broadcast); in JetStream it would be one queue that all share.
        """
        session = self._open()
        queue = queue or f"amq.gen-{uuid()}"
        if passive:
            return self._declared(queue)
        parsed = QueueArguments.parse(queue, arguments)
        self._decide(but=queue)
        if queue in session.transient:
            session.transient[queue].touch()
            return queue_declare_ok_t(queue, len(session.transient[queue]), 0)
        if exclusive or (not durable and parsed.expires is not None):
            self._make_transient(queue, auto_delete, parsed)
            return queue_declare_ok_t(queue, 0, 0)
        if auto_delete:
            session.registry.load()
            if queue not in session.registry.queues:
                self._undecided[queue] = {"arguments": arguments, "parsed": parsed}
                return queue_declare_ok_t(queue, 0, 0)
        return self._make_durable(queue, auto_delete, arguments)

    def _make_transient(self, queue: str, auto_delete: bool, parsed: QueueArguments) -> None:
        self._session.add_transient(
            queue,
            auto_delete=auto_delete,
            expires=parsed.expires,
            message_ttl=parsed.message_ttl,
        )

    def _make_durable(
        self, queue: str, auto_delete: bool, arguments: dict[str, Any] | None
    ) -> queue_declare_ok_t:
        session = self._session
        record = Queue(queue, auto_delete, dict(arguments or {}))
        counts = session.jetstream.ensure_queue(
            queue, auto_delete=auto_delete, inactive_after=record.inactive_after
        )
        session.registry.add_queue(record)
        return queue_declare_ok_t(queue, counts.ready, counts.waiting_pulls)

    def _decide(self, but: str | None = None) -> None:
        """Make auto-delete queues JetStream ones that were not bound to a fanout exchange."""
        for queue in [name for name in self._undecided if name != but]:
            self._make_durable(queue, True, self._undecided.pop(queue)["arguments"])

    def _declared(self, queue: str) -> queue_declare_ok_t:
        """Answer a passive declare."""
        session = self._session
        self._decide()
        transient = session.transient.get(queue)
        if transient is not None:
            return queue_declare_ok_t(queue, len(transient), transient.consumers)
        if not session.durable_routes("", queue):
            raise QueueMissing(queue)
        counts = session.jetstream.counts(queue, auto_delete=self._is_auto_delete(queue))
        if counts is None:
            raise QueueMissing(queue)
        return queue_declare_ok_t(queue, counts.ready, counts.waiting_pulls)

    def _is_auto_delete(self, queue: str) -> bool:
        record = self._session.registry.queues.get(queue)
        return record is not None and record.auto_delete

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Bind *queue* to *exchange*, so that *routing_key* reaches it."""
        session = self._open()
        if not exchange:  # every queue is bound to the default exchange by its name
            return
        known = self._known_exchange(exchange)
        undecided = self._undecided.get(queue)
        if undecided is not None and known.type == "fanout":
            del self._undecided[queue]
            self._make_transient(queue, True, undecided["parsed"])
        self._decide()
        transient = session.transient.get(queue)
        if transient is not None:
            transient.bind(exchange, known.type, routing_key)
            return
        if not session.durable_routes("", queue):
            raise QueueMissing(queue)
        session.registry.add_binding(Binding(exchange, routing_key, queue, known.type))

    def queue_unbind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
        nowait: bool = False,
        **kwargs: Any,
    ) -> None:
        """Undo `queue_bind`; no error if there is no such binding."""
        session = self._open()
        self._decide()
        transient = session.transient.get(queue)
        if transient is not None:
            transient.unbind(exchange, routing_key)
        else:
            session.registry.remove_binding(exchange, queue, routing_key)

    def queue_purge(self, queue: str, nowait: bool = False, **kwargs: Any) -> int:
        """Remove the messages of *queue* that are ready or delayed, and return their number."""
        session = self._open()
        self._decide()
        transient = session.transient.get(queue)
        if transient is not None:
            return transient.purge()
        if not session.durable_routes("", queue):
            raise QueueMissing(queue)
        return session.jetstream.purge(queue, auto_delete=self._is_auto_delete(queue))

    def queue_delete(
        self,
        queue: str,
        if_unused: bool = False,
        if_empty: bool = False,
        nowait: bool = False,
        **kwargs: Any,
    ) -> int:
        """Delete *queue* with its messages and bindings, and return how many messages it had.

        `PreconditionFailed` if it is not as *if_unused* or *if_empty* demand.  A queue that does
        not exist is no error, as in RabbitMQ.
        """
        session = self._open()
        self._undecided.pop(queue, None)
        transient = session.transient.get(queue)
        if transient is not None:
            if if_unused and transient.consumers:
                raise PreconditionFailed(f"queue {queue!r} is in use")
            if if_empty and len(transient):
                raise PreconditionFailed(f"queue {queue!r} is not empty")
            session.forget_transient(transient)
            return 0
        if not session.durable_routes("", queue):
            return 0
        auto_delete = self._is_auto_delete(queue)
        counts = session.jetstream.counts(queue, auto_delete=auto_delete)
        if counts is not None:
            if if_unused and counts.waiting_pulls:
                raise PreconditionFailed(f"queue {queue!r} is in use")
            if if_empty and (
                counts.ready or counts.in_flight or session.jetstream.delayed(queue)
            ):
                raise PreconditionFailed(f"queue {queue!r} is not empty")
        session.registry.delete_queue(queue)
        session.jetstream.delete_queue(queue, auto_delete=auto_delete)
        return counts.ready if counts is not None else 0

    def get_bindings(self) -> list[dict[str, str]]:
        """Return the bindings of durable queues, as kombu's management API has them."""
        registry = self._open().registry
        registry.refresh()
        return [
            {"destination": b.queue, "source": b.exchange, "routing_key": b.key}
            for b in registry.table.bindings()
        ]

    # -- publishing ----------------------------------------------------------------------------

    def prepare_message(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> envelope.Envelope:
        """Return the message `basic_publish` takes."""
        return self._outgoing.prepare(
            body, priority, content_type, content_encoding, headers, properties
        )

    def basic_publish(
        self,
        message: envelope.Envelope,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Publish *message*: a confirmed write for each durable queue, a core publish for others.

        With *mandatory*, a message no queue takes comes back through ``events['basic_return']``.
        """
        self._open()
        if self._undecided:
            self._decide()
        seconds = confirm_timeout if confirm_timeout is not None else timeout
        routed = self._outgoing.publish(message, exchange, routing_key, mandatory, seconds)
        if not routed:
            returned = NoRoute(exchange, routing_key)
            for callback in list(self.events["basic_return"]):
                callback(returned, exchange, routing_key, message)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every pipelined publish of this connection is confirmed."""
        self._open().flush(timeout)

    # -- consuming -----------------------------------------------------------------------------

    def basic_consume(
        self,
        queue: str,
        no_ack: bool = False,
        callback: Callable[[Message], Any] | None = None,
        consumer_tag: str = "",
        nowait: bool = False,
        on_cancel: Callable[[str], Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """Call *callback* with each message of *queue* until `basic_cancel`."""
        session = self._open()
        self._decide()
        assert callback is not None
        tag = consumer_tag or uuid()
        if tag in self._consumers:
            raise PreconditionFailed(f"consumer tag {tag!r} is in use")
        transient = session.transient.get(queue)
        if transient is None and not session.durable_routes("", queue):
            raise QueueMissing(queue)
        self._consumers[tag] = _Consumer(
            tag, queue, callback, no_ack, self, on_cancel, runs_tasks(callback)
        )
        if no_ack:
            self.no_ack_consumers.add(tag)
        if transient is not None:
            transient.consumers += 1
            transient.touch()
            session.transient_arrived(transient)
        else:
            self._start_pulling(queue)
        return tag

    def _start_pulling(self, queue: str) -> None:
        session = self._session
        jetstream = session.jetstream
        session.announce_degraded()
        with session.lock:
            for level in jetstream.queue_levels(self._is_auto_delete(queue)):
                key = jetstream.consumer_key(queue, level)
                if key not in self._sources:
                    token = (queue, jetstream.pull_subject(queue, level))
                    source = Source(LEVELS.index(level), token)
                    self._sources[key] = source
                    self._pulls.add(source)
                    self._touched[source] = time.monotonic()
        session.ledger.hold(self.qos)
        self.refill()

    def basic_cancel(self, consumer_tag: str, nowait: bool = False, **kwargs: Any) -> None:
        """End a consumer.  What it was given and did not settle stays held."""
        consumer = self._consumers.pop(consumer_tag, None)
        self.no_ack_consumers.discard(consumer_tag)
        if consumer is None:
            return
        session = self._session
        transient = session.transient.get(consumer.queue)
        if transient is not None:
            transient.consumers -= 1
            transient.touch()
            if transient.auto_delete and not transient.consumers:
                session.forget_transient(transient)
        elif not self.consumers_of(consumer.queue):
            self._stop_pulling(consumer.queue)
            self._auto_delete(consumer.queue)

    def _stop_pulling(self, queue: str) -> None:
        with self._session.lock:
            for key, source in list(self._sources.items()):
                if source.token[0] == queue:
                    del self._sources[key], self._touched[source]
                    self._pulls.remove(source)
            self._cancel_pulls()
            for delivery in self.ready.take(lambda delivery: delivery.queue == queue):
                self._hand_back(delivery)
        self.refill()

    def _auto_delete(self, queue: str) -> None:
        """Delete an auto-delete queue whose last consumer left; others still pull, or hold."""
        session = self._session
        if not self._is_auto_delete(queue) or not session.nats.is_open:
            return
        session.nats.round_trip(session.options.publish_timeout)  # our pulls are withdrawn
        counts = session.jetstream.counts(queue, auto_delete=True)
        if counts is None or not (counts.waiting_pulls or counts.in_flight):
            self.queue_delete(queue)

    def consumers_of(self, queue: str) -> list[_Consumer]:
        return [consumer for consumer in self._consumers.values() if consumer.queue == queue]

    def has_consumers(self) -> bool:
        return bool(self._consumers)

    def has_room(self) -> bool:
        """Tell whether the prefetch limit lets another delivery in."""
        return self.qos.can_consume()

    def basic_qos(
        self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False
    ) -> None:
        """Set the prefetch limit, 0 for none, also while consuming; *prefetch_size* is ignored."""
        with self._session.lock:
            self.qos.set_prefetch_count(prefetch_count)
        if self._sources and not self.closed:
            self.refill()
        self._wake_transient()

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Message | None:
        """Return the next message of *queue* without waiting for one, or None."""
        session = self._open()
        self._decide()
        transient = session.transient.get(queue)
        if transient is not None:
            session.nats.read_available()
            delivery = transient.pop()
        elif session.durable_routes("", queue):
            delivery = self._get_one(queue)
        else:
            raise QueueMissing(queue)
        if delivery is None:
            return None
        self._hold(delivery)
        message = self._to_message(delivery, None)
        if message is not None and no_ack:
            self.basic_ack(delivery.tag)
        return message if message is not None else self.basic_get(queue, no_ack)

    def _get_one(self, queue: str) -> Delivery | None:
        """Pull one message, from the most urgent level that has one."""
        session = self._session
        jetstream = session.jetstream
        for level in jetstream.queue_levels(self._is_auto_delete(queue)):
            answers: list[Msg] = []
            inbox = session.nats.new_inbox()
            sid = session.nats.subscribe(inbox, answers.append)
            try:
                jetstream.pull(jetstream.pull_subject(queue, level), 1, False, inbox)
                if not session.nats.wait(lambda a=answers: bool(a), session.options.publish_timeout):
                    continue
            finally:
                session.nats.unsubscribe(sid)
            if answers[0].reply:
                return self._delivery(answers[0], None)
        return None

    # -- what arrives --------------------------------------------------------------------------

    def refill(self) -> None:
        """Ask the server for what the credit allows."""
        session = self._session
        with session.lock:
            self.dirty = False
            commands = self._pulls.plan(time.monotonic())
            if not commands:
                return
            pull = session.jetstream.pull
            with session.nats.corked():
                for command in commands:
                    if isinstance(command, Cancel):
                        self._drop_inbox(WAIT_SLOT)
                        continue
                    inbox = self._inboxes[command.slot] or self._open_inbox(command.slot)
                    subject = command.source.token[1]
                    pull(subject, command.batch, command.wait, b"%b.%d" % (inbox[0], command.pull_id))

    def _open_inbox(self, slot: int) -> tuple[bytes, int]:
        """One subscription carries the pulls of a slot, whatever their source.

        So one UNSUB withdraws all waiting ones, and a message tells by its subscription which of
        its source's pulls it answers: its subject is the queue's.
        """
        nats = self._session.nats
        inbox = nats.new_inbox()
        sid = nats.subscribe(inbox + b".*", partial(self._arrived, slot, inbox))
        self._inboxes[slot] = (inbox, sid)
        self._has_pulled = True
        return inbox, sid

    def _drop_inbox(self, slot: int) -> None:
        inbox = self._inboxes[slot]
        if inbox is not None:
            self._inboxes[slot] = None
            self._session.nats.unsubscribe(inbox[1])

    def _cancel_pulls(self) -> None:
        self._drop_inbox(WAIT_SLOT)
        self._pulls.forget(time.monotonic())

    def _arrived(self, slot: int, inbox: bytes, msg: Msg) -> None:
        """Take a message or a status of a pull in *slot*."""
        with self._session.lock:
            self.dirty = True
            if msg.reply:
                opened = self._inboxes[slot]
                current = opened is not None and opened[0] is inbox
                self._arrived_message(msg, slot if current else None)
            else:
                self._arrived_status(msg, int(msg.subject[len(inbox) + 1 :]))
                self._session.wake_loop()

    def _arrived_message(self, msg: Msg, slot: int | None) -> None:
        """Hold a message; *slot* is None for one that crossed a withdrawal."""
        key, attempt, pending, stored = parse_reply(msg.reply)
        source = self._sources.get(key)
        delivery = self._delivery(msg, source, attempt, stored)
        if source is None or self.closed:  # cancelled; the message was under way
            delivery.settler.settle(delivery, "nak")
            return
        self._pulls.received(source, pending, slot, delivery.received_at)
        ledger = self._session.ledger
        if (attempt > 1 or ledger.is_wary) and ledger.held_again(msg.reply):
            self._pulls.settled()
            return
        self.qos.hold(delivery)
        self.ready.push(delivery, source.level)
        self._session.wake_loop()

    def _delivery(
        self, msg: Msg, source: Source | None, attempt: int = 0, stored: float = 0.0
    ) -> Delivery:
        if not attempt:
            _, attempt, _, stored = parse_reply(msg.reply)
        now = time.monotonic()
        _, level, token = msg.subject.split(b".", 2)
        queue = source.token[0] if source is not None else _queue_of(token)
        return Delivery(
            queue,
            source.level if source is not None else LEVELS.index(level.decode()),  # type: ignore[arg-type]
            msg.payload,
            msg.reply,
            self._session.jetstream,
            attempt,
            now,
            now,
            stored,
            source,
        )

    def _arrived_status(self, msg: Msg, pull_id: int) -> None:
        status = parse_headers(msg.headers)
        now = time.monotonic()
        if status.status == 100:
            self._pulls.heard(pull_id, now)
            return
        # 404 none, 408 expired: the source is empty.  409 and 503: no leader, shutdown, deleted.
        failed = status.status not in (404, 408)
        source = self._pulls.ended(pull_id, now, failed=failed)
        if failed and source is not None:
            logger.debug(
                "pull of queue %r ended: %s %s", source.token[0], status.status, status.description
            )
            if "Deleted" in status.description:
                self._gone.append((source, status.description))

    def after_read(self) -> None:
        """Act on what was read: pull again, or tell that a queue is gone."""
        while self._gone:
            self._consumer_gone(*self._gone.pop())
        self.refill()

    def _consumer_gone(self, source: Source, detail: str) -> None:
        """The queue was deleted under its consumers: tell them, or let kombu declare it again."""
        queue = source.token[0]
        callbacks = [c for c in self.consumers_of(queue) if c.on_cancel is not None]
        if not callbacks:
            raise ConsumerGone(queue, detail)
        for consumer in callbacks:
            self._consumers.pop(consumer.tag, None)
            assert consumer.on_cancel is not None
            consumer.on_cancel(consumer.tag)
        self._stop_pulling(queue)

    def tick(self, now: float) -> None:
        """Renew pulls the server went silent on, and look for consumers that do not answer."""
        if not self._sources:
            return
        with self._session.lock:
            self._pulls.renew_silent(now)
            lost = [s for s in self._pulls.sources if s.failures == FAILURES_BEFORE_CHECK]
        for source in lost:
            source.failures += 1
            if self._session.options.provision != "off":
                self._look_for(source.token[0])
        self._keep_in_use(now)
        self.refill()

    def _look_for(self, queue: str) -> None:
        """Find out why a consumer does not answer, and make it again if its queue is there."""
        jetstream = self._session.jetstream
        record = self._session.registry.queues.get(queue)
        auto_delete = self._is_auto_delete(queue)
        if record is None or jetstream.counts(queue, auto_delete=auto_delete) is None:
            raise ConsumerGone(queue)
        if self._session.options.provision == "auto":
            jetstream.ensure_queue(
                queue, auto_delete=auto_delete, inactive_after=record.inactive_after
            )

    def _keep_in_use(self, now: float) -> None:
        """Queues that go when they are unused must not go while we have no room to pull."""
        queues = self._session.registry.queues
        for source, touched in self._touched.items():
            record = queues.get(source.token[0])
            if record is None or not record.inactive_after:
                continue
            if source.asked:
                self._touched[source] = now
            elif now - touched > record.inactive_after / 4:
                self._touched[source] = now
                self._session.jetstream.touch(source.token[1])

    def deliver(self) -> bool:
        """Hand one ready delivery to its consumer; return whether there was one to hand on."""
        with self._session.lock:
            if not self.ready:
                return False
            delivery = self.ready.pop()
        consumers = self.consumers_of(delivery.queue)
        if not consumers:
            self._hand_back(delivery)
            return False
        consumer = consumers[0]
        if len(consumers) > 1:  # consumers of one queue take turns
            self._consumers[consumer.tag] = self._consumers.pop(consumer.tag)
        return self._call(delivery, consumer)

    def hand_on(self, delivery: Delivery, consumer: _Consumer) -> None:
        """Hold a delivery of a transient queue and hand it to *consumer*."""
        self._hold(delivery)
        self._call(delivery, consumer)

    def _hold(self, delivery: Delivery) -> None:
        with self._session.lock:
            self._pulls.held += 1
            self.qos.hold(delivery)

    def _call(self, delivery: Delivery, consumer: _Consumer) -> bool:
        message = self._to_message(delivery, consumer.tag, consumer.is_for_tasks)
        if message is None:
            return False
        if consumer.no_ack:
            self.basic_ack(delivery.tag)
        consumer.callback(message)
        return True

    def _to_message(
        self, delivery: Delivery, consumer_tag: str | None, is_for_tasks: bool = False
    ) -> Message | None:
        """Return the message, or None after giving up on it as a dead letter."""
        limit = self._session.options.max_deliveries
        decoded: envelope.Envelope | None = None
        try:
            decoded = envelope.decode(delivery.payload)
            if limit is not None and delivery.attempt > limit and delivery.token:
                self.bury(delivery.tag, "max_deliveries_exceeded")
                return None
            if is_for_tasks and "task" in decoded["headers"]:
                check_fields(decoded["headers"])
            return Message(decoded, delivery, self, consumer_tag, is_for_tasks)
        except MalformedMessage as exc:
            self.bury(delivery.tag, "malformed", exc)
            return None

    # -- settling ------------------------------------------------------------------------------

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Settle a delivery (with *multiple*, all up to it) as done; from any thread."""
        for tag in self.qos.up_to(delivery_tag) if multiple else (delivery_tag,):
            self._settle(tag, "ack")

    def basic_reject(self, delivery_tag: int, requeue: bool = False) -> None:
        """Put a delivery back (*requeue*), or make it a dead letter."""
        if requeue:
            self._settle(delivery_tag, "nak")
            return
        self.bury(delivery_tag, None)

    def basic_nack(
        self, delivery_tag: int, multiple: bool = False, requeue: bool = True
    ) -> None:
        """Reject a delivery, with *multiple* all up to it (RabbitMQ's extension)."""
        for tag in self.qos.up_to(delivery_tag) if multiple else (delivery_tag,):
            self.basic_reject(tag, requeue=requeue)

    def basic_recover(self, requeue: bool = True) -> None:
        """Put everything this channel holds back."""
        if not requeue:
            raise NotSupported("basic_recover(requeue=False)", "use requeue=True")
        for tag in self.qos.up_to(0):
            self._settle(tag, "nak")

    def nack_later(self, delivery_tag: int, delay: float) -> None:
        """Put a delivery back, to be delivered again after *delay* seconds."""
        self._settle(delivery_tag, "nak", delay)

    def _settle(self, tag: int, outcome: Any, delay: float | None = None) -> None:
        with self._session.lock:
            delivery = self._release(tag)
            delivery.settled = True
        delivery.settler.settle(delivery, outcome, delay)
        self._after_settle()

    def _release(self, tag: int) -> Delivery:
        try:
            return self.qos.release(tag)
        except PreconditionFailed as exc:
            if self.closed:  # it was handed back when the channel closed
                raise ConnectionLost("the channel is closed") from exc
            raise

    def _after_settle(self) -> None:
        """Ask for more, as there is room; a lost connection is for whoever reads it to notice."""
        if self.closed:
            return
        if self._sources:
            try:
                self.refill()
            except ConnectionLost as exc:
                logger.debug("no pulls after settling: %s", exc)
        self._wake_transient()

    def _wake_transient(self) -> None:
        """There is room again: transient queues of our consumers may hand on."""
        if not self._session.transient:
            return
        for consumer in self._consumers.values():
            queue = self._session.transient.get(consumer.queue)
            if queue is not None:
                self._session.transient_arrived(queue)

    def _hand_back(self, delivery: Delivery) -> None:
        """Put back a delivery nobody has seen."""
        with self._session.lock:
            self.qos.release(delivery.tag)
            delivery.settled = True
        try:
            delivery.settler.settle(delivery, "nak")
        except JetStreamTransportError as exc:
            logger.debug("could not hand back a message of %r: %s", delivery.queue, exc)

    def bury(
        self, delivery_tag: int, reason: Reason | None, error: BaseException | None = None
    ) -> None:
        """Give up on a delivery for *reason*, or because the application refused it (None).

        It goes to its queue's dead-letter exchange, if that has a queue for it, else to the dead
        letters.
        """
        with self._session.lock:
            delivery = self._release(delivery_tag)
        decoded = _decoded(delivery.payload)
        if reason is None:
            reason = extensions.reject_reason(deadletter.facts_of(decoded).get("task"))
        else:
            logger.error(
                "message of queue %r %s: %s%s",
                delivery.queue,
                "becomes a dead letter" if delivery.token else "is dropped",
                reason,
                f" ({error})" if error is not None else "",
            )
        if delivery.token:
            self._bury(delivery, reason, decoded, error)
        self._after_settle()

    def _bury(
        self,
        delivery: Delivery,
        reason: Reason,
        decoded: envelope.Envelope | None,
        error: BaseException | None,
    ) -> None:
        try:
            forwarded = reason != "malformed" and self._forward(delivery, decoded)
        except JetStreamTransportError as exc:
            self._session.dead_letter_written(exc)
            self._keep(delivery)
            return
        if forwarded:
            delivery.settled = True
            delivery.settler.settle(delivery, "ack")
        else:
            self._write_dead_letter(delivery, reason, decoded, error)

    def _keep(self, delivery: Delivery) -> None:
        """Put back a message that could not be written to where the dead go."""
        delivery.settled = True
        delivery.settler.settle(delivery, "nak", deadletter.RETRY_INTERVAL)

    def _forward(self, delivery: Delivery, decoded: envelope.Envelope | None) -> bool:
        """Publish to the queue's dead-letter exchange; return whether a queue took the message.

        Under the id of its death, so that it arrives once if this is repeated after a crash.
        """
        record = self._session.registry.queues.get(delivery.queue)
        if decoded is None or record is None or record.wants.dead_letter_exchange is None:
            return False
        exchange, key = record.wants.dead_letter_exchange, record.wants.dead_letter_routing_key
        if key is None:
            key = decoded["properties"]["delivery_info"].get("routing_key") or ""
        death = deadletter.death_id(delivery.token, delivery.payload)
        if self._outgoing.forward(decoded, exchange, key, death):
            return True
        logger.warning(
            "no queue takes what dies in queue %r: nothing is bound to exchange %r for %r",
            delivery.queue,
            exchange,
            key,
        )
        return False

    def _write_dead_letter(
        self,
        delivery: Delivery,
        reason: Reason,
        decoded: envelope.Envelope | None,
        error: BaseException | None = None,
    ) -> None:
        """First the confirmed write to the dead letters, then the end of the original."""
        session = self._session
        letter = DeadLetter(
            reason=reason,
            queue=delivery.queue,
            level=LEVELS[delivery.level],
            error=type(error).__name__ if error is not None else None,
            message=str(error) if error is not None else None,
            attempts=delivery.attempt,
            worker=deadletter.worker_name(),
            published_at=delivery.published_at or None,
            died_at=time.time(),
            **deadletter.facts_of(decoded),
        )

        def written(failure: JetStreamTransportError | None) -> None:
            self._letters.discard(delivery)
            session.dead_letter_written(failure)
            if failure is None:
                delivery.settled = True
                delivery.settler.settle(delivery, "term")
                extensions.dead_lettered(letter)
            else:
                self._keep(delivery)

        self._letters.add(delivery)
        try:
            session.jetstream.dead_letter(delivery, letter, written)
        except ConnectionLost:
            self._letters.discard(delivery)
            logger.warning("a dead letter of queue %r waits for the connection", letter.queue)

    # -- the end -------------------------------------------------------------------------------

    def _open(self) -> Session:
        """Return the session, or raise `ConnectionLost` if the channel was closed."""
        if self.closed or self.connection is None:
            raise ConnectionLost("the channel is closed")
        return self._session

    def close(self) -> None:
        """End the consumers and hand back at once what was not settled."""
        if self.closed:
            return
        session = self._session
        if session.nats.is_open:
            try:
                self._close_orderly()
            except ConnectionLost as exc:
                logger.debug("lost the connection while closing a channel: %s", exc)
        self.lose()

    def _close_orderly(self) -> None:
        session = self._session
        for tag in list(self._consumers):
            self.basic_cancel(tag)
        self._decide()
        with session.nats.corked():
            for tag in self.qos.up_to(0):
                self._settle(tag, "nak")
        if self._has_pulled:  # also if its consumers are cancelled by now
            # Messages that crossed the cancel arrive before the answer, and are handed back.
            session.nats.round_trip(IDLE_HEARTBEAT)
        # Else what was rejected just now would be delivered once more.
        session.nats.wait(lambda: not self._letters, session.options.publish_timeout)

    def lose(self) -> None:
        """Close without a word; the ledger looks after what the application still holds."""
        if self.closed:
            return
        self.closed = True
        self.connection = None
        session = self._session
        for consumer in self._consumers.values():
            transient = session.transient.get(consumer.queue)
            if transient is not None:
                transient.consumers -= 1
        self._consumers.clear()
        session.ledger.release(self.qos)
        session.ledger.adopt(d for d in self.qos.deliveries() if d.token)
        if self in session.channels:
            session.channels.remove(self)


def _decoded(payload: bytes) -> envelope.Envelope | None:
    try:
        return envelope.decode(payload)
    except MalformedMessage:
        return None


def _queue_of(token: bytes) -> str:
    return decode_token(token.decode())

