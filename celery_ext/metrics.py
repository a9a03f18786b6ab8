"""Metrics of queues and dead letters for Prometheus.

Each scrape asks the broker once, so the numbers are those of the moment, and any number of
exporters costs nothing in between.  Reference: docs/how-to/monitor.md, which a test compares.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kombu_jetstream.errors import JetStreamTransportError

from .broker import connect, options_of
from .fallback_health import FallbackState, look
from .overview import Overview, overview

__all__ = ["BrokerCollector", "serve"]

logger = logging.getLogger(__name__)

_QUEUE = {
    "ready": "Messages a worker may have now.",
    "in_flight": "Messages workers hold.",
    "delayed": "Messages whose time has not come.",
    "redelivered": "Messages in flight that were delivered before.",
    "consumers": "Workers that wait for a message.",
    "paused": "1 while the queue is paused.",
}


class BrokerCollector(Collector):
    """Asks the broker of an app at each scrape.

    A broker that cannot be reached makes ``celery_jetstream_up`` 0, and no other metric but those
    of the fallback Redis, if there is one.
    """

    def __init__(self, app: Any, *, timeout: float = 5.0) -> None:
        self._app = app
        self._timeout = timeout

    def collect(self) -> Iterator[Metric]:
        try:
            found = asyncio.run(self._look())
        except JetStreamTransportError as exc:
            logger.warning("cannot read the broker's state: %s", exc)
            found = None
        up = GaugeMetricFamily("celery_jetstream_up", "Whether the broker answered.")
        up.add_metric([], 1.0 if found is not None else 0.0)
        yield up
        if found is not None:
            yield from _queue_metrics(found)
            yield from _stream_metrics(found)
            yield from _letter_metrics(found)
        fallback = look(self._app, options_of(self._app))
        if fallback is not None:
            yield from _fallback_metrics(fallback)

    async def _look(self) -> Overview:
        async with connect(self._app, timeout=self._timeout) as broker:
            return await overview(broker)


def _queue_metrics(found: Overview) -> Iterator[Metric]:
    for name, text in _QUEUE.items():
        family = GaugeMetricFamily(f"celery_jetstream_queue_{name}", text, labels=["queue"])
        for queue in found.queues:
            value = queue.paused_until is not None if name == "paused" else getattr(queue, name)
            family.add_metric([queue.name], float(value))
        yield family
    levels = GaugeMetricFamily(
        "celery_jetstream_queue_level_ready",
        "Messages a worker may have now, by priority level.",
        labels=["queue", "level"],
    )
    oldest = GaugeMetricFamily(
        "celery_jetstream_queue_oldest_age_seconds",
        "How long the oldest message has been in the queue; 0 if it is empty.",
        labels=["queue"],
    )
    for queue in found.queues:
        oldest.add_metric([queue.name], queue.oldest_age or 0.0)
        for level, count in queue.levels.items():
            levels.add_metric([queue.name, level], float(count))
    yield levels
    yield oldest


def _stream_metrics(found: Overview) -> Iterator[Metric]:
    size = GaugeMetricFamily(
        "celery_jetstream_stream_bytes", "Bytes the stream holds.", labels=["stream"]
    )
    limit = GaugeMetricFamily(
        "celery_jetstream_stream_max_bytes", "Bytes it may hold, if limited.", labels=["stream"]
    )
    for stream in found.streams:
        size.add_metric([stream.name], float(stream.size))
        if stream.max_bytes is not None:
            limit.add_metric([stream.name], float(stream.max_bytes))
    yield size
    yield limit


def _letter_metrics(found: Overview) -> Iterator[Metric]:
    letters = GaugeMetricFamily("celery_jetstream_dead_letters", "Dead letters.", labels=["queue"])
    for queue in sorted(found.dead_letters.keys() | {queue.name for queue in found.queues}):
        letters.add_metric([queue], float(found.dead_letters.get(queue, 0)))
    yield letters
    oldest = GaugeMetricFamily(
        "celery_jetstream_dead_letters_oldest_age_seconds",
        "How long the oldest dead letter has been there; 0 if there is none.",
    )
    at = found.oldest_dead_letter_at
    oldest.add_metric([], max(0.0, time.time() - at) if at is not None else 0.0)
    yield oldest


def _fallback_metrics(found: FallbackState) -> Iterator[Metric]:
    up = GaugeMetricFamily("celery_jetstream_fallback_up", "Whether the fallback Redis answered.")
    up.add_metric([], 1.0 if found.problem is None else 0.0)
    yield up
    if found.problem is not None:
        return
    waiting = GaugeMetricFamily(
        "celery_jetstream_fallback_ready",
        "Messages that wait in the fallback Redis.",
        labels=["queue"],
    )
    for queue, count in found.waiting.items():
        waiting.add_metric([queue], float(count))
    yield waiting
    held = GaugeMetricFamily(
        "celery_jetstream_fallback_in_flight", "Messages workers took from the fallback Redis."
    )
    held.add_metric([], float(found.held))
    yield held


def serve(app: Any, host: str, port: int, *, timeout: float, say: Callable[[str], None]) -> None:
    """Serve ``/metrics`` until SIGINT or SIGTERM."""
    import signal

    registry = CollectorRegistry()
    registry.register(BrokerCollector(app, timeout=timeout))
    httpd, thread = start_http_server(port, addr=host, registry=registry)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *args: stopped.set())
    say(f"metrics on http://{host}:{httpd.server_port}/metrics, Ctrl-C stops it")
    try:
        stopped.wait()
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
