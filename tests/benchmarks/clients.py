"""The measured processes: ``python -m tests.benchmarks.clients NAME PARAMETERS`` prints JSON.

Each measurement is a process of its own, so that no state and no import of one contender is there
while another is measured.  A rate is counted after a warm-up, and its clock stops only when the
server has dealt with everything (a round trip at the end), so that nothing measured is still in
a buffer.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from amqp.exceptions import ChannelError
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.messaging import Consumer, Producer

from . import filling
from .processes import cpu_seconds

__all__ = ["main"]

#: Messages before the clock starts.
WARM_UP = 100

#: Seconds without a message after which a consumer gives up.
PATIENCE = 30.0

Parameters = dict[str, Any]
Figures = dict[str, float]


@contextmanager
def connected(parameters: Parameters) -> Iterator[Connection]:
    with Connection(
        parameters["url"], transport_options=parameters.get("options") or {}
    ) as connection:
        yield connection


def queue_of(name: str) -> Queue:
    """Return a queue as Celery's default one is: durable, bound to an exchange of its name."""
    return Queue(name, Exchange(name), routing_key=name)


def body(size: int) -> dict[str, str]:
    return {"a": "x" * size}


def publisher(connection: Connection, queue: Queue, size: int) -> Callable[[], None]:
    """Return a function that publishes one message of *size* bytes to *queue*."""
    producer = Producer(
        connection.default_channel,
        exchange=queue.exchange,
        routing_key=queue.routing_key,
        serializer="json",
    )
    content = body(size)
    return lambda: producer.publish(content)


def settle(channel: Any, queue: Queue) -> None:
    """Return when the server has dealt with all that *channel* sent."""
    if hasattr(channel, "flush"):
        channel.flush()
    if channel.connection.client.transport.driver_type == "redis":
        channel.client.ping()  # an empty queue does not exist for it
    else:
        queue(channel).queue_declare(passive=True)


def declared(connection: Connection, name: str) -> Queue:
    """Return queue *name*, declared and empty."""
    queue = queue_of(name)
    bound = queue(connection.default_channel)
    bound.declare()
    bound.purge()
    return queue


def repeat(call: Callable[[], Any], seconds: float, finish: Callable[[], Any]) -> float:
    """Return how often per second *call* can be called for about *seconds*, then *finish*."""
    for _ in range(min(WARM_UP, int(1000 * seconds))):
        call()
    finish()
    count = 0
    start = time.perf_counter()
    end = start + seconds
    while time.perf_counter() < end:
        call()
        count += 1
    finish()
    return count / (time.perf_counter() - start)


def publish(parameters: Parameters) -> Figures:
    """Publish to one queue for ``seconds``, for each of ``sizes`` (bytes)."""
    rates = {}
    with connected(parameters) as connection:
        for size in parameters["sizes"]:
            queue = declared(connection, parameters["queue"])
            channel = connection.default_channel
            rates[str(size)] = repeat(
                publisher(connection, queue, size),
                parameters["seconds"],
                partial(settle, channel, queue),
            )
        queue(connection.default_channel).delete()
    return rates


def raw(parameters: Parameters) -> Figures:
    """Publish with nothing but a socket: PUB, wait for the PubAck, again."""
    with connected(parameters) as connection:
        queue = declared(connection, parameters["queue"])
        subject, payload = filling.stored_message(connection, queue, body(parameters["sizes"][0]))
        server = connection.connection.nats.server
        with socket.create_connection((server.host, server.port)) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.recv(65536)
            plain.sendall(b'CONNECT {"verbose":false}\r\nSUB answer 1\r\nPING\r\n')
            assert plain.recv(65536).endswith(b"PONG\r\n")
            command = b"PUB %b answer %d\r\n%b\r\n" % (subject, len(payload), payload)

            def publish_one() -> None:
                plain.sendall(command)
                answer = plain.recv(65536)
                assert b'"seq"' in answer, answer

            rate = repeat(publish_one, parameters["seconds"], lambda: None)
        queue(connection.default_channel).delete()
    return {str(parameters["sizes"][0]): rate}


