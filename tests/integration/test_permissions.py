"""Real workers and producers under exactly what `celery jetstream permissions` prints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from kombu import Exchange, Queue

from celery_ext.broker import Broker, run
from celery_ext.dlq import DeadLetters
from celery_ext.doctor import diagnose
from celery_ext.permissions import as_nats_config, permissions
from celery_ext.provision import apply, declared, plan
from celery_ext.queues import statuses
from celery_ext.replay import Replay
from kombu_jetstream.errors import PermissionDenied
from kombu_jetstream.options import Options
from kombu_jetstream.server import NatsServer
from tests.acceptance.app import make_app
from tests.servers import CeleryWorker, eventually, file_backend_url, run_nats_server

QUEUES = ("celery", "a b.c")
#: What the server writes for every denial.
VIOLATION = " Violation - "


def config_of(folder: Path) -> dict[str, Any]:
    return {
        "broker_transport_options": {"namespace": "shop", "visibility_timeout": 5},
        "result_backend": file_backend_url(folder / "results"),
        "task_send_sent_event": True,
        "worker_send_task_events": True,
    }


def queues_of(app: celery.Celery) -> celery.Celery:
    app.conf.task_queues = [Queue(name, Exchange(name), routing_key=name) for name in QUEUES]
    return app


class Shop:
    """A server with one user per role, and the application that asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "results").mkdir()
        self.config = config_of(folder)
        app = self.app("nobody", "jetstream://127.0.0.1")
        options = Options.parse("jetstream://127.0.0.1/shop")
        needed = declared(app, QUEUES)
        blocks = {
            "producer": permissions("producer", options, needed),
            "controller": permissions("producer", options, needed, control=True),
            "worker": permissions("worker", options, needed),
            "operator": permissions("operator", options, needed),
        }
        users = "\n".join(
            f'{{user: {name}, password: "secret-{name}", {as_nats_config(block)} }}'
            for name, block in blocks.items()
        )
        self.server: NatsServer = run_nats_server(
            folder / "store", config=f"authorization {{ users: [\n{users}\n] }}"
        )

    def url(self, role: str) -> str:
        return f"jetstream://{role}:secret-{role}@127.0.0.1:{self.server.port}"

    def app(self, role: str, url: str | None = None, **options: Any) -> celery.Celery:
        config = json.loads(json.dumps(self.config))
        config["broker_transport_options"].update(options)
        broker_url = url if url is not None else self.url(role)
        return queues_of(make_app(**{"broker_url": broker_url, **config}))

    def worker(self) -> CeleryWorker:
        config = json.loads(json.dumps(self.config))
        config["broker_transport_options"]["provision"] = "off"
        del config["result_backend"]  # in the environment, as results=
        return CeleryWorker(
            self.folder,
            self.url("worker"),
            app="tests.integration.permitted_app",
            queues=",".join(QUEUES),
            results=self.folder / "results",
            config=config,
        )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    shop = Shop(tmp_path_factory.mktemp("shop folder"))

    async def provision(broker: Broker) -> None:
        await apply(broker, await plan(broker, declared(operator, QUEUES)))
        assert await plan(broker, declared(operator, QUEUES)) == []

    operator = shop.app("operator", provision="off")
    try:
        run(operator, provision)
        yield shop
    finally:
        shop.server.stop()


def test_a_producer_and_a_worker_do_all_their_work_without_one_violation(shop: Shop) -> None:
    app = shop.app("producer", provision="off")
    with shop.worker() as worker:
        done = {
            app.send_task("echo", ["now"]): "now",
            app.send_task("echo", ["named"], queue="a b.c"): "named",
            app.send_task("echo", ["urgent"], priority=9): "urgent",
            app.send_task("echo", ["low"], priority=1): "low",
            app.send_task("echo", ["later"], countdown=1.5): "later",
            app.send_task("retry_until", [3]): 3,
            app.send_task("nap_late", [8]): 8,
        }
        fanned = app.send_task("fan_out", ["noop", 3])
        failed = app.send_task("fail", queue="a b.c")

        for result, expected in done.items():
            assert result.get(timeout=30) == expected
        for task_id in fanned.get(timeout=30):
            assert app.AsyncResult(task_id).get(timeout=30) is None
        with pytest.raises(ValueError, match="as asked"):
            failed.get(timeout=30)
        operator = shop.app("operator", provision="off")
        letters = eventually(lambda: run(operator, _letters), 10.0)
        assert worker.warm_shutdown() == 0

    assert [(letter["task"], letter["queue"]) for letter in letters] == [("fail", "a b.c")]
    assert VIOLATION not in shop.server.log()
    assert "may not" not in worker.log


