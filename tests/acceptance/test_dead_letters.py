"""Messages that can never be processed are kept and explained, and the worker lives."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import nats
import pytest

from kombu_jetstream.deadletter import DeadLetter, read_fields
from kombu_jetstream.server import NatsServer
from kombu_jetstream.topology import encode_token
from tests.acceptance.letters import Letterbox, Stored
from tests.acceptance.sites import Site, start_all
from tests.servers import CeleryWorker, eventually, run_nats_server

pytestmark = pytest.mark.nats29


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with run_nats_server(tmp_path_factory.mktemp("nats store")) as server:
        yield server


def publish(server: NatsServer, messages: list[tuple[str, bytes]]) -> None:
    """Publish as a program would that knows NATS and nothing of us."""

    async def send() -> None:
        client = await nats.connect(server.url)
        for subject, payload in messages:
            await client.publish(subject, payload)
        await client.flush()
        await client.close()

    asyncio.run(send())


# Tasks that kill


KILLER = {"max_deliveries": 3, "visibility_timeout": 3}


def test_a_task_that_kills_its_process_dies_and_the_others_run(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{server.broker_url}/killer", broker_transport_options=KILLER)
    box = Letterbox(server, "killer")
    worker = site.worker(concurrency=2)
    start_all([worker])

    before = site.send("nap_late", 20, 0.05)
    killers = site.send("kill_self", 2)
    after = site.send("nap_late", 20, 0.05)

    # Celery needs up to five seconds to notice that a process is gone, six times.
    letters = [box.wait_for(killer, within=60) for killer in killers]
    site.wait_ended([*before, *after], within=30)
    site.assert_each_ran_once([*before, *after])
    assert [site.ledger.starts()[killer] for killer in killers] == [3, 3]
    for letter in letters:
        assert letter.reason == "max_deliveries_exceeded"
        assert letter.attempts == 3
        assert (letter.task, letter.queue, letter.level) == ("kill_self", "celery", "medium")
    assert worker.is_running
    eventually(lambda: not box.stored("medium"), within=10)


@pytest.mark.slow
def test_a_task_that_kills_its_process_comes_back_at_once_but_not_for_ever(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    """With the default limit of 20: it waits for no lease, and the others do not wait for it."""
    site = make_site(f"{server.broker_url}/loop")
    box = Letterbox(server, "loop")
    start_all([site.worker(concurrency=2)])

    (killer,) = site.send("kill_self", 1)
    others = site.send("noop", 100)

    site.wait_ended(others, within=20)
    # Celery needs up to five seconds to notice that a process is gone.
    letter = box.wait_for(killer, within=20 * 5 + 15)
    assert letter.attempts == 20
    assert site.ledger.starts()[killer] == 20


def test_a_task_that_kills_the_whole_worker_dies(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    """In the solo pool the task's process is the worker; something starts that again each time."""
    site = make_site(f"{server.broker_url}/solo", broker_transport_options=KILLER)
    box = Letterbox(server, "solo")
    (killer,) = site.send("kill_self", 1)

    worker = site.worker(pool="solo")
    deaths = 0
    while not box.of(killer):
        worker.start()
        eventually(lambda: not worker.is_running or box.of(killer), within=30, every=0.1)
        deaths += not worker.is_running
        assert deaths <= 3

    assert deaths == 3
    assert box.wait_for(killer).reason == "max_deliveries_exceeded"
    noops = site.send("noop", 10)
    site.wait_ended(noops, within=30)
    site.assert_each_ran_once(noops)


# Messages of a foreign client


BODY = '[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'


def task(*path: str, to: Any = None, **headers: Any) -> bytes:
    """A task message as Celery writes it; what is at *path* is replaced by *to*."""
    message: dict[str, Any] = {
        "body": BODY,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "noop", "id": "hostile", "retries": 0, **headers},
        "properties": {
            "correlation_id": "hostile",
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "priority": 0,
            "body_encoding": "utf-8",
            "delivery_tag": "tag",
        },
    }
    message = copy.deepcopy(message)
    if path:
        part = message
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = to
    return json.dumps(message).encode()


def tagged(kind: str, value: Any) -> bytes:
    """A message with one of kombu's tagged values in it."""
    return task("properties", "x", to={"__type__": kind, "__value__": value})


