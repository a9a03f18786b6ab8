"""What waits in the broker for its time, as ``celery inspect scheduled`` shows what workers hold.

Read over the worker's own connection, between two messages, so it takes two round trips only.
(`scheduled` is for the command line, has filters, and cancels.)
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from kombu_jetstream import envelope
from kombu_jetstream.errors import ApiError, JetStreamTransportError
from kombu_jetstream.jetstream import STREAM_NOT_FOUND

if TYPE_CHECKING:
    from kombu_jetstream.jetstream import JetStream

__all__ = ["waiting_tasks"]

#: Tasks shown by one worker at most: its answer is one message.
MAX_WAITING = 500


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
