"""What is wrong or about to be, and what to do about it.

Each check looks at one thing and returns findings; one that may not look says so and does not stop
the others.  Looking changes nothing on the server.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from kombu_jetstream.errors import ApiError, JetStreamTransportError, NoServers, PermissionDenied
from kombu_jetstream.topology import LEVELS, queue_token

from .broker import Broker, connect, open_client, options_of, settings_of
from .dlq import DeadLetters
from .fallback_health import examine
from .fallback_health import look as look_at_redis
from .overview import stream_statuses
from .provision import Declared, declared, plan
from .queues import UNTIL_RESUMED, QueueStatus, registered_queues, statuses
from .times import show_age, show_moment

__all__ = ["Diagnosis", "Finding", "diagnose"]

Severity = Literal["ok", "warning", "error"]

#: Oldest server that works, and API levels (ADR-44) with what is missing below them.
OLDEST_VERSION = (2, 9)
WITHOUT = {
    1: "message TTL and pausing of queues",
    2: "tasks that wait in the server, and replays that are exactly-once",
}

#: Seconds of clock skew: from the first on etas are noticeably off, from the second on wrong.
SKEW_WARNING = 1.0
SKEW_ERROR = 30.0

#: Part of a limit from which it is near.
NEAR = 0.8

#: Missing things that are named; more are counted.
MAX_LISTED = 3

#: Seconds over which a queue must have delivered something, if it could.
WATCHED = 1.0

#: Seconds back in which dead letters are news.
RECENT = 3600.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    severity: Severity
    message: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "severity": self.severity,
            "message": self.message,
            "remedy": self.remedy,
        }


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in the order in which things depend on each other."""

    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def reachable(self) -> bool:
        return not any(f.check == "server" and f.severity == "error" for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "healthy": self.healthy,
            "findings": [finding.as_json() for finding in self.findings],
        }


async def diagnose(app: Any, *, timeout: float = 5.0) -> Diagnosis:
    """Look at everything; *timeout* is seconds for each request.

    A broker that cannot be reached is a finding.  Raises `OptionsError` for a bad configuration.
    """
    needed = declared(app)
    findings = await _other_servers(app)
    try:
        async with connect(app, timeout=timeout) as broker:
            findings.append(_server(broker))
            for check, look in CHECKS.items():
                findings += await _look(check, look, broker, needed)
    except JetStreamTransportError as exc:
        if isinstance(exc, ValueError):
            raise
        remedy = "start the server, or correct broker_url" if isinstance(exc, NoServers) else ""
        findings.append(Finding("server", "error", str(exc), remedy))
    findings += await _fallback(app)
    return Diagnosis(findings)


Look = Callable[[Broker, Declared], Awaitable[list[Finding]]]


async def _look(check: str, look: Look, broker: Broker, needed: Declared) -> list[Finding]:
    try:
        found = await look(broker, needed)
    except PermissionDenied as exc:
        return [Finding(check, "error", str(exc), "use an operator's credentials")]
    except ApiError as exc:
        return [Finding(check, "error", str(exc), "look at the server's log")]
    return found or [Finding(check, "ok", OK[check])]


async def _other_servers(app: Any) -> list[Finding]:
    """Try each server of the URL, as one that is away is noticed only when it is needed."""
    with app.connection_for_write() as connection:
        _, settings = settings_of(connection)
    if len(settings.servers) == 1:
        return []
    found = []
    for server in settings.servers:
        try:
            client, _ = await open_client(replace(settings, servers=(server,)))
        except JetStreamTransportError as exc:
            remedy = "start it, or take it out of broker_url"
            found.append(Finding("servers", "warning", str(exc), remedy))
        else:
            await client.close()
            found.append(Finding("servers", "ok", f"{server} answers"))
    return found


def _server(broker: Broker) -> Finding:
    shown = f"nats-server {broker.version} at {broker.server}, API level {broker.info.api_level}"
    if broker.info.version < OLDEST_VERSION:
        return Finding("server", "error", f"{shown} is too old", "use 2.9.10 or newer")
    lacking = [what for level, what in WITHOUT.items() if broker.info.api_level < level]
    if lacking:
        message = f"{shown}, has no {'; no '.join(lacking)}"
        return Finding("server", "warning", message, "use 2.12 or newer")
    return Finding("server", "ok", shown)


async def _account(broker: Broker, needed: Declared) -> list[Finding]:
    info = await broker.api("INFO")
    limits = info.get("limits") or {}
    pairs = [
        ("storage", info.get("storage"), limits.get("max_storage")),
        ("memory", info.get("memory"), limits.get("max_memory")),
        ("streams", info.get("streams"), limits.get("max_streams")),
        ("consumers", info.get("consumers"), limits.get("max_consumers")),
    ]
    return [
        Finding(
            "account",
            "error" if used >= limit else "warning",
            f"the account uses {used} of {limit} {what}",
            "raise the account's limit, or purge what is not needed",
        )
        for what, used, limit in pairs
        if used and limit and limit > 0 and used >= NEAR * limit
    ]


