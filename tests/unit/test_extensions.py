from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from kombu_jetstream import extensions
from kombu_jetstream.deadletter import DeadLetter, Reason
from kombu_jetstream.extensions import GROUP
from tests.servers import run_python


class Recorder:
    def __init__(self, reason: Reason | None = None, error: Exception | None = None) -> None:
        self.reason = reason
        self.error = error
        self.letters: list[DeadLetter] = []

    def reject_reason(self, task: str | None) -> Reason | None:
        if self.error is not None:
            raise self.error
        return self.reason

    def dead_lettered(self, letter: DeadLetter) -> None:
        if self.error is not None:
            raise self.error
        self.letters.append(letter)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*extensions_: Recorder) -> None:
        monkeypatch.setattr(extensions._loaded, "extensions", extensions_)

    use()
    return use


def test_a_message_is_rejected_unless_an_extension_knows_better(loaded: Any) -> None:
    assert extensions.reject_reason("t") == "rejected"
    loaded(Recorder(), Recorder("unknown_task"), Recorder("malformed"))
    assert extensions.reject_reason("t") == "unknown_task"


def test_every_extension_hears_of_a_dead_letter(loaded: Any) -> None:
    first, second = Recorder(), Recorder()
    loaded(first, second)
    letter = DeadLetter(reason="rejected", queue="q")

    extensions.dead_lettered(letter)

    assert first.letters == second.letters == [letter]


def test_an_extension_that_fails_is_logged_and_passed_over(
    loaded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = Recorder("unknown_task")
    loaded(Recorder(error=ValueError("broken")), good)
    letter = DeadLetter(reason="rejected", queue="q")

    with caplog.at_level(logging.ERROR):
        assert extensions.reject_reason("t") == "unknown_task"
        extensions.dead_lettered(letter)

    assert good.letters == [letter]
    assert [bool(record.exc_info) for record in caplog.records] == [True, True]


# Loading, each in a process of its own


def run(code: str, site: Path | None = None) -> Any:
    done = run_python(code, {"PYTHONPATH": str(site)} if site is not None else None)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def package_with(site: Path, **entry_points: str) -> Path:
    """A folder for PYTHONPATH with an installed package that announces extensions."""
    info = site / "others-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {value}" for name, value in entry_points.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}\n")
    return site


def test_kombu_alone_loads_no_extension_and_no_celery() -> None:
    found, _ = run(
        """
import json, sys, kombu, kombu_jetstream
kombu.Connection("jetstream://").transport
print(json.dumps([name for name in ("celery", "celery_ext") if name in sys.modules]))
"""
    )

    assert found == []


def test_a_connection_of_a_celery_app_loads_celery_ext_before_it_is_used() -> None:
    found, _ = run(
        """
import json, sys, celery
app = celery.Celery(broker="jetstream://127.0.0.1:1")
before = "celery_ext.hooks" in sys.modules
app.connection_for_write()
from celery.signals import before_task_publish
print(json.dumps([before, "celery_ext.hooks" in sys.modules, len(before_task_publish.receivers)]))
"""
    )

    assert found == [False, True, 1]


def test_celery_imported_after_the_transport_is_noticed() -> None:
    found, _ = run(
        """
import json, sys, kombu, kombu_jetstream
kombu.Connection("jetstream://").transport
import celery
before = "celery_ext.hooks" in sys.modules
celery.Celery(broker="jetstream://").connection_for_write().transport
print(json.dumps([before, "celery_ext.hooks" in sys.modules]))
"""
    )

    assert found == [False, True]


def test_a_producer_does_not_load_the_workers_modules() -> None:
    found, _ = run(
        """
import json, sys, celery
app = celery.Celery(broker="memory://")
app.connection_for_write()
before = set(sys.modules)
app.conf.broker_url = "jetstream://127.0.0.1:1"
app.connection_for_write()
loaded = sys.modules.keys() - before
print(json.dumps(["celery_ext.hooks" in loaded,
    [name for name in loaded if name.startswith(("celery.worker", "celery_ext.worker"))]]))
"""
    )

    assert found == [True, []]


def test_an_extension_that_cannot_be_loaded_is_logged(tmp_path: Path) -> None:
    site = package_with(
        tmp_path, broken="no_such_module:extension", raising="os:fspath", nothing="time:tzset"
    )

    found, stderr = run(
        """
import json, logging, celery
logging.basicConfig()
celery.Celery(broker="jetstream://127.0.0.1:1").connection_for_write()
from kombu_jetstream import extensions
print(json.dumps([type(each).__module__ for each in extensions._loaded.extensions]))
""",
        site,
    )

    assert found == ["celery_ext.hooks"]
    assert "extension 'broken' cannot be loaded" in stderr
    assert "extension 'raising' cannot be loaded" in stderr
    assert "nothing" not in stderr
