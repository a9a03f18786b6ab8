"""From a failed task to its dead letter.

Pure.  The dead letter's payload is not made here: it is the message's own, as it was stored, so
that a replay is the same task with the same id, arguments, headers, chain and chord.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.utils.serialization import UnpickleableExceptionWrapper

from kombu_jetstream import deadletter
from kombu_jetstream.backend import Delivery
from kombu_jetstream.deadletter import DeadLetter, Reason
from kombu_jetstream.topology import LEVELS

from .settings import dotted_name

__all__ = ["Death", "error_of", "letter_of"]


def error_of(einfo: ExceptionInfo) -> BaseException:
    """Return the exception in what a pool hands over."""
    error: Any = einfo.exception
    found: BaseException = error.exc if isinstance(error, ExceptionWithTraceback) else error
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """Why a task ended for good."""

    reason: Reason
    error: str | None = None
    message: str | None = None
    traceback: str | None = None

    @classmethod
    def of(cls, einfo: ExceptionInfo, reason: Reason) -> Death:
        """Return the death by an exception.

        An exception that cannot be pickled arrives from the pool's process under another class;
        its name is known all the same.
        """
        error = error_of(einfo)
        if isinstance(error, UnpickleableExceptionWrapper):
            name = f"{error.exc_module}.{error.exc_cls_name}".removeprefix("builtins.")
        else:
            name = dotted_name(error_type(einfo))
        return cls(
            reason=reason,
            error=name,
            message=_text_of(error),
            traceback=str(einfo.traceback or ""),
        )


def _text_of(error: BaseException) -> str:
    """Return an exception's text, which its class may fail to make."""
    try:
        return str(error)
    except Exception as exc:
        return f"(its text cannot be made: {type(exc).__name__})"


def error_type(einfo: ExceptionInfo) -> type[BaseException]:
    """Return the class of the exception that was raised, if it could be pickled."""
    raised = einfo.type
    return raised if isinstance(raised, type) else type(error_of(einfo))


def letter_of(
    death: Death,
    delivery: Delivery,
    headers: Mapping[str, Any],
    *,
    task: str,
    task_id: str,
    worker: str,
    now: float,
) -> DeadLetter:
    """Return the dead letter of a task that ended with *death*.

    *headers* are the message's; *now* is in seconds since the epoch.
    """
    facts = deadletter.facts_of({"headers": headers})
    return DeadLetter(
        reason=death.reason,
        queue=delivery.queue,
        level=LEVELS[delivery.level],
        task=task,
        task_id=task_id,
        error=death.error,
        message=death.message,
        traceback=death.traceback,
        attempts=int(headers.get("retries") or 0) + 1,
        worker=worker,
        published_at=delivery.published_at or None,
        died_at=now,
        replayed=facts.get("replayed", 0),
    )
