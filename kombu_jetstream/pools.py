"""What a Celery worker's pool has to do with its connection to the broker.

Where a pool runs tasks decides what may wait while they run (`consuming`), and Celery's prefork
pool forgets something when a connection is lost (`is_handing_over`).  Read from Celery's objects,
never changed.
"""

from __future__ import annotations

from typing import Any

from .tasks import taker_of

__all__ = ["has_processes", "is_handing_over", "pool_elsewhere", "process_count"]

#: Pools whose tasks run in other processes or threads, not where messages are read.
_PREFORK = "celery.concurrency.prefork"
_POOLS_ELSEWHERE = frozenset({_PREFORK, "celery.concurrency.thread"})


def pool_elsewhere(callback: object) -> Any:
    """Return the pool to which *callback* hands tasks, if it runs none in the event loop's thread.

    The kombu ``Consumer`` of Celery's tasks has its worker's ``on_decode_error``.
    """
    worker = getattr(getattr(callback, "__self__", None), "on_decode_error", None)
    pool = getattr(getattr(worker, "__self__", None), "pool", None)
    is_it = taker_of(callback) == "tasks" and type(pool).__module__ in _POOLS_ELSEWHERE
    return pool if is_it else None


def has_processes(pool: object) -> bool:
    """Tell whether a pool runs tasks beside the process that reads.

    Threads compete with it for the interpreter, and need more at hand.
    """
    return type(pool).__module__ == _PREFORK


def process_count(pool: Any) -> int | None:
    """Return how many processes a pool has; None when it has ended, tasks may be settled then."""
    return pool.num_processes if getattr(pool, "_pool", None) is not None else None


def is_handing_over(pool: Any) -> bool:
    """Tell whether a process of *pool* was given a task and has not said yet that it has it.

    Celery takes such a task for one that waits in the worker.  When a connection is lost it forgets
    those (``AsynPool.flush``), this one's end included: it runs, and runs again.
    """
    jobs = getattr(getattr(pool, "_pool", None), "_cache", None)
    return any(
        getattr(job, "_write_to", None) is not None and not job.accepted()
        for job in list((jobs or {}).values())
    )
