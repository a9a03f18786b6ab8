"""A received message as kombu sees it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.transport import base

from .backend import Delivery
from .envelope import MAX_DEPTH, Envelope, decode_body, is_too_deep
from .errors import MalformedMessage
from .tasks import check_body

if TYPE_CHECKING:
    from .channel import Channel

__all__ = ["Message"]


class Message(base.Message):
    """One delivery, with its envelope undone.

    The delivery knows this object weakly: when nobody holds it any more, nobody can settle it.

    A message for Celery's tasks (*is_task*) whose body cannot be decoded becomes a dead letter when
    Celery settles it: Celery acknowledges what it cannot decode, which would be the end of it.
    """

    def __init__(
        self,
        envelope: Envelope,
        delivery: Delivery,
        channel: Channel,
        consumer_tag: str | None,
        is_task: bool = False,
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
        self._is_task = is_task
        #: why a task's body cannot be decoded, once that was tried
        self._undecodable: BaseException | None = None
        if is_task and self.errors:  # kombu could not decompress the body
            self._undecodable = self.errors[0][1]
        delivery.message = weakref.ref(self)

    def _decode(self) -> Any:
        if not self._is_task:
            return super()._decode()
        try:
            decoded = super()._decode()
            check_body(self.headers, decoded)
            if is_too_deep(decoded, self.body):
                raise MalformedMessage(f"not a task: nested deeper than {MAX_DEPTH}")
        except (ContentDisallowed, DecodeError) as exc:
            self._undecodable = exc
            raise
        except Exception as exc:  # of a codec; Celery expects DecodeError
            self._undecodable = MalformedMessage(f"the body cannot be decoded: {exc!r}")
            raise self._undecodable from exc
        return decoded

    def ack(self, multiple: bool = False) -> None:
        if not self._bury():
            super().ack(multiple)

    def reject(self, requeue: bool = False) -> None:
        if requeue or not self._bury():
            super().reject(requeue)

    def _bury(self) -> bool:
        """Make this message a dead letter if it cannot be decoded; return whether."""
        if self._undecodable is None or self.acknowledged or self.channel is None:
            return False
        self.channel.bury(self.delivery_tag, "malformed", self._undecodable)
        self._state = "REJECTED"
        return True

    def requeue_later(self, delay: float) -> None:
        """Put this message back, to be delivered again after *delay* seconds.

        It counts as a delivery (``max_deliveries``).  Raises as `requeue` does.
        """
        if self.channel is None:
            raise self.MessageStateError("This message does not have a receiving channel")
        if self.acknowledged:
            raise self.MessageStateError(f"Message already acknowledged with state: {self._state}")
        self.channel.nack_later(self.delivery_tag, delay)
        self._state = "REQUEUED"
