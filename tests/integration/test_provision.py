from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import celery
import pytest
from kombu import Exchange, Queue
from kombu.common import Broadcast

from celery_ext.broker import Broker, run
from celery_ext.provision import Change, apply, declared, plan
from kombu_jetstream.server import NatsServer
from tests.letters import queued

pytestmark = pytest.mark.nats29


@pytest.fixture
def app(shared_nats_server: NatsServer, namespace: str) -> Iterator[celery.Celery]:
    app = celery.Celery(broker=shared_nats_server.broker_url, set_as_current=False)
    app.conf.broker_transport_options = {"namespace": namespace}
    yield app
    app.pool.force_close_all()
    app.close()


def planned(app: celery.Celery, *queues: str) -> list[Change]:
    needed = declared(app, queues or None)
    return run(app, lambda broker: plan(broker, needed))


def provision(app: celery.Celery, *queues: str) -> list[Change]:
    needed = declared(app, queues or None)

    async def work(broker: Broker) -> list[Change]:
        return await apply(broker, await plan(broker, needed))

    return run(app, work)


def ask(app: celery.Celery, operation: str, body: Any = None) -> dict[str, Any]:
    return run(app, lambda broker: broker.api(operation, body))


def with_options(app: celery.Celery, **options: Any) -> None:
    """Change the transport options; the kombu connections made before keep theirs."""
    app.pool.force_close_all()
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, **options}


def test_planning_changes_nothing_and_applying_leaves_nothing_to_plan(app: celery.Celery) -> None:
    first = planned(app)
    assert planned(app) == first
    assert {change.action for change in first} == {"create"}

    assert provision(app) == first

    assert planned(app) == []
    assert provision(app) == []


def test_a_program_that_may_make_nothing_works_on_what_was_provisioned(
    app: celery.Celery,
) -> None:
    provision(app, "celery", "a b.c")
    with_options(app, provision="verify")

    task_ids = {app.send_task("shop.pay", queue=name).id for name in ("celery", "a b.c")}

    assert set(queued(app, "celery", "a b.c")) == task_ids
    assert planned(app, "celery", "a b.c") == []


def test_what_a_worker_made_needs_no_provisioning(app: celery.Celery) -> None:
    with app.connection_for_write() as connection:
        for queue in app.amqp.queues.values():
            queue(connection.default_channel).declare()
        channel = connection.default_channel
        for exchange in (app.control.mailbox.exchange, app.control.mailbox.reply_exchange):
            exchange(channel).declare()
        Exchange("celeryev", "topic")(channel).declare()

    assert planned(app) == []


def test_bindings_and_arguments_are_those_of_the_configuration(app: celery.Celery) -> None:
    news = Exchange("news", "topic")
    app.conf.task_queues = [
        Queue("mail", news, routing_key="mail.#", message_ttl=60.0),
        Queue("all", news, bindings=[], routing_key="#"),
        Broadcast("everybody"),
    ]

    provision(app)

    needed = declared(app)
    assert set(needed.queues) == {"mail", "all"}
    assert needed.queues["mail"].arguments == {"x-message-ttl": 60000}
    with_options(app, provision="off")
    app.send_task("shop.pay", exchange="news", routing_key="mail.new", exchange_type="topic")
    assert queued(app, "mail").total() == 1
    assert queued(app, "all").total() == 1


def test_changed_options_are_shown_and_applied(app: celery.Celery) -> None:
    provision(app)
    with_options(app, dead_letter_max_age=86400.0, visibility_timeout=90.0)

    changes = planned(app)

    assert [(change.action, change.what.rpartition("_")[2]) for change in changes] == [
        ("update", "dlq'"),
        ("update", "high'"),
        ("update", "medium'"),
        ("update", "low'"),
    ]
    assert changes[0].as_json()["differences"] == [
        {"field": "max_age", "found": 1209600.0, "expected": 86400.0}
    ]
    json.dumps([change.as_json() for change in changes])
    provision(app)
    assert planned(app) == []


def test_what_an_operator_added_to_a_stream_or_consumer_survives(
    app: celery.Celery, namespace: str
) -> None:
    provision(app)
    config = ask(app, f"STREAM.INFO.{namespace}_dlq")["config"]
    described = {**config, "description": "of the shop", "max_msgs": 5000}
    ask(app, f"STREAM.UPDATE.{namespace}_dlq", described)
    with_options(app, dead_letter_max_age=86400.0)

    provision(app)

    config = ask(app, f"STREAM.INFO.{namespace}_dlq")["config"]
    assert config["description"] == "of the shop"
    assert config["max_msgs"] == 5000
    assert config["max_age"] == 86400 * 10**9


@pytest.mark.requires_nats("2.11")
def test_a_pause_survives_a_change(app: celery.Celery, namespace: str) -> None:
    provision(app)
    consumer = f"{namespace}_medium.celery"
    ask(app, f"CONSUMER.PAUSE.{consumer}", {"pause_until": "2099-01-01T00:00:00Z"})
    with_options(app, visibility_timeout=90.0)

    provision(app)

    info = ask(app, f"CONSUMER.INFO.{consumer}")
    assert info["paused"]
    assert info["config"]["ack_wait"] == 90 * 10**9


def test_a_limit_that_is_set_later_makes_a_full_stream_refuse(
    app: celery.Celery, namespace: str
) -> None:
    with_options(app, stream_max_bytes=1_000_000)
    provision(app)
    config = ask(app, f"STREAM.INFO.{namespace}_medium")["config"]

    assert (config["max_bytes"], config["discard"]) == (1_000_000, "new")


def test_storage_cannot_be_changed_and_the_rest_is(app: celery.Celery) -> None:
    provision(app)
    with_options(app, stream_storage="memory", visibility_timeout=90.0)

    changes = planned(app)
    impossible = [change for change in changes if change.action == "impossible"]

    assert len(impossible) == 5
    assert len(provision(app)) == len(changes) - 5
    assert planned(app) == impossible


def test_an_exchange_of_another_type_is_not_overwritten(app: celery.Celery) -> None:
    app.conf.task_queues = [Queue("mail", Exchange("news", "topic"), routing_key="mail.#")]
    provision(app)
    app.amqp.queues.clear()
    app.amqp.queues.add(Queue("mail", Exchange("news", "fanout")))

    changes = planned(app)

    (exchange,) = (change for change in changes if change.what == "exchange 'news'")
    assert exchange.action == "impossible"
