"""Whether producers write to JetStream now, or to Redis: a state machine without I/O or clock.

*Theory of operation.*  Everything that touches JetStream tells what came of it, with the time; the
table below says what that means.  One machine per process and broker, so that all connections of
a process change over together and the outage is logged once.

==============  ==============  =============================================================
state           event           next state
==============  ==============  =============================================================
``jetstream``   ``failed``      the same, until it has failed for ``patience``: ``degraded``
``jetstream``   ``gave_up``     ``degraded``: one try took all the patience (a frozen server)
``jetstream``   ``worked``      the same, and the failure is forgotten
``degraded``    ``answered``    ``recovering``: a probe reached JetStream, connections are made anew
``recovering``  ``worked``      ``jetstream``
``recovering``  ``failed``,     ``degraded`` at once: the patience was spent before
                ``gave_up``
==============  ==============  =============================================================

What is not in the table changes nothing.  `Failover` is called from several threads; each call is
one transition under a lock.
"""

from __future__ import annotations

import logging
import threading
from enum import Enum

__all__ = ["TRANSITIONS", "Event", "Failover", "State"]

logger = logging.getLogger(__name__)


class State(Enum):
    JETSTREAM = "jetstream"
    DEGRADED = "degraded"
    RECOVERING = "recovering"


class Event(Enum):
    #: connecting or publishing failed for want of JetStream
    FAILED = "failed"
    #: one try lasted for all the patience there is
    GAVE_UP = "gave_up"
    #: JetStream did what it was asked
    WORKED = "worked"
    #: a probe had an answer
    ANSWERED = "answered"


#: FAILED in the state JETSTREAM is the one event whose outcome depends on time, see `Failover`.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.JETSTREAM, Event.GAVE_UP): State.DEGRADED,
    (State.DEGRADED, Event.ANSWERED): State.RECOVERING,
    (State.RECOVERING, Event.WORKED): State.JETSTREAM,
    (State.RECOVERING, Event.FAILED): State.DEGRADED,
    (State.RECOVERING, Event.GAVE_UP): State.DEGRADED,
}


class Failover:
    """The state of one broker in one process; *patience* is ``fallback_after``, in seconds."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.state = State.JETSTREAM
        #: how often Redis took over
        self.failovers = 0
        self._failing_since: float | None = None
        self._down_since = 0.0
        self._lock = threading.Lock()

    @property
    def is_degraded(self) -> bool:
        return self.state is State.DEGRADED

    def patience_left(self, now: float) -> float:
        """Return how long JetStream may go on failing before Redis takes over."""
        if self.state is not State.JETSTREAM:
            return 0.0
        since = self._failing_since
        return self.patience if since is None else max(0.0, since + self.patience - now)

    def happened(self, event: Event, now: float, cause: object = None) -> State:
        """Take an event and return the state after it; *cause* is for the log."""
        with self._lock:
            before = self.state
            self.state = self._next(event, now)
            if self.state is State.DEGRADED and before is State.JETSTREAM:
                self.failovers += 1
                since = self._failing_since
                self._down_since = since if since is not None else now
                logger.warning("JetStream is away (%s), Redis takes over", cause)
            elif self.state is State.JETSTREAM and before is State.RECOVERING:
                logger.warning("JetStream is back, it was away for %.1f s", now - self._down_since)
            if self.state is not State.JETSTREAM or event is Event.WORKED:
                self._failing_since = None
            return self.state

    def _next(self, event: Event, now: float) -> State:
        if self.state is State.JETSTREAM and event is Event.FAILED:
            if self._failing_since is None:
                self._failing_since = now
            is_over = now - self._failing_since >= self.patience
            return State.DEGRADED if is_over else State.JETSTREAM
        return TRANSITIONS.get((self.state, event), self.state)
