"""Which queues a message goes to: exchanges, bindings, AMQP patterns and NATS subjects.

The table holds what the registry says of durable queues: exchanges with their type, and bindings
``(exchange, key, queue)``.  `Table.route` answers from memory, so publishing costs no round trip.

Transient queues are not in the table: NATS routes for them.  A routing key becomes subject
tokens, one per word; a binding of a transient queue becomes one or two subscriptions:

===========  ===================  ====================================================
exchange     binding key          subjects below ``<ns>.x.<exchange>``
===========  ===================  ====================================================
direct       ``a.b``              ``a.b``
fanout       any                  the bare exchange and ``>``
topic        ``a.*``              ``a.*``
topic        ``a.#``              ``a`` and ``a.>`` (``#`` stands for no word, too)
topic        ``#.b``, ``a.#.b``   up to the first ``#``: bare and ``>``, filtered on arrival
===========  ===================  ====================================================

AMQP 0-9-1 section 3.1.3 defines the patterns.  Everything here is pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .topology import encode_token

__all__ = [
    "Binding",
    "Exchange",
    "Table",
    "is_of_control",
    "key_subject",
    "matcher",
    "subjects_of",
    "topic_matches",
]

_OF_CONTROL = re.compile(r"(^|\.)pidbox$|^celeryev$")

EXCHANGE_TYPES = frozenset({"direct", "topic", "fanout"})


def is_of_control(exchange: str) -> bool:
    """Tell whether an exchange is one of Celery's remote control and events.

    The queues bound to it are a worker's or a client's own.
    """
    return _OF_CONTROL.search(exchange) is not None


def _words(key: str) -> list[str]:
    """Split a routing key; the empty key has no words (as in RabbitMQ)."""
    return key.split(".") if key else []


def topic_matches(pattern: str, key: str) -> bool:
    """Tell whether topic *pattern* covers routing *key*: ``*`` one word, ``#`` any number."""
    words = _words(key)
    # The set of pattern positions reachable after each word: linear in both, never exponential.
    parts = _words(pattern)
    states = _closure({0}, parts)
    for word in words:
        step = set()
        for at in states:
            if at == len(parts):
                continue
            part = parts[at]
            if part == "#":
                step.add(at)
            elif part in ("*", word):
                step.add(at + 1)
        states = _closure(step, parts)
        if not states:
            return False
    return len(parts) in states


def _closure(states: set[int], parts: list[str]) -> set[int]:
    """Add the positions reached by letting ``#`` stand for no word."""
    result = set(states)
    for at in states:
        while at < len(parts) and parts[at] == "#":
            at += 1
            result.add(at)
    return result


def matcher(exchange_type: str, pattern: str) -> Callable[[str], bool]:
    """Return a predicate on routing keys for a binding of *pattern* to an exchange."""
    if exchange_type == "fanout":
        return lambda key: True
    if exchange_type == "topic" and ("*" in pattern or "#" in pattern):
        return lambda key: topic_matches(pattern, key)
    return lambda key: key == pattern


def key_subject(key: str) -> str:
    """Return the subject tokens of routing *key*, one per word."""
    return ".".join(encode_token(word) for word in _words(key))


def subjects_of(exchange_type: str, pattern: str) -> tuple[tuple[str, ...], bool]:
    """Return the subject suffixes a binding subscribes to, and whether arrivals need filtering."""
    if exchange_type == "fanout":
        return ("", ">"), False
    if exchange_type != "topic":
        return (key_subject(pattern),), False
    words = _words(pattern)
    if "#" not in words:
        return (".".join(w if w == "*" else encode_token(w) for w in words),), False
    cut = words.index("#")
    head = ".".join(w if w == "*" else encode_token(w) for w in words[:cut])
    wider = f"{head}.>" if head else ">"
    return (head, wider), cut != len(words) - 1


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange as it was declared."""

    name: str
    type: str = "direct"
    durable: bool = True
    auto_delete: bool = False
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Binding:
    """A durable queue bound to an exchange; *type* is the exchange's, so that routing needs no
    second look-up."""

    exchange: str
    key: str
    queue: str
    type: str = "direct"


class Table:
    """Exchanges and bindings of durable queues, with cached answers."""

    def __init__(self) -> None:
        self.exchanges: dict[str, Exchange] = {}
        self._bindings: dict[tuple[str, str, str], Binding] = {}
        self._routes: dict[tuple[str, str], tuple[str, ...]] = {}

    def clear(self) -> None:
        self.exchanges.clear()
        self._bindings.clear()
        self._routes.clear()

    def bindings(self, *, queue: str | None = None, exchange: str | None = None) -> list[Binding]:
        """Return the bindings, of one queue or exchange if named."""
        return [
            binding
            for binding in self._bindings.values()
            if queue in (None, binding.queue) and exchange in (None, binding.exchange)
        ]

    def has(self, binding: Binding) -> bool:
        return self._bindings.get((binding.exchange, binding.key, binding.queue)) == binding

    def add(self, binding: Binding) -> None:
        self._bindings[binding.exchange, binding.key, binding.queue] = binding
        self._routes.clear()

    def remove(self, exchange: str, key: str, queue: str) -> None:
        self._bindings.pop((exchange, key, queue), None)
        self._routes.clear()

    def route(self, exchange: str, key: str) -> tuple[str, ...]:
        """Return the durable queues bound to a named *exchange* that *key* reaches, each once."""
        try:
            return self._routes[exchange, key]
        except KeyError:
            pass
        found = {
            binding.queue: None
            for binding in self._bindings.values()
            if binding.exchange == exchange and matcher(binding.type, binding.key)(key)
        }
        if len(self._routes) > 10_000:  # keys may be unbounded (ids in them); the cache may not
            self._routes.clear()
        answer = self._routes[exchange, key] = tuple(found)
        return answer
