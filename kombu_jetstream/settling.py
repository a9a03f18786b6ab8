"""The part of a channel that settles deliveries: done, put back, or dead.

What is held is in `qos`; the store that made a delivery knows how to settle it (`backend`).  A
message that dies is written to the dead letters first, confirmed, and only then taken out of its
queue.  These verbs may come from any thread.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from . import deadletter, envelope, extensions
from .backend import Delivery, Outcome
from .deadletter import DeadLetter, Reason
from .declaring import Declaring
from .errors import (
    ConnectionLost,
    JetStreamTransportError,
    MalformedMessage,
    NotSupported,
    PreconditionFailed,
)
from .outgoing import Outgoing
from .pulls import Pulls, Ready
from .qos import QoS
from .topology import LEVELS

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Settling"]

logger = logging.getLogger(__name__)


class Settling(Declaring):
    """Holds deliveries and settles them."""

    dirty: bool

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._outgoing = Outgoing(session)
        self._pulls = Pulls(guard=session.options.starvation_guard)
        self.ready: Ready[Delivery] = Ready(self._pulls)
        self.qos = QoS(self._pulls)
        #: no task runs in the event loop's thread after an acknowledgement
        self.may_settle_late = False
        #: no consumer hands on tasks that may end the process after an acknowledgement
        self.may_hold = True

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Settle a delivery (with *multiple*, all up to it) as done; from any thread."""
        for tag in self.qos.up_to(delivery_tag) if multiple else (delivery_tag,):
            self._settle(tag, "ack")

    def basic_reject(self, delivery_tag: int, requeue: bool = False) -> None:
        """Put a delivery back (*requeue*), or make it a dead letter."""
        if requeue:
            self._settle(delivery_tag, "nak")
            return
        self.bury(delivery_tag, None)

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> None:
        """Reject a delivery, with *multiple* all up to it (RabbitMQ's extension)."""
        for tag in self.qos.up_to(delivery_tag) if multiple else (delivery_tag,):
            self.basic_reject(tag, requeue=requeue)

    def basic_recover(self, requeue: bool = True) -> None:
        """Put everything this channel holds back."""
        if not requeue:
            raise NotSupported("basic_recover(requeue=False)", "use requeue=True")
        for tag in self.qos.up_to(0):
            self._settle(tag, "nak")

    def nack_later(self, delivery_tag: int, delay: float) -> None:
        """Put a delivery back, to be delivered again after *delay* seconds."""
        self._settle(delivery_tag, "nak", delay)

    def _ack_later(self, tag: int) -> None:
        """Settle a delivery as done, with a write that need not come before what is done next."""
        session = self._session
        session.begin_write(may_wait=False)
        try:
            self._settle(tag, "ack")
        finally:
            session.end_write(hold=self.may_hold)

    def _settle(self, tag: int, outcome: Outcome, delay: float | None = None) -> None:
        session = self._session
        with session.lock:
            delivery = self._release(tag)
            delivery.settled = True
        if outcome != "ack":
            delivery.settler.settle(delivery, outcome, delay)
            self._after_settle()
            return
        # The acknowledgement and what asks for more are one write, or one for all of a tick, or
        # one for all that is at hand.
        waits = session.begin_write(self.may_settle_late)
        asked = True
        try:
            delivery.settler.settle(delivery, outcome, delay)
            asked = self._after_settle()
        finally:
            if not waits:
                session.end_write(hold=self.may_hold and not asked and self.ready.count > 0)

    def _release(self, tag: int, *, to_die: bool = False) -> Delivery:
        try:
            return self.qos.give_up(tag) if to_die else self.qos.release(tag)
        except PreconditionFailed as exc:
            if self.closed:  # it was handed back when the channel closed
                raise ConnectionLost("the channel is closed") from exc
            raise

    def _after_settle(self) -> bool:
        """Use the room there is now; return whether something was asked of the server."""
        raise NotImplementedError

    def _hand_back(self, delivery: Delivery) -> None:
        """Put back a delivery nobody has seen."""
        with self._session.lock:
            self.qos.release(delivery.tag)
            delivery.settled = True
        try:
            delivery.settler.settle(delivery, "nak")
        except JetStreamTransportError as exc:
            logger.debug("could not hand back a message of %r: %s", delivery.queue, exc)

    def bury(
        self, delivery_tag: int, reason: Reason | None, error: BaseException | None = None
    ) -> None:
        """Give up on a delivery for *reason*, or because the application refused it (None).

        It goes to its queue's dead-letter exchange, if that has a queue for it, else to the dead
        letters.
        """
        with self._session.lock:
            delivery = self._release(delivery_tag, to_die=True)
        decoded = _decoded(delivery.payload)
        if reason is None:
            reason = extensions.reject_reason(deadletter.facts_of(decoded).get("task"))
        else:
            logger.error(
                "message of queue %r %s: %s%s",
                delivery.queue,
                "becomes a dead letter" if delivery.token else "is dropped",
                reason,
                f" ({error})" if error is not None else "",
            )
        if delivery.token:
            self._bury(delivery, reason, decoded, error)
        else:
            self._gone(delivery)
        self._after_settle()

    def _gone(self, delivery: Delivery) -> None:
        with self._session.lock:
            delivery.settled = True
            self.qos.gone(delivery)
            self.dirty = True  # there is room for more

    def _bury(
        self,
        delivery: Delivery,
        reason: Reason,
        decoded: envelope.Envelope | None,
        error: BaseException | None,
    ) -> None:
        try:
            forwarded = reason != "malformed" and self._forward(delivery, decoded)
        except JetStreamTransportError as exc:
            self._session.dead_letter_written(exc)
            self._keep(delivery)
            return
        except Exception:  # whatever a foreign client wrote into it, it must not end the worker
            logger.exception(
                "message of queue %r cannot be published to its dead-letter exchange, "
                "it becomes a dead letter",
                delivery.queue,
            )
            forwarded = False
        if forwarded:
            self._gone(delivery)
            delivery.settler.settle(delivery, "ack")
        else:
            self._write_dead_letter(delivery, reason, decoded, error)

    def _keep(self, delivery: Delivery) -> None:
        """Put back a message that could not be written to where the dead go."""
        self._gone(delivery)
        delivery.settler.settle(delivery, "nak", deadletter.RETRY_INTERVAL)

    def _forward(self, delivery: Delivery, decoded: envelope.Envelope | None) -> bool:
        """Publish to the queue's dead-letter exchange; return whether a queue took the message.

        Under the id of its death, so that it arrives once if this is repeated after a crash.
        """
        record = self._session.registry.queues.get(delivery.queue)
        if decoded is None or record is None or record.wants.dead_letter_exchange is None:
            return False
        exchange, key = record.wants.dead_letter_exchange, record.wants.dead_letter_routing_key
        if key is None:
            key = decoded["properties"]["delivery_info"].get("routing_key") or ""
        death = deadletter.death_id(delivery.token, delivery.payload)
        if self._outgoing.forward(decoded, exchange, key, death):
            return True
        logger.warning(
            "no queue takes what dies in queue %r: nothing is bound to exchange %r for %r",
            delivery.queue,
            exchange,
            key,
        )
        return False

    def _write_dead_letter(
        self,
        delivery: Delivery,
        reason: Reason,
        decoded: envelope.Envelope | None,
        error: BaseException | None = None,
    ) -> None:
        """First the confirmed write to the dead letters, then the end of the original."""
        session = self._session
        letter = DeadLetter(
            reason=reason,
            queue=delivery.queue,
            level=LEVELS[delivery.level],
            error=type(error).__name__ if error is not None else None,
            message=str(error) if error is not None else None,
            # The delivery that is one too many is not an attempt.
            attempts=delivery.attempt - (reason == "max_deliveries_exceeded"),
            worker=deadletter.worker_name(),
            published_at=delivery.published_at or None,
            died_at=time.time(),
            **deadletter.facts_of(decoded),
        )

        def written(failure: JetStreamTransportError | None) -> None:
            session.dead_letter_written(failure)
            if failure is None:
                self._gone(delivery)
                delivery.settler.settle(delivery, "term")
                extensions.dead_lettered(letter)
            else:
                self._keep(delivery)

        try:
            session.jetstream.dead_letter(delivery, letter, written)
        except ConnectionLost:
            logger.warning("a dead letter of queue %r waits for the connection", letter.queue)


def _decoded(payload: bytes) -> envelope.Envelope | None:
    try:
        return envelope.decode(payload)
    except MalformedMessage:
        return None
