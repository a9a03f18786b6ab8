from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from kombu.connection import Connection

import kombu_jetstream  # noqa: F401 - its transports, for kombu
from kombu_jetstream.server import NatsServer


@pytest.fixture
def connect(shared_nats_server: NatsServer, namespace: str) -> Iterator[Callable[..., Connection]]:
    """Opens kombu connections to the test's namespace on the shared server.

    Keyword arguments are transport options; ``url`` replaces the shared server's.
    """
    with ExitStack() as stack:

        def opened(url: str | None = None, **options: Any) -> Connection:
            # A stream's limit is reserved on the disk, and a module has many namespaces.
            options.setdefault("dead_letter_max_bytes", 1024**2)
            base = url if url is not None else shared_nats_server.broker_url
            made = Connection(f"{base}/{namespace}", transport_options=options)
            return stack.enter_context(made)

        yield opened


@pytest.fixture
def connection(connect: Callable[..., Connection]) -> Connection:
    """One kombu connection with default options."""
    return connect()
