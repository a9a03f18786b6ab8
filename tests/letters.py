"""An application on a server, and dead letters in it, for the tests of `celery_ext`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import celery
from kombu import Exchange, Queue, pools

from celery_ext.broker import Broker, run
from celery_ext.dlq import DeadLetters, Letter, LetterFilter
from kombu_jetstream import deadletter, envelope
from kombu_jetstream.deadletter import DeadLetter
from kombu_jetstream.protocol import parse_headers

#: Seconds since the epoch of the first letter that `bury` writes.
LONG_AGO = 1_700_000_000.0


@contextmanager
def application(
    broker_url: str, namespace: str, *, queues: tuple[str, ...] = ("celery",), **options: Any
) -> Iterator[celery.Celery]:
    """An app whose queues exist in *namespace* of the broker."""
    app = celery.Celery("tests.letters", set_as_current=False)
    app.conf.update(
        broker_url=broker_url,
        broker_transport_options={"namespace": namespace, **options},
        task_queues=[Queue(name, Exchange(name), routing_key=name) for name in queues],
        task_default_queue=queues[0],
    )
    try:
        with app.connection_for_write() as connection:
            for queue in app.amqp.queues.values():
                queue(connection.default_channel).declare()
        yield app
    finally:
        app.pool.force_close_all()
        # kombu gives the next app with these settings the same pool.
        with app.connection_for_write() as connection, suppress(KeyError):
            del pools.producers[connection]
            del pools.connections[connection]
        app.close()


def message_of(task: str, task_id: str, queue: str, **headers: Any) -> envelope.Envelope:
    """A task message as Celery writes it."""
    return {
        "body": '[[1], {"two": 3}, {"callbacks": null, "errbacks": null, "chain": null}]',
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": task, "id": task_id, "retries": 3, **headers},
        "properties": {
            "correlation_id": task_id,
            "delivery_mode": 2,
            "priority": 0,
            "body_encoding": "utf-8",
            "delivery_tag": f"tag-{task_id}",
            "delivery_info": {"exchange": queue, "routing_key": queue},
        },
    }


def bury(app: celery.Celery, count: int = 1, *, first: int = 0, **facts: Any) -> list[str]:
    """Write *count* dead letters and return their task ids; *facts* are fields of `DeadLetter`.

    Those that are callables are called with the letter's number.
    """
    task_ids = [f"task-{number}" for number in range(first, first + count)]

    async def write(broker: Broker) -> None:
        for number, task_id in enumerate(task_ids, first):
            own = {name: v(number) if callable(v) else v for name, v in facts.items()}
            payload = own.pop("payload", None)
            letter = DeadLetter(
                **{
                    "reason": "task_failed",
                    "queue": "celery",
                    "task": "shop.pay",
                    "task_id": task_id,
                    "error": "ValueError",
                    "message": "no such card",
                    "traceback": "Traceback …\nValueError: no such card\n",
                    "attempts": 4,
                    "worker": "worker@test",
                    "published_at": LONG_AGO + number,
                    "died_at": time.time(),
                    **own,
                }
            )
            if payload is None:
                message = message_of(str(letter.task), task_id, letter.queue)
                payload = envelope.encode(message)
            raw = deadletter.headers_of(letter, f"death-{task_id}", 100_000)
            subject = broker.names.dead_letter_subject(letter.queue)
            headers = dict(parse_headers(raw).fields)
            if task_id == task_ids[-1]:  # stored after all the others
                await broker.publish(subject, payload, headers)
            else:
                await broker.client.publish(subject, payload, headers=headers)
            if number % 500 == 499:
                await broker.client.flush()

    run(app, write)
    return task_ids


def letters(app: celery.Celery, **which: Any) -> list[Letter]:
    """All letters that match, newest first."""

    async def read(broker: Broker) -> list[Letter]:
        found = DeadLetters(broker).newest(LetterFilter(**which))
        return [letter async for letter in found]

    return run(app, read)


def queued(app: celery.Celery, *queues: str) -> Counter[str]:
    """Take all messages out of the queues and return how often each task id was there."""
    found: Counter[str] = Counter()
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        for queue in queues or ("celery",):
            while (message := channel.basic_get(queue)) is not None:
                found[message.headers["id"]] += 1
                message.ack()
    return found
