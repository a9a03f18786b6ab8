"""All there is at a glance: server, streams, queues and dead letters of one namespace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kombu_jetstream.topology import LEVELS

from .broker import Broker
from .dlq import DeadLetters
from .queues import QueueStatus, statuses

__all__ = ["Overview", "StreamStatus", "overview", "stream_statuses", "worker_stats"]


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """What one stream holds."""

    name: str
    messages: int
    size: int
    #: None: no limit.
    max_bytes: int | None
    consumers: int
    replicas: int
    #: The server that leads it, None while there is none; in a cluster only.
    leader: str | None
    #: Copies that are behind or away.
    lagging: tuple[str, ...] = ()
    clustered: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "messages": self.messages,
            "bytes": self.size,
            "max_bytes": self.max_bytes,
            "consumers": self.consumers,
            "replicas": self.replicas,
            "leader": self.leader,
            "lagging": list(self.lagging),
        }


@dataclass(frozen=True, slots=True)
class Overview:
    """A namespace at one moment."""

    server: str
    version: str
    cluster: str | None
    namespace: str
    streams: list[StreamStatus]
    queues: list[QueueStatus]
    dead_letters: dict[str, int]
    #: Seconds since the epoch.
    oldest_dead_letter_at: float | None

    def as_json(self) -> dict[str, Any]:
        return {
            "server": {"address": self.server, "version": self.version, "cluster": self.cluster},
            "namespace": self.namespace,
            "streams": [stream.as_json() for stream in self.streams],
            "queues": [queue.as_json() for queue in self.queues],
            "dead_letters": {
                "count": sum(self.dead_letters.values()),
                "oldest_at": self.oldest_dead_letter_at,
                "queues": self.dead_letters,
            },
        }


async def stream_statuses(broker: Broker) -> list[StreamStatus]:
    """Return the streams of the namespace that exist."""
    names = broker.names
    found = []
    wanted = [names.stream(level) for level in LEVELS]
    for name in [*wanted, names.dead_letter_stream, names.registry_stream]:
        info = await broker.find(f"STREAM.INFO.{name}")
        if info is not None:
            found.append(_stream_status(info))
    return found


def _stream_status(info: dict[str, Any]) -> StreamStatus:
    config, state, cluster = info["config"], info["state"], info.get("cluster") or {}
    limit = int(config.get("max_bytes") or -1)
    replicas = cluster.get("replicas") or ()
    return StreamStatus(
        name=config["name"],
        messages=int(state["messages"]),
        size=int(state["bytes"]),
        max_bytes=limit if limit > 0 else None,
        consumers=int(state.get("consumer_count") or 0),
        replicas=int(config.get("num_replicas") or 1),
        leader=cluster.get("leader"),
        lagging=tuple(
            str(each["name"]) for each in replicas if each.get("offline") or not each.get("current")
        ),
        clustered="name" in cluster,
    )


def worker_stats(app: Any, *, timeout: float = 1.0) -> dict[str, dict[str, Any]]:
    """Return what became of the tasks of each worker, by its name (`celery_ext.stats`).

    Waits *timeout* seconds for answers, as nobody knows how many workers there are.
    """
    answers = app.control.broadcast("jetstream_stats", reply=True, timeout=timeout) or []
    return {worker: stats for answer in answers for worker, stats in answer.items()}


async def overview(
    broker: Broker, queue_names: Iterable[str] | None = None, *, interval: float = 0.0
) -> Overview:
    """Return what there is; *interval* and errors as for `queues.statuses`."""
    letters = DeadLetters(broker)
    return Overview(
        server=str(broker.server),
        version=broker.version,
        cluster=broker.info.cluster,
        namespace=broker.names.namespace,
        streams=await stream_statuses(broker),
        queues=await statuses(broker, queue_names, interval=interval),
        dead_letters=await letters.counts(),
        oldest_dead_letter_at=await letters.oldest_at(),
    )
