"""When a failed task is tried again, and how it is made to.

`decide` is the rule, without I/O or clock: it looks at one failure and returns `Retry`,
`DeadLetter` or `GiveUp`.  The rest applies it through Celery's own ``task.retry``, as
`celery.app.autoretry` does, so that states, chains, chords and the ``task_retry`` signal are as
with any other retry.

A task that has a policy of its own is left alone: one with ``autoretry_for``, or whose code calls
``retry``.  The code is looked at, as ``self.retry`` may be called in some cases only, and an
exception that comes out of `Task.retry` (it was tried often enough) is final as well.  Where
looking misleads, the task says it: ``jetstream_retry=False`` or ``True`` in its decorator.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import CodeType, TracebackType
from typing import Any, TypeAlias

from celery.app.task import Task
from celery.exceptions import Ignore, Reject
from celery.exceptions import Retry as CeleryRetry

from kombu_jetstream.deadletter import Reason

from .settings import RetryPolicy, dotted_name

__all__ = [
    "DeadLetter",
    "Decision",
    "Failure",
    "GiveUp",
    "Retry",
    "decide",
    "has_own_policy",
    "is_one_of",
    "retry_after",
    "wrap",
]

logger = logging.getLogger(__name__)

#: Doublings of the delay after which it is beyond any limit.
MAX_DOUBLINGS = 64


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after *delay* seconds."""

    delay: float


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Fail, and keep the message for that *reason*."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Fail, and keep nothing."""


Decision: TypeAlias = Retry | DeadLetter | GiveUp


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is known of one failed attempt."""

    error: type[BaseException]
    #: 1 for the first execution.
    attempt: int
    #: The task lists the exception in ``throws``: it belongs to what the task does.
    expected: bool = False
    #: Seconds the exception asks to wait, if it does.
    retry_after: float | None = None


def decide(
    policy: RetryPolicy | None,
    failure: Failure,
    uniform: Callable[[float, float], float] = random.uniform,
) -> Decision:
    """Return what is to become of a task after *failure*.

    Without a *policy* nothing is tried again.  A ``retry_after`` of the exception is obeyed as it
    is, since who asks for it knows; the back-off's limit and jitter are for the back-off alone.
    """
    if failure.expected:
        return GiveUp()
    if policy is None:
        return DeadLetter("task_failed")
    if is_one_of(failure.error, policy.unrecoverable):
        return DeadLetter("unrecoverable_error")
    if policy.retryable is not None and not is_one_of(failure.error, policy.retryable):
        return DeadLetter("unrecoverable_error")
    if failure.attempt >= policy.max_attempts:
        return DeadLetter("task_failed")
    if failure.retry_after is not None:
        return Retry(failure.retry_after)
    return Retry(_backoff(policy, failure.attempt, uniform))


def _backoff(policy: RetryPolicy, attempt: int, uniform: Callable[[float, float], float]) -> float:
    """Return the delay after a failed *attempt*: exponential, with full jitter (AWS's "Exponential
    Backoff And Jitter", which spreads the load best)."""
    doublings = min(attempt - 1, MAX_DOUBLINGS)
    delay = min(policy.backoff_max, policy.backoff_base * 2.0**doublings)
    return uniform(0.0, delay) if policy.jitter else delay


def is_one_of(error: type[BaseException], names: Iterable[str]) -> bool:
    """Tell whether *error* or a class it derives from has one of the dotted *names*.

    A name may be the one a package shows it by (``requests.ConnectionError`` is defined in
    ``requests.exceptions``): that is looked up in the modules that are loaded.
    """
    names = tuple(names)
    if not names:
        return False
    lineage = error.mro()
    if not {dotted_name(cls) for cls in lineage}.isdisjoint(names):
        return True
    return any(_loaded(name) in lineage for name in names)


def _loaded(name: str) -> type | None:
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return found if isinstance(found, type) else None


def retry_after(error: BaseException) -> float | None:
    """Return the seconds an exception asks to wait in its ``retry_after``, or None.

    A number, a `timedelta` or a number as text (the header's form) will do.
    """
    try:
        value = getattr(error, "retry_after", None)
    except Exception:  # a property of the exception's
        logger.exception("the retry_after of a %s cannot be read", type(error).__name__)
        return None
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if value is None or isinstance(value, bool):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


# Applying it


def has_own_policy(task: Task) -> bool:
    """Tell whether *task* is to be left alone; see the head of this module."""
    said = getattr(task, "jetstream_retry", None)
    if said is not None:
        return not said
    if task.name.startswith("celery."):  # Celery's own, which know what they do
        return True
    if getattr(task, "autoretry_for", ()) or hasattr(task, "_orig_run"):
        return True
    code = getattr(inspect.unwrap(task.run), "__code__", None)
    return code is not None and any("retry" in each.co_names for each in _with_nested(code))


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    """Yield *code* and that of the functions within."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_nested(constant)


def wrap(task: Task, policy: RetryPolicy) -> None:
    """Make *task* follow *policy*: `Task.run` of this object is replaced, see `unwrap`.

    Its tracer must be built after that, or again.
    """
    original = task.run

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (Ignore, Reject, CeleryRetry):
            raise
        except Exception as error:
            try:
                delay = _delay(task, policy, error)
            except Exception:  # the policy must not hide what went wrong
                logger.exception("the retry policy of task %s failed", task.name)
                delay = None
            if delay is None:
                raise
            _retry(task, policy, error, delay)

    run._jetstream_original = original  # type: ignore[attr-defined]
    task.run = run


def unwrap(task: Task) -> None:
    """Undo `wrap`."""
    if is_wrapped(task):
        del task.run


def is_wrapped(task: Task) -> bool:
    return hasattr(task.__dict__.get("run"), "_jetstream_original")


def _delay(task: Task, policy: RetryPolicy, error: Exception) -> float | None:
    """Return the seconds after which the running *task* is tried again, or None if it is not."""
    request = task.request
    if request.called_directly or _came_out_of_retry(error.__traceback__):
        return None
    decision = decide(
        policy,
        Failure(
            error=type(error),
            attempt=(request.retries or 0) + 1,
            expected=isinstance(error, task.throws or ()),
            retry_after=retry_after(error),
        ),
    )
    return decision.delay if isinstance(decision, Retry) else None


def _came_out_of_retry(traceback: TracebackType | None) -> bool:
    """Tell whether `Task.retry` raised it: the task gave up after tries of its own."""
    while traceback is not None:
        if traceback.tb_frame.f_code is Task.retry.__code__:
            return True
        traceback = traceback.tb_next
    return False


def _retry(task: Task, policy: RetryPolicy, error: Exception, delay: float) -> None:
    """Publish the task again and raise Celery's `Retry`; or *error*, if that cannot be done."""
    try:
        raise task.retry(exc=error, countdown=delay, max_retries=policy.max_attempts - 1)
    except Reject as refused:
        # The retry could not be published.  Celery would reject the message, which is gone if it
        # was acknowledged early; as a failure it becomes a dead letter.
        logger.error(
            "task %s[%s] could not be published for another attempt: %r",
            task.name,
            task.request.id,
            refused.reason,
        )
        raise error from refused
    finally:
        # `Task.retry` leaves its argument on the task, where `autoretry` would take it up.
        task.__dict__.pop("override_max_retries", None)
