"""pytest-celery's worker image with this package in it."""

from __future__ import annotations

import pytest

__all__ = ["default_worker_pytest_celery_pkg"]


@pytest.fixture(scope="session")
def default_worker_pytest_celery_pkg() -> str:
    """What pip installs in the built-in worker's image; it brings pytest-celery along."""
    return "kombu-jetstream[pytest]"
