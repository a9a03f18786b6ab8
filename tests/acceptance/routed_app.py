"""The acceptance app with queues of every kind: routed, topic, fanout, Broadcast."""

from __future__ import annotations

from celery import Celery
from kombu.common import Broadcast
from kombu.entity import Exchange, Queue

from tests.acceptance.app import make_app

TOPIC = Exchange("news", type="topic")
FANOUT = Exchange("everyone", type="fanout")

QUEUES = [
    Queue("celery"),
    Queue("feeds", Exchange("feeds", type="direct"), routing_key="feed"),
    Queue("sport", TOPIC, routing_key="*.sport.#"),
    Queue("all news", TOPIC, routing_key="#"),
    Queue("copy one", FANOUT),
    Queue("copy two", FANOUT),
    Broadcast("workers"),
]


def make_routed_app(**config: object) -> Celery:
    app = make_app(**config)
    app.conf.update(
        task_queues=QUEUES,
        task_default_queue="celery",
        task_default_exchange="",
        task_default_routing_key="celery",
        task_create_missing_queues=False,
        task_routes={
            "where": {"queue": "feeds"},
            "tick": {"queue": "workers", "exchange": "workers"},
        },
        task_track_started=True,
    )
    return app


app = make_routed_app()
