"""Fixtures of the acceptance ring: real workers of an ordinary app on a real nats-server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.acceptance.app import make_app
from tests.acceptance.sites import Site
from tests.servers import missing, nats_server_binary


@pytest.fixture(scope="session", autouse=True)
def _needs_nats_server() -> None:
    if nats_server_binary() is None:
        missing("nats-server")


@pytest.fixture(scope="module")
def make_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Site]]:
    """Makes a `Site`: ``make_site(broker_url, name, **celery_settings)``.

    Its workers and clients are stopped at the end of the module.
    """
    with ExitStack() as stack:

        def make(
            broker_url: str,
            name: str = "site",
            *,
            make_app: Callable[..., Celery] = make_app,
            **config: Any,
        ) -> Site:
            folder: Path = tmp_path_factory.mktemp(f"{name} folder")
            return stack.enter_context(Site(folder, broker_url, config, make_app))

        yield make
