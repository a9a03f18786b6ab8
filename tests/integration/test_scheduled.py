from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import celery
import pytest

from celery_ext.broker import Broker, run
from celery_ext.scheduled import Scheduled, ScheduledFilter, ScheduledTask
from kombu_jetstream.server import NatsServer
from tests.letters import application, queued
from tests.servers import eventually

pytestmark = pytest.mark.requires_nats("2.12")


@pytest.fixture
def app(shared_nats_server: NatsServer, namespace: str) -> Iterator[celery.Celery]:
    with application(shared_nats_server.broker_url, namespace, queues=("celery", "a b.c")) as app:
        yield app


def send(app: celery.Celery, task: str = "shop.pay", **options: Any) -> str:
    return str(app.send_task(task, **{"countdown": 600, **options}).id)


def scheduled(app: celery.Celery, limit: int | None = None, **which: Any) -> list[ScheduledTask]:
    return run(app, lambda broker: Scheduled(broker).next_due(ScheduledFilter(**which), limit))


def cancel(app: celery.Celery, task_id: str) -> int:
    return run(app, lambda broker: Scheduled(broker).cancel(task_id))


def test_waiting_tasks_are_listed_with_their_due_time(app: celery.Celery) -> None:
    eta = datetime.now(timezone.utc) + timedelta(hours=2)
    before = time.time()

    task_id = send(app, "mail.send", countdown=None, eta=eta, queue="a b.c", priority=9)

    (waiting,) = scheduled(app)
    assert waiting.as_json() == {
        "task": "mail.send",
        "task_id": task_id,
        "queue": "a b.c",
        "level": "high",
        "due_at": pytest.approx(eta.timestamp(), abs=0.001),
        "published_at": pytest.approx(before, abs=30),
    }


def test_what_is_due_first_is_listed_first_across_levels(app: celery.Celery) -> None:
    for countdown, priority in [(300, 9), (100, 1), (200, 5), (400, 0)]:
        send(app, f"t{countdown}", countdown=countdown, priority=priority)

    assert [waiting.task for waiting in scheduled(app)] == ["t100", "t200", "t300", "t400"]
    assert [waiting.task for waiting in scheduled(app, limit=2)] == ["t100", "t200"]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ({"queue": "a b.c"}, ["mail.send"]),
        ({"queue": "a"}, []),
        ({"task": "shop.*"}, ["shop.pay"]),
        ({"before": 900}, ["shop.pay"]),
    ],
    ids=["queue", "other queue", "task", "before"],
)
def test_filters_choose_tasks(
    app: celery.Celery, which: dict[str, Any], expected: list[str]
) -> None:
    send(app, "shop.pay", countdown=600)
    send(app, "mail.send", countdown=1200, queue="a b.c")
    if "before" in which:
        which = {"before": time.time() + which["before"]}

    assert [waiting.task for waiting in scheduled(app, **which)] == expected


def test_a_cancelled_task_never_arrives_and_the_others_do(app: celery.Celery) -> None:
    cancelled = send(app, countdown=2)
    kept = send(app, countdown=2)

    assert cancel(app, cancelled) == 1

    assert [waiting.task_id for waiting in scheduled(app)] == [kept]
    assert eventually(lambda: queued(app), 10.0) == {kept: 1}
    assert queued(app) == {}


@pytest.mark.parametrize("task_id", ["no-such-task", "*", ">", "a.b", ""])
def test_cancelling_what_is_not_there_removes_nothing(app: celery.Celery, task_id: str) -> None:
    send(app)

    assert cancel(app, task_id) == 0
    assert len(scheduled(app)) == 1


def test_a_task_id_of_the_users_own_making_can_be_cancelled(app: celery.Celery) -> None:
    send(app, task_id="invoice.17 *>/é")

    assert [waiting.task_id for waiting in scheduled(app)] == ["invoice.17 *>/é"]
    assert cancel(app, "invoice.17 *>/é") == 1
    assert scheduled(app) == []


def test_all_tasks_of_a_queue_are_cancelled_at_once(app: celery.Celery) -> None:
    send(app)
    for priority in (9, 5, 1):
        send(app, queue="a b.c", priority=priority)

    assert run(app, lambda broker: Scheduled(broker).cancel_queue("a b.c")) == 3
    assert [waiting.queue for waiting in scheduled(app)] == ["celery"]


def test_a_namespace_that_does_not_exist_has_nothing_waiting(
    shared_nats_server: NatsServer,
) -> None:
    app = celery.Celery(broker=f"{shared_nats_server.broker_url}/nowhere", set_as_current=False)

    assert scheduled(app) == []
    assert cancel(app, "x") == 0


@pytest.mark.slow
def test_twenty_thousand_waiting_tasks_are_listed_and_one_is_cancelled(
    app: celery.Celery,
) -> None:
    async def fill(broker: Broker) -> None:
        names = broker.names
        for number in range(20_000):
            headers = {
                "Nats-Schedule": f"@at 2099-01-01T00:00:{59 - number % 60:02d}Z",
                "Nats-Schedule-Target": names.subject("medium", "celery"),
                "Celery-Task": f"t{number}",
            }
            subject = names.delay_subject("medium", "celery", f"id-{number}", f"m-{number}")
            await broker.client.publish(subject, b"x" * 300, headers=headers)
            if number % 500 == 499:
                await broker.client.flush()

    run(app, fill)
    eventually(lambda: len(scheduled(app)) == 20_000, 30.0)

    assert cancel(app, "id-12345") == 1

    assert len(scheduled(app)) == 19_999
    assert [waiting.task for waiting in scheduled(app, limit=2)] == ["t59", "t119"]
