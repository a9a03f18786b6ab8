"""How a task settles its own message: `nack` and `dead_letter`, called inside of it.

Both raise exceptions that Celery understands, kinds of its `Reject`: no result is stored for a
message that comes back, and a task that ends for good is failed.  They are kinds of `Ignore` too,
because that is what ``autoretry_for=(Exception,)`` lets through.

What is special about them is done where the message is, in the worker's main process (`requests`).
Without the hooks, and on other brokers, a `Nack` puts the message back at once, and a
`DeadLettered` rejects it.
"""

from __future__ import annotations

import math
from typing import NoReturn

from celery import current_task
from celery.exceptions import Ignore, Reject

__all__ = ["DeadLettered", "Nack", "dead_letter", "nack"]


class Nack(Ignore, Reject):
    """The message is to be delivered again after `delay` seconds."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        Reject.__init__(self, f"again in {delay:g} s" if delay else "again at once", requeue=True)
        self.args = (delay,)  # what pickle and the JSON result format build it from

    def __str__(self) -> str:
        return str(self.reason)

    __repr__ = Reject.__repr__


class DeadLettered(Ignore, Reject):
    """The message is to become a dead letter, with `reason` as its text."""

    def __init__(self, reason: str) -> None:
        Reject.__init__(self, reason, requeue=False)
        self.args = (reason,)

    def __str__(self) -> str:
        return str(self.reason)

    __repr__ = Reject.__repr__


def nack(delay: float = 0.0) -> NoReturn:
    """Give the running task's message back, to be delivered again after *delay* seconds.

    The task keeps its id, and no retry is counted; the delivery is, so that ``max_deliveries``
    ends it.  Only for tasks with ``acks_late``, as others have acknowledged their message before
    they run: `RuntimeError` there.  `ValueError` for a bad *delay*.
    """
    if isinstance(delay, bool) or not isinstance(delay, (int, float)):
        raise TypeError(f"expected delay to be seconds >= 0, got {delay!r}")
    if not math.isfinite(delay) or delay < 0:
        raise ValueError(f"expected delay to be seconds >= 0, got {delay!r}")
    task = current_task._get_current_object() if current_task else None
    if task is not None and not task.acks_late:
        raise RuntimeError(
            f"task {task.name!r} acknowledges its message before it runs, so there is nothing to "
            "give back; set acks_late=True, or use self.retry"
        )
    raise Nack(float(delay))


def dead_letter(reason: str) -> NoReturn:
    """End the running task for good: it fails, and its message becomes a dead letter.

    *reason* is what the dead letter says, as its message; its reason code is ``rejected``.
    """
    raise DeadLettered(str(reason))
