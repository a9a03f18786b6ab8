"""What workers answer to ``celery inspect``: ``jetstream_stats``.

Celery keeps remote control commands in one table per process, used by the worker that answers and
by the command line, which refuses names it does not know; so both register.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from celery import Celery
from celery.worker.control import Panel

__all__ = ["STATS", "register", "unregister"]

#: Name of the command.
STATS = "jetstream_stats"

Report: TypeAlias = "Callable[[Celery], dict[str, Any] | None]"


def _none(app: Celery) -> None:
    return None


def register(report: Report = _none) -> None:
    """Make the command known; a worker gives the *report* it answers with."""

    def jetstream_stats(state: Any, **kwargs: Any) -> dict[str, Any]:
        """What became of the tasks of this worker, per task and queue."""
        return report(state.app) or {"error": "the hooks of celery_ext are off in this worker"}

    Panel.register(name=STATS, type="inspect")(jetstream_stats)


def unregister() -> None:
    """Undo `register`."""
    Panel.data.pop(STATS, None)
    Panel.meta.pop(STATS, None)
