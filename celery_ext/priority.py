"""From a task's priority level to the number in its message.

Pure.  The levels and which numbers mean them are the transport's (`topology.level_of`): 7 to 9
high, 4 to 6 medium, 1 to 3 low, reversed with ``priority_order="redis"``.
"""

from __future__ import annotations

from typing import Literal

from kombu_jetstream.topology import Level

__all__ = ["priority_of"]

#: The middle of each level.
_AMQP: dict[Level, int] = {"high": 8, "medium": 5, "low": 2}


def priority_of(level: Level, order: Literal["amqp", "redis"]) -> int:
    """Return the AMQP priority that puts a message into *level*."""
    number = _AMQP[level]
    return number if order == "amqp" else 9 - number
