"""The only place that connects Celery's signals: each handler is a few lines around a decision.

Signals are process-wide and mostly do not say which app they are about, so there is one `Hooks` per
process, for all apps whose broker is ``jetstream://``.  It is made when the transport is loaded
(`celery_ext.extension`) or by `celery_ext.install`.

==============================  ===========================================================
``before_task_publish``         the priority of the task's level; the trace context
``worker_init``                 settings are read, the worker's tasks taken over (`worker`)
``worker_process_init``         so are tasks registered since: a process of the pool begins
``worker_ready``                the same in the main process
``worker_shutdown``             all of it is undone
``task_revoked``                is counted
``task_prerun``, ``_postrun``   the trace context of the message, if there is OpenTelemetry
==============================  ===========================================================

Celery logs what a handler raises and goes on.  One error is different: a worker with settings that
cannot be read does not start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import billiard
from celery import Celery, _state, signals
from celery.utils.dispatch import Signal

from kombu_jetstream.deadletter import DeadLetter, Reason
from kombu_jetstream.errors import JetStreamTransportError

from . import tracing
from .priority import priority_of
from .settings import Globs, Settings

if TYPE_CHECKING:
    from .worker import WorkerHooks

__all__ = ["Hooks"]

logger = logging.getLogger(__name__)

DRIVER_TYPE = "jetstream"

#: Module that spawned processes of a pool are told to import; see there.
SPAWNED = "celery_ext.spawned"


@dataclass(frozen=True, slots=True)
class _Policies:
    """What an app wants; read once."""

    settings: Settings
    #: AMQP priority by task name.
    priorities: Globs[int]


#: Of an app with another broker, or with the hooks off.
_NOTHING = _Policies(Settings(hooks=False), Globs({}))


class Hooks:
    """The hooks of this process."""

    def __init__(self) -> None:
        self._policies: WeakKeyDictionary[Celery, _Policies] = WeakKeyDictionary()
        self._uninstalled: WeakSet[Celery] = WeakSet()
        self._workers: WeakKeyDictionary[Celery, WorkerHooks] = WeakKeyDictionary()
        self._off = False
        self._traces = tracing.is_available()
        #: the worker's main process, which loads this before it forks
        self._pid = os.getpid()
        self._in_spawned_process = False

    # Connecting

    def _handlers(self) -> Iterator[tuple[Signal, Callable[..., Any]]]:
        yield signals.before_task_publish, self.on_publish
        yield signals.worker_init, self.on_worker_init
        yield signals.worker_process_init, self.on_pool_process
        yield signals.worker_ready, self.on_worker_process
        yield signals.worker_shutdown, self.on_worker_shutdown
        yield signals.task_revoked, self.on_revoked
        if self._traces:
            yield signals.task_prerun, self.on_prerun
            yield signals.task_postrun, self.on_postrun

    def connect(self) -> None:
        """Connect the signals, unless `uninstall_all` was called; once is enough."""
        if self._off:
            return
        for signal, handler in self._handlers():
            signal.connect(handler, weak=False, dispatch_uid=f"celery_ext.{handler.__name__}")

    def _disconnect(self) -> None:
        for signal, handler in self._handlers():
            signal.disconnect(dispatch_uid=f"celery_ext.{handler.__name__}")

    def install(self, app: Celery) -> None:
        """Look after *app*, and read its settings again."""
        self._uninstalled.discard(app)
        self._policies.pop(app, None)
        self._off = False
        self.connect()

    def uninstall(self, app: Celery) -> None:
        """Leave *app* alone from now on, its tasks as they were."""
        self._uninstalled.add(app)
        self._stop(app)

    def uninstall_all(self) -> None:
        """Leave every app alone, until one is installed again."""
        self._off = True
        for app in list(self._workers):
            self._stop(app)
        self._disconnect()

    def _stop(self, app: Celery) -> None:
        worker = self._workers.pop(app, None)
        if worker is not None:
            worker.stop()

    # Settings

    def _of(self, app: Celery) -> _Policies:
        """Return what *app* wants.  Raises `OptionsError` the first time if that is no good."""
        if app in self._uninstalled:
            return _NOTHING
        policies = self._policies.get(app)
        if policies is None:
            self._policies[app] = _NOTHING  # if it raises, once
            policies = self._policies[app] = _read(app)
        return policies

    # The handlers

    def on_publish(
        self,
        sender: str,
        declare: Any = None,
        properties: Any = None,
        headers: Any = None,
        **kwargs: Any,
    ) -> None:
        """Give a message the priority of its task's level, unless the caller gave one."""
        app = self._publisher(sender, declare)
        if app is None:
            return
        try:
            policies = self._of(app)
        except JetStreamTransportError as error:
            logger.error("publishing without the settings of app %r: %s", app.main, error)
            return
        if properties.get("priority") is None:
            priority = policies.priorities.get(sender)
            if priority is not None:
                properties["priority"] = priority
        if self._traces and policies.settings.hooks:
            tracing.trace_publish(headers)

    def on_prerun(self, task: Any, **kwargs: Any) -> None:
        if task.app in self._workers:
            tracing.trace_task_start(task.request)

    def on_postrun(self, task: Any, **kwargs: Any) -> None:
        if task.app in self._workers:
            tracing.trace_task_end(task.request)

    def on_worker_init(self, sender: Any, **kwargs: Any) -> None:
        """Take over the tasks of a worker that is about to start."""
        app = sender.app
        self._policies.pop(app, None)
        try:
            worker = self._begin(app, sender.hostname)
        except JetStreamTransportError as error:
            # Celery goes on after any `Exception`, and the settings would be without effect.
            raise SystemExit(f"error: {error}") from error
        if worker is not None and _spawns(sender):
            app.conf.include = (*(app.conf.include or ()), SPAWNED)

    def on_pool_process(self, sender: Any, **kwargs: Any) -> None:
        """Begin in a process of the pool; the main one says what the server lacks."""
        if os.getpid() != self._pid:  # solo and threads have none, and send the signal all the same
            from kombu_jetstream.session import tell_nothing

            tell_nothing()
        self.on_worker_process(sender, **kwargs)

    def on_worker_process(self, sender: Any, **kwargs: Any) -> None:
        """Take over what was registered since, in the main process or in one of the pool's."""
        if self._in_spawned_process:
            self._begin(_state.get_current_app(), sender)
        for worker in self._workers.values():
            worker.take_tasks()

    def _begin(self, app: Celery, hostname: str) -> WorkerHooks | None:
        settings = self._of(app).settings
        if not settings.hooks:
            return None
        from .worker import WorkerHooks  # loads the worker's modules, for workers only

        self._stop(app)
        worker = self._workers[app] = WorkerHooks(app, settings, DRIVER_TYPE, hostname)
        worker.start()
        return worker

    def connect_in_spawned_process(self) -> None:
        """Connect in a process of the pool that was not forked, and has no worker to take over."""
        self._in_spawned_process = True
        self.connect()

    def on_worker_shutdown(self, sender: Any, **kwargs: Any) -> None:
        self._stop(sender.app)

    def on_revoked(self, request: Any, sender: Any = None, **kwargs: Any) -> None:
        worker = self._workers.get(sender.app)
        if worker is not None:
            queue = (request.delivery_info or {}).get("routing_key") or ""
            worker.stats.ended(sender.name, queue, "revoked")

    # What the transport asks and tells (`kombu_jetstream.extensions.Extension`)

    def reject_reason(self, task: str | None) -> Reason | None:
        """Celery rejects messages of tasks it does not know before it says so by a signal."""
        workers = list(self._workers.values())
        if task is None or not workers or any(task in worker.app.tasks for worker in workers):
            return None
        return "unknown_task"

    def dead_lettered(self, letter: DeadLetter) -> None:
        for worker in self._workers.values():
            worker.stats.dead_lettered(letter.task, letter.queue, letter.reason)

    # Which app publishes

    def _publisher(self, task_name: str, declare: Any) -> Celery | None:
        """Return the app that publishes, which the signal does not tell.

        With one app there is no question.  Of several, it is the one the declared queue belongs
        to, else the one that has the task, else the current one.
        """
        apps = [app for app in _state._get_active_apps() if app.configured]
        if len(apps) <= 1:
            return apps[0] if apps else None
        for queue in declare or ():
            for app in apps:
                if app.amqp.queues.get(queue.name) is queue:
                    return app
        having = [app for app in apps if task_name in app._tasks]
        current = _state.get_current_app()
        return having[0] if len(having) == 1 else current if current in apps else None


def _spawns(controller: Any) -> bool:
    """Tell whether the processes of a worker's pool are fresh interpreters, not forks."""
    method = getattr(controller, "pool_start_method", "fork")  # Celery 5.7
    return bool(method != "fork" or billiard.get_start_method() != "fork")


def _read(app: Celery) -> _Policies:
    with app.connection_for_write() as connection:
        if getattr(connection.get_transport_cls(), "driver_type", None) != DRIVER_TYPE:
            return _NOTHING
        settings = Settings.read(app.conf)
        if not settings.hooks:
            return _NOTHING
        if not settings.priorities:
            return _Policies(settings, Globs({}))
        order = connection.transport.settings()[0].priority_order
    return _Policies(settings, settings.priorities.map(lambda level: priority_of(level, order)))
