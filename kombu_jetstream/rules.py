"""Rules for values that people set: the words for what is expected, and the check.

Used for the options of the transport and for the settings of `celery_ext`, so that a bad value is
reported in one form: "expected 'name' to be seconds > 0, got '1h'".  Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import OptionsError, shortened

__all__ = [
    "BYTES",
    "COUNT",
    "SECONDS",
    "SECONDS_OR_ZERO",
    "SWITCH",
    "TEXT",
    "Rule",
    "matching",
    "one_of",
    "seconds",
    "whole",
]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value has to be: the words for it, the check, and how text becomes one."""

    #: Completes "expected 'name' to be …".
    expected: str
    #: Returns the value as it is stored; raises ValueError or TypeError for a bad one.
    accept: Callable[[Any], Any]
    from_text: Callable[[str], object] = str

    def or_none(self) -> Rule:
        """Return this rule with None allowed too; in a URL ``none``, unless any text will do."""

        def accept(value: Any) -> Any:
            return None if value is None else self.accept(value)

        def from_text(text: str) -> object:
            return None if text.lower() == "none" else self.from_text(text)

        is_text = self.from_text is str
        return Rule(f"{self.expected} or None", accept, str if is_text else from_text)

    def checked(
        self,
        value: Any,
        name: str,
        where: str = "",
        *,
        shown: str | None = None,
        is_text: bool = False,
    ) -> Any:
        """Return *value* as it is stored, converted first if it *is_text*.

        Raises `OptionsError`: "expected *name* *where* to be …, got *shown*", which defaults to
        the value itself, so give it for a secret.
        """
        try:
            return self.accept(self.from_text(value) if is_text else value)
        except (ValueError, TypeError, OverflowError):
            got = shown if shown is not None else shortened(value)
            raise OptionsError.bad_value(name, where, self.expected, got) from None


def seconds(*, zero: bool) -> Callable[[Any], float]:
    def accept(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ValueError
        return float(value)

    return accept


def whole(low: int, high: float = math.inf) -> Callable[[Any], int]:
    def accept(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        if not low <= value <= high:
            raise ValueError
        return value

    return accept


def one_of(*choices: object) -> Rule:
    def accept(value: Any) -> Any:
        if isinstance(value, bool):  # True == 1
            raise TypeError
        return choices[choices.index(value)]  # or ValueError

    return Rule("one of " + ", ".join(map(repr, choices)), accept, type(choices[0]))


def matching(pattern: str) -> Callable[[Any], str]:
    compiled = re.compile(pattern)

    def accept(value: Any) -> str:
        if not compiled.fullmatch(value):
            raise ValueError
        return str(value)

    return accept


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _switch_from_text(text: str) -> object:
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)


SECONDS = Rule("seconds > 0", seconds(zero=False), float)
SECONDS_OR_ZERO = Rule("seconds >= 0", seconds(zero=True), float)
COUNT = Rule("a whole number >= 1", whole(1), int)
BYTES = Rule("a whole number of bytes >= 1", whole(1), int)
SWITCH = Rule("True or False", _switch, _switch_from_text)
TEXT = Rule("text that is not empty", matching(r"(?s).+"))
