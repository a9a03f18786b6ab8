"""What the worker's main process does when a task has ended: dead letters, `nack`, statistics.

Celery lets a task choose the class of its requests (``Task.Request``).  A request lives in the
main process, has the message as it came, and hears how the task ended, in whatever pool; late
acknowledgements go through it.  So here a dead letter can be the original message byte for byte,
and be stored before the message is settled:

* a message that was acknowledged early becomes a dead letter as soon as the task has failed;
* one that was not, in front of its acknowledgement, and only if there is one: Celery may put it
  back instead (worker lost, time limit).  If the dead letter cannot be stored, it goes back, too.

The pool's processes know nothing of it: they have neither the message nor a connection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import celery
from billiard.einfo import ExceptionInfo
from celery.exceptions import Ignore, Reject, Retry, Terminated, TimeLimitExceeded
from celery.worker import state
from celery.worker.request import Request

from kombu_jetstream.deadletter import RETRY_INTERVAL
from kombu_jetstream.errors import MessageTooLarge

from .letters import Death, error_of
from .outcomes import DeadLettered, Nack
from .stats import Outcome

if TYPE_CHECKING:
    from .worker import WorkerHooks

__all__ = ["hooked"]

#: Whether Celery stores a failure for a `Reject` without requeue; before 5.7 it stored nothing.
REJECT_IS_FAILURE = celery.VERSION >= (5, 7)


def hooked(base: type[Request], worker: WorkerHooks) -> type[Request]:
    """Return *base* as a class whose requests tell *worker* how their tasks ended."""
    return type(f"Hooked{base.__name__}", (_HookedRequest, base), {"_worker": worker})


class _HookedRequest(Request):
    """A request that looks after its message."""

    _worker: ClassVar[WorkerHooks]

    #: why the task ended, until the dead letter is stored or the message went back
    _death: Death | None = None
    #: how the execution ended, once it has
    _outcome: Outcome | None = None
    _counted = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Celery makes a class for each task (`create_request_cls`), whose `on_success` is a copy
        # of `Request.on_success` that does not call it.
        if "on_success" in cls.__dict__:
            cls.on_success = _counting(cls.on_success)  # type: ignore[method-assign]

    def on_success(self, failed__retval__runtime: tuple[Any, Any, Any], **kwargs: Any) -> None:
        super().on_success(failed__retval__runtime, **kwargs)
        if not failed__retval__runtime[0]:
            self._count("succeeded")

    def on_failure(
        self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        error = error_of(exc_info)
        if isinstance(error, Nack) and not self.acknowledged:
            state.task_ready(self)
            self._give_back(error.delay)
            self._count("requeued")
            return
        self._outcome = self._outcome_of(error)
        if self._outcome == "failed":
            self._death = self._worker.death_of(self, exc_info)
        if isinstance(error, DeadLettered) and not REJECT_IS_FAILURE:
            self.task.backend.mark_as_failure(
                self.id, error, request=self._context, store_result=self.store_errors
            )
        try:
            super().on_failure(exc_info, send_failed_event, return_ok)
        except MessageTooLarge:
            # The result backend is rpc://, and the text of the error more than the server takes.
            # Celery would end the worker for it (solo), or leave the message unsettled.
            self._worker.failed(f"storing how {self.humaninfo()} failed")
            if not self.acknowledged:
                self.acknowledge()
        finally:
            self._end()

    def on_timeout(self, soft: bool, timeout: float) -> None:
        # The prefork pool has reported the failure before; a gevent pool only tells of the time.
        if soft or self._outcome is not None or state.should_terminate:
            super().on_timeout(soft, timeout)
            return
        self._outcome = "failed"
        self._death = self._worker.death_of(self, _raised(TimeLimitExceeded(timeout)))
        try:
            super().on_timeout(soft, timeout)
        finally:
            self._end()

    def _outcome_of(self, error: BaseException) -> Outcome | None:
        """Return how an execution that raised *error* ended; None if it was ended from outside."""
        if isinstance(error, DeadLettered):
            return "failed"
        if isinstance(error, Reject):
            return "requeued" if error.requeue else "rejected"
        if isinstance(error, Ignore):
            return "ignored"
        if isinstance(error, Retry):
            return "retried"
        if isinstance(error, Terminated) or self._already_revoked or self._already_cancelled:
            return None
        return "failed"

    # What Celery decides in `on_failure`

    def acknowledge(self) -> None:
        if self._death is not None and not self.acknowledged and not self._bury():
            self._outcome = "requeued"
            self._give_back(RETRY_INTERVAL)
            return
        super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        if self._death is not None and not self.acknowledged:
            if requeue:
                self._death, self._outcome = None, "requeued"
            elif self._bury():
                # The transport would make another dead letter of it.
                super().acknowledge()
                self.send_event("task-rejected", requeue=False)
                return
        super().reject(requeue)

    def _retry_worker_lost(self, exc: BaseException, exc_info: ExceptionInfo) -> bool:
        """Celery 5.7: ``retry_on_worker_lost`` publishes the task again, then acknowledges."""
        death, self._death = self._death, None
        retried = bool(super()._retry_worker_lost(exc, exc_info))
        if retried:
            self._outcome = "retried"
        else:
            self._death = death
        return retried

    def _success_was_stored(self) -> Any:
        """Celery 5.7: a worker lost after its task had succeeded is no failure."""
        stored = super()._success_was_stored()
        if stored:
            self._death, self._outcome = None, "succeeded"
        return stored

    # What is done then

    def _give_back(self, delay: float) -> None:
        try:
            self._message.requeue_later(delay)
        except Exception:  # it comes back by itself, when its lease ends
            self._worker.failed(f"giving back the message of {self.humaninfo()}")
        self.acknowledged = True
        self.send_event("task-rejected", requeue=True)

    def _bury(self) -> bool:
        death, self._death = self._death, None
        assert death is not None
        return self._worker.bury(self, death)

    def _end(self) -> None:
        """Bury a message that was acknowledged early, and count the execution."""
        if self._death is not None:
            self._bury()
        if self._outcome is not None:
            self._count(self._outcome)

    def _count(self, outcome: Outcome) -> None:
        if not self._counted:
            self._counted = True
            self._worker.ended(self, outcome)


def _counting(on_success: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(on_success)
    def counted(
        self: _HookedRequest, failed__retval__runtime: tuple[Any, Any, Any], **kwargs: Any
    ) -> None:
        on_success(self, failed__retval__runtime, **kwargs)
        if not failed__retval__runtime[0]:
            self._count("succeeded")

    return counted


def _raised(error: BaseException) -> ExceptionInfo:
    try:
        raise error
    except type(error):
        return ExceptionInfo()
