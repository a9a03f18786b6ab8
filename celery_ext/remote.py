"""What workers answer to ``celery inspect``.

``jetstream_stats`` is new.  ``scheduled`` is Celery's, which knows of the tasks a worker holds
until they are due; here most of them wait in the broker, so the worker adds those of its queues.

Celery keeps remote control commands in one table per process, used by the worker that answers and
by the command line, which refuses names it does not know; so both register.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from celery import Celery
from celery.worker.control import Panel

from kombu_jetstream import envelope
from kombu_jetstream.errors import ApiError, JetStreamTransportError
from kombu_jetstream.jetstream import STREAM_NOT_FOUND

if TYPE_CHECKING:
    from kombu_jetstream.jetstream import JetStream

__all__ = ["STATS", "answer", "register", "stop_answering", "waiting_tasks"]

logger = logging.getLogger(__name__)

#: Name of the command.
STATS = "jetstream_stats"

#: Celery's names for the command that lists tasks with an eta.
SCHEDULED = ("scheduled", "dump_schedule")

#: Tasks that wait in the broker and are shown by one worker at most: the answer is one message.
MAX_WAITING = 500

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


def waiting_tasks(
    jetstream: JetStream, queues: Iterable[str], limit: int = MAX_WAITING
) -> list[dict[str, Any]]:
    """Return what waits in the broker for *queues*, at most *limit* tasks, as Celery shows them.

    Two round trips, whatever their number.  Raises as any request does.
    """
    subjects = list(_subjects(jetstream, queues))[:limit]
    answers = jetstream.request_many(
        [(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject}) for stream, subject in subjects]
    )
    found = [_shown(answer) for answer in answers if isinstance(answer, dict)]
    return sorted((each for each in found if each is not None), key=lambda each: str(each["eta"]))


def _subjects(jetstream: JetStream, queues: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield stream and subject of each waiting message."""
    names = jetstream.names
    wanted = [
        (names.stream(level), names.delayed(level, queue))
        for level in jetstream.levels
        for queue in queues
    ]
    answers = jetstream.request_many(
        [(f"STREAM.INFO.{stream}", {"subjects_filter": subject}) for stream, subject in wanted]
    )
    for (stream, _), answer in zip(wanted, answers, strict=True):
        if isinstance(answer, ApiError) and answer.err_code == STREAM_NOT_FOUND:
            continue
        if isinstance(answer, JetStreamTransportError):
            raise answer
        for subject in answer["state"].get("subjects") or ():
            yield stream, subject


def _shown(answer: dict[str, Any]) -> dict[str, Any] | None:
    """Return a waiting message as `celery.worker.control.scheduled` has requests."""
    try:
        message = envelope.decode(base64.b64decode(answer["message"]["data"]))
    except JetStreamTransportError:
        return None
    headers, properties = message["headers"], message["properties"]
    return {
        "eta": headers.get("eta"),
        "priority": 6,  # of the timer that Celery holds tasks in
        "request": {
            "id": headers.get("id"),
            "name": headers.get("task"),
            "args": headers.get("argsrepr"),
            "kwargs": headers.get("kwargsrepr"),
            "type": headers.get("task"),
            "hostname": None,
            "time_start": None,
            "acknowledged": False,
            "delivery_info": {
                **properties["delivery_info"],
                "priority": properties.get("priority"),
                "redelivered": False,
            },
            "worker_pid": None,
        },
    }
