from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pytest

from celery_ext.broker import Broker, connect, run
from celery_ext.dlq import DeadLetters, LetterFilter, LetterMissing
from celery_ext.replay import Replay, Report, Superseded
from kombu_jetstream import envelope
from kombu_jetstream.errors import PublishRejected, QueueMissing
from kombu_jetstream.server import NatsServer
from tests.letters import application, bury, letters, message_of, queued
from tests.servers import eventually, free_port, nats_server_version, python_env, run_nats_server

pytestmark = pytest.mark.nats29

needs_batches = pytest.mark.requires_nats("2.12")


@pytest.fixture
def app(shared_nats_server: NatsServer, namespace: str) -> Iterator[celery.Celery]:
    with application(
        shared_nats_server.broker_url, namespace, queues=("celery", "a b.c", "other")
    ) as app:
        yield app


@pytest.fixture(params=["batches", "claims"])
def any_app(
    request: pytest.FixtureRequest, shared_nats_server: NatsServer, namespace: str
) -> Iterator[celery.Celery]:
    """An app whose streams take atomic batches, and one whose streams do not."""
    if request.param == "batches" and nats_server_version() < (2, 12):
        pytest.skip("needs nats-server 2.12")
    with application(shared_nats_server.broker_url, namespace) as app:
        if request.param == "claims":
            without_batches(app)
        yield app


def without_batches(app: celery.Celery) -> None:
    """Give the level streams the configuration older servers have."""

    async def update(broker: Broker) -> None:
        for level in broker.levels:
            info = await broker.api(f"STREAM.INFO.{broker.names.stream(level)}")
            config = {**info["config"], "allow_atomic": False}
            await broker.api(f"STREAM.UPDATE.{broker.names.stream(level)}", config)

    run(app, update)


def replay(
    app: celery.Celery, *ids: str, which: LetterFilter | None = None, **options: Any
) -> Report:
    return run(app, lambda broker: Replay(broker, **options).run(ids, which))


def replay_all(app: celery.Celery, **options: Any) -> Report:
    return replay(app, which=LetterFilter(), **options)


def leftovers(app: celery.Celery) -> list[str]:
    """Subjects of all messages in the namespace that are not the registry's."""

    async def read(broker: Broker) -> list[str]:
        found: dict[str, int] = {}
        for level in broker.levels:
            found |= await broker.subjects(broker.names.stream(level), ">")
        return sorted(found | await broker.subjects(broker.names.dead_letter_stream, ">"))

    return run(app, read)


def test_replayed_letters_are_in_their_queues_and_no_letters_any_more(
    any_app: celery.Celery,
) -> None:
    task_ids = bury(any_app, 250)

    report = replay_all(any_app)

    assert report == Report(replayed=250)
    assert queued(any_app) == dict.fromkeys(task_ids, 1)
    assert letters(any_app) == []
    assert leftovers(any_app) == []


def test_a_replayed_message_is_the_same_task_with_all_its_attempts(app: celery.Celery) -> None:
    message = message_of("shop.pay", "one", "celery", jetstream_replayed=1, group="g", eta=None)
    bury(app, payload=envelope.encode(message))

    replay(app, "1")

    with app.connection_for_read() as connection:
        again = connection.default_channel.basic_get("celery", no_ack=True)
    assert again is not None
    expected = {**message["headers"], "retries": 0, "jetstream_replayed": 2}
    assert again.headers == expected
    assert again.body.decode() == message["body"]
    assert again.properties["delivery_info"] == message["properties"]["delivery_info"]
    assert again.properties["correlation_id"] == "one"
    assert again.properties["delivery_tag"] != message["properties"]["delivery_tag"]


def test_types_that_kombu_tags_are_written_as_they_were(app: celery.Celery) -> None:
    tagged = {"__type__": "uuid", "__value__": {"hex": "0" * 32, "version": None}}
    message = message_of("shop.pay", "one", "celery", card=tagged)
    bury(app, payload=json.dumps(message).encode())

    replay(app, "1")

    assert stored_headers(app)[0]["card"] == tagged


def stored_headers(app: celery.Celery) -> list[dict[str, Any]]:
    """Headers of the messages in the queue "celery", as they are stored."""

    async def read(broker: Broker) -> list[dict[str, Any]]:
        found = []
        for level in broker.levels:
            subject = broker.names.subject(level, "celery")
            async for page in broker.pages(broker.names.stream(level), subject, 100):
                found += [json.loads(stored.payload)["headers"] for stored in page]
        return found

    return run(app, read)


