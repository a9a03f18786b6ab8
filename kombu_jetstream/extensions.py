"""What adds to the transport without being part of it, loaded in Celery processes.

A package announces an extension with an entry point of the group ``kombu_jetstream.extensions``:
a function without arguments that returns an `Extension`, or None if it has nothing to add.
`celery_ext` is one.  They are loaded once per process, when the transport is loaded and Celery is
there; programs that use kombu alone never import them.

An extension cannot break the transport: what it raises is logged, and the transport goes on
without it.
"""

from __future__ import annotations

import logging
import sys
import threading
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from .deadletter import DeadLetter, Reason

__all__ = ["GROUP", "Extension", "dead_lettered", "load", "reject_reason"]

logger = logging.getLogger(__name__)

#: Entry-point group.
GROUP = "kombu_jetstream.extensions"


class Extension(Protocol):
    """What the transport asks and tells an extension.  Called from any thread."""

    def reject_reason(self, task: str | None) -> Reason | None:
        """Return why a message of *task* was rejected, or None if that is not known."""

    def dead_lettered(self, letter: DeadLetter) -> None:
        """A dead letter was stored."""


class _Loaded:
    """The extensions of this process: they are process-wide, as Celery's signals are."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done = False
        self.extensions: tuple[Extension, ...] = ()


_loaded = _Loaded()


def load() -> None:
    """Load the extensions unless that was done, or Celery is not imported.  Never raises."""
    if _loaded.done or "celery" not in sys.modules:
        return
    with _loaded.lock:
        if _loaded.done:  # by another thread, meanwhile
            return  # type: ignore[unreachable]
        # First, as an extension may construct a connection, which loads the transport.
        _loaded.done = True
        found = (_extension(entry) for entry in entry_points(group=GROUP))
        _loaded.extensions = tuple(extension for extension in found if extension is not None)


def _extension(entry: EntryPoint) -> Extension | None:
    try:
        extension: Extension | None = entry.load()()
    except Exception:
        logger.exception("extension %r cannot be loaded", entry.name)
        return None
    return extension


def reject_reason(task: str | None) -> Reason:
    """Return why a message of *task* was rejected: "rejected" unless an extension knows better."""
    for extension in _loaded.extensions:
        try:
            reason = extension.reject_reason(task)
        except Exception:
            logger.exception("an extension failed to tell why a message was rejected")
            continue
        if reason is not None:
            return reason
    return "rejected"


def dead_lettered(letter: DeadLetter) -> None:
    """Tell the extensions of a stored dead letter."""
    for extension in _loaded.extensions:
        try:
            extension.dead_lettered(letter)
        except Exception:
            logger.exception("an extension failed to take notice of a dead letter")
