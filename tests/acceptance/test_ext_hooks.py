"""What the hooks add to workers and producers, and that without them nothing is different."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import celery
import pytest
from celery import Celery, chain, chord
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

import celery_ext
from celery_ext.broker import run
from celery_ext.dlq import LetterFilter
from celery_ext.replay import Replay
from kombu_jetstream.server import NatsServer
from tests.acceptance.ext_app import SETTINGS, make_ext_app
from tests.acceptance.letters import Letterbox
from tests.acceptance.sites import Site, run_celery
from tests.servers import api_request, eventually

pytestmark = pytest.mark.nats29

APP = "tests.acceptance.ext_app"

celery_version = tuple(map(int, celery.__version__.split(".")[:2]))


@pytest.fixture
def site(shared_nats_server: NatsServer, namespace: str, make_site: Callable[..., Site]) -> Site:
    """A namespace of this test alone."""
    return make_site(
        f"{shared_nats_server.broker_url}/{namespace}", namespace, make_app=make_ext_app
    )


@pytest.fixture
def letters(shared_nats_server: NatsServer, namespace: str) -> Letterbox:
    return Letterbox(shared_nats_server, namespace)


def send(site: Site, name: str, *args: Any, **options: Any) -> Any:
    return site.client.tasks[name].apply_async(args, **options)


# Replay


def test_a_dead_letter_is_the_message_byte_for_byte(site: Site, letters: Letterbox) -> None:
    """Whatever the task did to its arguments, and with its chain, chord and callbacks."""
    tasks = site.client.tasks
    changing, add, total = tasks["changes_its_arguments"], tasks["add"], tasks["total"]
    changing.apply_async(
        ([1, 2],), {"options": {}}, headers={"tenant": "ours"}, link=add.si(1, 2), priority=9
    )
    chain(changing.s([3], options={}), add.s(1)).apply_async()
    chord([changing.s([4], options={})], total.s()).apply_async()
    published = {
        each.headers["Celery-Task-Id"]: each.payload
        for level in ("high", "medium")
        for each in letters.stored(level)
        if each.headers["Celery-Task"] == "changes_its_arguments"
    }
    assert len(published) == 3

    with site.worker(pool="solo", app=APP):
        for task_id in published:
            letters.wait_for(task_id)

    assert {task_id: letters.of(task_id)[0][1] for task_id in published} == published


def test_a_replayed_task_is_the_same_and_its_chain_goes_on(
    site: Site, letters: Letterbox, folder: Path
) -> None:
    mend, add = site.client.tasks["mend"], site.client.tasks["add"]
    mended = folder / "mended"

    with site.worker(app=APP):
        last = chain(mend.s(str(mended), 5), add.s(2)).apply_async()
        first_id = last.parent.id
        assert letters.wait_for(first_id).reason == "unrecoverable_error"
        mended.touch()
        report = run(site.client, lambda broker: Replay(broker).run((), LetterFilter()))

        assert report.replayed == 1
        # Celery had failed the whole chain, so the stored result changes.
        eventually(lambda: site.client.AsyncResult(last.id).result == 7, 20, every=0.1)
        assert site.client.AsyncResult(first_id).result == 5
        assert site.ledger.starts()[first_id] == 2
        assert letters.of(first_id) == []


def test_a_replayed_task_that_fails_again_says_so(site: Site, letters: Letterbox) -> None:
    with site.worker(app=APP):
        result = send(site, "flaky", 99)
        letters.wait_for(result.id)
        run(site.client, lambda broker: Replay(broker).run((), LetterFilter()))

        eventually(lambda: site.ledger.starts()[result.id] == 6, 20)
        letter = letters.wait_for(result.id)
        assert (letter.attempts, letter.replayed) == (3, 1)


# Outages


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_task_that_fails_while_the_broker_is_away_becomes_a_dead_letter(
    nats_server: NatsServer, make_site: Callable[..., Site], pool: str
) -> None:
    """The task acknowledged early: the dead letter is all there is."""
    site = make_site(f"{nats_server.broker_url}/out", pool, make_app=make_ext_app)
    letters = Letterbox(nats_server, "out")

    with site.worker(pool=pool, app=APP) as worker:
        result = send(site, "sleep_and_fail", 2)
        site.wait_started([result.id], within=10)
        nats_server.kill()
        if pool == "threads":  # others hear of the failure when they are connected again
            worker.wait_log("could not be stored, trying later", within=30)
        else:
            eventually(lambda: "KeyError" in site.story_of(result.id), 15)
        nats_server.start()

        assert letters.wait_for(result.id, within=45).error == "KeyError"
        assert len(letters.of(result.id)) == 1


@pytest.mark.slow
def test_a_late_message_whose_dead_letter_cannot_be_stored_comes_back(
    site: Site, letters: Letterbox, shared_nats_server: NatsServer
) -> None:
    """A stream that refuses everything, as a full one does, and later does not."""
    with site.worker(app=APP) as worker:
        api(shared_nats_server, f"STREAM.UPDATE.{letters.namespace}_dlq", max_msg_size=1)
        result = send(site, "once_late")
        worker.wait_log("could not be stored, trying later", within=20)
        assert letters.of(result.id) == []
        api(shared_nats_server, f"STREAM.UPDATE.{letters.namespace}_dlq", max_msg_size=-1)

        letter = letters.wait_for(result.id, within=30)

    assert letter.error == "KeyError"
    assert site.ledger.starts()[result.id] == 2


def api(server: NatsServer, operation: str, **changes: Any) -> None:
    """Change fields of a stream's configuration."""
    name = operation.rpartition(".")[2]
    config = api_request(server.url, f"STREAM.INFO.{name}")["config"]
    answer = api_request(server.url, operation, {**config, **changes})
    assert "error" not in answer, answer


