"""What goes wrong before or beside the work, as a user of Celery sees it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection

from kombu_jetstream.errors import MessageTooLarge
from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import Site, start_all
from tests.servers import (
    CeleryWorker,
    api_request,
    free_port,
    nats_server_binary,
    run_nats_server,
)

pytestmark = pytest.mark.nats29

ACCOUNTS = {
    "accounts": {
        "APP": {
            "jetstream": "enabled",
            "users": [
                {"user": "app", "password": "right"},
                {
                    "user": "poor",
                    "password": "right",
                    "permissions": {"publish": {"deny": ["$JS.API.STREAM.>"]}},
                },
            ],
        },
        "PLAIN": {"users": [{"user": "plain", "password": "right"}]},
    }
}


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server with an account that has JetStream, and one that has not."""
    with run_nats_server(tmp_path_factory.mktemp("nats store"), config=ACCOUNTS) as server:
        yield server


@pytest.fixture
def start_worker(folder: Path) -> Iterator[Callable[..., CeleryWorker]]:
    workers = []

    def start(broker_url: str, **config: Any) -> CeleryWorker:
        worker = CeleryWorker(folder, broker_url, pool="solo", config=config)
        workers.append(worker)
        return worker.start()

    yield start
    for worker in workers:
        worker.kill9()


def _exit_code(worker: CeleryWorker) -> int:
    assert worker.process is not None
    return worker.process.wait(20)


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        (
            "{url}",
            {"visibilty_timeout": 5},
            "unknown option 'visibilty_timeout', did you mean 'visibility_timeout'?",
        ),
        (
            "{url}",
            {"visibility_timeout": "1h"},
            "expected 'visibility_timeout' to be seconds > 0, got '1h'",
        ),
        ("{url}?publish_windw=3", {}, "did you mean 'publish_window'?"),
        ("jetstream://nats.example:port", {}, "expected the port of host 'nats.example'"),
        (
            "{url}?publish_timeout=3",
            {"publish_timeout": 4},
            "'publish_timeout' is 3.0 in the URL and 4.0 in the transport options, say it once",
        ),
    ],
    ids=["unknown option", "bad value", "unknown option of the URL", "bad URL", "said twice"],
)
def test_worker_stops_at_a_setting_it_cannot_use(
    shared_nats_server: NatsServer,
    start_worker: Callable[..., CeleryWorker],
    url: str,
    options: dict[str, Any],
    says: str,
) -> None:
    broker_url = url.format(url=shared_nats_server.broker_url)

    worker = start_worker(broker_url, broker_transport_options=options)

    assert _exit_code(worker) == 1
    assert says in worker.log


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ("app:not-the-password", "refused the credentials (Authorization Violation)"),
        ("poor:right", "this user may not publish to '$JS.API.STREAM.INFO."),
    ],
    ids=["wrong password", "missing permission"],
)
def test_worker_stops_where_it_is_refused(
    accounts: NatsServer, start_worker: Callable[..., CeleryWorker], user: str, says: str
) -> None:
    worker = start_worker(f"jetstream://{user}@{accounts.host}:{accounts.port}")

    assert _exit_code(worker) == 1
    assert says in worker.log
    assert user.partition(":")[2] not in worker.log


def test_worker_stops_where_tls_is_not_offered(
    accounts: NatsServer, start_worker: Callable[..., CeleryWorker]
) -> None:
    worker = start_worker(f"jetstreams://app:right@{accounts.host}:{accounts.port}")

    assert _exit_code(worker) == 1
    assert "TLS is demanded and server" in worker.log
    assert "no credential was sent" in worker.log


def test_worker_without_retries_stops_where_no_server_is(
    start_worker: Callable[..., CeleryWorker],
) -> None:
    worker = start_worker(
        f"jetstream://127.0.0.1:{free_port()}",
        broker_connection_retry=False,
        broker_connection_retry_on_startup=False,
    )

    assert _exit_code(worker) == 1
    assert "Retrying to establish a connection to the message broker" in worker.log
    assert "has been disabled" in worker.log


def test_worker_says_what_an_account_without_jetstream_needs(
    accounts: NatsServer, start_worker: Callable[..., CeleryWorker]
) -> None:
    worker = start_worker(f"jetstream://plain:right@{accounts.host}:{accounts.port}")

    worker.wait_log("has no JetStream (JetStream not enabled for account)", within=20)
    worker.wait_log("Trying again in")


def test_worker_says_what_a_server_without_jetstream_needs(
    start_worker: Callable[..., CeleryWorker],
) -> None:
    port = free_port()
    binary = nats_server_binary()
    assert binary is not None
    with subprocess.Popen([binary, "-a", "127.0.0.1", "-p", str(port), "-l", "/dev/null"]) as plain:
        try:
            worker = start_worker(f"jetstream://127.0.0.1:{port}")
            worker.wait_log("has no JetStream; start it with -js", within=20)
        finally:
            plain.terminate()


def test_worker_stops_at_a_stream_that_is_somebody_elses(
    shared_nats_server: NatsServer, start_worker: Callable[..., CeleryWorker]
) -> None:
    config = {"name": "taken_medium", "subjects": ["something.else"], "retention": "limits"}
    made = api_request(shared_nats_server.url, "STREAM.CREATE.taken_medium", config)
    assert "error" not in made

    worker = start_worker(f"{shared_nats_server.broker_url}/taken")

    assert _exit_code(worker) == 1
    assert "stream 'taken_medium' has subjects ['something.else']" in worker.log
    after = api_request(shared_nats_server.url, "STREAM.INFO.taken_medium")
    assert after["config"]["subjects"] == ["something.else"]


def test_task_larger_than_the_server_takes_is_refused_and_nothing_else_is_lost(
    shared_nats_server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{shared_nats_server.broker_url}/large", "large")
    before = site.send("noop", 3)

    with pytest.raises(MessageTooLarge, match=r"the server takes at most 1.048.576"):
        site.client.tasks["size"].delay("x" * 1_048_000)

    after = site.send("noop", 3)
    start_all([site.worker("large")])
    site.wait_ended([*before, *after], within=10)
    site.assert_each_ran_once([*before, *after])


@pytest.mark.parametrize(
    "queue_name",
    ["a.b", "a b", "*", ">", "a/b\\c", "$JS.API", "=2E", "grün ☂", "'\"{}", "q" * 200],
    ids=str,
)
def test_queue_name_with_odd_characters(shared_nats_server: NatsServer, queue_name: str) -> None:
    with Connection(f"{shared_nats_server.broker_url}/odd") as connection:
        queue = connection.SimpleQueue(queue_name)
        queue.put("hello")
        message = queue.get(timeout=5)
        message.ack()
        queue.close()

    assert message.payload == "hello"


def test_worker_of_a_queue_with_an_odd_name(
    shared_nats_server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{shared_nats_server.broker_url}/oddly", "odd")
    name = "it's *all* > good.☂/\\ ="
    start_all([site.worker("odd", queues=name)])

    task_ids = site.send("noop", 3, queue=name)

    site.wait_ended(task_ids, within=10)
    site.assert_each_ran_once(task_ids)
