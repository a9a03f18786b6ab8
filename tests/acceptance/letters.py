"""What is in the dead-letter stream of a namespace, read with nats-py."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import nats
from nats.js.errors import NotFoundError

from kombu_jetstream.deadletter import DeadLetter, read_fields
from kombu_jetstream.server import NatsServer
from tests.servers import eventually


@dataclass(frozen=True)
class Stored:
    """A message of a stream."""

    seq: int
    subject: str
    payload: bytes
    headers: dict[str, str]


class Letterbox:
    """The dead letters of one namespace."""

    def __init__(self, server: NatsServer, namespace: str) -> None:
        self.server = server
        self.namespace = namespace

    def stored(self, stream: str = "dlq") -> list[Stored]:
        """All messages of a stream of the namespace, in their order."""

        async def read() -> list[Stored]:
            client = await nats.connect(self.server.url, allow_reconnect=False)
            try:
                jetstream = client.jetstream()
                name = f"{self.namespace}_{stream}"
                state = (await jetstream.stream_info(name)).state
                found = []
                for seq in range(max(1, state.first_seq), state.last_seq + 1):
                    try:
                        message = await jetstream.get_msg(name, seq)
                    except NotFoundError:
                        continue
                    found.append(
                        Stored(
                            seq, message.subject or "", message.data or b"", message.headers or {}
                        )
                    )
                return found
            finally:
                await client.close()

        return asyncio.run(read())

    def of(self, task_id: str) -> list[tuple[DeadLetter, bytes]]:
        """The letters of one task with their payloads."""
        letters = [(read_fields(each.headers), each.payload) for each in self.stored()]
        return [(letter, payload) for letter, payload in letters if letter.task_id == task_id]

    def wait_for(self, task_id: str, within: float = 15.0) -> DeadLetter:
        """The only letter of a task, as soon as there is one."""
        letters = eventually(
            lambda: self.of(task_id), within, every=0.1, what=f"a dead letter of {task_id}"
        )
        assert len(letters) == 1, letters
        return letters[0][0]
