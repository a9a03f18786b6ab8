"""JetStream as a broker of pytest-celery: what its own vendors have.

The classes know of containers what docker-py says of them, and so work on a `LocalContainer`, too.
"""

from __future__ import annotations

from typing import Any

from kombu import Connection
from pytest_celery import CeleryTestBroker, CeleryTestContainer

__all__ = [
    "CELERY_JETSTREAM_BROKER",
    "DEFAULT_JETSTREAM_BROKER",
    "JETSTREAM_CONTAINER_TIMEOUT",
    "JETSTREAM_ENV",
    "JETSTREAM_IMAGE",
    "JETSTREAM_PORTS",
    "JETSTREAM_PREFIX",
    "JetStreamContainer",
    "JetStreamTestBroker",
]

CELERY_JETSTREAM_BROKER = "celery_jetstream_broker"
DEFAULT_JETSTREAM_BROKER = "default_jetstream_broker"
#: Not the image without a shell: pytest_docker_tools runs ``cat`` in it.
JETSTREAM_IMAGE = "nats:2-alpine"
JETSTREAM_PORTS: dict[str, int | None] = {"4222/tcp": None}
JETSTREAM_ENV: dict[str, str] = {}
#: Seconds.
JETSTREAM_CONTAINER_TIMEOUT = 60
JETSTREAM_PREFIX = "jetstream://"


class JetStreamContainer(CeleryTestContainer):
    """A nats-server with JetStream."""

    @property
    def client(self) -> Connection:
        """A kombu connection to the server, from outside of the container."""
        return Connection(self.celeryconfig["host_url"])

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "host_url": self.host_url,
            "hostname": self.hostname,
            "port": self.port,
            "vhost": self.vhost,
        }

    @classmethod
    def command(
        cls,
        *args: str,
        debugpy: bool = False,
        wait_for_client: bool = True,
        **kwargs: Any,
    ) -> list[str]:
        return ["-js", *args]

    @property
    def url(self) -> str:
        """The broker's URL for other containers."""
        inside = self._port_name.partition("/")[0]
        return f"{self.prefix()}{self.hostname}:{inside}/{self.vhost}"

    @property
    def host_url(self) -> str:
        """The broker's URL for the test."""
        return f"{self.prefix()}localhost:{self.port}/{self.vhost}"

    @property
    def hostname(self) -> str:
        return str(self.attrs["Config"]["Hostname"])

    @property
    def port(self) -> int:
        """The port for the test."""
        return int(self._wait_port(self._port_name))

    @property
    def _port_name(self) -> str:
        """The port within the container, as Docker names it; the image exposes others as well."""
        ports: dict[str, Any] = self.attrs["NetworkSettings"]["Ports"]
        return next((name for name, bound in ports.items() if bound), next(iter(JETSTREAM_PORTS)))

    @property
    def vhost(self) -> str:
        """The namespace, the default one if empty: the path of the URL."""
        return ""

    @classmethod
    def version(cls) -> str:
        return cls.image().partition(":")[2]

    @classmethod
    def initial_env(cls) -> dict[str, str]:
        return JETSTREAM_ENV

    @classmethod
    def image(cls) -> str:
        return JETSTREAM_IMAGE

    @classmethod
    def ports(cls) -> dict[str, int | None]:
        return JETSTREAM_PORTS

    @classmethod
    def prefix(cls) -> str:
        return JETSTREAM_PREFIX

    @property
    def ready_prompt(self) -> str | None:
        return "Server is ready"


class JetStreamTestBroker(CeleryTestBroker):
    """The broker node of a test."""
