from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import celery
import pytest
from kombu import Queue

from celery_ext import doctor
from celery_ext.broker import Broker, run
from celery_ext.dlq import LetterFilter
from celery_ext.doctor import Diagnosis, Finding, diagnose
from celery_ext.queues import pause
from celery_ext.replay import Replay
from kombu_jetstream.server import NatsServer
from tests.letters import application, bury
from tests.servers import NatsCluster, eventually, free_port, nats_server_version


@pytest.fixture
def app(nats_server: NatsServer) -> Iterator[celery.Celery]:
    with application(nats_server.broker_url, "shop") as app:
        yield app


def examine(app: celery.Celery) -> Diagnosis:
    return asyncio.run(diagnose(app))


def troubles(app: celery.Celery) -> list[tuple[str, str, str]]:
    """Check, severity and message of all that is not as it should be, but the server's age."""
    findings = examine(app).findings
    if nats_server_version() < (2, 12):
        findings = [finding for finding in findings if finding.check != "server"]
    for finding in findings:
        assert finding.severity == "ok" or finding.remedy, finding
    return [(f.check, f.severity, f.message) for f in findings if f.severity != "ok"]


def ask(app: celery.Celery, operation: str, body: Any = None) -> dict[str, Any]:
    return run(app, lambda broker: broker.api(operation, body))


@pytest.mark.requires_nats("2.12")
def test_a_healthy_broker_has_nothing_but_ok(app: celery.Celery) -> None:
    diagnosis = examine(app)

    assert {finding.severity for finding in diagnosis.findings} == {"ok"}
    assert [finding.check for finding in diagnosis.findings] == ["server", *doctor.CHECKS]
    assert diagnosis.healthy
    assert diagnosis.reachable


def test_an_old_server_is_told_with_what_it_lacks(app: celery.Celery) -> None:
    (found,) = (finding for finding in examine(app).findings if finding.check == "server")

    lacks_schedules = "tasks that wait in the server" in found.message
    lacks_ttl = "message TTL" in found.message
    assert lacks_schedules is (nats_server_version() < (2, 12))
    assert lacks_ttl is (nats_server_version() < (2, 11))
    assert found.severity == ("warning" if lacks_schedules else "ok")


def test_a_server_that_is_away_is_an_error_with_its_address() -> None:
    port = free_port()

    diagnosis = examine(celery.Celery(broker=f"jetstream://127.0.0.1:{port}", set_as_current=False))

    (finding,) = diagnosis.findings
    assert finding == Finding(
        "server",
        "error",
        f"no NATS server could be reached (127.0.0.1:{port}: Connection refused)",
        "start the server, or correct broker_url",
    )
    assert not diagnosis.reachable


def test_one_server_of_several_that_is_away_is_a_warning(nats_server: NatsServer) -> None:
    port = free_port()
    url = f"jetstream://127.0.0.1:{nats_server.port},127.0.0.1:{port}/shop"
    with application(url, "shop") as app:
        found = [trouble for trouble in troubles(app) if trouble[0] == "servers"]

    assert [severity for _, severity, _ in found] == ["warning"]
    assert f"127.0.0.1:{port}" in found[0][2]


def test_missing_streams_are_a_warning_or_an_error_by_who_makes_them(
    nats_server: NatsServer,
) -> None:
    app = celery.Celery(broker=nats_server.broker_url, set_as_current=False)

    for provision, severity in (("auto", "warning"), ("off", "error")):
        app.conf.broker_transport_options = {"provision": provision}
        (found,) = (trouble for trouble in troubles(app) if trouble[0] == "streams")
        exchanges = "4 exchanges, " if provision == "off" else ""
        expected = f"missing: 5 streams, 3 consumers, 1 queue, {exchanges}1 binding"
        assert found == ("streams", severity, expected)


def test_other_settings_of_a_stream_are_told_field_by_field(app: celery.Celery) -> None:
    config = ask(app, "STREAM.INFO.shop_dlq")["config"]
    ask(app, "STREAM.UPDATE.shop_dlq", {**config, "max_age": 3600 * 10**9})

    assert troubles(app) == [
        (
            "streams",
            "warning",
            "stream 'shop_dlq': max_age is 3600.0, the options want 1209600.0",
        )
    ]


def test_what_cannot_be_changed_is_an_error(nats_server: NatsServer) -> None:
    with application(nats_server.broker_url, "shop") as app:
        app.conf.broker_transport_options = {"namespace": "shop", "stream_storage": "memory"}

        found = troubles(app)

    assert len(found) == 5
    assert found[0] == (
        "streams",
        "error",
        "stream 'shop_high': storage is 'file', the options want 'memory'",
    )


def test_a_foreign_consumer_and_a_foreign_stream_are_found(app: celery.Celery) -> None:
    ask(
        app,
        "CONSUMER.CREATE.shop_medium.thief.shop.medium.other",
        {
            "stream_name": "shop_medium",
            "config": {
                "name": "thief",
                "durable_name": "thief",
                "filter_subject": "shop.medium.other",
                "ack_policy": "explicit",
            },
        },
    )
    ask(app, "STREAM.CREATE.copy", {"name": "copy", "subjects": ["shop.x.>"]})

    assert troubles(app) == [
        ("overlaps", "error", "stream 'copy' takes subjects below 'shop', too"),
        ("overlaps", "warning", "consumer 'thief' of stream 'shop_medium' belongs to no queue"),
    ]


