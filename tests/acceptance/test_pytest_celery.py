"""pytest-celery's nodes, clusters and setups over JetStream, without Docker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery
from pytest_celery import RESULT_TIMEOUT, CeleryTestSetup, ping
from pytest_celery.vendors.worker.tasks import add, fail, sleep

from celery_ext.broker import run
from celery_ext.dlq import DeadLetters
from celery_ext.pytest_local import *  # noqa: F403 - fixtures
from celery_ext.pytest_nodes import JetStreamTestBroker
from celery_ext.pytest_plugin import docker_answers
from celery_ext.pytest_setup import *  # noqa: F403 - fixtures
from tests.letters import letters
from tests.servers import eventually, python_env

pytestmark = pytest.mark.slow


class Setup(CeleryTestSetup):
    """A setup whose workers and producers acknowledge late and find the dead soon."""

    @classmethod
    def update_app_config(cls, app: Celery) -> None:
        app.conf.update(
            task_acks_late=True,
            broker_transport_options={"visibility_timeout": 2.0},
            broker_connection_retry_on_startup=True,
        )


@pytest.fixture
def celery_setup_cls() -> type[CeleryTestSetup]:
    return Setup


def test_the_setup_is_ready_and_runs_tasks(celery_setup: CeleryTestSetup) -> None:
    assert celery_setup.ready(ping=True, control=True, docker=True)
    assert isinstance(celery_setup.broker, JetStreamTestBroker)
    assert celery_setup.app.conf.broker_url == celery_setup.broker.config()["host_url"]

    queue = celery_setup.worker.worker_queue

    assert ping.s().apply_async(queue=queue).get(timeout=RESULT_TIMEOUT) == "pong"
    answers = celery_setup.app.control.ping()
    assert answers == [{celery_setup.worker.hostname(): {"ok": "pong"}}]
    (worker,) = celery_setup.worker.get_running_processes_info(
        ["pid", "cmdline"], {"pid": celery_setup.worker.container.attrs["State"]["Pid"]}
    )
    assert worker["cmdline"][1:4] == ["-m", "celery", "-A"]


def test_a_task_of_a_killed_worker_is_run_by_the_next_one(celery_setup: CeleryTestSetup) -> None:
    worker = celery_setup.worker
    result = sleep.s(2).apply_async(queue=worker.worker_queue)
    worker.wait_for_log("Task pytest_celery.vendors.worker.tasks.sleep")

    worker.kill()
    assert worker.container.status == "exited"
    worker.restart()

    assert result.get(timeout=RESULT_TIMEOUT) is True


def test_tasks_survive_a_killed_server(celery_setup: CeleryTestSetup) -> None:
    broker, worker = celery_setup.broker, celery_setup.worker
    assert add.s(1, 2).apply_async(queue=worker.worker_queue).get(timeout=RESULT_TIMEOUT) == 3
    worker.kill("SIGTERM")
    eventually(lambda: (worker.container.reload(), worker.container.status)[1] == "exited", 30.0)
    results = [add.s(n, n).apply_async(queue=worker.worker_queue) for n in range(20)]

    broker.kill()
    assert broker.container.status == "exited"
    broker.restart()
    worker.restart()

    assert broker.logs().count("Server is ready") == 2
    for number, result in enumerate(results):
        assert result.get(timeout=RESULT_TIMEOUT) == 2 * number


def test_a_failed_task_is_a_dead_letter(celery_setup: CeleryTestSetup) -> None:
    result = fail.s("on purpose").apply_async(queue=celery_setup.worker.worker_queue)

    with pytest.raises(RuntimeError, match="on purpose"):
        result.get(timeout=RESULT_TIMEOUT)

    (letter,) = eventually(lambda: letters(celery_setup.app), 10.0)
    assert letter.record.task_id == result.id
    assert letter.record.worker == celery_setup.worker.hostname()
    assert run(celery_setup.app, lambda broker: DeadLetters(broker).purge()) == 1


SUITE = """
def test_of_a_user(celery_setup):
    assert celery_setup.ready(ping=True)
    assert celery_setup.app.conf.result_backend == "rpc://"
"""


def run_suite(folder: Path, mode: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a test suite of its own, with what a user writes."""
    (folder / "pytest.ini").write_text(f"[pytest]\ncelery_jetstream = {mode}\n")
    (folder / "test_of_a_user.py").write_text(SUITE)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args],
        cwd=folder,
        env=python_env(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_lines_give_a_suite_a_real_server_and_a_real_worker(folder: Path) -> None:
    done = run_suite(folder, "local")

    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_without_docker_auto_is_local(folder: Path) -> None:
    done = run_suite(folder, "auto", "--fixtures", "-v")

    where = "celery_ext/pytest_local.py"
    assert (where in done.stdout) is not docker_answers()


def test_a_mode_that_is_none_is_a_usage_error(folder: Path) -> None:
    done = run_suite(folder, "podman")

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    expected = "expected celery_jetstream to be one of auto, docker, local, got 'podman'"
    assert expected in done.stderr


def test_a_suite_that_does_not_ask_for_it_is_left_alone(folder: Path) -> None:
    done = run_suite(folder, "", "--collect-only")

    # pytest-celery's own brokers, one test for each and each backend.
    assert "[celery_setup_worker-" in done.stdout
