"""kombu clients for tests: what a message is sent with and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.message import Message
from kombu.messaging import Consumer

from tests.servers import api_request


def drain(connection: Connection, until: Callable[[], Any], within: float = 5.0) -> None:
    """Handle events of *connection* until a condition holds; fail after *within* seconds."""
    deadline = time.monotonic() + within
    while not until():
        left = deadline - time.monotonic()
        assert left > 0, f"what was waited for did not come within {within:g} s"
        try:
            # Another thread may make it come true, or what comes is not for a consumer.
            connection.drain_events(timeout=min(left, 0.05))
        except TimeoutError:
            continue


def drain_quiet(connection: Connection, quiet: float = 0.3) -> None:
    """Handle events of *connection* until none came for *quiet* seconds."""
    while True:
        try:
            connection.drain_events(timeout=quiet)
        except TimeoutError:
            return


class Received(Consumer):
    """A consumer that keeps what it gets, acknowledged at once unless told otherwise."""

    def __init__(
        self, channel: Any, *queues: Queue | str, ack: bool = True, **options: Any
    ) -> None:
        self._client = channel.connection.client
        self.bodies: list[Any] = []
        self.messages: list[Message] = []
        self._acks = ack and not options.get("no_ack")
        named = [Queue(q, no_declare=True) if isinstance(q, str) else q for q in queues]
        options.setdefault("accept", ["json", "pickle", "msgpack", "yaml", "text/plain"])
        super().__init__(channel, named, on_message=self._keep, **options)

    def __len__(self) -> int:
        return len(self.bodies)

    def _keep(self, message: Message) -> None:
        self.bodies.append(message.decode())
        self.messages.append(message)
        if self._acks:
            message.ack()

    def has(self, count: int) -> bool:
        """Tell whether *count* messages came in all."""
        return len(self.bodies) >= count

    def wait(self, count: int, within: float = 5.0) -> list[Any]:
        """Handle events until *count* messages came in all, and return their bodies."""
        drain(self._client, lambda: len(self.bodies) >= count, within)
        return self.bodies


def declare(connection: Connection, *queues: Queue) -> None:
    """Declare *queues* with their exchanges and bindings."""
    with connection.channel() as channel:
        for queue in queues:
            queue.bind(channel).declare()


def send(
    connection: Connection,
    *bodies: Any,
    to: str | Queue | None = None,
    exchange: str | Exchange = "",
    key: str = "",
    **options: Any,
) -> None:
    """Publish *bodies* to a queue by its name, or to an exchange with a routing key."""
    if isinstance(to, Queue):
        to = to.name
    with connection.channel() as channel:
        producer = connection.Producer(channel, auto_declare=False)
        for body in bodies:
            producer.publish(body, exchange=exchange, routing_key=to or key, **options)


def take_all(connection: Connection, queue: str | Queue) -> list[Any]:
    """Get and acknowledge what is ready in a queue; return the bodies in order."""
    name = queue.name if isinstance(queue, Queue) else queue
    bodies = []
    with connection.channel() as channel:
        while (message := channel.basic_get(name)) is not None:
            message.accept = None
            bodies.append(message.decode())
            message.ack()
    return bodies


def count(connection: Connection, queue: str | Queue) -> int:
    """How many messages of a queue are ready."""
    name = queue.name if isinstance(queue, Queue) else queue
    with connection.channel() as channel:
        return int(channel.queue_declare(name, passive=True).message_count)


def state_of(url: str, namespace: str) -> dict[str, dict[str, Any]]:
    """What JetStream keeps of a namespace: messages and consumers by stream."""
    names = api_request(url, "STREAM.NAMES", {"subject": f"{namespace}.>"})["streams"] or []
    state = {}
    for name in names:
        info = api_request(url, f"STREAM.INFO.{name}", {"subjects_filter": ">"})["state"]
        consumers = api_request(url, f"CONSUMER.NAMES.{name}", {})["consumers"] or []
        state[name] = {
            "subjects": info.get("subjects") or {},
            "consumers": sorted(consumers),
        }
    return state
