"""``make demo`` without its pip install, and the examples by themselves."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import (
    ROOT,
    can_connect,
    child_processes,
    eventually,
    missing,
    nats_server_binary,
    python_env,
)

DEMO = ROOT / "docs" / "examples" / "demo.py"
SHOP = ROOT / "docs" / "examples" / "shop"


@pytest.fixture
def demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    if nats_server_binary() is None:
        missing("nats-server")
    env = python_env({"TMPDIR": str(folder)})
    with subprocess.Popen(
        [sys.executable, str(DEMO)],
        env=env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_demo_shows_everything_and_leaves_nothing(
    demo: subprocess.Popen[str], folder: Path
) -> None:
    said, _ = demo.communicate(timeout=100)

    assert demo.returncode == 0, said
    for heading in ("One task", "A chain", "A group", "A periodic task", "celery inspect"):
        assert f"\n{heading}" in said or f"{heading} says" in said
    assert "not as expected" not in said
    assert said.endswith("Everything is stopped and removed.\n")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_demo_leaves_nothing(
    demo: subprocess.Popen[str], folder: Path, number: int
) -> None:
    assert demo.stdout is not None
    said = ""
    while "One task" not in said:
        line = demo.stdout.readline()
        assert line, said
        said += line
    port = int(re.findall(r"jetstream://127.0.0.1:(\d+)", said)[0])
    children = child_processes(demo.pid)
    assert len(children) == 2, "a nats-server and a worker"

    demo.send_signal(number)
    rest, _ = demo.communicate(timeout=60)

    assert demo.returncode == 130, rest
    assert "Interrupted; everything is stopped and removed." in rest
    assert not can_connect(port)
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert list(folder.iterdir()) == []


def test_shop_imports_nothing_of_ours() -> None:
    for file in SHOP.glob("*.py"):
        assert "kombu" not in file.read_text(), file
        assert "celery_ext" not in file.read_text(), file
