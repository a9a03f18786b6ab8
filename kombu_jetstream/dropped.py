"""Which deliveries of a lost connection nobody will settle any more.

A message object that nobody holds can never be settled, and a delivery knows its own weakly.  That
is enough but for one case.  Celery 5.7 drops the tasks that wait in the worker for their eta, as it
drops all that was reserved; but a timer's entry and the request refer to each other, and Celery's
lists keep the cancelled entry.  So for those the request is asked for, in Celery's own state.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

from .backend import Delivery

__all__ = ["is_dropped", "note_scheduled"]


def note_scheduled(deliveries: Iterable[Delivery]) -> None:
    """Note which of *deliveries* wait for their eta, right after the loss of their connection.

    Celery forgets that a moment later.
    """
    state: Any = sys.modules.get("celery.worker.state")
    scheduled = list(getattr(state, "scheduled_requests", ()))  # new in Celery 5.7
    requests = {id(request.message): request for request in scheduled}
    for delivery in deliveries:
        message = delivery.message() if delivery.message is not None else None
        request = requests.get(id(message)) if message is not None else None
        if request is not None:
            delivery.request = weakref.ref(request)


def is_dropped(delivery: Delivery) -> bool:
    """Tell whether nobody will settle *delivery*: its message is gone, or Celery dropped it."""
    if delivery.message is None or delivery.message() is None:
        return True
    request = delivery.request() if delivery.request is not None else None
    if request is None:
        return False
    state: Any = sys.modules["celery.worker.state"]
    if request in state.scheduled_requests:
        return False
    if request in state.reserved_requests or request.time_start is not None:
        delivery.request = None  # its time came before it was dropped: it runs, or did
        return False
    return state.requests.get(request.id) is not request
