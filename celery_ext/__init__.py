"""What Celery gets on top of the ``jetstream://`` transport: policies, by hooks.

Loaded by the transport in every Celery process, without an import in user code:

* retries with back-off for tasks that have none of their own (``jetstream_retry``);
* priority levels by task name (``jetstream_priorities``);
* dead letters of tasks that fail for good (``jetstream_dead_letter``);
* gossip, mingle and ``celery inspect jetstream_stats`` in workers.

Within a task, `nack` gives its message back for later, and `dead_letter` ends it for good.
`install` and `uninstall` are for those who want to say it; ``jetstream_hooks = False`` is the same
in the configuration.

==============  ====================================================================
`hooks`         connects Celery's signals, the only place that does
`settings`      the keys of the configuration (pure)
`retry`         when a task is tried again (pure), and how it is made to
`priority`      levels to numbers (pure)
`worker`        takes a worker's tasks over;  `requests` what happens when one has ended
`letters`       from a failure to a dead letter (pure);  `burials` stores them
`outcomes`      `nack` and `dead_letter`
`stats`         counters of a worker;  `remote` what ``celery inspect`` gets;  `waiting`
                tasks that wait in the broker
`tracing`       trace context in messages, with OpenTelemetry
==============  ====================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .outcomes import DeadLettered, Nack, dead_letter, nack

if TYPE_CHECKING:
    from celery import Celery

    from .hooks import Hooks

__all__ = ["DeadLettered", "Nack", "dead_letter", "extension", "install", "nack", "uninstall"]

#: The hooks of this process, once somebody asked for them: Celery's signals are process-wide, too.
_hooks: Hooks | None = None


def _hooks_of_process() -> Hooks:
    global _hooks
    if _hooks is None:
        from .hooks import Hooks  # not needed to use `nack`

        _hooks = Hooks()
    return _hooks


def extension() -> Hooks:
    """Connect the hooks and return them; the transport calls this when it is loaded.

    They do nothing in apps with another broker, and none in which ``jetstream_hooks`` is False.
    """
    hooks = _hooks_of_process()
    hooks.connect()
    return hooks


def connect_in_spawned_process() -> None:
    """Connect the hooks in a process of a pool; see `spawned`."""
    _hooks_of_process().connect_in_spawned_process()


def install(app: Celery) -> None:
    """Connect the hooks for *app* now, rather than with its first connection.

    Its settings are read when they are needed, and again after another `install`.
    """
    _hooks_of_process().install(app)


def uninstall(app: Celery | None = None) -> None:
    """Leave *app* alone from now on, its tasks as they were; None: every app of this process."""
    hooks = _hooks_of_process()
    if app is None:
        hooks.uninstall_all()
    else:
        hooks.uninstall(app)
