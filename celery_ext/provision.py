"""What an application needs on the server, compared with what is there, and made.

With ``provision="auto"`` workers do this by themselves when they start.  This is for deployments in
which they may not, and for changing streams that exist already, which workers never do.

First `plan`, which only looks; then `apply`.  A stream's storage and retention cannot be changed by
anybody: such a change is in the plan and says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from nats.js import api

from kombu_jetstream import topology
from kombu_jetstream.registry import Queue
from kombu_jetstream.routing import Binding, Exchange
from kombu_jetstream.topology import Difference, Level, queue_token

from .broker import Broker

__all__ = ["Change", "Declared", "apply", "declared", "expected_streams", "plan"]

#: The server refuses to change these (facts 1).
_FIXED = frozenset({"storage", "retention"})

Action = Literal["create", "update", "impossible"]


@dataclass(slots=True)
class Declared:
    """What an application declares: queues that are durable, their exchanges and bindings."""

    queues: dict[str, Queue] = field(default_factory=dict)
    exchanges: dict[str, Exchange] = field(default_factory=dict)
    bindings: list[Binding] = field(default_factory=list)
    #: Of the exchanges: those of remote control, to the workers and back.
    control: tuple[str, ...] = ()


def declared(app: Any, queue_names: Iterable[str] | None = None) -> Declared:
    """Return what a Celery *app* declares, for all its queues or those named.

    A name it does not configure is one more queue like its default one, as in ``celery worker -Q``.
    Transient queues are not kept by any server, they are left out.
    """
    found = Declared()
    queues = app.amqp.queues
    for name in queues if queue_names is None else queue_names:
        queue = queues[name]  # makes it, if task_create_missing_queues is on, or raises
        if queue.exclusive or queue.auto_delete or not queue.durable or queue.expires is not None:
            continue
        found.queues[queue.name] = Queue(queue.name, False, _arguments_of(queue))
        _bind(found, queue, queue.exchange, queue.routing_key)
        for binding in queue.bindings:
            _bind(found, queue, binding.exchange, binding.routing_key)
    # What a worker's remote control and events are sent to.
    mailbox = app.control.mailbox
    for exchange in (mailbox.exchange, mailbox.reply_exchange):
        _add_exchange(found, exchange)
        found.control += (exchange.name,)
    events = app.conf.event_exchange
    found.exchanges[events] = Exchange(events, "topic")
    return found


def _arguments_of(queue: Any) -> dict[str, Any]:
    """Return the arguments a queue is declared with, as `Channel.prepare_queue_arguments` does."""
    from kombu.transport import base

    arguments = base.to_rabbitmq_queue_arguments(
        queue.queue_arguments or {},
        expires=queue.expires,
        message_ttl=queue.message_ttl,
        max_length=queue.max_length,
        max_length_bytes=queue.max_length_bytes,
        max_priority=queue.max_priority,
    )
    return dict(arguments)


def _bind(found: Declared, queue: Any, exchange: Any, routing_key: str) -> None:
    if exchange is None or not exchange.name:  # the default exchange reaches every queue
        return
    _add_exchange(found, exchange)
    binding = Binding(exchange.name, routing_key or "", queue.name, exchange.type or "direct")
    found.bindings.append(binding)


def _add_exchange(found: Declared, exchange: Any) -> None:
    found.exchanges[exchange.name] = Exchange(
        exchange.name,
        exchange.type or "direct",
        bool(exchange.durable),
        bool(exchange.auto_delete),
        dict(exchange.arguments or {}),
    )


@dataclass(slots=True)
class Change:
    """One thing that is not as it should be, and what is done about it."""

    action: Action
    #: For people: ``stream 'celery_high'``.
    what: str
    differences: list[Difference] = field(default_factory=list)
    #: What to ask of the server: an operation of its API, or a subject to publish to.
    operation: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    is_record: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "action": self.action,
            "what": self.what,
            "differences": [
                {"field": d.field, "found": d.found, "expected": d.expected}
                for d in self.differences
            ],
        }


def expected_streams(broker: Broker) -> list[api.StreamConfig]:
    """Return the streams of the namespace as the options and the server want them."""
    options, level = broker.options, broker.info.api_level
    return [
        *(topology.level_stream(options, name, level) for name in broker.levels),
        topology.dead_letter_stream(options, level),
        topology.registry_stream(options, level),
    ]


async def plan(broker: Broker, needed: Declared) -> list[Change]:
    """Return what would have to be done, in the order in which to do it."""
    changes = []
    for config in expected_streams(broker):
        change = await _plan_stream(broker, config)
        if change is not None:
            changes.append(change)
    for queue in needed.queues.values():
        for level in broker.levels:
            change = await _plan_consumer(broker, queue, level)
            if change is not None:
                changes.append(change)
    return changes + await _plan_records(broker, needed)


async def _plan_stream(broker: Broker, expected: api.StreamConfig) -> Change | None:
    what = f"stream {expected.name!r}"
    found = await broker.find(f"STREAM.INFO.{expected.name}")
    wanted = expected.as_dict()
    if found is None:
        return Change("create", what, [], f"STREAM.CREATE.{expected.name}", wanted)
    current = found["config"]
    differences = topology.differences(
        api.StreamConfig.from_response(json.loads(json.dumps(current))), expected
    )
    if not differences:
        return None
    if any(difference.field in _FIXED for difference in differences):
        return Change("impossible", what, differences)
    # An update replaces the whole configuration, so it starts from what is there.
    body = {**current, **{d.field: wanted.get(d.field, 0) for d in differences}}
    return Change("update", what, differences, f"STREAM.UPDATE.{expected.name}", body)


async def _plan_consumer(broker: Broker, queue: Queue, level: Level) -> Change | None:
    stream = broker.names.stream(level)
    expected = topology.consumer_config(broker.options, level, queue.name)
    what = f"consumer {expected.name!r} of stream {stream!r}"
    wanted = expected.as_dict()
    operation = f"CONSUMER.CREATE.{stream}.{expected.name}.{expected.filter_subject}"
    found = await broker.find(f"CONSUMER.INFO.{stream}.{queue_token(queue.name)}")
    if found is None:
        return Change("create", what, [], operation, {"stream_name": stream, "config": wanted})
    current = found["config"]
    differences = topology.differences(
        api.ConsumerConfig.from_response(json.loads(json.dumps(current))), expected
    )
    if not differences:
        return None
    # A pause, and whatever else an operator set, survives.
    body = {**current, **{d.field: wanted.get(d.field, 0) for d in differences}}
    return Change("update", what, differences, operation, {"stream_name": stream, "config": body})


async def _plan_records(broker: Broker, needed: Declared) -> list[Change]:
    """Return the records the registry lacks, exchanges before what is bound to them."""
    names = broker.names
    there: dict[str, dict[str, Any]] = {}
    async for page in broker.pages(names.registry_stream, f"{names.registry}.>", 500):
        for stored in page:
            if stored.payload:
                there[stored.subject] = json.loads(stored.payload)
    wanted: list[tuple[str, str, dict[str, Any]]] = []
    for queue in needed.queues.values():
        record = {"name": queue.name, "auto_delete": False, "arguments": queue.arguments}
        wanted.append((f"queue {queue.name!r}", names.registry_queue(queue.name), record))
    for exchange in needed.exchanges.values():
        record = {
            "name": exchange.name,
            "type": exchange.type,
            "durable": exchange.durable,
            "auto_delete": exchange.auto_delete,
            "arguments": exchange.arguments,
        }
        subject = names.registry_exchange(exchange.name)
        wanted.append((f"exchange {exchange.name!r}", subject, record))
    for binding in needed.bindings:
        record = {
            "exchange": binding.exchange,
            "key": binding.key,
            "queue": binding.queue,
            "type": binding.type,
        }
        subject = names.registry_binding(binding.exchange, binding.queue, binding.key)
        what = f"binding of queue {binding.queue!r} to exchange {binding.exchange!r}"
        wanted.append((what, subject, record))
    changes = (_record(what, subject, there, record) for what, subject, record in wanted)
    return [change for change in changes if change is not None]


def _record(
    what: str, subject: str, there: dict[str, dict[str, Any]], record: dict[str, Any]
) -> Change | None:
    current = there.get(subject)
    if current is None:
        return Change("create", what, [], subject, record, is_record=True)
    fields = [name for name in record if current.get(name) != record[name]]
    # How an exchange is kept makes no difference here, and every kombu says it otherwise.
    fields = [name for name in fields if name not in ("durable", "auto_delete")]
    if not fields:
        return None
    differences = [Difference(name, current.get(name), record[name]) for name in fields]
    if what.startswith("exchange") and "type" in fields:
        return Change("impossible", what, differences)
    return Change("update", what, differences, subject, record, is_record=True)


async def apply(broker: Broker, changes: Iterable[Change]) -> list[Change]:
    """Make the changes that can be made and return those; raises at the first that fails."""
    done = []
    for change in changes:
        if change.action == "impossible":
            continue
        if change.is_record:
            record = change.body
            if change.what.startswith("queue"):
                record = {**record, "at": time.time()}
            payload = json.dumps(record, sort_keys=True).encode()
            await broker.publish(change.operation, payload, {})
        else:
            await broker.api(change.operation, change.body)
        done.append(change)
    return done
