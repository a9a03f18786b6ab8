"""The Celery app that is measured: tasks that do nothing.

Configured by the environment alone, for its worker and its producer alike: ``BROKER_URL``,
``TRANSPORT_OPTIONS`` and ``APP_SETTINGS`` (JSON objects), ``QUEUE``, and ``COUNTER``, a file that
grows by one byte for each task run.  The file's size is exact whatever processes and threads run
the tasks, and costs each the same 2 microseconds.
"""

from __future__ import annotations

import json
import os
import time

from celery import Celery

__all__ = ["app", "noop", "since"]

app = Celery("benchmark", set_as_current=False)
app.conf.update(
    broker_url=os.environ["BROKER_URL"],
    broker_transport_options=json.loads(os.environ.get("TRANSPORT_OPTIONS", "{}")),
    broker_connection_retry_on_startup=True,
    task_default_queue=os.environ["QUEUE"],
    **json.loads(os.environ.get("APP_SETTINGS", "{}")),
)

_counter = os.open(
    os.environ.get("COUNTER", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600
)


@app.task(ignore_result=True)
def noop() -> None:
    """Be counted."""
    os.write(_counter, b".")


@app.task
def since(sent: float) -> float:
    """Return how many seconds ago *sent* was, by the clock all processes of a machine share."""
    return time.monotonic() - sent
