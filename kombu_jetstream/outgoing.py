"""From a kombu message to what is written: where, when, and under which id.

A message goes to every durable queue its exchange and routing key reach, one confirmed write each,
and once to the subject that transient queues listen to.  Its id is made with the message, before
the first try, so that kombu's own retries carry the same one.
"""

from __future__ import annotations

import hashlib
import os
import time
from itertools import count
from typing import TYPE_CHECKING, Any

from kombu.utils.uuid import uuid

from . import envelope
from .deadletter import REPLAYED_HEADER
from .delays import DELAY_PROPERTY, due_time, schedule_header, ttl_header, ttl_of
from .errors import NotSupported
from .protocol import encode_headers
from .routing import key_subject
from .topology import Level, encode_token, level_of

if TYPE_CHECKING:
    from .registry import Queue
    from .session import Session

__all__ = ["Outgoing"]

#: Message header with the caller's own message id: one message per id within ``dedup_window``.
DEDUP_HEADER = "dedup_id"

#: Longest of them that becomes the message id as it is; the server keeps ids in memory.
MAX_MESSAGE_ID = 200

#: Subjects kept for the next message to the same exchange and routing key.
MAX_SUBJECTS = 10_000


class _MessageIds:
    """Unique ids, cheaper than a UUID each: a random prefix and a counter.

    A forked child takes a prefix of its own.
    """

    def __init__(self) -> None:
        self._pid = 0
        self._prefix = ""
        self._count = count()

    def __next__(self) -> str:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._prefix = uuid().replace("-", "")
            self._count = count()
        return f"{self._prefix}-{next(self._count):x}"


