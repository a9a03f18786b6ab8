"""Whether an application can use its broker, for probes: fast, and with a worker's permissions.

For more than yes or no there is `celery_ext.doctor`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from kombu_jetstream.errors import JetStreamTransportError, JetStreamUnavailable, NoResponders

from .broker import Broker, connect

__all__ = ["Health", "health", "round_trips"]


@dataclass(slots=True)
class Health:
    """The answer to a probe."""

    healthy: bool = False
    #: Why not, or what is not yet.
    reason: str = ""
    server: str | None = None
    version: str | None = None
    #: Seconds from asking to knowing.
    took: float = 0.0
    #: What was tried, and whether it went well, in its order.
    checks: dict[str, bool] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "healthy": self.healthy,
            "reason": self.reason,
            "server": self.server,
            "version": self.version,
            "took": self.took,
            "checks": self.checks,
        }


async def health(app: Any, *, timeout: float = 5.0) -> Health:
    """Return whether the broker of *app* is reachable and has its streams; never raises for that.

    Streams that are missing are no fault with ``provision="auto"``: the first worker makes them.
    *timeout* is seconds for each request.  `OptionsError` is raised: it is no state of the broker.
    """
    found = Health(checks={"connection": False})
    began = time.monotonic()
    try:
        async with connect(app, timeout=timeout) as broker:
            found.server, found.version = str(broker.server), broker.version
            found.checks = {"connection": True, "jetstream": False}
            await _look(broker, found)
    except JetStreamTransportError as exc:
        if isinstance(exc, ValueError):
            raise
        found.reason = str(exc)
    found.took = time.monotonic() - began
    found.healthy = all(found.checks.values())
    return found


async def _look(broker: Broker, found: Health) -> None:
    names = broker.names
    try:
        # What every role may do; the answer may be that there is no such message.
        await broker.get_strictly(names.registry_stream, seq=1, next_by_subj=f"{names.registry}.>")
    except NoResponders:
        # Nobody answers for the stream: it is not there, or nobody leads it, or no JetStream.
        found.checks["jetstream"] = broker.info.jetstream or bool(broker.options.jetstream_domain)
        if not found.checks["jetstream"]:
            raise JetStreamUnavailable(str(broker.server)) from None
        found.reason = f"stream {names.registry_stream!r} is missing or has no leader"
        found.checks["streams"] = broker.options.provision == "auto"
    else:
        found.checks = {"connection": True, "jetstream": True, "streams": True}


async def round_trips(app: Any, count: int, *, timeout: float = 5.0) -> tuple[str, list[float]]:
    """Return the server's address and the seconds of *count* PINGs to it."""
    async with connect(app, timeout=timeout) as broker:
        seconds = []
        for _ in range(count):
            began = time.monotonic()
            await broker.ping()
            seconds.append(time.monotonic() - began)
        return str(broker.server), seconds