def test_letters_go_back_to_their_level_and_in_their_order(app: celery.Celery) -> None:
    bury(app, 6, level=lambda n: "high" if n % 2 else "low")

    replay_all(app)

    with app.connection_for_read() as connection:
        channel = connection.default_channel
        order = [channel.basic_get("celery", no_ack=True).headers["id"] for _ in range(6)]
    assert order == ["task-1", "task-3", "task-5", "task-0", "task-2", "task-4"]


def test_a_filter_chooses_what_is_replayed_and_the_rest_stays(any_app: celery.Celery) -> None:
    bury(any_app, 10, error=lambda n: "KeyError" if n < 4 else "ValueError")

    report = replay(any_app, which=LetterFilter(error="KeyError"))

    assert report.replayed == 4
    assert set(queued(any_app)) == {"task-0", "task-1", "task-2", "task-3"}
    assert len(letters(any_app)) == 6


def test_letters_named_by_id_are_replayed_once_each(app: celery.Celery) -> None:
    bury(app, 5)

    report = replay(app, "4", "2", "4")

    assert report.replayed == 2
    assert queued(app) == {"task-1": 1, "task-3": 1}


def test_a_missing_id_is_an_error_before_anything_is_done(app: celery.Celery) -> None:
    bury(app, 2)

    with pytest.raises(LetterMissing):
        replay(app, "1", "9")

    assert len(letters(app)) == 2
    assert queued(app) == {}


def test_another_queue_gets_the_letters_and_the_routing_says_so(app: celery.Celery) -> None:
    bury(app, 3, queue=lambda n: "celery" if n else "gone")

    report = replay_all(app, to_queue="a b.c")

    assert report.replayed == 3
    with app.connection_for_read() as connection:
        again = connection.default_channel.basic_get("a b.c", no_ack=True)
    assert again.properties["delivery_info"] == {"exchange": "", "routing_key": "a b.c"}
    assert len(queued(app, "a b.c")) == 2


def test_a_queue_that_does_not_exist_is_an_error_before_anything_is_done(
    app: celery.Celery,
) -> None:
    bury(app)

    with pytest.raises(QueueMissing, match="no queue 'nowhere'"):
        replay_all(app, to_queue="nowhere")

    assert len(letters(app)) == 1


def test_what_cannot_be_replayed_stays_and_is_reported(any_app: celery.Celery) -> None:
    bury(any_app, 1, queue="gone")
    bury(any_app, 1, first=1, payload=b"{", reason="malformed")
    bury(any_app, 1, first=2, payload=b'{"body": "", "properties": {}}', reason="malformed")
    bury(any_app, 1, first=3)

    report = replay_all(any_app)

    assert report.replayed == 1
    assert [letter_id for letter_id, _ in report.failed] == ["1", "2", "3"]
    assert report.failed[0][1] == "no queue 'gone'"
    assert report.failed[1][1].startswith("not a JSON document")
    assert [letter.id for letter in letters(any_app)] == ["3", "2", "1"]


def test_expired_tasks_are_counted(app: celery.Celery) -> None:
    for number, expires in enumerate(["2020-01-01T00:00:00Z", "2099-01-01T00:00:00+00:00", None]):
        message = message_of("shop.pay", f"task-{number}", "celery", expires=expires)
        bury(app, first=number, payload=envelope.encode(message))

    report = replay_all(app)

    assert (report.replayed, report.expired) == (3, 1)


def test_the_rate_is_kept(app: celery.Celery) -> None:
    bury(app, 30)
    seen: list[tuple[float, int]] = []

    def progress(report: Report) -> None:
        seen.append((time.monotonic(), report.replayed))

    began = time.monotonic()
    replay_all(app, rate=40.0, progress=progress)

    assert time.monotonic() - began >= 30 / 40.0
    # Never more than one batch ahead of the rate.
    assert all(done <= (at - began) * 40.0 + 10.0 + 1.0 for at, done in seen)


def test_letters_that_die_during_a_replay_are_not_replayed_by_it(app: celery.Celery) -> None:
    bury(app, 2)

    def die_again(report: Report) -> None:
        # In a thread of its own: the loop of the replay runs in this one.
        subprocess.run(
            [sys.executable, "-c", BURY_ONE, json.dumps(app.conf.broker_transport_options)],
            env=python_env({"BROKER_URL": app.conf.broker_url}),
            check=True,
        )

    report = replay_all(app, rate=1000.0, progress=die_again)

    assert report.replayed == 2
    assert [letter.record.task_id for letter in letters(app)] == ["task-9"]


BURY_ONE = """
import json, os, sys
import celery
from tests.letters import bury
app = celery.Celery(broker=os.environ["BROKER_URL"])
app.conf.broker_transport_options = json.loads(sys.argv[1])
bury(app, first=9)
"""


# Interruptions.  The protocol has four steps; each test stops between two of them.


class Killed(Exception):
    """The command ends here, as if it were killed."""


