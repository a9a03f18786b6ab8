"""Put many messages into a queue fast, so that filling it is not what takes the time.

The messages are those kombu would have written: one is made by the transport, and written again
by its broker's fastest way.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import Any
from uuid import uuid4

from kombu.connection import Connection
from kombu.entity import Queue
from kombu.messaging import Producer

__all__ = ["fill", "stored_message"]

#: Messages after which a broker that confirms nothing is given the time to take them: it may block
#: a publisher for longer than py-amqp waits.
BREATH = 5000

#: Messages of one Redis command.
BATCH = 1000

#: Every so many messages a JetStream confirm is asked for, and awaited before the next but one
#: group: a server drops what comes faster than it stores.
GROUP = 500


def fill(connection: Connection, queue: Queue, content: Any, count: int) -> None:
    """Add *count* messages with *content* to *queue*."""
    if count <= 0:
        return
    ways = {"jetstream": _fill_jetstream, "redis": _fill_redis}
    ways.get(connection.transport.driver_type, _fill_by_kombu)(connection, queue, content, count)


def _fill_by_kombu(connection: Connection, queue: Queue, content: Any, count: int) -> None:
    # A connection of its own, without confirms.
    with connection.clone(transport_options={}) as other:
        producer = _producer(other, queue)
        for number in range(count):
            producer.publish(content)
            if number % BREATH == BREATH - 1:
                queue(other.default_channel).queue_declare(passive=True)
        queue(other.default_channel).queue_declare(passive=True)


def _producer(connection: Connection, queue: Queue) -> Producer:
    return Producer(
        connection.default_channel,
        exchange=queue.exchange,
        routing_key=queue.routing_key,
        serializer="json",
    )


def _fill_redis(connection: Connection, queue: Queue, content: Any, count: int) -> None:
    channel: Any = connection.default_channel
    _producer(connection, queue).publish(content)
    model = json.loads(channel.client.lpop(queue.name))
    tag = model["properties"]["delivery_tag"]
    before, after = json.dumps(model).split(tag)
    texts = (f"{before}{uuid4()}{after}" for _ in range(count))
    while batch := list(islice(texts, BATCH)):
        channel.client.lpush(queue.name, *batch)


def stored_message(connection: Connection, queue: Queue, content: Any) -> tuple[bytes, bytes]:
    """Return subject and payload of a message in JetStream."""
    from kombu_jetstream import envelope

    producer = _producer(connection, queue)
    encoded, content_type, content_encoding = producer._prepare(content, headers={})
    message = producer.channel.prepare_message(encoded, 0, content_type, content_encoding, {}, {})
    message["properties"]["delivery_info"] = {
        "exchange": queue.exchange.name,
        "routing_key": queue.routing_key,
    }
    message["properties"]["delivery_mode"] = 2
    names = connection.connection.jetstream.names
    return names.subject("medium", queue.name).encode(), envelope.encode(message)


def _fill_jetstream(connection: Connection, queue: Queue, content: Any, count: int) -> None:
    subject, payload = stored_message(connection, queue, content)
    nats = connection.connection.nats
    answers: list[Any] = []
    for group, start in enumerate(range(0, count, GROUP)):
        with nats.corked():
            for _ in range(min(GROUP, count - start) - 1):
                nats.publish(subject, payload)
            nats.request_nowait(subject, payload, b"", answers.append)
        awaited = group if start + GROUP < count else group + 1
        if not nats.wait(lambda awaited=awaited: len(answers) >= awaited, 60.0):
            raise RuntimeError("JetStream confirms nothing any more")
    for answer in answers:
        if b'"seq"' not in answer.payload:
            raise RuntimeError(f"JetStream did not store a message: {answer!r}")