async def _letters(broker: Broker) -> list[dict[str, Any]]:
    return [letter.as_json() async for letter in DeadLetters(broker).newest()]


def test_a_controller_asks_and_stops_workers_and_a_producer_does_not(shop: Shop) -> None:
    controller, producer = shop.app("controller", provision="off"), shop.app("producer")
    with shop.worker() as worker:
        assert controller.control.inspect(timeout=2).ping() == {worker.hostname: {"ok": "pong"}}
        assert VIOLATION not in shop.server.log()

        task = controller.send_task("nap", [20])
        eventually(lambda: worker.ledger.starts("nap"), 10.0)
        controller.control.revoke(task.id, terminate=True)
        eventually(lambda: "Terminating" in worker.log, 10.0)

        producer.conf.broker_transport_options["provision"] = "off"
        producer.control.shutdown()
        eventually(lambda: VIOLATION in shop.server.log(), 10.0)
        time.sleep(0.5)
        assert worker.is_running


def test_an_operator_does_all_that_the_command_does_and_nothing_outside(shop: Shop) -> None:
    app = shop.app("operator", provision="off")
    before = shop.server.log().count(VIOLATION)

    async def work(broker: Broker) -> None:
        assert {queue.name for queue in await statuses(broker)} == set(QUEUES)
        await Replay(broker).run([letter["id"] for letter in await _letters(broker)])
        await DeadLetters(broker).purge()
        with pytest.raises(PermissionDenied):
            await broker.api("STREAM.CREATE.other", {"name": "other", "subjects": ["other.>"]})

    diagnosis = asyncio.run(diagnose(app))
    assert shop.server.log().count(VIOLATION) == before
    assert {finding.severity for finding in diagnosis.findings} <= {"ok", "warning"}
    run(app, work)
    with app.connection_for_write() as connection:
        connection.default_channel.queue_purge("celery")
    assert shop.server.log().count(VIOLATION) == before + 1  # the stream of another


@pytest.mark.parametrize("role", ["producer", "worker"])
def test_what_a_role_may_not_do_is_denied_by_name(shop: Shop, role: str) -> None:
    app = shop.app(role, provision="off")

    async def forbidden(broker: Broker) -> None:
        for operation in (
            "STREAM.INFO.shop_medium",
            "STREAM.DELETE.shop_medium",
            "STREAM.PURGE.shop_dlq",
            "CONSUMER.DELETE.shop_medium.celery",
            "STREAM.MSG.GET.shop_medium",
            "DIRECT.GET.shop_medium",
            "DIRECT.GET.shop_dlq",
        ):
            with pytest.raises(PermissionDenied) as caught:
                await broker.api(operation, {})
            assert caught.value.subject == f"$JS.API.{operation}"
        for subject in ("shop.registry.queue.x", "shop.medium.other", "shop.dlq.other"):
            with pytest.raises(PermissionDenied):
                await broker.publish(subject, b"{}", {})

    run(app, forbidden)


def test_a_domain_and_another_inbox_are_in_the_block() -> None:
    app = queues_of(make_app(broker_url="jetstream://127.0.0.1"))
    options = Options.parse(
        "jetstream://127.0.0.1/shop",
        {"jetstream_domain": "hub", "inbox_prefix": "_INBOX_w", "priority_levels": 1},
    )

    allowed = permissions("worker", options, declared(app, ["celery"]))

    assert allowed["publish"]["allow"] == [
        "$JS.hub.API.DIRECT.GET.shop_registry",
        "shop.medium.celery",
        "shop.medium.@delay.celery.>",
        "shop.dlq.celery",
        "$JS.hub.API.CONSUMER.MSG.NEXT.shop_medium.celery",
        "$JS.ACK.shop_medium.celery.>",
        "$JS.ACK.hub.*.shop_medium.celery.>",
        "shop.x.>",
        "shop.q.>",
    ]
    assert allowed["subscribe"]["allow"] == [
        "_INBOX_w.>",
        "shop.registry.>",
        "shop.x.>",
        "shop.q.>",
    ]
