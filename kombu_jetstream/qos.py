"""What a channel holds: deliveries by AMQP tag, and the prefetch limit."""

from __future__ import annotations

from itertools import count

from .backend import Delivery
from .errors import PreconditionFailed
from .pulls import Pulls

__all__ = ["QoS"]


class QoS:
    """Held deliveries of one channel.

    A delivery is held from its arrival until it is settled, whether the application has seen it
    or it waits in a buffer; the prefetch limit and the leases cover both.
    """

    def __init__(self, pulls: Pulls) -> None:
        self.prefetch_count = 0
        self._pulls = pulls
        self._held: dict[int, Delivery] = {}
        #: given up on, but still in their queue
        self._dying: dict[int, Delivery] = {}
        self._tags = count(1)

    def __len__(self) -> int:
        return len(self._held)

    def set_prefetch_count(self, prefetch_count: int) -> None:
        self.prefetch_count = prefetch_count or 0
        self._pulls.set_limit(self.prefetch_count)

    def can_consume(self) -> bool:
        """Tell whether another delivery may be handed out."""
        return not self.prefetch_count or len(self._held) < self.prefetch_count

    def hold(self, delivery: Delivery) -> None:
        """Hold *delivery* and give it a tag."""
        tag = delivery.tag = next(self._tags)
        self._held[tag] = delivery

    def release(self, tag: int) -> Delivery:
        """Hold it no longer.  Raises `PreconditionFailed` for an unknown tag, as AMQP does."""
        delivery = self._take(tag)
        self._pulls.settled()
        return delivery

    def give_up(self, tag: int) -> Delivery:
        """Let nobody settle it any more, but hold it until it is `gone`.

        Its lease goes on, and the room it takes bounds how many are on their way.  Raises as
        `release` does.
        """
        delivery = self._dying[tag] = self._take(tag)
        return delivery

    def gone(self, delivery: Delivery) -> None:
        """Hold a delivery that was given up on no longer."""
        if self._dying.pop(delivery.tag, None) is not None:
            self._pulls.settled()

    def _take(self, tag: int) -> Delivery:
        try:
            return self._held.pop(tag)
        except KeyError:
            raise PreconditionFailed(f"unknown delivery tag {tag!r}") from None

    def up_to(self, tag: int) -> list[int]:
        """Return the held tags up to and including *tag*; 0 means all (AMQP's ``multiple``)."""
        return [held for held in self._held.copy() if held <= tag or not tag]

    def deliveries(self) -> list[Delivery]:
        """Return what is held; callable from another thread."""
        return [*self._held.copy().values(), *self._dying.copy().values()]

    @property
    def is_giving_up(self) -> bool:
        """Whether something that was given up on is still in its queue."""
        return bool(self._dying)
