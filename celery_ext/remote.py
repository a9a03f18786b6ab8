"""What workers answer to ``celery inspect``.

``jetstream_stats`` is new.  ``scheduled`` is Celery's, which knows of the tasks a worker holds
until they are due; here most of them wait in the broker, so the worker adds those of its queues.

Celery keeps remote control commands in one table per process, used by the worker that answers and
by the command line, which refuses names it does not know; so both register.  The command line
imports this module, so it imports little.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from celery import Celery
from celery.worker.control import Panel

__all__ = ["STATS", "answer", "register", "stop_answering"]

logger = logging.getLogger(__name__)

#: Name of the command.
STATS = "jetstream_stats"

#: Celery's names for the command that lists tasks with an eta.
SCHEDULED = ("scheduled", "dump_schedule")

Report: TypeAlias = "Callable[[Celery], dict[str, Any] | None]"


def register() -> None:
    """Make ``jetstream_stats`` known; enough for the command line."""
    _register_stats(lambda app: None)


def answer(report: Report) -> None:
    """Answer as a worker does, with the *report* of its app."""
    _register_stats(report)
    for name in SCHEDULED:
        Panel.data[name] = _with_waiting(Panel.data[name])


def stop_answering() -> None:
    """Undo `answer`."""
    register()
    for name in SCHEDULED:
        Panel.data[name] = getattr(Panel.data[name], "_celerys_own", Panel.data[name])


def _register_stats(report: Report) -> None:
    def jetstream_stats(state: Any, **kwargs: Any) -> dict[str, Any]:
        """What became of the tasks of this worker, per task and queue."""
        return report(state.app) or {"error": "the hooks of celery_ext are off in this worker"}

    Panel.register(name=STATS, type="inspect")(jetstream_stats)


def _with_waiting(celerys_own: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(celerys_own, "_celerys_own"):
        return celerys_own

    def scheduled(state: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """List of currently scheduled ETA/countdown tasks."""
        from kombu_jetstream.errors import JetStreamTransportError

        from .waiting import waiting_tasks

        held = list(celerys_own(state, **kwargs))
        try:
            jetstream = state.consumer.connection.connection.jetstream
            queues = list(state.app.amqp.queues.consume_from)
            return held + list(waiting_tasks(jetstream, queues))
        except (JetStreamTransportError, AttributeError) as exc:
            # No permission, or no JetStream behind this connection.
            logger.warning("cannot tell which tasks wait in the broker: %s", exc)
            return held

    scheduled._celerys_own = celerys_own  # type: ignore[attr-defined]
    return scheduled
