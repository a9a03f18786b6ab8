from __future__ import annotations

import socket
import ssl
import time
from contextlib import closing

import pytest

from kombu_jetstream.connection import ConnectionSettings, NatsConnection, Server
from kombu_jetstream.endpoint import Credentials, certificate_error, dial, poll_socket
from kombu_jetstream.protocol import Info


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("broker", Server("broker", 4222)),
        ("broker:4223", Server("broker", 4223)),
        ("10.0.0.1:4222", Server("10.0.0.1", 4222)),
        ("nats://broker", Server("broker", 4222)),
        ("nats://broker:4223/", Server("broker", 4223)),
        ("tls://broker:4223", Server("broker", 4223, tls=True)),
        ("[::1]", Server("::1", 4222)),
        ("[::1]:4223", Server("::1", 4223)),
        ("tls://[fe80::1%25eth0]:1", Server("fe80::1%25eth0", 1, tls=True)),
    ],
)
def test_server_is_read(text: str, server: Server) -> None:
    assert Server.parse(text) == server


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":4222",
        "a:b",
        "a:0",
        "a:65536",
        "a:1:2",
        "::1",
        "http://a",
        "a b",
        "nats://",
        "a/b",
        "[]",
    ],
)
def test_what_is_no_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a server as 'host:port'"):
        Server.parse(text)


def test_credentials_in_a_server_are_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="got 'broker:4222'") as caught:
        Server.parse("nats://ann:s3cret@broker:4222")

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("text", ["broker:4222", "[::1]:4222"])
def test_server_is_shown_as_it_is_written(text: str) -> None:
    assert str(Server.parse(text)) == text


def test_a_server_that_demands_tls_gets_a_context() -> None:
    context = ssl.create_default_context()

    assert ConnectionSettings().tls_context(Server("a")) is None
    assert ConnectionSettings(tls=context).tls_context(Server("a")) is context
    assert ConnectionSettings(tls=context).tls_context(Server("a", tls=True)) is context
    made = ConnectionSettings().tls_context(Server("a", tls=True))
    assert made is not None
    assert made.check_hostname
    assert made.verify_mode is ssl.CERT_REQUIRED


def test_connect_options_of_each_kind() -> None:
    server = Server("a")

    assert Credentials().connect_options(server, None) == {}
    assert Credentials(token="t").connect_options(server, None) == {"auth_token": "t"}
    assert Credentials(user="u", password="p").connect_options(server, None) == {
        "user": "u",
        "pass": "p",
    }


def test_dial_tries_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            dead = unused.getsockname()
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", dead),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

        with closing(dial(Server("broker", port), time.monotonic() + 2)) as sock:
            assert sock.getpeername() == ("127.0.0.1", port)
            assert sock.gettimeout() == 0.0
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_dial_raises_the_last_address_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])

    with pytest.raises(OSError, match="assign requested address"):
        dial(Server("broker"), time.monotonic() + 2)


@pytest.mark.parametrize("with_poll", [True, False], ids=["poll", "select"])
def test_polling_says_what_a_socket_is_ready_for(
    monkeypatch: pytest.MonkeyPatch, with_poll: bool
) -> None:
    if not with_poll:
        monkeypatch.delattr("select.poll")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert poll_socket(ours.fileno(), True, True, 1) == (False, True)
        assert poll_socket(ours.fileno(), True, False, 0.01) == (False, False)
        theirs.send(b"x")
        assert poll_socket(ours.fileno(), True, False, None) == (True, False)
        theirs.close()
        assert poll_socket(ours.fileno(), True, False, 1)[0]


def test_polling_for_days_is_possible() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")

        assert poll_socket(ours.fileno(), True, False, 1e9) == (True, False)


def test_other_errors_are_not_about_certificates() -> None:
    assert certificate_error(Server("a"), OSError(32, "Broken pipe")) is None
    assert certificate_error(Server("a"), ssl.SSLError(1, "no reason")) is None


def connection_to(server: Server, *urls: str) -> NatsConnection:
    connection = NatsConnection(ConnectionSettings(servers=(server, Server("other"))))
    connection.server = server
    connection.info = Info(connect_urls=urls)
    return connection


def test_cluster_servers_come_after_those_of_the_settings() -> None:
    connection = connection_to(Server("a"), "b:4222", "other:4222", "[::1]:4223", "nonsense:")

    assert connection.discovered_servers == (
        Server("a"),
        Server("other"),
        Server("b"),
        Server("::1", 4223, tls_name="a"),
    )


def test_addresses_of_a_cluster_bear_the_name_we_connected_to() -> None:
    connection = connection_to(Server("a.example", tls=True), "10.0.0.1:4222", "b.example:4222")

    assert connection.discovered_servers[2:] == (
        Server("10.0.0.1", tls=True, tls_name="a.example"),
        Server("b.example", tls=True),
    )


def test_unconnected_connection_knows_the_servers_of_its_settings() -> None:
    settings = ConnectionSettings(servers=(Server("a"), Server("b")))

    assert NatsConnection(settings).discovered_servers == settings.servers
