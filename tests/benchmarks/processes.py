"""What processes use, read from Linux."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["cpu_seconds", "resident_megabytes"]

#: What makes a process's number its CPU clock, which counts nanoseconds, not ticks of 10 ms
#: (clock_getcpuclockid(3), linux/posix-timers.h).
_CPUCLOCK_SCHED = 2


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time of *pids* so far, those that ended left out."""
    seconds = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            seconds += time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    return seconds


def resident_megabytes(pid: int) -> float:
    """Return the memory of one process."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(kilobytes.split()[1]) / 1024
