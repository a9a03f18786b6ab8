from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import celery
import pytest

from celery_ext.broker import Broker, run
from celery_ext.dlq import DeadLetters, Letter, LetterFilter, LetterMissing
from kombu_jetstream.server import NatsServer
from tests.letters import LONG_AGO, application, bury, letters
from tests.servers import run_python

pytestmark = pytest.mark.nats29

#: A moment a little ago, when the letters of these tests died.
NOW = time.time() - 60.0


@pytest.fixture
def app(shared_nats_server: NatsServer, namespace: str) -> Iterator[celery.Celery]:
    with application(
        shared_nats_server.broker_url, namespace, queues=("celery", "a b.c", "other")
    ) as app:
        yield app


def test_letters_are_listed_newest_first_with_what_they_record(app: celery.Celery) -> None:
    bury(app, 3)

    found = letters(app)

    assert [letter.record.task_id for letter in found] == ["task-2", "task-1", "task-0"]
    newest = found[0].as_json()
    assert newest.pop("died_at") > LONG_AGO
    assert newest == {
        "id": "3",
        "reason": "task_failed",
        "task": "shop.pay",
        "task_id": "task-2",
        "queue": "celery",
        "error": "ValueError",
        "message": "no such card",
        "attempts": 4,
        "worker": "worker@test",
        "published_at": LONG_AGO + 2,
        "replayed": 0,
    }


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ({}, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ({"queue": "a b.c"}, [9, 7, 5, 3, 1]),
        ({"queue": "a b"}, []),
        ({"task": "shop.*"}, [9, 6, 3, 0]),
        ({"task": "shop"}, []),
        ({"error": "BadCard"}, [8, 4, 0]),
        ({"error": "shop.errors.BadCard"}, [8, 4, 0]),
        ({"error": "adCard"}, []),
        ({"reason": "rejected"}, [5]),
        ({"since": NOW + 7}, [9, 8, 7]),
        ({"queue": "celery", "task": "shop.*", "error": "BadCard"}, [0]),
    ],
    ids=lambda value: "-".join(value) or "all" if isinstance(value, dict) else "",
)
def test_filters_choose_letters(
    app: celery.Celery, which: dict[str, Any], expected: list[int]
) -> None:
    bury(
        app,
        10,
        queue=lambda n: "a b.c" if n % 2 else "celery",
        task=lambda n: "mail.send" if n % 3 else "shop.pay",
        error=lambda n: "ValueError" if n % 4 else "shop.errors.BadCard",
        reason=lambda n: "rejected" if n == 5 else "task_failed",
        died_at=lambda n: NOW + n,
    )

    assert [letter.record.task_id for letter in letters(app, **which)] == [
        f"task-{number}" for number in expected
    ]


def test_pages_and_limits_join_without_gap_or_repeat(app: celery.Celery) -> None:
    bury(app, 2500)
    delete(app, [str(number) for number in range(100, 2300)])

    async def read(broker: Broker) -> list[list[Letter]]:
        store = DeadLetters(broker)
        pages: list[list[Letter]] = []
        before = None
        while True:
            page = [letter async for letter in store.newest(limit=70, before=before)]
            if not page:
                return pages
            pages.append(page)
            before = page[-1].id

    pages = run(app, read)

    expected = [*range(2500, 2299, -1), *range(99, 0, -1)]
    assert [letter.seq for page in pages for letter in page] == expected
    assert [len(page) for page in pages] == [70, 70, 70, 70, 20]


def test_a_letter_is_shown_with_its_original_message(app: celery.Celery) -> None:
    bury(app, level="high")

    shown = get(app, "1").details()

    assert shown["level"] == "high"
    assert shown["traceback"] == "Traceback …\nValueError: no such card\n"
    assert shown["original"]["headers"]["id"] == "task-0"
    assert shown["original"]["body"].startswith("[[1]")


def test_a_payload_that_is_no_message_is_shown_as_text(app: celery.Celery) -> None:
    bury(app, reason="malformed", payload=b"\xff{", task=None, task_id=None)

    assert get(app, "1").details()["original"] == "\\xff{"


@pytest.mark.parametrize("letter_id", ["2", "x", "", "-1", "1.5", "9" * 30])
def test_a_letter_that_is_not_there_is_an_error_with_its_id(
    app: celery.Celery, letter_id: str
) -> None:
    bury(app)

    with pytest.raises(LetterMissing) as caught:
        get(app, letter_id)

    assert str(caught.value) == f"no dead letter {letter_id!r}"


def test_letters_are_deleted_by_id_by_filter_and_all_at_once(app: celery.Celery) -> None:
    bury(app, 20, queue=lambda n: "other" if n % 4 == 0 else "celery")

    async def work(broker: Broker) -> list[int]:
        store = DeadLetters(broker)
        by_id = await store.delete(["2", "3", "3", "77"])
        matching = await store.delete_matching(LetterFilter(queue="other"))
        of_queue = await store.purge("other")
        return [by_id, matching, of_queue, await store.purge()]

    assert run(app, work) == [2, 5, 0, 13]
    assert letters(app) == []


