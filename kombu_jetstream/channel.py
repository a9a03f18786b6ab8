"""One kombu channel: AMQP's verbs, each a few lines.

A channel is used by one thread, but for the settling verbs.  It is made of

- `declaring.Declaring`: exchanges, queues, bindings;
- `settling.Settling`: ack, reject, recover, and what becomes of messages that die;
- `consuming.Consuming`: consume, get, prefetch, and the pulls behind them;

and publishes (`outgoing`) and closes here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

from . import envelope
from .consuming import Consuming
from .errors import JetStreamTransportError, NoRoute
from .message import Message
from .pulls import IDLE_HEARTBEAT

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Channel"]

logger = logging.getLogger(__name__)

_channel_ids = count(1)


class Channel(Consuming):
    """What `Transport.create_channel` returns."""

    Message = Message

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.channel_id = next(_channel_ids)
        self.events: dict[str, set[Callable[..., Any]]] = {"basic_return": set()}

    # -- publishing ----------------------------------------------------------------------------

    def prepare_message(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> envelope.Envelope:
        """Return the message `basic_publish` takes."""
        return self._outgoing.prepare(
            body, priority, content_type, content_encoding, headers, properties
        )

    def basic_publish(
        self,
        message: envelope.Envelope,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Publish *message*: a confirmed write for each durable queue, a core publish for others.

        With *mandatory*, a message no queue takes comes back through ``events['basic_return']``.
        """
        self._open()
        if self._undecided:
            self._decide()
        seconds = confirm_timeout if confirm_timeout is not None else timeout
        routed = self._outgoing.publish(message, exchange, routing_key, mandatory, seconds)
        if not routed:
            returned = NoRoute(exchange, routing_key)
            for callback in list(self.events["basic_return"]):
                callback(returned, exchange, routing_key, message)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every pipelined publish of this connection is confirmed."""
        self._open().flush(timeout)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the consumers and hand back at once what was not settled."""
        if self.closed:
            return
        session = self._session
        if session.nats.is_open:
            try:
                self._close_orderly()
            except JetStreamTransportError as exc:
                logger.debug("while closing a channel: %s", exc)
        self.lose()

    def _close_orderly(self) -> None:
        session = self._session
        self._is_closing = True
        for consumer_tag in list(self._consumers):
            self.basic_cancel(consumer_tag)
        self._decide()
        with session.nats.corked():
            for tag in self.qos.up_to(0):
                self._settle(tag, "nak")
        if self._has_pulled:  # also if its consumers are cancelled by now
            # Messages that crossed the cancel arrive before the answer, and are handed back.
            session.nats.round_trip(IDLE_HEARTBEAT)
        # Else what was rejected just now would be delivered once more.
        session.nats.wait(lambda: not self.qos.is_giving_up, session.options.publish_timeout)

    def lose(self) -> None:
        """Close without a word; the ledger looks after what the application still holds."""
        if self.closed:
            return
        self.closed = True
        self.connection = None
        session = self._session
        for consumer in self._consumers.values():
            transient = session.transient.get(consumer.queue)
            if transient is not None:
                transient.consumers -= 1
        self._consumers.clear()
        self._consumers_by_queue.clear()
        session.ledger.release(self.qos)
        session.ledger.adopt(d for d in self.qos.deliveries() if d.token)
        if self in session.channels:
            session.channels.remove(self)
