"""pytest-celery's broker and worker without Docker: real processes of this machine.

The nodes, clusters and setups are pytest-celery's own; only what they wrap is a `LocalContainer`.
The worker runs the same files as in Docker, with this interpreter and what the test can import.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_celery import CeleryWorkerContainer
from pytest_celery.defaults import DEFAULT_WORKER_CONTAINER_TIMEOUT
from pytest_docker_tools.wrappers.container import wait_for_callable

from kombu_jetstream.server import ServerNotFound, find_nats_server

from .local_container import LocalContainer
from .pytest_nodes import JETSTREAM_CONTAINER_TIMEOUT, JetStreamContainer

__all__ = ["default_jetstream_broker", "default_worker_container"]


@pytest.fixture
def default_jetstream_broker(
    default_jetstream_broker_cls: type[JetStreamContainer],
    default_jetstream_broker_command: list[str],
    default_jetstream_broker_env: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[JetStreamContainer]:
    """A nats-server of this machine, on a free port, with an empty store."""
    try:
        binary = find_nats_server()
    except ServerNotFound as exc:
        pytest.skip(str(exc))
    folder = tmp_path_factory.mktemp("jetstream-broker") / "server"
    port = _free_port()
    listen = ["-a", "127.0.0.1", "-p", str(port), "-sd", str(folder)]
    local = LocalContainer(
        [binary, *listen, *default_jetstream_broker_command],
        folder,
        env=default_jetstream_broker_env,
        port=port,
        hostname="127.0.0.1",
        name=f"jetstream-{port}",
    )
    try:
        yield _started(default_jetstream_broker_cls(local), JETSTREAM_CONTAINER_TIMEOUT)
    finally:
        local.remove(force=True)


@pytest.fixture
def default_worker_container(
    default_worker_container_cls: type[CeleryWorkerContainer],
    default_worker_command: list[str],
    default_worker_env: dict[str, str],
    default_worker_initial_content: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[CeleryWorkerContainer]:
    """A worker of this machine, in a folder with the files it has in Docker."""
    folder = tmp_path_factory.mktemp("celery-worker") / "app"
    _write(folder, default_worker_initial_content)
    env = {
        **default_worker_env,
        # What the test imports the worker can import; its own files come first.
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]),
        "C_FORCE_ROOT": "1",
    }
    local = LocalContainer(default_worker_command, folder, env=env)
    try:
        yield _started(default_worker_container_cls(local), DEFAULT_WORKER_CONTAINER_TIMEOUT)
    finally:
        local.remove(force=True)


def _started(container: Any, timeout: float) -> Any:
    """Start what *container* wraps, and return it when it is ready, as the factory for Docker."""
    container._container.start()
    wait_for_callable("Waiting for container to be ready", container.ready, timeout)
    return container


def _write(folder: Path, content: dict[str, Any]) -> None:
    for name, text in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else str(text).encode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