class KilledBeforeDelete(Replay):
    """A replay that is killed when the tasks are in their queues and before anything is deleted."""

    async def run(self, *args: Any, **kwargs: Any) -> Report:
        async def delete(letter_ids: Any) -> int:
            raise Killed

        self._letters.delete = delete  # type: ignore[method-assign]
        return await super().run(*args, **kwargs)

    async def _end(self) -> None:
        pass  # a killed process takes no fence away


class KilledAfterDelete(Replay):
    """A replay that is killed when the letters are deleted, and the marks are not."""

    async def _forget(self, *args: Any) -> None:
        raise Killed

    async def _end(self) -> None:
        pass


class KilledAfterClaim(Replay):
    """A replay that is killed after the claim and before the task is published."""

    async def run(self, *args: Any, **kwargs: Any) -> Report:
        publish = self._broker.publish

        async def claim_only(subject: str, *rest: Any) -> Any:
            if ".@claim." not in subject:
                raise Killed
            return await publish(subject, *rest)

        self._broker.publish = claim_only  # type: ignore[method-assign,assignment]
        return await super().run(*args, **kwargs)


def killed(app: celery.Celery, kind: type[Replay]) -> None:
    with pytest.raises(Killed):
        run(app, lambda broker: kind(broker).run((), LetterFilter()))


@needs_batches
def test_killed_before_the_letters_are_deleted_each_is_in_its_queue_once(
    shared_nats_server: NatsServer, namespace: str
) -> None:
    # The shortest window there is, so that it is over: the ids are forgotten.
    with application(
        shared_nats_server.broker_url, namespace, dedup_window=0.1, publish_timeout=0.1
    ) as app:
        task_ids = bury(app, 150)
        killed(app, KilledBeforeDelete)
        assert len(letters(app)) == 150
        time.sleep(0.5)  # the window

        report = replay_all(app)

        assert queued(app) == dict.fromkeys(task_ids, 1)
        assert report == Report(replayed=50, already=100)
        assert letters(app) == []
        assert leftovers(app) == []


@needs_batches
def test_a_restarted_server_that_forgot_consumed_ids_gets_no_task_twice(tmp_path: Path) -> None:
    with (
        run_nats_server(tmp_path / "nats store", port=free_port()) as server,
        application(server.broker_url, "restart") as app,
    ):
        task_ids = bury(app, 20)
        killed(app, KilledBeforeDelete)
        assert queued(app) == dict.fromkeys(task_ids, 1)  # consumed: the server need not remember
        server.kill()
        server.start()

        report = replay_all(app)

        assert report == Report(already=20)
        assert queued(app) == {}
        assert letters(app) == []


@needs_batches
def test_marks_left_behind_harm_nothing(app: celery.Celery) -> None:
    bury(app, 3)
    killed(app, KilledAfterDelete)
    assert letters(app) == []
    again = bury(app, 3, first=10)

    report = replay_all(app)

    assert report == Report(replayed=3)
    assert set(again) < set(queued(app))


@needs_batches
def test_a_replay_that_was_frozen_while_another_ran_writes_nothing_more(
    app: celery.Celery,
) -> None:
    task_ids = bury(app, 20)

    async def two() -> None:
        async with connect(app) as one, connect(app) as other:
            first = Replay(one)

            class Frozen(Exception):
                pass

            original = one.publish_batch

            async def publish_batch(messages: Any) -> int:
                # Frozen here: the letters are read, nothing is written.
                assert await Replay(other).run((), LetterFilter()) == Report(replayed=20)
                return await original(messages)

            one.publish_batch = publish_batch  # type: ignore[method-assign]
            with pytest.raises(Superseded):
                await first.run((), LetterFilter())
            assert first.report == Report()

    asyncio.run(two())

    assert queued(app) == dict.fromkeys(task_ids, 1)


@needs_batches
def test_a_full_stream_ends_the_replay_and_the_letters_stay(
    shared_nats_server: NatsServer, namespace: str
) -> None:
    with application(shared_nats_server.broker_url, namespace, stream_max_bytes=20_000) as app:
        bury(app, 50)

        with pytest.raises(PublishRejected, match="maximum bytes exceeded"):
            replay_all(app)

        assert len(letters(app)) + queued(app).total() == 50


def test_killed_after_a_claim_the_task_runs_once_while_the_server_remembers(
    shared_nats_server: NatsServer, namespace: str
) -> None:
    with application(shared_nats_server.broker_url, namespace) as app:
        without_batches(app)
        task_ids = bury(app, 30)
        killed(app, KilledBeforeDelete)  # claimed and published
        killed(app, KilledAfterClaim)  # perhaps claimed, not published
        published = len(stored_headers(app))

        report = replay_all(app)

        assert report == Report(replayed=30 - published, already=published)
        assert queued(app) == dict.fromkeys(task_ids, 1)
        assert leftovers(app) == []


