"""Publishing with confirms: each awaited, or pipelined in a window.

A message has an id (``Nats-Msg-Id``), so that sending it again cannot store it twice within the
stream's dedup window.  Whatever may be a passing fault is tried again under the same id until
``publish_timeout`` is over.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .connection import NatsConnection
from .errors import (
    ChannelFailed,
    ConnectionLost,
    JetStreamTransportError,
    NoResponders,
    PublishRejected,
    PublishTimeout,
    RequestTimeout,
)
from .options import Options
from .protocol import Msg, status_code

__all__ = ["Publisher", "Unconfirmed"]

#: Seconds to wait for one confirm before the message is sent again (R3 over a slow disk takes
#: tens of milliseconds; a leader change takes seconds).
FIRST_WAIT = 2.0

#: Seconds between tries while a stream has no leader: it answers "no responders" at once, and a
#: tight loop would only load the server (facts 11).
RETRY_DELAYS = (0.05, 0.1, 0.2, 0.4, 0.5)

#: Tries without a leader after which the stream is looked for: one that does not exist will not
#: get a leader.
TRIES_BEFORE_CHECK = (1, 5)

#: Seconds between looks at what became of pipelined messages, while more are published.
LOOK_INTERVAL = 0.05

#: The cluster is electing a leader: worth another try.
CLUSTER_NOT_AVAILABLE = 10008


@dataclass(slots=True, eq=False)
class Unconfirmed:
    """A pipelined message whose confirm did not come yet."""

    subject: bytes
    payload: bytes
    headers: bytes
    sent_at: float
    deadline: float
    token: Any = None
    tries: int = 0
    retry_at: float = 0.0


def outcome_of(subject: bytes, msg: Msg) -> JetStreamTransportError | None:
    """Return None if *msg* confirms a publish to *subject*, else what it means."""
    payload = msg.payload
    if b'"error"' not in payload and b'"seq"' in payload:
        return None
    if status_code(msg.headers) == 503:
        return NoResponders(subject.decode())
    try:
        error = json.loads(payload)["error"]
        err_code, description = int(error.get("err_code", 0)), str(error.get("description", ""))
    except (ValueError, KeyError, TypeError):
        return PublishRejected(subject.decode(), 0, f"unreadable answer {payload[:80]!r}")
    if err_code == CLUSTER_NOT_AVAILABLE:
        return NoResponders(subject.decode())
    return PublishRejected(subject.decode(), err_code, description)


class Publisher:
    """Confirmed publishes over one connection."""

    def __init__(
        self,
        connection: NatsConnection,
        options: Options,
        missing: Callable[[bytes], JetStreamTransportError | None],
    ) -> None:
        self.connection = connection
        self.options = options
        #: asked when a stream does not answer: an error if it does not exist, None if it does
        self._missing = missing
        self.unconfirmed: dict[int, Unconfirmed] = {}
        self._next = 0
        self._look_at = 0.0
        self._failures: list[JetStreamTransportError] = []

    def publish(
        self, subject: bytes, payload: bytes, headers: bytes, timeout: float | None = None
    ) -> None:
        """Store one message and wait for the confirm, at most *timeout* seconds in all.

        Raises `PublishTimeout` when no confirm came, `PublishRejected` when the stream refuses,
        `MessageTooLarge` before anything is sent, `ConnectionLost` with the connection.
        """
        timeout = timeout if timeout is not None else self.options.publish_timeout
        deadline = time.monotonic() + timeout
        tries = 0
        wait = FIRST_WAIT
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise PublishTimeout(subject.decode(), timeout)
            try:
                answer = self.connection.request(
                    subject, payload, headers, timeout=min(wait, remaining)
                )
                error = outcome_of(subject, answer)
            except NoResponders as exc:
                error = exc
            except RequestTimeout:
                wait *= 2
                continue
            if error is None:
                return
            if not isinstance(error, NoResponders):
                raise error
            self._pause(subject, tries, deadline)
            tries += 1

    def _pause(self, subject: bytes, tries: int, deadline: float) -> None:
        if tries + 1 in TRIES_BEFORE_CHECK:
            missing = self._missing(subject)
            if missing is not None:
                raise missing
        delay = RETRY_DELAYS[min(tries, len(RETRY_DELAYS) - 1)]
        remaining = max(0.0, deadline - time.monotonic())
        self.connection.wait(lambda: False, min(delay, remaining))

    # -- pipelined ---------------------------------------------------------------------------

    def pipeline(
        self, subject: bytes, payload: bytes, headers: bytes, timeout: float | None = None
    ) -> None:
        """Send one message without waiting for its confirm.

        Waits only while ``publish_window`` messages are unconfirmed.  An earlier message that
        failed for good raises here, or in `flush`.
        """
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_INTERVAL
            self.connection.read_available()
            self.retry(now)
        self.raise_failures()
        timeout = timeout if timeout is not None else self.options.publish_timeout
        window = self.options.publish_window
        if len(self.unconfirmed) >= window:
            half = window // 2
            self._settle(lambda: len(self.unconfirmed) <= half)
            self.raise_failures()
            now = time.monotonic()
        self._send(Unconfirmed(subject, payload, headers, now, now + timeout))

    def _send(self, message: Unconfirmed) -> None:
        self._next += 1
        key = self._next

        def confirmed(answer: Msg | Exception) -> None:
            if isinstance(answer, Msg):
                error = outcome_of(message.subject, answer)
            else:
                error = answer if isinstance(answer, JetStreamTransportError) else None
            if isinstance(error, NoResponders):
                message.retry_at = time.monotonic() + RETRY_DELAYS[min(message.tries, 4)]
                message.tries += 1
                return
            self.unconfirmed.pop(key, None)
            if error is not None:
                self._failures.append(error)

        self.unconfirmed[key] = message
        try:
            message.token = self.connection.request_nowait(
                message.subject, message.payload, message.headers, confirmed
            )
        except ConnectionLost:
            raise  # stays unconfirmed: the next connection sends it again
        except Exception:
            del self.unconfirmed[key]
            raise

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every pipelined message is confirmed.

        Raises the first failure, or `PublishTimeout`; waits at most *timeout* seconds
        (default: each message's own ``publish_timeout``).
        """
        if self.unconfirmed:
            self._settle(lambda: not self.unconfirmed, timeout)
        self.raise_failures()

    def raise_failures(self) -> None:
        """Raise the first failure of an earlier pipelined message, once."""
        if self._failures:
            failure, self._failures = self._failures[0], []
            raise failure

    def _settle(self, done: Callable[[], bool], timeout: float | None = None) -> None:
        end = time.monotonic() + timeout if timeout is not None else None
        while not done():
            now = time.monotonic()
            self.retry(now)
            if end is not None and now > end:
                oldest = next(iter(self.unconfirmed.values()))
                raise PublishTimeout(oldest.subject.decode(), timeout or 0.0)
            self.connection.wait(done, 0.25)

    def retry(self, now: float) -> None:
        """Send again what was refused for want of a leader or got no answer.

        Raises what a missing stream means; the messages wait for the next connection then.
        """
        for key, message in list(self.unconfirmed.items()):
            if now > message.deadline:
                del self.unconfirmed[key]
                self._failures.append(
                    PublishTimeout(message.subject.decode(), self.options.publish_timeout)
                )
            elif (message.retry_at and now >= message.retry_at) or (
                not message.retry_at and now - message.sent_at > FIRST_WAIT
            ):
                if message.tries in TRIES_BEFORE_CHECK:
                    message.tries += 1
                    missing = self._missing(message.subject)
                    if missing is not None:
                        raise missing
                del self.unconfirmed[key]
                self.connection.cancel(message.token)
                message.retry_at, message.sent_at = 0.0, now
                self._send(message)

    def take_unconfirmed(self) -> list[Unconfirmed]:
        """Give up what is unconfirmed, for the next connection to send."""
        messages = list(self.unconfirmed.values())
        self.unconfirmed.clear()
        return messages

    def resend(self, messages: list[Unconfirmed]) -> None:
        """Send what an earlier connection left unconfirmed, under the same message ids."""
        now = time.monotonic()
        waiting = deque(messages)
        try:
            while waiting:
                message = waiting.popleft()
                message.sent_at, message.retry_at, message.tries = now, 0.0, 0
                message.deadline = now + self.options.publish_timeout
                try:
                    self._send(message)
                except ChannelFailed as exc:  # this server takes less in one message
                    self._failures.append(exc)
        finally:
            for message in waiting:  # the connection is lost again
                self._next += 1
                self.unconfirmed[self._next] = message
