"""pytest-celery's fixtures for one more vendor: a nats-server with JetStream, in Docker.

Named as the vendors' own are, and overridden in the same way.  `pytest_local` has the same without
Docker, `pytest_setup` makes them the broker of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_docker_tools import container, fxtr

from .pytest_nodes import JETSTREAM_CONTAINER_TIMEOUT, JetStreamContainer, JetStreamTestBroker

__all__ = [
    "celery_jetstream_broker",
    "default_jetstream_broker",
    "default_jetstream_broker_cls",
    "default_jetstream_broker_command",
    "default_jetstream_broker_env",
    "default_jetstream_broker_image",
    "default_jetstream_broker_ports",
]


@pytest.fixture
def celery_jetstream_broker(
    default_jetstream_broker: JetStreamContainer,
) -> Iterator[JetStreamTestBroker]:
    """The broker node; what `celery_broker` is to return."""
    broker = JetStreamTestBroker(default_jetstream_broker)
    yield broker
    broker.teardown()


@pytest.fixture
def default_jetstream_broker_cls() -> type[JetStreamContainer]:
    """The class of the broker's container."""
    return JetStreamContainer


default_jetstream_broker = container(
    image="{default_jetstream_broker_image}",
    ports=fxtr("default_jetstream_broker_ports"),
    environment=fxtr("default_jetstream_broker_env"),
    network="{default_pytest_celery_network.name}",
    wrapper_class=JetStreamContainer,
    timeout=JETSTREAM_CONTAINER_TIMEOUT,
    command=fxtr("default_jetstream_broker_command"),
)


@pytest.fixture
def default_jetstream_broker_command(
    default_jetstream_broker_cls: type[JetStreamContainer],
) -> list[str]:
    """Arguments of nats-server."""
    return default_jetstream_broker_cls.command()


@pytest.fixture
def default_jetstream_broker_env(
    default_jetstream_broker_cls: type[JetStreamContainer],
) -> dict[str, str]:
    """Environment of the server."""
    return default_jetstream_broker_cls.initial_env()


@pytest.fixture
def default_jetstream_broker_image(default_jetstream_broker_cls: type[JetStreamContainer]) -> str:
    """Name of the image, with a tag."""
    return default_jetstream_broker_cls.image()


@pytest.fixture
def default_jetstream_broker_ports(
    default_jetstream_broker_cls: type[JetStreamContainer],
) -> dict[str, int | None]:
    """Ports of the container, and of the host; None for any free one."""
    return default_jetstream_broker_cls.ports()
