"""JetStream as the broker of all tests, and results through it: no other server is needed.

pytest-celery runs each test with all of its own brokers and backends.  These fixtures take the
place of its lists; a test suite overrides them in its conftest, as it would pytest-celery's.
"""

from __future__ import annotations

from typing import Any

import pytest

from .pytest_nodes import JetStreamTestBroker

__all__ = ["celery_backend_cluster", "celery_backend_cluster_config", "celery_broker"]

#: Results come back through the broker.
RESULTS = "rpc://"


@pytest.fixture
def celery_broker(celery_jetstream_broker: JetStreamTestBroker) -> JetStreamTestBroker:
    """The broker of each test."""
    return celery_jetstream_broker


@pytest.fixture
def celery_backend_cluster() -> None:
    """No result backend of its own."""


@pytest.fixture
def celery_backend_cluster_config(celery_backend_cluster: Any) -> dict[str, Any]:
    """The backend's configuration, of a cluster if the test has one."""
    if celery_backend_cluster is not None:
        return dict(celery_backend_cluster.config())
    return {"urls": [RESULTS], "host_urls": [RESULTS]}