def test_purging_one_queue_leaves_the_others(app: celery.Celery) -> None:
    bury(app, 6, queue=lambda n: "a b.c" if n % 2 else "celery")

    assert run(app, lambda broker: DeadLetters(broker).purge("a b.c")) == 3
    assert {letter.record.queue for letter in letters(app)} == {"celery"}


def test_stats_group_by_queue_reason_error_and_task(app: celery.Celery) -> None:
    bury(app, 6, task=lambda n: f"t{n % 2}", died_at=lambda n: LONG_AGO + n)
    bury(app, 2, first=6, error=None, task=None, queue="other", reason="malformed")

    stats = run(app, lambda broker: DeadLetters(broker).stats()).as_json()

    assert stats.pop("bytes") > 1000
    assert stats.pop("newest_at") > LONG_AGO + 100
    assert stats == {
        "count": 8,
        "oldest_at": LONG_AGO,
        "queues": {"celery": 6, "other": 2},
        "reasons": {"task_failed": 6, "malformed": 2},
        "errors": {"ValueError": 6, "": 2},
        "tasks": {"t0": 3, "t1": 3, "": 2},
    }


def test_counts_and_age_need_no_reading(app: celery.Celery) -> None:
    async def work(broker: Broker) -> list[Any]:
        store = DeadLetters(broker)
        return [await store.counts(), await store.oldest_at(), await store.count_since(LONG_AGO)]

    assert run(app, work) == [{}, None, 0]
    bury(app, 5, queue=lambda n: "a b.c" if n % 2 else "celery")

    counts, oldest_at, since = run(app, work)

    assert counts == {"celery": 3, "a b.c": 2}
    assert oldest_at > LONG_AGO
    assert since == 5
    assert run(app, lambda broker: DeadLetters(broker).count_since(oldest_at + 3600)) == 0


def test_a_namespace_that_does_not_exist_has_no_letters(shared_nats_server: NatsServer) -> None:
    app = celery.Celery(broker=f"{shared_nats_server.broker_url}/nowhere", set_as_current=False)

    async def work(broker: Broker) -> list[Any]:
        store = DeadLetters(broker)
        return [
            [letter async for letter in store.newest()],
            await store.counts(),
            await store.oldest_at(),
            await store.count_since(0.0),
            (await store.stats()).count,
            await store.purge(),
            await store.find("1"),
        ]

    assert run(app, work) == [[], {}, None, 0, 0, 0, None]


@pytest.mark.slow
def test_a_hundred_thousand_letters_are_listed_and_grouped_in_bounded_memory(
    app: celery.Celery, namespace: str
) -> None:
    bury(
        app,
        100_000,
        error=lambda n: f"shop.errors.E{n % 10}",
        payload=b"x" * 500,
        traceback="y" * 200,
    )

    done = run_python(READ_ALL, args=[app.conf.broker_url, namespace])

    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["newest"] == [str(number) for number in range(100_000, 99_950, -1)]
    assert read["rare"] == []
    assert read["stats"]["count"] == 100_000
    assert read["stats"]["errors"] == {f"shop.errors.E{number}": 10_000 for number in range(10)}
    # All of them are 100 MB as bytes alone, and several times that as objects.
    assert read["grown_bytes"] < 40 * 1024 * 1024


#: Reads the letters of a namespace in a process of its own, whose memory is then known.
READ_ALL = """
import json, resource, sys
import celery
from celery_ext.broker import run
from celery_ext.dlq import DeadLetters, LetterFilter

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

async def work(broker):
    store = DeadLetters(broker)
    before = peak_bytes()
    newest = [letter.id async for letter in store.newest(limit=50)]
    rare = [letter.id async for letter in store.newest(LetterFilter(task="no.such"), limit=50)]
    stats = (await store.stats()).as_json()
    grown = peak_bytes() - before
    return {"newest": newest, "rare": rare, "stats": stats, "grown_bytes": grown}

app = celery.Celery(broker=sys.argv[1])
app.conf.broker_transport_options = {"namespace": sys.argv[2]}
print(json.dumps(run(app, work)))
"""


def test_reading_leaves_no_consumer_behind(app: celery.Celery) -> None:
    bury(app, 600)

    async def consumers(broker: Broker) -> Any:
        store = DeadLetters(broker)
        await store.stats()
        await store.count_since(0.0)
        assert len([letter async for letter in store.newest(limit=5)]) == 5
        return await consumer_count(broker, store)

    async def consumer_count(broker: Broker, store: DeadLetters) -> int:
        """Return how many there are soon: nobody waits until they are deleted."""
        deadline = time.monotonic() + 5
        while True:
            info = await broker.api(f"STREAM.INFO.{store.stream}")
            count: int = info["state"]["consumer_count"]
            if not count or time.monotonic() > deadline:
                return count
            await asyncio.sleep(0.01)

    assert run(app, consumers) == 0


def get(app: celery.Celery, letter_id: str) -> Letter:
    return run(app, lambda broker: DeadLetters(broker).get(letter_id))


def delete(app: celery.Celery, ids: list[str]) -> int:
    return run(app, lambda broker: DeadLetters(broker).delete(ids))
