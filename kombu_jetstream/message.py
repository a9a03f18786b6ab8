"""A received message as kombu sees it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from kombu.transport import base

from .backend import Delivery
from .envelope import Envelope, decode_body

if TYPE_CHECKING:
    from .channel import Channel

__all__ = ["Message"]


class Message(base.Message):  # type: ignore[misc]  # kombu has no types
    """One delivery, with its envelope undone.

    The delivery knows this object weakly: when nobody holds it any more, nobody can settle it.
    """

    def __init__(
        self, envelope: Envelope, delivery: Delivery, channel: Channel, consumer_tag: str | None
    ) -> None:
        properties: dict[str, Any] = envelope["properties"]
        info = dict(properties["delivery_info"])
        info["redelivered"] = delivery.attempt > 1
        if properties.get("priority") is not None:
            info["priority"] = properties["priority"]
        if consumer_tag is not None:
            info["consumer_tag"] = consumer_tag
        super().__init__(
            body=decode_body(envelope["body"], properties.get("body_encoding")),
            delivery_tag=delivery.tag,
            content_type=envelope.get("content-type"),
            content_encoding=envelope.get("content-encoding"),
            delivery_info=info,
            properties=properties,
            headers=envelope.get("headers"),
            postencode="utf-8",
            channel=channel,
        )
        #: the delivery, with the payload as it was stored; it knows this object weakly
        self.delivery = delivery
        #: how often the message was delivered, this time included
        self.attempt = delivery.attempt
        #: the queue it came from; delivery_info has exchange and routing key only
        self.queue = delivery.queue
        delivery.message = weakref.ref(self)

    def requeue_later(self, delay: float) -> None:
        """Put this message back, to be delivered again after *delay* seconds.

        It counts as a delivery (``max_deliveries``).  Raises as `requeue` does.
        """
        if self.channel is None:
            raise self.MessageStateError("This message does not have a receiving channel")
        if self.acknowledged:
            raise self.MessageStateError(
                f"Message already acknowledged with state: {self._state}"
            )
        self.channel.nack_later(self.delivery_tag, delay)
        self._state = "REQUEUED"
