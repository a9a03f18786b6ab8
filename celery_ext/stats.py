"""What became of the tasks of this worker, per task and queue.

Counted in the worker's main process, which hears of every execution whatever the pool, and read by
``celery inspect jetstream_stats`` (`remote`).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any, Literal, get_args

__all__ = ["OUTCOMES", "Outcome", "Stats"]

#: How one execution of a task ended.  ``rejected`` and ``ignored`` are Celery's `Reject` without
#: requeue and `Ignore`; ``requeued`` is `Reject` with it, or `celery_ext.nack`.
Outcome = Literal["succeeded", "failed", "retried", "rejected", "requeued", "ignored", "revoked"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Stats:
    """Counters of one worker.  Callable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = time.time()
        #: by task, queue and outcome or "dead_lettered"
        self._counts: Counter[tuple[str, str, str]] = Counter()
        #: by reason
        self._dead_letters: Counter[str] = Counter()
        self._hook_errors = 0

    def ended(self, task: str, queue: str, outcome: Outcome) -> None:
        """Count one execution."""
        key = (task, queue, outcome)
        with self._lock:
            self._counts[key] += 1

    def dead_lettered(self, task: str | None, queue: str, reason: str) -> None:
        """Count one dead letter, of no task if the message was none."""
        with self._lock:
            self._dead_letters[reason] += 1
            if task is not None:
                self._counts[task, queue, "dead_lettered"] += 1

    def hook_failed(self) -> None:
        """Count one error within a hook."""
        with self._lock:
            self._hook_errors += 1

    def report(self) -> dict[str, Any]:
        """Return the counters since the worker started, for the remote control."""
        with self._lock:
            counts, dead_letters = self._counts.copy(), self._dead_letters.copy()
            hook_errors = self._hook_errors
        tasks: dict[str, dict[str, dict[str, int]]] = {}
        for (task, queue, what), number in sorted(counts.items()):
            empty = dict.fromkeys(("processed", *OUTCOMES, "dead_lettered"), 0)
            row = tasks.setdefault(task, {}).setdefault(queue, empty)
            row[what] += number
            if what != "dead_lettered":
                row["processed"] += number
        return {
            "since": self._since,
            "tasks": tasks,
            "dead_letters": dict(sorted(dead_letters.items())),
            "hook_errors": hook_errors,
        }
