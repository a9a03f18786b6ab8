"""`delay()` while the server is away: kombu's OperationalError, in time, and no hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu.exceptions import OperationalError

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import Site
from tests.servers import free_port, run_nats_server

pytestmark = pytest.mark.nats29

#: Celery's own settings, which the acceptance app changes for its workers.
CELERY_DEFAULTS: dict[str, Any] = {
    "broker_connection_timeout": 4.0,
    "task_publish_retry": True,
    "task_publish_retry_policy": {
        "max_retries": 3,
        "interval_start": 0,
        "interval_max": 1,
        "interval_step": 0.2,
    },
}

#: Settings of somebody who wants to know soon.
IMPATIENT = {
    **CELERY_DEFAULTS,
    "broker_connection_timeout": 1.0,
    "broker_transport_options": {"publish_timeout": 1.0},
}

#: Seconds of grace for a loaded machine, and for the pauses between tries (0.2 + 0.4 + 0.6).
GRACE = 2.5


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with run_nats_server(tmp_path / "nats store") as server:
        yield server


def _seconds_to_fail(site: Site) -> float:
    start = time.monotonic()
    with pytest.raises(OperationalError):
        site.client.tasks["noop"].delay()
    return time.monotonic() - start


def test_with_celerys_defaults_and_no_server_ever(make_site: Callable[..., Site]) -> None:
    site = make_site(f"jetstream://127.0.0.1:{free_port()}", **CELERY_DEFAULTS)

    # A refused connection costs nothing; what it takes are the pauses between the tries.
    assert _seconds_to_fail(site) < GRACE
    assert _seconds_to_fail(site) < GRACE


def test_with_celerys_defaults_and_a_server_that_went_away(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    """A server that was there a moment ago is waited for, once, for the connection timeout."""
    site = make_site(server.broker_url, **CELERY_DEFAULTS)
    site.send("noop", 1)
    server.kill()

    assert _seconds_to_fail(site) < CELERY_DEFAULTS["broker_connection_timeout"] + GRACE
    assert _seconds_to_fail(site) < GRACE


@pytest.mark.parametrize("used_before", [False, True], ids=["never used", "used before"])
def test_a_frozen_server(
    server: NatsServer, make_site: Callable[..., Site], used_before: bool
) -> None:
    """It takes connections and bytes, and answers nothing.

    The bound is the time of one publish, and of a connection for each of the tries.
    """
    site = make_site(server.broker_url, **IMPATIENT)
    if used_before:
        site.send("noop", 1)
    server.pause()

    try:
        assert _seconds_to_fail(site) < 1.0 + 4 * 1.0 + GRACE
        assert _seconds_to_fail(site) < 4 * 1.0 + GRACE
    finally:
        server.resume()


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_without_retries_one_timeout_is_all(
    server: NatsServer, make_site: Callable[..., Site], fault: str
) -> None:
    settings: dict[str, Any] = {**IMPATIENT, "task_publish_retry": False}
    site = make_site(server.broker_url, **settings)
    site.send("noop", 1)
    getattr(server, fault)()

    try:
        assert _seconds_to_fail(site) < 1.0 + GRACE / 2
    finally:
        server.resume()


def test_delay_works_again_when_the_server_is_back(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(server.broker_url, **IMPATIENT)
    site.send("noop", 1)
    server.kill()
    with pytest.raises(OperationalError):
        site.client.tasks["noop"].delay()

    server.start()

    site.send("noop", 1)
