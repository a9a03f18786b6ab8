"""Durations and moments as people write and read them.  Pure; seconds, since the epoch for moments.

=============  ================================================================
written        means
=============  ================================================================
``90``         90 seconds
``1h30m``      weeks ``w``, days ``d``, ``h``, ``m``, ``s`` and ``ms``, added up
``2h``         as a moment: two hours ago
``2026-11-22`` as a moment, with or without ``T14:30``; local time if no offset
``1795340000`` as a moment: seconds since the epoch
=============  ================================================================
"""

from __future__ import annotations

import re
from datetime import datetime

__all__ = ["duration_of", "moment_of", "show_age", "show_moment"]

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")

#: A bare number from here on is a moment: as a duration it would be 31 years.
_EPOCH = 1e9


def duration_of(text: str) -> float:
    """Return seconds.  ValueError with what was expected for anything but the forms above."""
    text = text.strip().lower()
    try:
        seconds = float(text)
    except ValueError:
        parts = _PART.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise ValueError(
                f"expected a duration as 90, 45s, 15m, 2h, 1d or 1h30m, got {text!r}"
            ) from None
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"expected a duration of 0 or more seconds, got {text!r}")
    return seconds


def moment_of(text: str, now: float) -> float:
    """Return a moment: one that is written out, or a duration before *now*."""
    text = text.strip()
    try:
        return datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text)).timestamp()
    except ValueError:
        pass
    try:
        seconds = duration_of(text)
    except ValueError:
        raise ValueError(
            f"expected a moment as 2026-11-22T14:30, or a duration before now as 2h, got {text!r}"
        ) from None
    return seconds if seconds >= _EPOCH else now - seconds


def show_moment(moment: float | None) -> str:
    """Return local time to the second, for tables; empty for None."""
    return "" if moment is None else datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def show_age(seconds: float | None) -> str:
    """Return the two largest units, for tables: ``3d4h``, ``5m2s``, ``0.4s``; empty for None."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f}s"
    left = int(seconds)
    shown: list[str] = []
    for unit in ("d", "h", "m", "s"):
        amount, left = divmod(left, int(_UNITS[unit]))
        if amount or shown:
            shown.append(f"{amount}{unit}")
    return "".join(part for part in shown[:2] if part[0] != "0" or len(shown) == 1)
