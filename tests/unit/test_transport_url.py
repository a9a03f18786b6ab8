"""The broker URL as kombu's `Connection` and Celery show it."""

from __future__ import annotations

import pickle

import pytest
from kombu import Connection

import kombu_jetstream  # noqa: F401
from kombu_jetstream.options import with_secret, without_secret

URLS = {
    "password": "jetstream://shop:p%40ss@h1:1,h2:2/ns?ack_confirm=true",
    "token": "jetstream://s3cret@h/ns",
    "empty password": "jetstream://shop:@h",
    "nothing": "jetstream://h",
    "no host": "jetstreams://",
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS.keys())
def test_secret_comes_off_and_on_again(url: str) -> None:
    bare, secret = without_secret(url)

    assert (with_secret(bare, secret) if secret is not None else bare) == url


@pytest.mark.parametrize("url", [URLS["password"], URLS["token"]], ids=["password", "token"])
def test_what_celery_sends_of_a_connection_has_the_secret_where_it_removes_it(url: str) -> None:
    info = Connection(url).info()

    secret = info.pop("password")
    assert secret in ("p@ss", "s3cret")
    assert secret not in repr(info)
    assert "p%40ss" not in repr(info)


@pytest.mark.parametrize("url", URLS.values(), ids=URLS.keys())
def test_copies_of_a_connection_mean_the_same_server(url: str) -> None:
    connection = Connection(url)
    settings = connection.transport.settings()

    for copy in (connection.clone(), pickle.loads(pickle.dumps(connection))):
        assert copy.transport.settings()[0] == settings[0]


def test_shown_uri_masks_the_secret_and_keeps_the_rest() -> None:
    connection = Connection(URLS["password"])
    _ = connection.transport

    assert connection.as_uri() == "jetstream://shop:**@h1:1,h2:2/ns?ack_confirm=true"
    assert connection.as_uri(include_password=True) == URLS["password"]