def test_a_claim_the_server_no_longer_knows_about_leaves_the_letter_in_doubt(
    shared_nats_server: NatsServer, namespace: str
) -> None:
    with application(
        shared_nats_server.broker_url, namespace, dedup_window=0.5, publish_timeout=0.5
    ) as app:
        without_batches(app)
        task_ids = bury(app, 1)
        killed(app, KilledAfterClaim)
        time.sleep(0.5)  # the window

        report = replay_all(app)

        assert report == Report(in_doubt=["1"])
        assert queued(app) == {}
        assert len(letters(app)) == 1

        report = replay_all(app, in_doubt=True)

        assert report == Report(replayed=1)
        assert queued(app) == dict.fromkeys(task_ids, 1)
        assert leftovers(app) == []


REPLAY = """
import os, sys
import celery
from celery_ext.broker import run
from celery_ext.dlq import LetterFilter
from celery_ext.replay import Replay
app = celery.Celery(broker=os.environ["BROKER_URL"])
app.conf.broker_transport_options = {"namespace": sys.argv[1]}
report = run(app, lambda broker: Replay(broker).run((), LetterFilter()))
print(report.as_json())
"""


@pytest.mark.slow
@pytest.mark.requires_nats("2.12")
def test_ten_thousand_letters_with_a_command_killed_again_and_again_each_once(
    app: celery.Celery, namespace: str
) -> None:
    task_ids = bury(app, 10_000)

    def wait_for(process: subprocess.Popen[bytes], letters: int) -> None:
        eventually(lambda: remaining() < letters or process.poll() is not None, 60.0)

    def remaining() -> int:
        return run(app, lambda broker: DeadLetters(broker).counts()).get("celery", 0)

    left, kills = 10_000, 0
    while left:
        process = subprocess.Popen(
            [sys.executable, "-c", REPLAY, namespace],
            env=python_env({"BROKER_URL": app.conf.broker_url}),
            stdout=subprocess.PIPE,
        )
        try:
            # Killed at any step: what it has done by then is never the same.
            wait_for(process, left - 1000)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        finally:
            process.kill()
            process.communicate()
        left = remaining()

    assert kills >= 3
    assert queued(app) == dict.fromkeys(task_ids, 1)


#: What a foreign client may have written, and no command may stumble over.
ODD = {
    "no headers": {"headers": None},
    "a count that is text": {
        "headers": {"task": "shop.pay", "id": "odd", "jetstream_replayed": "x"}
    },
    "a count that is a list": {
        "headers": {"task": "shop.pay", "id": "odd", "jetstream_replayed": [1]}
    },
    "year 1": {
        "headers": {"task": "shop.pay", "id": "odd", "expires": "0001-01-01T00:00:00+14:00"}
    },
    "year 1 without an offset": {
        "headers": {"task": "shop.pay", "id": "odd", "expires": "0001-01-01T00:00:00"}
    },
}


@pytest.mark.parametrize("fields", ODD.values(), ids=ODD)
def test_an_odd_letter_keeps_no_other_from_its_queue(
    app: celery.Celery, fields: dict[str, Any]
) -> None:
    bury(app, 1)
    odd = {**message_of("shop.pay", "odd", "celery"), **fields}
    bury(app, 1, first=1, payload=json.dumps(odd).encode())
    bury(app, 1, first=2)

    report = replay_all(app)

    assert report.replayed == 3
    assert report.failed == []
    assert letters(app) == []


def test_a_letter_that_cannot_be_made_ready_is_reported_and_the_others_go(
    app: celery.Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    bury(app, 3)
    prepare = Replay._prepare

    def fails_for_the_second(self: Replay, letter: Any) -> Any:
        if letter.record.task_id == "task-1":
            raise ZeroDivisionError("what nobody thought of")
        return prepare(self, letter)

    monkeypatch.setattr(Replay, "_prepare", fails_for_the_second)

    report = replay_all(app)

    assert report.replayed == 2
    assert [reason for _, reason in report.failed] == ["ZeroDivisionError: what nobody thought of"]
    assert [letter.record.task_id for letter in letters(app)] == ["task-1"]


def test_the_oldest_go_first_where_there_is_a_limit(app: celery.Celery) -> None:
    bury(app, 5)

    report = run(app, lambda broker: Replay(broker).run(which=LetterFilter(), limit=2))

    assert report.replayed == 2
    assert queued(app) == {"task-0": 1, "task-1": 1}
    assert [letter.record.task_id for letter in letters(app)] == ["task-4", "task-3", "task-2"]