async def _clock(broker: Broker, needed: Declared) -> list[Finding]:
    before = time.time()
    info = await broker.find(f"STREAM.INFO.{broker.names.registry_stream}")
    after = time.time()
    if info is None or "ts" not in info:  # 2.9 does not say
        return []
    seconds = info["ts"].partition(".")
    fraction = float(f"0.{seconds[2].removesuffix('Z') or 0}")
    whole = datetime.fromisoformat(f"{seconds[0].removesuffix('Z')}+00:00").timestamp()
    skew = whole + fraction - (before + after) / 2
    certain = abs(skew) - (after - before) / 2
    if certain < SKEW_WARNING:
        return []
    severity: Severity = "error" if certain >= SKEW_ERROR else "warning"
    message = f"this machine's clock is {abs(skew):.1f} s {'behind' if skew > 0 else 'ahead of'} "
    return [
        Finding(
            "clock",
            severity,
            f"{message}the server's: tasks with an eta or expires are off by as much",
            "synchronise both clocks (NTP)",
        )
    ]


async def _streams(broker: Broker, needed: Declared) -> list[Finding]:
    """Compare streams, consumers and records with what the options want."""
    found = []
    verb = "celery jetstream provision"
    changes = await plan(broker, needed)
    later = broker.options.provision == "auto"
    missing = [change.what for change in changes if change.action == "create"]
    if later:
        # Those of events and remote control come with the first event or command, if ever.
        missing = [what for what in missing if not what.startswith("exchange ")]
    if missing:
        remedy = f"start a worker, or run `{verb}`" if later else f"run `{verb}`"
        severity: Severity = "warning" if later else "error"
        found.append(Finding("streams", severity, f"missing: {_listed(missing)}", remedy))
    for change in changes:
        told = ", ".join(
            f"{each.field} is {each.found!r}, the options want {each.expected!r}"
            for each in change.differences
        )
        if change.action == "update":
            remedy = f"run `{verb}`, or give all programs the options that made it"
            found.append(Finding("streams", "warning", f"{change.what}: {told}", remedy))
        elif change.action == "impossible":
            remedy = f"it cannot be changed: drain it, delete it, run `{verb}`"
            found.append(Finding("streams", "error", f"{change.what}: {told}", remedy))
    return found


def _listed(things: list[str]) -> str:
    """Return things by name if they are few, else how many of each kind."""
    if len(things) <= MAX_LISTED:
        return ", ".join(things)
    kinds = Counter(thing.partition(" ")[0] for thing in things)
    return ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())


async def _overlaps(broker: Broker, needed: Declared) -> list[Finding]:
    """Find streams and consumers of others that take what is ours."""
    names = broker.names
    ours = {names.stream(level) for level in LEVELS}
    ours |= {names.dead_letter_stream, names.registry_stream, names.mirror_stream}
    answer = await broker.api("STREAM.NAMES", {"subject": f"{names.namespace}.>"})
    found = [
        Finding(
            "overlaps",
            "error",
            f"stream {other!r} takes subjects below {names.namespace!r}, too",
            "change its subjects, or use another namespace (the path of broker_url)",
        )
        for other in answer.get("streams") or ()
        if other not in ours
    ]
    tokens = {queue_token(name) for name in await registered_queues(broker)}
    tokens |= {queue_token(name) for name in needed.queues}
    for level in LEVELS:
        stream = names.stream(level)
        listed = await broker.find(f"CONSUMER.NAMES.{stream}")
        for consumer in (listed or {}).get("consumers") or ():
            if consumer not in tokens:
                message = f"consumer {consumer!r} of stream {stream!r} belongs to no queue"
                remedy = "delete it: a work queue gives it messages that workers then never see"
                found.append(Finding("overlaps", "warning", message, remedy))
    return found


async def _queues(broker: Broker, needed: Declared) -> list[Finding]:
    found = []
    for queue in await statuses(broker, interval=WATCHED):
        found += _queue(queue)
    return found