class Outgoing:
    """Publishes the messages of one channel."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.options = session.options
        self._ids = _MessageIds()
        self._pipelined = session.options.publish_confirms == "pipelined"
        #: subjects by queue and level; as many as there are queues
        self._subjects: dict[tuple[str, Level], bytes] = {}
        #: subjects by exchange and routing key
        self._transient_subjects: dict[tuple[str, str], bytes] = {}
        #: ``dedup_id``, group and task id of the last task of a group that had one
        self._grouped: tuple[str, Any, Any] | None = None

    def prepare(
        self,
        body: Any,
        priority: int | None,
        content_type: str | None,
        content_encoding: str | None,
        headers: dict[str, Any] | None,
        properties: dict[str, Any] | None,
    ) -> envelope.Envelope:
        """Return the envelope of a message; see `Channel.prepare_message`."""
        properties = properties if properties is not None else {}
        # kombu passes the same dictionary again when it retries, so the id stays.
        if "delivery_tag" not in properties:
            properties["delivery_tag"] = next(self._ids)
        properties.setdefault("priority", priority or 0)
        text, properties["body_encoding"] = envelope.encode_body(body, content_encoding)
        return {
            "body": text,
            "content-encoding": content_encoding,
            "content-type": content_type,
            "headers": headers if headers is not None else {},
            "properties": properties,
        }

    def publish(
        self,
        message: envelope.Envelope,
        exchange: str,
        routing_key: str,
        mandatory: bool,
        timeout: float | None,
    ) -> bool:
        """Write *message* wherever it goes; return False if *mandatory* and nobody takes it."""
        properties = message["properties"]
        properties["delivery_info"] = {"exchange": exchange, "routing_key": routing_key}
        payload = envelope.encode(message)
        queues = self._session.durable_routes(exchange, routing_key)
        nats = self._session.nats
        if not exchange and queues:
            if not self._pipelined:
                self._store(queues[0], message, payload, False, timeout)
                return True
            nats.cork()
            try:
                self._store(queues[0], message, payload, False, timeout)
            finally:
                self._session.end_publish()
            return True
        subject = self._transient_subject(exchange, routing_key)
        if not queues:
            if mandatory:
                return self._heard(subject, payload)
            nats.publish(subject, payload)
            return True
        nats.cork()  # all leave in one write: a confirm is waited for in here
        try:
            nats.publish(subject, payload)
            for queue in queues:
                self._store(queue, message, payload, len(queues) > 1, timeout)
        finally:
            if self._pipelined:
                self._session.end_publish()
            else:
                nats.uncork()
        return True

    def _transient_subject(self, exchange: str, routing_key: str) -> bytes:
        """Return the subject on which transient queues hear of a message."""
        subject = self._transient_subjects.get((exchange, routing_key))
        if subject is None:
            names = self._session.jetstream.names
            if exchange:
                subject = names.exchange(exchange, key_subject(routing_key)).encode()
            else:
                subject = names.transient_queue(routing_key).encode()
            if len(self._transient_subjects) >= MAX_SUBJECTS:  # keys may have ids in them
                self._transient_subjects.clear()
            self._transient_subjects[exchange, routing_key] = subject
        return subject

    def forward(
        self, message: envelope.Envelope, exchange: str, routing_key: str, message_id: str
    ) -> bool:
        """Publish a received message again, to another exchange; return whether a queue takes it.

        It is a message of its own, *message_id*, that is due now and does not expire, as in
        RabbitMQ.  Confirmed in any case: the caller settles the first one when this returns.
        """
        properties = dict(message["properties"], delivery_tag=message_id)
        for name in ("expiration", DELAY_PROPERTY):
            properties.pop(name, None)
        headers = dict(message["headers"])
        headers.pop(DEDUP_HEADER, None)  # or the first message would make this one a duplicate
        pipelined, self._pipelined = self._pipelined, False
        try:
            return self.publish(
                dict(message, headers=headers, properties=properties),
                exchange,
                routing_key,
                True,
                None,
            )
        finally:
            self._pipelined = pipelined

    def _heard(self, subject: bytes, payload: bytes) -> bool:
        """Publish to transient queues and tell whether there was one.

        The server answers "no responders" when there is none, and before it answers a PING.
        """
        answers: list[Any] = []
        nats = self._session.nats
        token = nats.request_nowait(subject, payload, b"", answers.append)
        try:
            nats.round_trip(self.options.publish_timeout)
        finally:
            nats.cancel(token)
        return not answers

    def _store(
        self,
        queue: str,
        message: envelope.Envelope,
        payload: bytes,
        several: bool,
        timeout: float | None,
    ) -> None:
        session = self._session
        record = session.registry.queues[queue]
        properties, headers = message["properties"], message["headers"]
        level: Level = "medium"
        if not record.auto_delete:
            level = level_of(properties.get("priority"), self.options, record.wants.max_priority)
        message_id = self._message_id(properties, headers)
        if several:  # a stream knows an id once, whatever the subject
            message_id = f"{message_id}.{encode_token(queue)}"
        subject = self._subjects.get((queue, level))
        if subject is None:
            subject = session.jetstream.names.subject(level, queue).encode()
            self._subjects[queue, level] = subject
        fields = list(envelope.headers_of(message_id, message))
        if (
            record.arguments
            or "expiration" in properties
            or "eta" in headers
            or DELAY_PROPERTY in properties
        ):
            subject = self._timed(subject, fields, record, level, message, message_id)
        write = session.publisher.pipeline if self._pipelined else session.publisher.publish
        write(subject, payload, encode_headers(fields), timeout)

    def _message_id(self, properties: dict[str, Any], headers: dict[str, Any]) -> str:
        own = headers.get(DEDUP_HEADER)
        if own is None or own == "":
            return str(properties["delivery_tag"])
        message_id = _printable(str(own))
        self._check_group(message_id, headers)
        task = str(headers.get("task"))
        is_body = headers.get("group") is not None and headers.get("group_index") is None
        if is_body or task.startswith("celery."):
            # Celery gives a chord's options to its tasks, to what waits for them and to the body.
            message_id = f"{message_id}.{task}"
        # A retry of the task and a replay carry the header along, but are not the same message.
        tries = (headers.get("retries") or 0, headers.get(REPLAYED_HEADER) or 0)
        return message_id if tries == (0, 0) else f"{message_id}.{tries[0]}.{tries[1]}"

    def _check_group(self, message_id: str, headers: dict[str, Any]) -> None:
        """Refuse one id for several tasks of a group: all but the first would be lost."""
        group = headers.get("group")
        if group is None or headers.get("group_index") is None:
            return
        before, self._grouped = self._grouped, (message_id, group, headers.get("id"))
        if before is not None and before[:2] == (message_id, group) and before != self._grouped:
            raise NotSupported(
                f"one {DEDUP_HEADER} {message_id!r} for several tasks of a group",
                f"give each its own: task.s(…).set(headers={{{DEDUP_HEADER!r}: …}})",
            )

    def _timed(
        self,
        subject: bytes,
        fields: list[tuple[str, str]],
        record: Queue,
        level: Level,
        message: envelope.Envelope,
        message_id: str,
    ) -> bytes:
        """Add what the server is to know of time; return the subject, the delayed one maybe."""
        session = self._session
        now = time.time()
        properties, headers = message["properties"], message["headers"]
        due = self._schedulable(due_time(headers, properties, now), properties, now)
        queue_ttl = record.wants.message_ttl
        if queue_ttl is None and record.auto_delete:
            queue_ttl = record.wants.expires  # a reply nobody fetched goes with its queue
        ttl = ttl_of(properties, queue_ttl, due - now if due is not None else 0.0)
        if ttl is not None and not session.jetstream.has_ttl:
            session.degraded("message TTL")
            ttl = None
        if due is None:
            if ttl is not None:
                fields.append(("Nats-TTL", ttl_header(ttl)))
            return subject
        fields.append(("Nats-Schedule", schedule_header(due)))
        fields.append(("Nats-Schedule-Target", subject.decode()))
        if ttl is not None:
            fields.append(("Nats-Schedule-TTL", ttl_header(ttl)))
        task_id = str(headers.get("id") or "")
        names = session.jetstream.names
        return names.delay_subject(level, record.name, task_id, message_id).encode()

    def _schedulable(
        self, due: float | None, properties: dict[str, Any], now: float
    ) -> float | None:
        """Return *due* if the server is to wait for it, or None: nobody, or the worker."""
        if due is None:
            return None
        # Workers look at an eta only, so a delay is the server's whatever its length.
        is_delay = DELAY_PROPERTY in properties
        if due - now <= (0 if is_delay else self.options.delay_threshold):
            return None
        if self._session.jetstream.has_schedules:
            return due
        if is_delay:
            raise NotSupported(
                f"{DELAY_PROPERTY} on this server",
                "nats-server 2.12 can do it, without "
                "stream_max_bytes; workers hold tasks with a countdown or an eta",
            )
        self._session.degraded("schedules")
        return None


def _printable(text: str) -> str:
    """Return *text* as it is if it fits a header, else a digest of it."""
    if (
        len(text) <= MAX_MESSAGE_ID
        and text.isascii()
        and text.isprintable()
        and text == text.strip()
    ):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
