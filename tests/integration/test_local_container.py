from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_docker_tools.exceptions import ContainerFailed
from pytest_docker_tools.wrappers import Container

from celery_ext.local_container import LocalContainer
from tests.servers import child_processes, eventually, free_port

Make = Callable[..., LocalContainer]

#: Says that it is up, says so when it is asked to stop, and has a child of its own.
PATIENT = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def stop(*args):
    print("asked to stop", flush=True)
    child.terminate()
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
time.sleep(60)
"""

#: Does not stop when asked.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(60)
"""

LISTENER = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
time.sleep(60)
"""


@pytest.fixture
def make(folder: Path) -> Iterator[Make]:
    made: list[LocalContainer] = []

    def start(code: str, *args: str, **options: Any) -> LocalContainer:
        local = LocalContainer(
            ["python", "-c", code, *args], folder / f"box {len(made)}", **options
        )
        made.append(local)
        local.start()
        return local

    yield start
    for local in made:
        local.remove(force=True)


def wait_up(local: LocalContainer, times: int = 1) -> None:
    eventually(lambda: local.logs().count(b"up\n") == times, 10.0)


def test_status_and_attributes_are_of_the_last_reload(make: Make, folder: Path) -> None:
    assert LocalContainer(["python"], folder / "new").status == "created"
    local = make(PATIENT, env={"SHOP": "open"})
    wait_up(local)
    assert local.status == "running"
    assert local.attrs["State"]["Running"]
    assert "SHOP=open" in local.attrs["Config"]["Env"]

    local.kill()

    assert local.status == "running"
    local.reload()
    assert local.status == "exited"
    assert local.attrs["State"]["ExitCode"] == -signal.SIGKILL


def test_sigkill_takes_the_children_too_and_at_once(make: Make) -> None:
    local = make(PATIENT)
    wait_up(local)
    assert local.process is not None
    (child,) = eventually(lambda: child_processes(local.attrs["State"]["Pid"]), 10.0)

    local.kill("KILL")

    assert local.process.poll() is not None
    eventually(lambda: not _is_alive(child), 10.0)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize("name", ["SIGTERM", "TERM", signal.SIGTERM, 15], ids=str)
def test_another_signal_goes_to_the_process_and_is_not_waited_for(
    make: Make, name: str | int
) -> None:
    local = make(PATIENT)
    wait_up(local)

    local.kill(name)

    assert local.wait(10) == {"StatusCode": 3}
    assert local.logs() == b"up\nasked to stop\n"
    local.kill()  # and again is no error


def test_restart_stops_in_order_and_keeps_log_and_identity(make: Make) -> None:
    local = make(PATIENT)
    wait_up(local)
    before, pid = local.id, local.attrs["State"]["Pid"]

    local.restart()

    wait_up(local, 2)
    assert local.logs() == b"up\nasked to stop\nup\n"
    assert local.id == before
    assert local.attrs["State"]["Pid"] != pid
    assert local.status == "running"


def test_what_does_not_stop_is_killed_after_the_timeout(make: Make) -> None:
    local = make(STUBBORN)
    wait_up(local)
    began = time.monotonic()

    local.stop(timeout=0.3)

    assert 0.3 <= time.monotonic() - began < 5
    local.reload()
    assert local.status == "exited"


def test_commands_run_in_its_folder_and_environment(make: Make) -> None:
    local = make(PATIENT, env={"SHOP": "open"})

    code = "import os, sys; print(os.environ['SHOP'], os.getcwd()); sys.exit(4)"
    done = local.exec_run(["python", "-c", code])
    text = local.exec_run('python -c "import sys; print(sys.executable)"')

    assert done == (4, f"open {os.path.realpath(local.folder)}\n".encode())
    assert text == (0, f"{sys.executable}\n".encode())


def test_its_name_takes_the_place_of_the_hosts(make: Make) -> None:
    local = make("import sys, time; print(sys.argv[1], flush=True); time.sleep(60)", "w@%h")

    eventually(lambda: local.logs() == f"w@{local.id[:12]}\n".encode(), 10.0)
    assert local.attrs["Config"]["Hostname"] == local.id[:12] == local.short_id
    assert len(local.id) == 64


def test_pytest_docker_tools_finds_its_port_and_its_end(make: Make) -> None:
    port = free_port()
    local = make(LISTENER, str(port), port=port)
    container = Container(local)

    eventually(container.ready, 10.0)

    assert container.get_addr(f"{port}/tcp") == ("127.0.0.1", port)
    assert container.env["PATH"] == os.environ["PATH"]
    assert container.logs() == ""
    local.kill()
    with pytest.raises(ContainerFailed):
        container.ready()