def _queue(queue: QueueStatus) -> list[Finding]:
    name = f"queue {queue.name!r}"
    found = []
    if queue.temporary and (queue.missing or not queue.consumers):
        return []
    if queue.missing:
        message = f"{name} has no consumer at level {', '.join(queue.missing)}"
        remedy = "restart a worker of it, or run `celery jetstream provision`"
        found.append(Finding("queues", "error", message, remedy))
    if queue.paused_until is not None:
        until = queue.paused_until
        end = "until resumed" if until >= UNTIL_RESUMED else f"until {show_moment(until)}"
        remedy = f"`celery jetstream queues resume {queue.name}`"
        found.append(Finding("queues", "warning", f"{name} is paused {end}", remedy))
    elif queue.ready and not queue.consumers and not queue.in_flight:
        message = f"nobody consumes {name}: {queue.ready} messages wait"
        if queue.oldest_age is not None:
            message += f", the oldest for {show_age(queue.oldest_age)}"
        remedy = f"start a worker with -Q {queue.name}"
        found.append(Finding("queues", "warning", message, remedy))
    elif queue.ready and queue.consumers and not queue.rate:
        message = (
            f"{name} is stuck: {queue.ready} messages and {queue.consumers} waiting workers, "
            f"and nothing was delivered in {WATCHED:g} s"
        )
        remedy = "look at the server's log and the leader of the stream; restart the workers"
        found.append(Finding("queues", "error", message, remedy))
    if queue.redelivered:
        message = f"{queue.redelivered} messages of {name} were delivered more than once"
        remedy = (
            "look for workers that were killed (memory?); after max_deliveries such messages "
            "become dead letters"
        )
        found.append(Finding("queues", "warning", message, remedy))
    return found


async def _limits(broker: Broker, needed: Declared) -> list[Finding]:
    found = []
    for stream in await stream_statuses(broker):
        name = f"stream {stream.name!r}"
        if stream.max_bytes is not None and stream.size >= NEAR * stream.max_bytes:
            what = f"{name} has {stream.size} of {stream.max_bytes} bytes"
            if stream.name == broker.names.dead_letter_stream:
                remedy = "replay or purge dead letters: the oldest are dropped when it is full"
            else:
                remedy = "add workers, or raise stream_max_bytes: a full stream refuses tasks"
            found.append(Finding("limits", "warning", what, remedy))
        if stream.clustered and stream.leader is None:
            remedy = "bring back a majority of the servers"
            found.append(Finding("limits", "error", f"{name} has no leader", remedy))
        if stream.lagging:
            what = f"copies of {name} are behind or away: {', '.join(stream.lagging)}"
            found.append(Finding("limits", "warning", what, "look at these servers"))
        if stream.clustered and stream.replicas == 1:
            remedy = "set stream_replicas to 3, and run `celery jetstream provision`"
            what = f"{name} has one copy, in a cluster"
            found.append(Finding("limits", "warning", what, remedy))
    return found


async def _fallback(app: Any) -> list[Finding]:
    """Return what is to be said of the Redis that takes over, if there is one.

    Above all when JetStream is away.
    """
    options = options_of(app)
    if options.fallback_url is None:
        return []
    remarks = await asyncio.to_thread(examine, options)
    findings = [Finding("fallback", each.severity, each.message, each.remedy) for each in remarks]
    if any(each.severity == "error" for each in remarks):
        return findings
    state = await asyncio.to_thread(look_at_redis, app, options)
    if state is not None and (state.waiting or state.held):
        there = f"in Redis {sum(state.waiting.values())} messages wait, workers hold {state.held}"
        findings.append(Finding("fallback", "ok", there))
    return findings or [Finding("fallback", "ok", "Redis can take over while JetStream is away")]


async def _dead_letters(broker: Broker, needed: Declared) -> list[Finding]:
    letters = DeadLetters(broker)
    found = []
    total = sum((await letters.counts()).values())
    recent = await letters.count_since(time.time() - RECENT)
    if recent:
        message = f"{recent} dead letters in the last hour, {total} in all"
        remedy = "`celery jetstream dlq stats --since 1h` groups them"
        found.append(Finding("dead letters", "warning", message, remedy))
    elif total:
        found.append(Finding("dead letters", "ok", f"{total}, none in the last hour"))
    namespace = broker.names.namespace
    left = await broker.subjects(letters.stream, f"{namespace}.dlq.@claim.*")
    for level in LEVELS:
        left |= await broker.subjects(
            broker.names.stream(level), f"{namespace}.{level}.@replayed.*"
        )
    if left:
        message = f"a replay was interrupted, or runs now: {len(left)} letters are half-way"
        remedy = "replay these letters again; none is replayed twice"
        found.append(Finding("dead letters", "warning", message, remedy))
    return found


#: In the order in which they are made; what is fine is said in these words.
CHECKS: dict[str, Look] = {
    "account": _account,
    "clock": _clock,
    "streams": _streams,
    "overlaps": _overlaps,
    "limits": _limits,
    "queues": _queues,
    "dead letters": _dead_letters,
}
OK = {
    "account": "JetStream is enabled, no limit is near",
    "clock": "no difference to the server's that matters",
    "streams": "streams and queues are as the options want them",
    "overlaps": "nobody else takes our messages",
    "limits": "no stream is near its limit",
    "queues": "every queue that has messages is consumed",
    "dead letters": "none",
}
