"""The pytest plugin: JetStream in pytest-celery's tests.

With pytest-celery installed it offers the fixtures of `pytest_fixtures`, as pytest-celery's own
vendors do.  A test suite that wants nothing else says so in one line of its configuration::

    [pytest]
    celery_jetstream = auto

============  ==========================================================================
``auto``      ``docker`` if a Docker daemon answers, else ``local``
``docker``    server and workers in containers
``local``     server and workers as processes of this machine (`pytest_local`)
============  ==========================================================================

Loaded in every pytest run of an environment, so it imports nothing unless it is used for something.
"""

from __future__ import annotations

import contextlib
import os
import socket
from importlib.util import find_spec

import pytest

__all__ = ["docker_answers", "pytest_addoption", "pytest_configure"]

MODES = ("auto", "docker", "local")

if find_spec("pytest_celery") is not None:
    # Fixtures are found in the plugin's own namespace.
    from .pytest_fixtures import *  # noqa: F403


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run pytest-celery's tests on JetStream: auto, docker or local"
    parser.addini("celery_jetstream", text, default="")
    parser.getgroup("celery").addoption(
        "--celery-jetstream", metavar="MODE", default=None, help=text
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put JetStream in the place of pytest-celery's brokers, if the configuration says so."""
    mode = config.getoption("--celery-jetstream") or config.getini("celery_jetstream")
    if not mode:
        return
    if mode not in MODES:
        raise pytest.UsageError(
            f"expected celery_jetstream to be one of {', '.join(MODES)}, got {mode!r}"
        )
    if find_spec("pytest_celery") is None:
        raise pytest.UsageError(
            "celery_jetstream needs pytest-celery: pip install 'kombu-jetstream[pytest]'"
        )
    from . import pytest_setup

    # Registered after pytest-celery's plugin, so these fixtures win; a conftest's still win over
    # these.
    config.pluginmanager.register(pytest_setup, "celery_jetstream_setup")
    if mode == "local" or (mode == "auto" and not docker_answers()):
        from . import pytest_local

        config.pluginmanager.register(pytest_local, "celery_jetstream_local")
    else:
        from . import pytest_docker

        config.pluginmanager.register(pytest_docker, "celery_jetstream_docker")


def docker_answers() -> bool:
    """Tell whether there is a Docker daemon, where docker-py looks for it."""
    import docker
    from docker.errors import DockerException

    host = os.environ.get("DOCKER_HOST", docker.constants.DEFAULT_UNIX_SOCKET)
    # docker-py leaves a socket open when it cannot connect, which a strict test suite resents.
    if "unix://" in host and not _accepts(host.rpartition("unix://")[2]):
        return False
    try:
        client = docker.from_env(timeout=5)
    except DockerException:
        return False
    try:
        return bool(client.ping())
    except (DockerException, OSError):
        return False
    finally:
        client.close()


def _accepts(path: str) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
