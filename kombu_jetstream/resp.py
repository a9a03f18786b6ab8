"""The Redis wire protocol: bytes to values, commands to bytes.

RESP2 and RESP3 (github.com/redis/redis-specifications, protocol/RESP3.md).  It exists beside
redis-py's own parsers because those block in the middle of a reply and hide pushes; a socket in an
event loop can have neither.  Pure: no socket, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Parser", "Push", "ReplyError", "encode"]


class ReplyError(Exception):
    """An error reply, a value like any other here."""


class Push(list[Any]):
    """An out-of-band message: nobody asked for it."""


@dataclass(slots=True)
class _Frame:
    """An aggregate that is not complete yet."""

    items: list[Any]
    left: int


def encode(*words: bytes | str | int) -> bytes:
    """Return a command as an array of bulk strings."""
    raw = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(raw) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in raw)


class Parser:
    """Incremental: takes bytes as they come, returns the values they complete.

    Linear in the bytes, however they are cut: a reply may have hundreds of messages.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._stack: list[_Frame] = []
        #: length of the bulk string being read
        self._bulk: int | None = None

    def feed(self, data: bytes) -> list[Any]:
        """Return the values complete by now.  ValueError if this is not RESP."""
        buffer = self._buffer
        buffer += data
        at, values = 0, []
        while True:
            if self._bulk is not None:
                end = at + self._bulk
                if len(buffer) < end + 2:
                    break
                value: Any = bytes(buffer[at:end])
                at, self._bulk = end + 2, None
            else:
                end = buffer.find(b"\r\n", at)
                if end < 0:
                    break
                kind, text = chr(buffer[at]), bytes(buffer[at + 1 : end])
                at = end + 2
                is_whole, value = self._begin(kind, text)
                if not is_whole:
                    continue
            values += self._complete(value)
        del buffer[:at]
        return values

    def _begin(self, kind: str, text: bytes) -> tuple[bool, Any]:
        """Take the first line of a value; return whether that is all of it, and the value."""
        match kind:
            case "+":
                return True, text
            case "-":
                return True, ReplyError(text.decode(errors="replace"))
            case ":" | "(":
                return True, int(text)
            case "$" | "=" | "!":
                if int(text) < 0:
                    return True, None
                self._bulk = int(text)
                return False, None
            case "*" | "~" | ">" | "%" | "|":
                count = int(text) * (2 if kind in "%|" else 1)
                items: list[Any] = Push() if kind == ">" else []
                if count <= 0:
                    return True, items if count == 0 else None
                self._stack.append(_Frame(items, count))
                return False, None
            case "_":
                return True, None
            case "#":
                return True, text == b"t"
            case ",":
                return True, float(text)
        raise ValueError(f"expected a RESP value, got {kind!r}")

    def _complete(self, value: Any) -> list[Any]:
        """Put a value where it belongs; return it, or what it completes, if that is outermost."""
        while self._stack:
            frame = self._stack[-1]
            frame.items.append(value)
            frame.left -= 1
            if frame.left:
                return []
            self._stack.pop()
            value = frame.items
        return [value]
