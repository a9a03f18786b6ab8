"""A process of this machine that offers what docker-py's containers offer.

pytest-celery's nodes wrap a container object and ask it for its attributes, status and logs, kill
and restart it and run commands in it.  This is such an object without Docker, so that the nodes
work unchanged: the server and the workers of a test are real processes, in folders of their own.

As with Docker: ``status`` and ``attrs`` are of the last `reload`, the log survives a restart,
SIGKILL takes all processes away and waits for it, any other signal goes to the first one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ExecResult", "LocalContainer"]

#: Seconds in which a killed process must be gone.
KILL_TIMEOUT = 10.0


class ExecResult(NamedTuple):
    """What `LocalContainer.exec_run` returns, as docker-py does."""

    exit_code: int
    output: bytes


class LocalContainer:
    """One process and its children.

    Parameters:
        command: What to run; ``celery`` and ``python`` are those of this interpreter.
        folder: Its working directory, made when missing; its log is beside it.
        env: Its environment, on top of this process's.
        port: TCP port it listens on; none if None.
        hostname: Its name for others; by default the first 12 characters of its `id`, which take
            the place of ``%h`` in *command*, too.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: str | os.PathLike[str],
        *,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        hostname: str | None = None,
        name: str | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex * 2
        self.short_id = self.id[:12]
        self.name = name if name is not None else f"local-{self.short_id}"
        self.hostname = hostname if hostname is not None else self.short_id
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path = self.folder.with_name(f"{self.folder.name}.log")
        self.port = port
        self.env = dict(env or {})
        self.command = [part.replace("%h", self.short_id) for part in command]
        self.status = "created"
        self.attrs: dict[str, Any] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.reload()

    def __repr__(self) -> str:
        return f"<LocalContainer {self.name} {self.status}>"

    # -- what docker-py's containers have ----------------------------------------------------------

    def start(self) -> None:
        """Start the process; no error if it runs."""
        if self._is_running():
            return
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self._resolved(self.command),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        atexit.register(self._kill_all)
        self.reload()

    def reload(self) -> None:
        """Read ``status`` and ``attrs`` anew."""
        if self.process is not None:
            self.status = "running" if self._is_running() else "exited"
        bound = {}
        if self.port is not None:
            # Docker maps a port to another of the host; here they are one.
            bound[f"{self.port}/tcp"] = [{"HostIp": "127.0.0.1", "HostPort": str(self.port)}]
        self.attrs = {
            "Id": self.id,
            "Name": f"/{self.name}",
            "State": {
                "Status": self.status,
                "Running": self.status == "running",
                "Pid": self.process.pid if self.process is not None else 0,
                "ExitCode": self.process.returncode or 0 if self.process is not None else 0,
            },
            "Config": {
                "Hostname": self.hostname,
                "Env": [f"{name}={value}" for name, value in self._environment().items()],
                "Cmd": self.command,
            },
            "HostConfig": {"PortBindings": bound},
            "NetworkSettings": {
                "Networks": {"local": {"IPAddress": "127.0.0.1"}},
                "Ports": bound,
            },
        }

    def logs(self) -> bytes:
        """Return what the process has written since it was first started."""
        return self.log_path.read_bytes() if self.log_path.exists() else b""

    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal, SIGKILL if None; a process that has ended is no error."""
        number = _signal_number(signal)
        if self.process is None or not self._is_running():
            return
        if number == _SIGKILL:
            self._kill_all()
        else:
            self.process.send_signal(number)

    def stop(self, timeout: float = 10) -> None:
        """Send SIGTERM, and SIGKILL when it runs *timeout* seconds later."""
        if self.process is not None and self._is_running():
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        self._kill_all()

    def restart(self, timeout: float = 10) -> None:
        """Stop as `stop` does, and start again with the same command, port and folder."""
        self.stop(timeout)
        self.start()

    def wait(self, timeout: float | None = None) -> dict[str, int]:
        """Return when the process has ended, with its exit code."""
        assert self.process is not None
        return {"StatusCode": self.process.wait(timeout)}

    def remove(self, force: bool = False) -> None:
        """Take the process away; the folder stays, to be looked at."""
        self._kill_all()

    def exec_run(self, cmd: str | Sequence[str], **kwargs: Any) -> ExecResult:
        """Run a command in the folder and environment of the process."""
        command = shlex.split(cmd) if isinstance(cmd, str) else list(cmd)
        if command[:2] == ["cat", "/proc/net/tcp"]:
            # pytest_docker_tools looks there for the sockets that listen in the container: for
            # ours, not for the host's, and not every host has the file.
            return ExecResult(0, self._listening())
        done = subprocess.run(
            self._resolved(command),
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return ExecResult(done.returncode, done.stdout)

    # -- behind it ---------------------------------------------------------------------------------

    def _is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _resolved(self, command: Sequence[str]) -> list[str]:
        """Return *command* with this interpreter's programs, whatever PATH says."""
        first, *rest = command
        if first == "celery":
            return [sys.executable, "-m", "celery", *rest]
        return [sys.executable if first == "python" else first, *rest]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.env}

    def _listening(self) -> bytes:
        """Return the kernel's table of sockets, as far as pytest_docker_tools reads it."""
        if self.port is None:
            return b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return b"  0: 0100007F:%04X 00000000:0000 0A\n" % self.port
        return b""

    def _kill_all(self) -> None:
        """Kill the process and its children, and wait until they are gone."""
        process = self.process
        if process is None:
            return
        deadline = time.monotonic() + KILL_TIMEOUT
        # The group outlives its first process for as long as a child does.
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, _SIGKILL)
            except (ProcessLookupError, PermissionError):
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.wait(KILL_TIMEOUT)
        atexit.unregister(self._kill_all)


_SIGKILL = signal.SIGKILL


def _signal_number(given: str | int | None) -> int:
    if given is None:
        return _SIGKILL
    if isinstance(given, int):
        return given
    name = given if given.startswith("SIG") else f"SIG{given}"
    return signal.Signals[name]