#: By name, with a part of what the letter must say.  Most of them end a worker of any other broker.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a JSON document"),
    "truncated": (task()[:100], "not a JSON document"),
    "no JSON": (b"hello", "not a JSON document"),
    "no text": (b"\xff\xfe\x00", "not a JSON document"),
    "null bytes": (b"\0" * 100, "not a JSON document"),
    "deep list": (b"[" * 200_000, "not a JSON document"),
    "deep object": (b'{"a":' * 200_000, "not a JSON document"),
    "huge number": (b"1" * 100_000, "not a JSON document"),
    "number": (b"5", "not a JSON object"),
    "list": (b"[]", "not a JSON object"),
    "text": (b'"x"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "empty object": (b"{}", "'body' is missing"),
    "tagged decimal": (tagged("decimal", "x"), "not a JSON document: InvalidOperation"),
    "tagged bytes": (tagged("bytes", 5), "not a JSON document: AttributeError"),
    "tagged date": (tagged("datetime", []), "not a JSON document: TypeError"),
    "unknown tag": (tagged("evil", 5), "not a JSON document: ValueError"),
    "body number": (task("body", to=5), "'body' is of type int"),
    "body object": (task("body", to={}), "'body' is of type dict"),
    "properties list": (task("properties", to=[]), "'properties' is of type list"),
    "properties missing": (task("properties"), "'properties' is missing"),
    "headers text": (task("headers", to="x"), "'headers' is of type str"),
    "delivery info list": (
        task("properties", "delivery_info", to=["exchange"]),
        "'delivery_info' is of type list",
    ),
    "routing key number": (
        task("properties", "delivery_info", "routing_key", to=5),
        "'routing_key' is of type int",
    ),
    "priority text": (task("properties", "priority", to="high"), "'priority' is of type str"),
    "content type list": (task("content-type", to=[]), "'content-type' is of type list"),
    "content encoding number": (task("content-encoding", to=5), "'content-encoding' is of"),
    "body encoding number": (task("properties", "body_encoding", to=5), "'body_encoding' is of"),
    "unknown body encoding": (
        task("properties", "body_encoding", to="rot13"),
        "unknown body_encoding 'rot13'",
    ),
    "broken base64": (task("properties", "body_encoding", to="base64"), "not base64"),
    "task list": (task(task=["noop"]), "expected 'task' to be text"),
    "task null": (task(task=None), "expected 'task' to be text"),
    "id list": (task(id=[]), "expected 'id' to be text"),
    "id missing": (task(id=None), "expected 'id' to be text"),
    "id number": (task(id=5), "expected 'id' to be text"),
    "id surrogate": (task(id="\ud800"), "expected 'id' to be text"),
    "shadow object": (task(shadow={"a": 1}), "expected 'shadow' to be text"),
    "empty eta": (task(eta=""), "expected 'eta' to be an ISO 8601 time"),
    "eta list": (task(eta=[]), "expected 'eta' to be an ISO 8601 time"),
    "expires object": (task(expires={}), "expected 'expires' to be an ISO 8601 time"),
    "timelimit number": (task(timelimit=5), "expected 'timelimit' to be two numbers"),
    "timelimit texts": (task(timelimit=["a", "b"]), "expected 'timelimit' to be two numbers"),
    "timelimit beyond any timer": (
        task(timelimit=[10**400, None]),
        "expected 'timelimit' to be two numbers",
    ),
    "priority not a number": (
        task("properties", "priority", to=float("nan")),
        "'priority' is nan",
    ),
    "headers deep": (
        task(mine="deep").replace(b'"deep"', b"[" * 500 + b"]" * 500),
        "nested deeper than 200",
    ),
    "arguments deep": (
        task("body", to=f"[[{'[' * 500}{']' * 500}], {{}}, {{}}]"),
        "nested deeper than 200",
    ),
    "stamped headers number": (task(stamped_headers=5), "expected 'stamped_headers' to be"),
    "stamps text": (task(stamps="x"), "expected 'stamps' to be an object"),
    "unknown compression": (task(compression="snake oil"), ""),
    "body no JSON": (task("body", to="hello"), ""),
    "body deep": (task("body", to="[" * 100_000), ""),
    "body of JSON number": (task("body", to="5"), "[args, kwargs, embed]"),
    "body of JSON null": (task("body", to="null"), "[args, kwargs, embed]"),
    "body of two": (task("body", to="[[], {}]"), "[args, kwargs, embed]"),
    "empty body": (task("body", to=""), "[args, kwargs, embed]"),
    "args number": (task("body", to="[5, {}, {}]"), "expected 'args' to be a list"),
    "kwargs number": (task("body", to="[[], 5, {}]"), "expected 'kwargs' to be an object"),
    "embed number": (task("body", to="[[], {}, 5]"), "the third part"),
    "pickle": (task("content-type", to="application/x-python-serialize"), "untrusted content"),
    "unknown content type": (task("content-type", to="application/x-evil"), ""),
    "no content type": (task("content-type", to=None), "[args, kwargs, embed]"),
    "protocol 1 without id": (
        task("headers", to={}).replace(json.dumps(BODY).encode(), b'"{\\"task\\": \\"noop\\"}"'),
        "expected 'id' to be text",
    ),
}


@dataclass
class Survivor:
    """A worker that was sent everything in `HOSTILE`, and what became of that."""

    worker: CeleryWorker
    site: Site
    noops: list[str]
    by_payload: dict[bytes, Stored]


