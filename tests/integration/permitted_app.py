"""`tests.acceptance.app` with the two queues of `test_permissions`."""

from __future__ import annotations

from kombu import Exchange, Queue

from tests.acceptance.app import app as app

app.conf.task_queues = [
    Queue(name, Exchange(name), routing_key=name) for name in ("celery", "a b.c")
]