# Workers among themselves


def test_workers_find_each_other(site: Site) -> None:
    first = site.worker(
        "first", mingle=True, app=APP, loglevel="DEBUG", config={"worker_send_task_events": True}
    )
    second = site.worker("second", mingle=True, app=APP)

    with first, second:
        second.wait_log("mingle: sync with 1 nodes")
        second.wait_log("mingle: sync complete")
        first.wait_log("second@test joined the party", within=20)
        second.warm_shutdown()
        first.wait_log("second@test left", within=20)


def test_a_task_revoked_before_a_worker_starts_is_revoked_there_too(site: Site) -> None:
    """What mingle is for."""
    with site.worker("first", mingle=True, app=APP, queues="elsewhere"):
        result = send(site, "noop")
        site.client.control.revoke(result.id)
        eventually(lambda: result.id in str(site.client.control.inspect(timeout=2).revoked()), 10)
        with site.worker("second", mingle=True, app=APP) as second:
            second.wait_log("Discarding revoked task: noop")

    assert site.ledger.starts()[result.id] == 0


@pytest.mark.requires_nats("2.12")
def test_inspect_scheduled_lists_what_waits_in_the_broker(site: Site) -> None:
    with site.worker(app=APP):
        later = send(site, "add", 1, 2, countdown=3600)
        sooner = send(site, "add", 3, 4, countdown=1800, priority=9)
        send(site, "add", 5, 6, countdown=60, queue="elsewhere")

        (answer,) = site.client.control.inspect(timeout=5, limit=1).scheduled().values()

    assert [each["request"]["id"] for each in answer] == [sooner.id, later.id]
    assert answer[0]["eta"] < answer[1]["eta"]
    assert answer[0]["request"]["name"] == "add"
    assert answer[0]["request"]["args"] == "(3, 4)"
    assert answer[0]["request"]["delivery_info"]["priority"] == 9


# Producers


def levels_of(letters: Letterbox, task_ids: list[str]) -> dict[str, str]:
    """Level by task id of what waits in the streams."""
    return {
        each.headers["Celery-Task-Id"]: level
        for level in ("high", "medium", "low")
        for each in letters.stored(level)
        if each.headers["Celery-Task-Id"] in task_ids
    }


def test_tasks_wait_in_the_stream_of_their_level(site: Site, letters: Letterbox) -> None:
    first = send(site, "urgent")  # the first publish of a producer, before any connection
    low = site.client.send_task("idle.dreams", queue="celery")
    plain = send(site, "noop")
    explicit = send(site, "urgent", priority=2)
    default = send(site, "urgent", priority=0)

    found = levels_of(letters, [each.id for each in (first, low, plain, explicit, default)])

    assert found == {
        first.id: "high",
        low.id: "low",
        plain.id: "medium",
        explicit.id: "low",
        default.id: "medium",
    }


def test_beat_publishes_to_the_level_of_a_task(site: Site, letters: Letterbox) -> None:
    schedule = {"often": {"task": "urgent", "schedule": 0.5, "options": {"queue": "unread"}}}
    worker = site.worker(
        app=APP,
        args=["-B", "-s", str(site.folder / "schedule")],
        config={"beat_schedule": schedule},
    )

    with worker:
        found = eventually(
            lambda: [each.subject for each in letters.stored("high") if "unread" in each.subject],
            20,
        )

    assert found[0] == f"{letters.namespace}.high.unread"


# Without the hooks


