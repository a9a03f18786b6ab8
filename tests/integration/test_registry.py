"""The registry all processes share, and what anybody may write into it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import nats
import pytest
from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from kombu_jetstream.server import NatsServer
from tests.messaging import Received, declare, send, take_all
from tests.servers import api_request

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]
Publish = Callable[[Mapping[str, bytes]], None]

WORK = Queue("work", Exchange("work", type="topic"), "a.#")


@pytest.fixture
def foreign(shared_nats_server: NatsServer, namespace: str) -> Publish:
    """Publishes payloads by subject, as a client that knows nothing of kombu."""

    async def publish(messages: Mapping[str, bytes]) -> None:
        client = await nats.connect(shared_nats_server.url)
        for subject, payload in messages.items():
            await client.publish(f"{namespace}.{subject}", payload)
        await client.flush()
        await client.close()

    return lambda messages: asyncio.run(publish(messages))


def record(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


#: Records nobody here would write.
NONSENSE = {
    "registry.queue.=FF": record(name="x"),
    "registry.queue.=ZZ": record(name="=ZZ"),
    "registry.queue.a": b"not json",
    "registry.queue.b": b"[" * 50_000,
    "registry.queue.c": record(name="another"),
    "registry.queue.d": record(name=5),
    "registry.queue.e": record(name="e", arguments=[1]),
    "registry.queue.f": record(name="f", unknown_field=1),
    "registry.queue.g.h": record(name="g"),
    "registry.queue.i": b"17",
    "registry.queue.j": record(name="j", arguments={"x-max-length": 5}),
    "registry.exchange.a": record(name="a", type="headers"),
    "registry.exchange.b": record(name="b", type=["topic"]),
    "registry.exchange.c": b"\xff\xfe",
    "registry.binding.work.work": record(exchange="work", queue="work", key="k"),
    "registry.binding.work.work.k": record(exchange="work", queue="work", key=5, type="topic"),
    "registry.binding.work.work.l": record(exchange="work", queue="work", key="l", type=None),
    "registry.binding.work.work.m": record(exchange="work", queue=None, key="m", type="topic"),
    "registry.strange": b"{}",
    "registry.strange.=FF.x": b"x",
}


def test_nonsense_in_the_registry_is_ignored_and_said(
    connect: Connect, foreign: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    before = connect()
    declare(before, WORK)

    foreign(NONSENSE)

    after = connect()
    for connection in (before, after):
        send(connection, 1, exchange="work", key="a.b")
        assert take_all(connection, WORK) == [1]
        declare(connection, Queue("more", Exchange("work", type="topic"), "m"))
    said = [r for r in caplog.records if "unreadable registry record" in r.getMessage()]
    assert {r.levelno for r in said} == {logging.WARNING}
    assert len(said) >= len(NONSENSE) - 3


def test_nonsense_on_the_subjects_of_exchanges_is_ignored(
    connect: Connect, foreign: Publish
) -> None:
    connection = connect()
    replies = Queue("replies", Exchange("t", type="topic"), "#.r.#", exclusive=True)
    received = Received(connection.channel(), replies)
    received.consume()

    foreign(
        {
            "x.t.=FF.r": b"{}",
            "x.t.=ZZ": b"{}",
            "x.t.r": b"not json",
            "x.t.r.r": b"",
            "q.replies": b"[1]",
        }
    )
    send(connection, 1, exchange="t", key="r")

    assert received.wait(1) == [1]


def test_many_records_are_read_in_pages(connect: Connect) -> None:
    connection = connect()
    exchange = Exchange("t", type="topic")
    declare(connection, Queue("q", exchange, "first"))
    channel = connection.channel()
    for number in range(1100):
        channel.queue_bind("q", "t", f"key.{number}")

    later = connect()
    send(later, 1, exchange="t", key="key.0")
    send(later, 2, exchange="t", key="key.1099")

    assert len(later.channel().get_bindings()) == 1101
    assert take_all(later, "q") == [1, 2]


def test_what_is_removed_is_removed_for_those_who_come_later(
    connect: Connect, shared_nats_server: NatsServer, namespace: str
) -> None:
    connection = connect()
    declare(connection, WORK, Queue("kept", Exchange("work", type="topic"), "k"))
    channel = connection.channel()
    channel.queue_delete("work")

    later = connect()
    send(later, "lost", exchange="work", key="a.b")

    assert {b["destination"] for b in later.channel().get_bindings()} == {"kept"}
    info = api_request(shared_nats_server.url, f"STREAM.INFO.{namespace}_registry")
    # The exchange, "kept", its binding, and at most the marks of the two that went.
    assert info["state"]["messages"] <= 5


def test_declaring_again_writes_nothing(
    connect: Connect, shared_nats_server: NatsServer, namespace: str
) -> None:
    declare(connect(), WORK)

    def last_sequence() -> int:
        info = api_request(shared_nats_server.url, f"STREAM.INFO.{namespace}_registry")
        return int(info["state"]["last_seq"])

    before = last_sequence()
    for connection in (connect(), connect()):
        declare(connection, WORK, WORK)

    assert last_sequence() == before


@pytest.mark.parametrize("bound_before", [False, True], ids=["first binding", "another binding"])
def test_a_binding_made_elsewhere_is_known_when_it_was_made(
    connect: Connect, bound_before: bool
) -> None:
    """A message nobody took a moment ago does not hide it."""
    one, other = connect(), connect()
    exchange = Exchange("news", type="topic")
    if bound_before:
        declare(one, Queue("all", exchange, "unrelated"))
    else:
        with one.channel() as channel:
            exchange.bind(channel).declare()
    send(one, "nobody took it", exchange="news", key="a.0")

    for number in range(1, 10):
        declare(other, Queue(f"q{number}", exchange, f"a.{number}"))
        send(one, number, exchange="news", key=f"a.{number}")

        assert take_all(other, f"q{number}") == [number]