def consume(parameters: Parameters) -> Figures:
    """Consume and acknowledge ``count`` messages, for each of ``prefetches`` and ``sizes``."""
    rates = {}
    for size in parameters["sizes"]:
        for prefetch in parameters["prefetches"]:
            with connected(parameters) as connection:
                queue = declared(connection, parameters["queue"])
                filling.fill(connection, queue, body(size), parameters["count"] + 2 * WARM_UP)
                rates[f"{prefetch}/{size}"] = _consume(
                    connection, [queue], prefetch, parameters["count"], parameters["seconds"]
                )
                queue(connection.default_channel).delete()
    return rates


def _consume(
    connection: Connection, queues: list[Queue], prefetch: int, count: int, seconds: float
) -> float:
    """Return the rate over *count* messages, or as many as came in *seconds*."""
    got = 0

    def on_message(message: Any) -> None:
        nonlocal got
        got += 1
        message.ack()

    channel = connection.channel()
    with Consumer(channel, queues, on_message=on_message, prefetch_count=prefetch):
        while got < WARM_UP:
            connection.drain_events(timeout=PATIENCE)
        first, start = got, time.perf_counter()
        while got < first + count and time.perf_counter() < start + seconds:
            connection.drain_events(timeout=PATIENCE)
        settle(channel, queues[0])
        return (got - first) / (time.perf_counter() - start)


def depth(parameters: Parameters) -> Figures:
    """Consume from, and publish to, queues with ``depths`` messages waiting.

    What is consumed is put back in between, outside the clock.
    """
    rates = {}
    content = body(parameters["size"])
    chunk = int(parameters["chunk"])
    for waiting in parameters["depths"]:
        with connected(parameters) as connection:
            queue = queue_of(f"{parameters['queue']}-{waiting}")
            queue(connection.default_channel).declare()
            left = _count(connection, queue)
            filling.fill(connection, queue, content, waiting - left)
            rates[f"consume at {waiting}"] = _consume_in_chunks(
                connection,
                queue,
                parameters,
                chunk,
                partial(filling.fill, connection, queue, content, chunk),
            )
            channel = connection.default_channel
            rates[f"publish at {waiting}"] = repeat(
                publisher(connection, queue, parameters["size"]),
                parameters["seconds"] / 2,
                partial(settle, channel, queue),
            )
    return rates


def _consume_in_chunks(
    connection: Connection,
    queue: Queue,
    parameters: Parameters,
    chunk: int,
    refill: Callable[[], None],
) -> float:
    got, spent, target = 0, 0.0, 0

    def on_message(message: Any) -> None:
        nonlocal got
        got += 1
        message.ack()

    channel = connection.channel()
    with Consumer(channel, [queue], on_message=on_message, prefetch_count=parameters["prefetch"]):
        connection.drain_events(timeout=PATIENCE)
        counted = got
        while spent < parameters["seconds"]:
            target = got + chunk
            start = time.perf_counter()
            while got < target:
                connection.drain_events(timeout=PATIENCE)
            spent += time.perf_counter() - start
            refill()
    return (got - counted) / spent


def _count(connection: Connection, queue: Queue) -> int:
    try:
        answer = queue(connection.default_channel).queue_declare(passive=True)
    except ChannelError:  # Redis: an empty queue does not exist
        return 0
    return int(answer.message_count)


def delete_queues(parameters: Parameters) -> Figures:
    """Delete ``queues``."""
    with connected(parameters) as connection:
        for name in parameters["queues"]:
            queue_of(name)(connection.default_channel).delete()
    return {}


