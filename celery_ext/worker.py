"""The hooks of one worker: its tasks get the retry policy and the request class, and back.

Lives in the worker's main process and, by the fork, in the processes of its pool, where only the
wrapped tasks matter.  Nothing of it may break a task: an error in here is logged and counted.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from celery import Celery, Task
from celery.app.trace import build_tracer
from celery.utils.imports import symbol_by_name
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.mingle import Mingle

from kombu_jetstream.deadletter import death_id

from . import remote, retry
from .burials import Burials, Remains
from .letters import Death, error_of, error_type, letter_of
from .outcomes import DeadLettered
from .requests import hooked
from .retry import Failure, decide
from .settings import RetryPolicy, Settings
from .stats import Outcome, Stats

if TYPE_CHECKING:
    from billiard.einfo import ExceptionInfo
    from celery.worker.request import Request

__all__ = ["WorkerHooks"]

logger = logging.getLogger(__name__)

#: Steps that Celery starts with some kinds of broker only.
_FOR_SOME_BROKERS: tuple[Any, ...] = (Mingle, Gossip)


class WorkerHooks:
    """What is done to the tasks and requests of one worker."""

    def __init__(self, app: Celery, settings: Settings, driver_type: str, hostname: str) -> None:
        self.app = app
        self.settings = settings
        self.stats = Stats()
        self._driver_type = driver_type
        self._hostname = hostname
        self._burials = Burials(app)
        #: of the tasks that follow one of ours
        self._policies: dict[str, RetryPolicy] = {}
        self._request_classes: dict[Any, type[Request]] = {}
        #: tasks we have seen, and what they had as `Request` of their own
        self._tasks: dict[Task, Any] = {}
        self._without: dict[Any, set[str]] = {}
        self._stopped = False

    # Start and end

    def start(self) -> None:
        """Take the tasks over; before the pool and the consumer are made."""
        remote.answer(self._report)
        for step in _FOR_SOME_BROKERS:
            self._without[step] = step.compatible_transports
            step.compatible_transports = step.compatible_transports | {self._driver_type}
        self.take_tasks()

    def take_tasks(self) -> None:
        """Take over the tasks that were registered since the last call."""
        for task in list(self.app.tasks.values()):
            if task not in self._tasks:
                self._take(task)

    def _take(self, task: Task) -> None:
        self._tasks[task] = task.__dict__.get("Request")
        task.Request = self._request_class(task.Request)
        policy = self.settings.retry_for(task.name)
        if policy is None or retry.has_own_policy(task):
            return
        self._policies[task.name] = policy
        retry.wrap(task, policy)
        self._trace_anew(task)

    def _request_class(self, own: Any) -> type[Request]:
        found = self._request_classes.get(own)
        if found is None:
            found = self._request_classes[own] = hooked(symbol_by_name(own), self)
        return found

    def stop(self) -> None:
        """Undo all that `start` did.

        A worker that goes on has requests of our class until it connects again; they do nothing.
        """
        self._stopped = True
        for task, request_class in self._tasks.items():
            if request_class is None:
                task.__dict__.pop("Request", None)
            else:
                task.Request = request_class
            if retry.is_wrapped(task):
                retry.unwrap(task)
                self._trace_anew(task)
        self._tasks.clear()
        self._policies.clear()
        for step, transports in self._without.items():
            step.compatible_transports = transports
        self._without.clear()
        self._burials.close()
        remote.stop_answering()

    def _trace_anew(self, task: Task) -> None:
        """Build a task's tracer again, if it has one: it holds on to `Task.run`."""
        if task.__trace__ is not None:
            app = self.app
            task.__trace__ = build_tracer(task.name, task, app.loader, self._hostname, app=app)

    def _report(self, app: Celery) -> dict[str, Any] | None:
        if app is not self.app:
            return None
        report = self.stats.report()
        # Loaded by the transport only when there is a fallback.
        module = sys.modules.get("kombu_jetstream.fallback")
        if module is not None:
            report["fallback"] = module.counters()
        return report

    # What the requests ask

    def ended(self, request: Request, outcome: Outcome) -> None:
        """Count one execution."""
        if self._stopped:
            return
        try:
            self.stats.ended(request.task.name, _queue_of(request), outcome)
        except Exception:
            self.failed("counting a task")

    def death_of(self, request: Request, einfo: ExceptionInfo) -> Death | None:
        """Return the death of a task that failed for good, or None if nothing is to be kept."""
        try:
            return self._death_of(request, einfo)
        except Exception:
            self.failed("looking at the failure of a task")
            # It failed, whatever it is that cannot be looked at: better a letter that says less.
            return Death(reason="task_failed") if self.settings.dead_letter else None

    def _death_of(self, request: Request, einfo: ExceptionInfo) -> Death | None:
        task, error = request.task, error_of(einfo)
        if self._stopped:
            return None
        if not request.message.delivery.token:
            return None  # of a Broadcast queue: every worker has it, and no queue to go back to
        if isinstance(error, DeadLettered):
            return Death(reason="rejected", message=str(error))
        if not self.settings.dead_letter or not getattr(task, "dead_letter", True):
            return None
        raised = error_type(einfo)
        decision = decide(
            self._policies.get(task.name),
            Failure(
                error=raised,
                attempt=_attempt(request),
                expected=issubclass(raised, task.throws or ()),
            ),
        )
        if isinstance(decision, retry.GiveUp):
            return None
        # A policy that would try again was overruled: the retry could not be published.
        reason = decision.reason if isinstance(decision, retry.DeadLetter) else "task_failed"
        return Death.of(einfo, reason)

    def bury(self, request: Request, death: Death) -> bool:
        """Store the dead letter of a request's message; return whether the message may go.

        It may not when it is still unsettled and the dead letter could not be stored; that of a
        message settled already is stored later.  Blocks for a round trip, or some seconds while
        the broker is away.
        """
        try:
            remains = self._remains(request, death)
        except Exception:
            self.failed(f"making the dead letter of {request.humaninfo()}")
            return True
        try:
            self._burials.store(remains)
        except Exception as exc:
            self.stats.hook_failed()
            logger.error(
                "the dead letter of %s could not be stored, trying later: %s",
                request.humaninfo(),
                exc,
            )
            if request.acknowledged:
                self._burials.store_later(remains)
            return False
        logger.info("%s is a dead letter: %s", request.humaninfo(), death.reason)
        return True

    def _remains(self, request: Request, death: Death) -> Remains:
        message = request.message
        delivery = message.delivery
        letter = letter_of(
            death,
            delivery,
            message.headers,
            task=request.task.name,
            task_id=request.id,
            worker=request.hostname,
            now=time.time(),
        )
        return Remains(letter, delivery.payload, death_id(delivery.token, delivery.payload))

    def failed(self, what: str) -> None:
        """Log and count the exception that is being handled."""
        self.stats.hook_failed()
        logger.exception("celery_ext failed in %s", what)


def _attempt(request: Request) -> int:
    return int(request.request_dict.get("retries") or 0) + 1


def _queue_of(request: Request) -> str:
    return str(request.message.queue)