def test_without_policies_the_bytes_on_the_wire_are_those_of_the_transport_alone(
    site: Site, letters: Letterbox
) -> None:
    with site.new_client(jetstream_retry=None, jetstream_priorities=None) as app:
        publish_all_kinds(app)
        app.conf.update(SETTINGS, jetstream_hooks=False)
        celery_ext.install(app)
        publish_all_kinds(app)
        app.conf.jetstream_hooks = True
        celery_ext.uninstall(app)
        publish_all_kinds(app)

    stored = [
        (each.subject, without_ids(each.payload), sorted(each.headers.items() - ids(each.headers)))
        for level in ("high", "medium", "low")
        for each in letters.stored(level)
    ]
    assert len(stored) == 9
    for one in stored:
        assert stored.count(one) == 3, one


def publish_all_kinds(app: Celery) -> None:
    chain(
        app.tasks["urgent"].s().set(task_id="one", root_id="root"),
        app.tasks["add"].s(1).set(task_id="two"),
    ).apply_async()
    app.tasks["urgent"].apply_async(task_id="three", priority=0, headers={"a": "b"})
    app.send_task("idle.dreams", ({"x": 1},), task_id="four", queue="celery", priority=3)


def ids(headers: dict[str, str]) -> set[tuple[str, str]]:
    return {(name, value) for name, value in headers.items() if name == "Nats-Msg-Id"}


def without_ids(payload: bytes) -> str:
    """The envelope without what differs between any two publishes."""
    envelope = json.loads(payload)
    del envelope["properties"]["delivery_tag"]
    return json.dumps(envelope)


def test_a_worker_with_the_hooks_off_is_celerys_own(site: Site, letters: Letterbox) -> None:
    with site.worker(app=APP, mingle=True, config={"jetstream_hooks": False}) as worker:
        failing = [send(site, "flaky", 1), send(site, "once_late"), send(site, "burying")]
        refused = send(site, "burying_late")
        for result in failing:
            with pytest.raises(Exception):  # noqa: B017, PT011
                result.get(timeout=20, interval=0.05)

        assert letters.wait_for(refused.id).reason == "rejected"  # the transport's
        assert [len(letters.of(result.id)) for result in failing] == [0, 0, 0]
        assert [site.ledger.starts()[result.id] for result in failing] == [1, 1, 1]
        assert "mingle" not in worker.log
        inspected = site.client.control.inspect(timeout=5, limit=1)._request("jetstream_stats")
        assert list(inspected.values()) == [
            {"error": "the hooks of celery_ext are off in this worker"}
        ]


def test_a_worker_with_bad_settings_does_not_start(site: Site) -> None:
    worker = site.worker(app=APP, config={"jetstream_retry": {"max_atempts": 5}})

    worker.start()
    assert worker.process is not None

    assert worker.process.wait(30) == 1
    assert (
        "error: unknown key 'max_atempts' in jetstream_retry, did you mean 'max_attempts'?"
        in worker.log
    )
    assert "Traceback" not in worker.log


# Tracing


def test_the_trace_of_the_publisher_goes_on_in_the_task(site: Site, letters: Letterbox) -> None:
    trace_id = 0x0AF7651916CD43DD8448EB211C80319C
    span = SpanContext(trace_id, 0xB7AD6B7169203331, is_remote=False, trace_flags=TraceFlags(1))

    with trace.use_span(NonRecordingSpan(span)):
        traced = send(site, "trace_of")
        waiting = send(site, "noop", queue="unread")
    untraced = send(site, "trace_of")

    (stored,) = [
        each for each in letters.stored("medium") if each.headers["Celery-Task-Id"] == waiting.id
    ]
    assert stored.headers["traceparent"] == f"00-{trace_id:032x}-b7ad6b7169203331-01"
    with site.worker(app=APP, concurrency=1):
        assert traced.get(timeout=20, interval=0.05) == f"{trace_id:032x}"
        assert untraced.get(timeout=20, interval=0.05) == "0" * 32


def test_the_command_line_knows_the_statistics(site: Site) -> None:
    with site.worker(app=APP):
        send(site, "noop").get(timeout=20, interval=0.05)

        done = run_celery(site.env(), "inspect", "jetstream_stats", "--json", app=APP)

    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout.splitlines()[-1]).values()
    assert answer["tasks"]["noop"]["celery"]["succeeded"] == 1


@pytest.mark.skipif(celery_version < (5, 7), reason="Celery 5.7 can spawn the pool's processes")
def test_processes_that_are_spawned_have_the_policy_too(site: Site, letters: Letterbox) -> None:
    with site.worker(app=APP, config={"worker_pool_start_method": "spawn"}, concurrency=1):
        mended, failing = send(site, "flaky", 2), send(site, "bad_card")

        assert mended.get(timeout=40, interval=0.05) == 1
        assert letters.wait_for(failing.id).reason == "unrecoverable_error"
