from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import celery
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from celery_ext.metrics import BrokerCollector
from kombu_jetstream.server import NatsServer
from tests.letters import application, bury
from tests.servers import ROOT, free_port, nats_server_version, python_env

Samples = dict[tuple[str, ...], float]


@pytest.fixture
def app(shared_nats_server: NatsServer, namespace: str) -> Iterator[celery.Celery]:
    with application(shared_nats_server.broker_url, namespace, queues=("celery", 'a "b"')) as app:
        yield app


def scrape(app: celery.Celery) -> Samples:
    registry = CollectorRegistry()
    registry.register(BrokerCollector(app, timeout=2.0))
    return samples_of(generate_latest(registry).decode())


def samples_of(text: str) -> Samples:
    """Values by name without the prefix, then label values in alphabetical order."""
    return {
        (
            sample.name.removeprefix("celery_jetstream_"),
            *sorted(sample.labels.values()),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_queues_and_dead_letters_are_measured(app: celery.Celery) -> None:
    for priority in (0, 9, 9):
        app.send_task("shop.pay", priority=priority)
    app.send_task("shop.pay", queue='a "b"', countdown=600)
    bury(app, 4)

    found = scrape(app)

    assert found["up",] == 1
    assert found["queue_ready", "celery"] == 3
    assert found["queue_level_ready", "celery", "high"] == 2
    assert found["queue_in_flight", "celery"] == 0
    assert found["queue_delayed", 'a "b"'] == (1 if nats_server_version() >= (2, 12) else 0)
    assert found["queue_paused", "celery"] == 0
    assert found["queue_consumers", "celery"] == 0
    assert 0 < found["queue_oldest_age_seconds", "celery"] < 60
    assert found["dead_letters", "celery"] == 4
    assert found["dead_letters", 'a "b"'] == 0
    assert 0 < found["dead_letters_oldest_age_seconds",] < 60
    assert [value for key, value in found.items() if key[0] == "stream_max_bytes"] == [1024**3]
    assert len([key for key in found if key[0] == "stream_bytes"]) == 5


def test_a_broker_that_is_away_is_down_and_nothing_else() -> None:
    url = f"jetstream://127.0.0.1:{free_port()}"

    assert scrape(celery.Celery(broker=url, set_as_current=False)) == {("up",): 0.0}


def test_every_metric_is_in_the_documentation(app: celery.Celery) -> None:
    bury(app)
    documented = (ROOT / "docs" / "how-to" / "monitor.md").read_text()

    for name in {key[0] for key in scrape(app)}:
        assert f"`celery_jetstream_{name}`" in documented


def test_the_exporter_serves_metrics_until_it_is_stopped(shared_nats_server: NatsServer) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "celery", "-A", "tests.acceptance.app", "jetstream"),
            *("exporter", "--port", "0", "--host", "127.0.0.1"),
        ],
        env=python_env({"BROKER_URL": shared_nats_server.broker_url}),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        url = line.split()[2].rstrip(",")
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert samples_of(answer.read().decode())["up",] == 1
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()
