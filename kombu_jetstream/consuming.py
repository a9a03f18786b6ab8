"""The part of a channel that consumes: pulls, what arrives, and whom it is handed to.

How much to ask of which queue and level is decided in `pulls`; here that becomes requests, and what
the server answers becomes deliveries.  All pulls of a slot share a subscription, see `_open_inbox`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kombu.utils.uuid import uuid

from . import envelope
from .backend import Delivery
from .delays import ttl_of
from .errors import (
    ConnectionLost,
    ConsumerGone,
    MalformedMessage,
    PreconditionFailed,
    QueueMissing,
)
from .jetstream import parse_reply
from .message import Message
from .pools import has_processes, is_handing_over, pool_elsewhere, process_count
from .protocol import Msg, parse_headers
from .pulls import SLOTS, WAIT_SLOT, Cancel, Pull, Source
from .settling import Settling
from .tasks import Taker, check_event, check_fields, taker_of
from .topology import LEVELS, decode_token

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Consuming"]

logger = logging.getLogger(__name__)

#: Seconds in which a server has dealt with an acknowledgement; it answers a PING before.
ACK_TIME = 0.2

#: Failed pulls in a row after which the consumer is looked for.
FAILURES_BEFORE_CHECK = 3


@dataclass(slots=True, eq=False)
class _Consumer:
    """One `basic_consume`."""

    tag: str
    queue: str
    callback: Callable[[Message], Any]
    no_ack: bool
    channel: Consuming
    on_cancel: Callable[[str], Any] | None = None
    taker: Taker = None


class Consuming(Settling):
    """Asks for messages and hands them on."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.no_ack_consumers: set[str] = set()
        #: something arrived or ended, so `refill` may have something to ask
        self.dirty = False
        self._consumers: dict[str, _Consumer] = {}
        #: the same by queue, as far as somebody asked
        self._consumers_by_queue: dict[str, tuple[_Consumer, ...]] = {}
        self._sources: dict[bytes, Source] = {}
        #: when the server last heard that a consumer is in use
        self._touched: dict[Source, float] = {}
        #: subject prefix and subscription of the pulls, by slot
        self._inboxes: list[tuple[bytes, int] | None] = [None] * SLOTS
        self._has_pulled = False
        #: Celery's pool, if all consumers hand their tasks to it and it has processes for them
        self._processes: Any = None
        self._is_closing = False
        #: sources whose consumer the server says is deleted
        self._deleted: list[tuple[Source, str]] = []

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
        pool = pool_elsewhere(callback)
        self.may_settle_late = pool is not None and (self.may_settle_late or not self._consumers)
        self._processes = pool if self.may_settle_late and has_processes(pool) else None
        taker = taker_of(callback)
        self.may_hold = self.may_hold and taker is None
        self._consumers_by_queue.pop(queue, None)
        self._consumers[tag] = _Consumer(tag, queue, callback, no_ack, self, on_cancel, taker)
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
            # All of them now, so that what a channel has on the server does not depend on its load.
            for slot, inbox in enumerate(self._inboxes):
                if inbox is None:
                    self._open_inbox(slot)
        session.ledger.hold(self.qos)
        session.ledger.note_consuming(self)
        self.refill()

    def is_waiting_for(self, queue: str, now: float) -> bool:
        """Tell whether a pull of ours waits on the server for *queue*, an auto-delete one: then it
        is there, and empty.  Callable from any thread."""
        session = self._session
        if self.closed or not session.nats.is_open:
            return False
        (level,) = session.jetstream.queue_levels(auto_delete=True)
        source = self._sources.get(session.jetstream.consumer_key(queue, level))
        return source is not None and source.is_waiting(now)

    def basic_cancel(self, consumer_tag: str, nowait: bool = False, **kwargs: Any) -> None:
        """End a consumer.  What it was given and did not settle stays held.

        What is on its way to it is awaited, and handed back at once.
        """
        consumer = self._consumers.pop(consumer_tag, None)
        self.no_ack_consumers.discard(consumer_tag)
        if consumer is None:
            return
        self._consumers_by_queue.pop(consumer.queue, None)
        session = self._session
        transient = session.transient.get(consumer.queue)
        if transient is not None:
            transient.consumers -= 1
            transient.touch()
            if transient.auto_delete and not transient.consumers:
                session.forget_transient(transient)
        elif not self.consumers_of(consumer.queue):
            self._stop_pulling(consumer.queue)
            if not self._is_closing:
                session.nats.round_trip(session.answer_timeout)
            self._auto_delete(consumer.queue)

    def _stop_pulling(self, queue: str) -> None:
        session = self._session
        keys = [key for key, source in self._sources.items() if source.token[0] == queue]
        with session.lock:
            for key, source in list(self._sources.items()):
                if source.token[0] == queue:
                    del self._sources[key], self._touched[source]
                    self._pulls.remove(source)
            self._cancel_pulls()
        if keys:  # none where JetStream is away
            session.jetstream.drop_withdrawn(keys)
        with session.lock:
            for delivery in self.ready.take(lambda delivery: delivery.queue == queue):
                self._hand_back(delivery)
        self.refill()

    def _auto_delete(self, queue: str) -> None:
        """Delete an auto-delete queue whose last consumer left; others still pull, or hold."""
        session = self._session
        if not self._is_auto_delete(queue) or not session.nats.is_open:
            return
        session.nats.round_trip(session.options.publish_timeout)  # our pulls are withdrawn
        end = time.monotonic() + ACK_TIME
        while True:
            counts = session.jetstream.counts(queue, auto_delete=True)
            if counts is None or not (counts.waiting_pulls or counts.in_flight):
                self.queue_delete(queue)
                return
            if counts.waiting_pulls or time.monotonic() > end:
                return
            # Our last acknowledgements may not be counted yet.
            session.nats.wait(lambda: False, ACK_TIME / 20)

    def consumers_of(self, queue: str) -> tuple[_Consumer, ...]:
        found = self._consumers_by_queue.get(queue)
        if found is None:
            found = tuple(c for c in self._consumers.values() if c.queue == queue)
            self._consumers_by_queue[queue] = found
        return found

    def has_consumers(self) -> bool:
        return bool(self._consumers)

    @property
    def has_processes(self) -> bool:
        """Whether all that is consumed goes to a pool of processes, which an event loop feeds."""
        return self._processes is not None and self._session.has_loop

    @property
    def is_handing_over(self) -> bool:
        """Whether a process is being given a task; see `pools`."""
        return self.has_processes and is_handing_over(self._processes)

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
                subject = jetstream.pull_subject(queue, level)
                jetstream.pull(subject, 1, False, inbox)
                timeout = session.options.publish_timeout
                if not jetstream.wait_answered(partial(bool, answers), subject, timeout):
                    continue
            finally:
                session.nats.unsubscribe(sid)
            if answers[0].reply:
                return self._delivery(answers[0], None)
        return None

    # -- what arrives --------------------------------------------------------------------------

    def refill(self) -> bool:
        """Ask the server for what the credit allows; return whether there was anything to ask."""
        session = self._session
        if self._is_closing:
            return False
        self.dirty = False
        pulls, now = self._pulls, time.monotonic()
        pulls.at_work = process_count(self._processes) if self.has_processes else None
        if pulls.is_content(now):
            if pulls.asks_at is not None:
                session.ask_later(pulls.asks_at - now)
            return False
        with session.lock:
            commands = pulls.plan(now)
            if not commands:
                return False
            session.has_asked = True
            if len(commands) == 1:
                self._tell(commands[0])
            else:
                with session.nats.corked():
                    for command in commands:
                        self._tell(command)
        return True

    def _tell(self, command: Pull | Cancel) -> None:
        """Tell the server what `Pulls.plan` wants."""
        if isinstance(command, Cancel):
            self._drop_inbox(command.slot)
            return
        inbox = self._inboxes[command.slot] or self._open_inbox(command.slot)
        reply = b"%b.%d" % (inbox[0], command.pull_id)
        self._session.jetstream.pull(command.source.token[1], command.batch, command.wait, reply)

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
            source.level if source is not None else LEVELS.index(level.decode()),
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
                self._deleted.append((source, status.description))

    def after_read(self) -> None:
        """Act on what was read: pull again, or tell that a queue is gone."""
        while self._deleted:
            self._consumer_gone(*self._deleted.pop())
        self.refill()

    def _consumer_gone(self, source: Source, detail: str) -> None:
        """The queue was deleted under its consumers: tell them, or let kombu declare it again."""
        if source not in self._pulls.sources:
            return  # told already: each of the queue's levels says it
        queue = source.token[0]
        callbacks = [c for c in self.consumers_of(queue) if c.on_cancel is not None]
        if not callbacks:
            raise ConsumerGone(queue, detail)
        for consumer in callbacks:
            self._consumers.pop(consumer.tag, None)
            self._consumers_by_queue.pop(queue, None)
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
            jetstream.provision(again=True)  # its stream may be what is missing
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
            if not self.ready.count:
                return False
            delivery = self.ready.pop()
        consumers = self.consumers_of(delivery.queue)
        if not consumers:
            self._hand_back(delivery)
            return False
        consumer = consumers[0]
        if len(consumers) > 1:  # consumers of one queue take turns
            self._consumers_by_queue[delivery.queue] = (*consumers[1:], consumer)
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
        message = self._to_message(delivery, consumer.tag, consumer.taker)
        if message is None:
            return False
        if consumer.no_ack:
            self._ack_later(delivery.tag)
        consumer.callback(message)
        return True

    def _to_message(
        self, delivery: Delivery, consumer_tag: str | None, taker: Taker = None
    ) -> Message | None:
        """Return the message, or None after giving up on it as a dead letter."""
        limit = self._session.options.max_deliveries
        decoded: envelope.Envelope | None = None
        try:
            decoded = envelope.decode(delivery.payload)
            if limit is not None and delivery.attempt > limit and delivery.token:
                self.bury(delivery.tag, "max_deliveries_exceeded")
                return None
            if (
                delivery.token
                and not self._session.server_expires
                and self._is_over(delivery, decoded)
            ):
                logger.debug("a message of queue %r has expired", delivery.queue)
                self.basic_ack(delivery.tag)
                return None
            if taker == "tasks" and "task" in decoded["headers"]:
                check_fields(decoded["headers"])
            message = Message(decoded, delivery, self, consumer_tag, taker == "tasks")
            if taker == "gossip":
                _check_event(message)
            return message
        except MalformedMessage as exc:
            self.bury(delivery.tag, "malformed", exc)
            return None

    def _is_over(self, delivery: Delivery, decoded: envelope.Envelope) -> bool:
        """Tell whether a message waited for longer than it or its queue allows.

        Servers with TTLs (2.11) have removed it by then.
        """
        if not delivery.published_at:
            return False
        record = self._session.registry.queues.get(delivery.queue)
        ttl = ttl_of(decoded["properties"], record.wants.message_ttl if record else None)
        return ttl is not None and time.time() > delivery.published_at + ttl

    def _after_settle(self) -> bool:
        """Ask for more, as there is room; a lost connection is for whoever reads it to notice."""
        if self.closed:
            return False
        asked = False
        if self._session.is_collecting:
            self.dirty = True  # once, at the end of the tick
        elif self._sources:
            try:
                asked = self.refill()
            except ConnectionLost as exc:
                logger.debug("no pulls after settling: %s", exc)
        self._wake_transient()
        return asked

    def _wake_transient(self) -> None:
        """There is room again: transient queues of our consumers may hand on."""
        if not self._session.transient:
            return
        for consumer in self._consumers.values():
            queue = self._session.transient.get(consumer.queue)
            if queue is not None:
                self._session.transient_arrived(queue)


def _check_event(message: Message) -> None:
    try:
        body = message.payload
    except Exception as exc:
        raise MalformedMessage(f"not an event: {type(exc).__name__}") from exc
    check_event(message.headers, body)


def _queue_of(token: bytes) -> str:
    return decode_token(token.decode())
