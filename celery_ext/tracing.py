"""Trace context in task messages, for programs with OpenTelemetry.

The publisher's W3C ``traceparent`` goes into the message's headers (the transport repeats it as a
NATS header, for tools that look at the stream), and what the task does is a part of that trace.
``opentelemetry-instrumentation-celery`` does the same and makes spans as well: where it is
loaded, all that is left to do is to tell its spans about the queue.

Without the package ``opentelemetry-api`` nothing of this happens.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import MutableMapping
from typing import Any

__all__ = ["is_available", "tell", "trace_publish", "trace_task_end", "trace_task_start"]

#: Where the task's request keeps what `trace_task_end` needs.
_TOKEN = "_jetstream_trace"


def is_available() -> bool:
    """Tell whether OpenTelemetry's API is installed."""
    try:
        return importlib.util.find_spec("opentelemetry.propagate") is not None
    except ModuleNotFoundError:
        return False


def _is_instrumented() -> bool:
    return "opentelemetry.instrumentation.celery" in sys.modules


def trace_publish(headers: MutableMapping[str, Any]) -> None:
    """Add the current trace context to a message's headers, unless they have one."""
    if "traceparent" not in headers and not _is_instrumented():
        from opentelemetry import propagate

        propagate.inject(headers)


def trace_task_start(request: Any) -> None:
    """Make the trace of a task's message the current one."""
    if _is_instrumented():
        tell(request)
        return
    headers = request.headers or {}
    if "traceparent" not in headers:
        return
    from opentelemetry import context, propagate

    setattr(request, _TOKEN, context.attach(propagate.extract(headers)))


def trace_task_end(request: Any) -> None:
    """Undo `trace_task_start`."""
    token = request.__dict__.pop(_TOKEN, None)
    if token is not None:
        from opentelemetry import context

        context.detach(token)


def tell(request: Any) -> None:
    """Say on the current span, if it is recorded, where its message was (semantic conventions of
    messaging)."""
    from opentelemetry import trace

    span = trace.get_current_span()
    if span.is_recording():
        span.set_attribute("messaging.system", "nats")
        span.set_attribute(
            "messaging.destination.name", (request.delivery_info or {}).get("routing_key") or ""
        )