def test_a_queue_nobody_consumes_is_found_with_its_age(app: celery.Celery) -> None:
    app.send_task("shop.pay")
    app.send_task("shop.pay")

    ((check, severity, message),) = troubles(app)

    assert (check, severity) == ("queues", "warning")
    assert message.startswith("nobody consumes queue 'celery': 2 messages wait, the oldest for ")


@pytest.mark.requires_nats("2.11")
def test_a_paused_queue_is_found(app: celery.Celery) -> None:
    app.send_task("shop.pay")
    run(app, lambda broker: pause(broker, "celery"))

    assert troubles(app) == [("queues", "warning", "queue 'celery' is paused until resumed")]


def test_a_queue_without_its_consumer_is_found(app: celery.Celery) -> None:
    ask(app, "CONSUMER.DELETE.shop_low.celery")

    assert ("queues", "error", "queue 'celery' has no consumer at level low") in troubles(app)


def test_messages_that_come_back_are_found(nats_server: NatsServer) -> None:
    with application(nats_server.broker_url, "shop") as app:
        app.send_task("shop.pay")
        with app.connection_for_read() as connection:
            channel = connection.default_channel
            channel.basic_get("celery").reject(requeue=True)
            held = eventually(lambda: channel.basic_get("celery"), 10.0)

            found = troubles(app)

            assert held.headers
    assert found == [
        ("queues", "warning", "1 messages of queue 'celery' were delivered more than once")
    ]


def test_recent_dead_letters_are_counted(app: celery.Celery) -> None:
    bury(app, 3)

    assert troubles(app) == [
        ("dead letters", "warning", "3 dead letters in the last hour, 3 in all")
    ]


@pytest.mark.requires_nats("2.12")
def test_an_interrupted_replay_is_found(app: celery.Celery) -> None:
    bury(app, 3)

    class Killed(Exception):
        pass

    async def interrupted(broker: Broker) -> None:
        replay = Replay(broker)

        async def delete(letter_ids: Any) -> int:
            raise Killed

        replay._letters.delete = delete  # type: ignore[method-assign]
        with pytest.raises(Killed):
            await replay.run((), LetterFilter())

    run(app, interrupted)

    messages = [message for check, _, message in troubles(app) if check == "dead letters"]
    assert messages[1] == "a replay was interrupted, or runs now: 3 letters are half-way"


def test_a_stream_near_its_limit_is_found(nats_server: NatsServer) -> None:
    with application(nats_server.broker_url, "shop", dead_letter_max_bytes=20_000) as app:
        bury(app, 30)

        found = [trouble for trouble in troubles(app) if trouble[0] == "limits"]

    assert len(found) == 1
    assert found[0][2].startswith("stream 'shop_dlq' has ")
    assert found[0][2].endswith(" of 20000 bytes")


@pytest.mark.requires_nats("2.11")
@pytest.mark.parametrize(
    ("ahead", "severity"), [(5.0, "warning"), (-5.0, "warning"), (60.0, "error"), (0.2, "ok")]
)
def test_a_clock_that_is_off_is_found(
    app: celery.Celery, monkeypatch: pytest.MonkeyPatch, ahead: float, severity: str
) -> None:
    clock: Callable[[], float] = time.time
    monkeypatch.setattr("celery_ext.doctor.time.time", lambda: clock() + ahead)

    (found,) = (f for f in examine(app).findings if f.check == "clock")

    assert found.severity == severity
    if severity != "ok":
        where = "ahead of" if ahead > 0 else "behind"
        assert f"{abs(ahead):.1f} s {where} the server's" in found.message


@pytest.mark.cluster
@pytest.mark.slow
def test_in_a_cluster_single_copies_and_lost_servers_are_found(
    nats_cluster: Callable[..., NatsCluster],
) -> None:
    cluster = nats_cluster(3)
    with application(cluster.broker_url, "shop") as app:
        found = troubles(app)
        assert len(found) == 5
        assert found[0] == ("limits", "warning", "stream 'shop_high' has one copy, in a cluster")

    with application(cluster.broker_url, "three", stream_replicas=3) as app:
        assert troubles(app) == []

        cluster.servers[2].kill()

        def lost() -> list[str]:
            found = [message for check, _, message in troubles(app) if check == "limits"]
            return [message for message in found if "behind or away: n3" in message]

        eventually(lambda: len(lost()) == 5, 30.0)


def test_a_reply_queue_nobody_reads_is_no_finding(app: celery.Celery) -> None:
    with app.connection_for_write() as connection, connection.channel() as channel:
        Queue("replies", auto_delete=True, durable=True, expires=3600).bind(channel).declare()
        connection.Producer(channel).publish("x", routing_key="replies")

    assert not [each for each in examine(app).findings if "replies" in each.message]