@pytest.fixture(scope="module", params=["prefork", "solo"])
def survivor(
    request: pytest.FixtureRequest, server: NatsServer, make_site: Callable[..., Site]
) -> Survivor:
    namespace = f"hostile_{request.param}"
    site = make_site(f"{server.broker_url}/{namespace}")
    box = Letterbox(server, namespace)
    worker = site.worker(pool=request.param)
    start_all([worker])
    noops = []
    for payload, _ in HOSTILE.values():
        noops += site.send("noop", 1)
        publish(server, [(f"{namespace}.medium.celery", payload)])
    noops += site.send("noop", 1)

    def all_are_over() -> bool:
        assert worker.is_running, worker.tail()
        return not box.stored("medium")

    eventually(all_are_over, within=30, every=0.1)
    eventually(lambda: len(box.stored()) >= len(HOSTILE), within=10)
    letters = box.stored()
    return Survivor(worker, site, noops, {letter.payload: letter for letter in letters})


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_foreign_client_publishes_is_a_dead_letter(survivor: Survivor, name: str) -> None:
    payload, told = HOSTILE[name]

    letter = read_fields(survivor.by_payload[payload].headers)

    assert letter.reason == "malformed"
    assert letter.queue == "celery"
    assert letter.error
    assert told in (letter.message or "")


def test_the_worker_lives_and_works_through_all_of_it(survivor: Survivor) -> None:
    survivor.site.wait_ended(survivor.noops, within=10)
    survivor.site.assert_each_ran_once(survivor.noops)
    assert survivor.worker.log.count(" ready.") == 1
    assert survivor.worker.is_running
    assert len(survivor.by_payload) == len({payload for payload, _ in HOSTILE.values()})


def test_what_celery_refuses_itself_is_a_dead_letter(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    """It rejects them; the reason of an unknown task is told by name."""
    site = make_site(f"{server.broker_url}/refused")
    box = Letterbox(server, "refused")
    start_all([site.worker()])

    (unknown,) = [site.client.send_task("no.such.task", (1,)).id]
    publish(server, [("refused.medium.celery", task(id="bad-eta", eta="tomorrow"))])

    letter = box.wait_for(unknown)
    assert (letter.reason, letter.task) == ("unknown_task", "no.such.task")
    assert box.wait_for("bad-eta").reason == "rejected"


def event(body: str, **headers: Any) -> bytes:
    return task("body", to=body, **headers)


HEARTBEAT = {"type": "worker-heartbeat", "hostname": "other@test", "clock": 1, "timestamp": 1.0}

#: A message that is one of tasks, or none at all, and events with something wrong in them.
TRANSIENT = [b"", b"x", b"{", b"[" * 100_000, b"\xff", b"{}", b"null", task()[:100], task()] + [
    event(body)
    for body in ("", "{", "5", "null", "[]", "{}", '"x"', "[" * 100_000, '[{"type": 5}]')
]
TRANSIENT += [
    event(json.dumps({**HEARTBEAT, name: value, "utcoffset": 0, "freq": 2.0}))
    for name in ("type", "hostname", "clock", "timestamp", "id")
    for value in list[Any]([None, [], {}, "x", "worker-elect"])
]
TRANSIENT += [event(json.dumps(HEARTBEAT), hostname=value) for value in list[Any]([[], {}, 5])]


def test_garbage_for_remote_control_and_events_does_not_end_a_worker(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{server.broker_url}/control")
    worker = site.worker(args=["-E"])
    start_all([worker])
    exchanges = ["celery.pidbox", "celeryev", "reply.celery.pidbox"]
    keys = ["", ".worker.heartbeat", ".worker.online", ".worker.elect", ".worker.elect.ack"]

    publish(
        server,
        [
            (f"control.x.{encode_token(exchange)}{key}", payload)
            for exchange in exchanges
            for key in keys
            for payload in TRANSIENT
        ]
        + [(f"control.q.{encode_token('worker@test.celery.pidbox')}", p) for p in TRANSIENT],
    )

    noops = site.send("noop", 10)
    site.wait_ended(noops, within=15)
    assert site.client.control.ping(timeout=2) == [{worker.hostname: {"ok": "pong"}}]
    assert worker.log.count(" ready.") == 1
    assert Letterbox(server, "control").stored() == []


def test_a_dead_letter_is_the_message_as_it_was(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    """So that a replay is the same task."""
    site = make_site(f"{server.broker_url}/same")
    box = Letterbox(server, "same")
    before = time.time()
    result = site.client.send_task(
        "no.such.task", (1, "zwei"), {"three": [3]}, priority=9, headers={"tenant": "t1"}
    )
    (original,) = box.stored("high")
    start_all([site.worker()])

    letter: DeadLetter = box.wait_for(result.id)

    ((_, payload),) = box.of(result.id)
    assert payload == original.payload
    assert letter.level == "high"
    assert letter.published_at == pytest.approx(before, abs=5)
    assert letter.published_at is not None
    assert letter.died_at >= letter.published_at
    assert letter.replayed == 0