def queues(parameters: Parameters) -> Figures:
    """Consume ``count`` messages that are spread over each of ``numbers`` of queues.

    "one of N": N queues are consumed from, and one of them has everything.
    """
    rates = {}
    content = body(parameters["size"])
    count, prefetch = parameters["count"], parameters["prefetch"]
    for number in parameters["numbers"]:
        # A client may get a prefetch of each while it still subscribes to the others.
        needed = count + WARM_UP + prefetch * number
        names = [f"{parameters['queue']}-{number}-{index}" for index in range(number)]
        for busy in [number] if number == 1 else [number, 1]:
            with connected(parameters) as connection:
                all_of_them = [queue_of(name) for name in names]
                for queue in all_of_them:
                    queue(connection.default_channel).declare()
                for queue in all_of_them[:busy]:
                    filling.fill(connection, queue, content, needed // busy + 1)
                rates[f"{number}" if busy == number else f"one of {number}"] = _consume(
                    connection, all_of_them, prefetch, count, parameters["seconds"]
                )
                for queue in all_of_them[:busy]:
                    queue(connection.default_channel).purge()
    return rates


def delay(parameters: Parameters) -> Figures:
    """Call ``task.delay()`` for ``seconds``."""
    from .app import app, noop

    with app.connection_for_write() as connection:
        declared(connection, parameters["queue"])

    def finish() -> None:
        with app.producer_pool.acquire(block=True) as producer:
            settle(producer.channel, queue_of(parameters["queue"]))

    rate = repeat(noop.delay, parameters["seconds"], finish)
    with app.connection_for_write() as connection:
        queue_of(parameters["queue"])(connection.default_channel).delete()
    return {"delay": rate}


def send_tasks(parameters: Parameters) -> Figures:
    """Send ``count`` tasks that do nothing, due in ``countdown`` seconds."""
    from .app import app, noop

    start = time.perf_counter()
    with app.producer_pool.acquire(block=True) as producer:
        for _ in range(parameters["count"]):
            noop.apply_async(producer=producer, countdown=parameters.get("countdown"))
        settle(producer.channel, queue_of(parameters["queue"]))
    return {"seconds": time.perf_counter() - start}


def costs(parameters: Parameters) -> Figures:
    """Publish ``count`` messages and consume them; return microseconds of CPU for one.

    Of this process, of the busiest of the servers ``pids`` (it leads the stream), and of the rest.
    """
    figures: Figures = {}
    count = parameters["count"]
    with connected(parameters) as connection:
        queue = declared(connection, parameters["queue"])
        channel: Any = connection.default_channel
        call = publisher(connection, queue, parameters["size"])
        for _ in range(WARM_UP):
            call()
        settle(channel, queue)
        before = _cpu_times(parameters["pids"])
        for _ in range(count):
            call()
        settle(channel, queue)
        figures |= _cost_of("publish", count, before, _cpu_times(parameters["pids"]))

        before = _cpu_times(parameters["pids"])
        _consume(connection, [queue], 256, count - WARM_UP, PATIENCE)
        figures |= _cost_of("consume", count, before, _cpu_times(parameters["pids"]))
        queue(channel).delete()
    return figures


def _cpu_times(pids: list[int]) -> list[float]:
    """Return CPU seconds of this process and of *pids*."""
    return [time.process_time(), *(cpu_seconds([pid]) for pid in pids)]


def _cost_of(verb: str, count: int, before: list[float], after: list[float]) -> Figures:
    client, *servers = ((b - a) / count * 1e6 for a, b in zip(before, after, strict=True))
    leader = max(servers, default=0.0)
    return {
        f"{verb}: client": client,
        f"{verb}: leader": leader,
        f"{verb}: others": sum(servers) - leader,
    }


def latency(parameters: Parameters) -> Figures:
    """Send ``rate`` tasks a second, one after the other, and wait for each result.

    When an answer takes longer than its turn, the next task goes out at once.
    """
    from .app import since

    there, back = [], []
    for _ in range(20):
        since.delay(time.monotonic()).get(timeout=PATIENCE)
    start = time.monotonic()
    for number in range(parameters["count"]):
        time.sleep(max(0.0, start + number / parameters["rate"] - time.monotonic()))
        sent = time.monotonic()
        there.append(since.delay(sent).get(timeout=PATIENCE))
        back.append(time.monotonic() - sent)
    return {
        "started p50": 1000 * _percentile(there, 50),
        "started p99": 1000 * _percentile(there, 99),
        "answered p50": 1000 * _percentile(back, 50),
        "answered p99": 1000 * _percentile(back, 99),
    }


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


CLIENTS: dict[str, Callable[[Parameters], Figures]] = {
    client.__name__: client
    for client in (
        publish,
        raw,
        consume,
        depth,
        delete_queues,
        queues,
        delay,
        send_tasks,
        costs,
        latency,
    )
}


def main(name: str, parameters: str) -> None:
    print(json.dumps(CLIENTS[name](json.loads(parameters))))


if __name__ == "__main__":
    main(*sys.argv[1:])
