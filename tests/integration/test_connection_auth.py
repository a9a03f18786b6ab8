"""Log-in and permissions against real servers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nkeys
import pytest

from kombu_jetstream.connection import ConnectionSettings, Credentials, NatsConnection, Server
from kombu_jetstream.errors import (
    AuthenticationFailed,
    ConnectionLost,
    NoServers,
    PermissionDenied,
)
from kombu_jetstream.protocol import Msg
from kombu_jetstream.server import NatsServer
from tests.servers import eventually, run_nats_server

pytestmark = pytest.mark.nats29

Login = Callable[..., NatsConnection]


def settings_of(server: NatsServer, credentials: Credentials, **options: Any):
    return ConnectionSettings(
        servers=(Server("127.0.0.1", server.port),), credentials=credentials, **options
    )


@pytest.fixture
def login() -> Iterator[Login]:
    """Connects to a server with credentials, and closes at the end."""
    made: list[NatsConnection] = []

    def log_in(server: NatsServer, options: dict[str, Any] | None = None, **credentials: str):
        connection = NatsConnection(
            settings_of(server, Credentials(**credentials), **(options or {}))
        )
        made.append(connection)
        connection.connect()
        return connection

    yield log_in
    for connection in made:
        connection.close()


@pytest.fixture(scope="module")
def seed() -> str:
    """A user's nkey seed."""
    return new_key(nkeys.PREFIX_BYTE_USER)[0]


def new_key(kind: int) -> tuple[str, str]:
    """Return seed and public key."""
    seed = nkeys.encode_seed(os.urandom(32), kind).decode()
    return seed, nkeys.from_seed(bytearray(seed.encode())).public_key.decode()


def public_key(seed: str) -> str:
    return str(nkeys.from_seed(bytearray(seed.encode())).public_key.decode())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, seed: str) -> Iterator[NatsServer]:
    """A server with users of every kind but JWT and token."""
    config = {
        "authorization": {
            "users": [
                {"user": "ann", "password": "s3cret word"},
                {"nkey": public_key(seed)},
                {
                    "user": "worker",
                    "password": "pw",
                    "permissions": {
                        "publish": {"allow": ["Tasks.>", "_INBOX.>"]},
                        "subscribe": {"allow": ["Tasks.>", "_INBOX.>"]},
                    },
                },
                {
                    "user": "no-inbox",
                    "password": "pw",
                    "permissions": {"publish": ">", "subscribe": "Tasks.>"},
                },
            ]
        }
    }
    with run_nats_server(tmp_path_factory.mktemp("users"), config=config) as running:
        yield running


# Who are you


def test_user_and_password_are_let_in(login: Login, server: NatsServer) -> None:
    login(server, user="ann", password="s3cret word").round_trip(2)


@pytest.mark.parametrize(
    "credentials",
    [
        {"user": "ann", "password": "wrong"},
        {"user": "bob", "password": "s3cret word"},
        {"user": "ann"},
        {"token": "s3cret word"},
        {},
    ],
    ids=["password", "user", "no-password", "token", "nothing"],
)
def test_wrong_credentials_are_refused_and_not_shown(
    login: Login, server: NatsServer, credentials: dict[str, str]
) -> None:
    with pytest.raises(AuthenticationFailed, match="Authorization Violation") as caught:
        login(server, **credentials)

    assert caught.value.server == f"127.0.0.1:{server.port}"
    assert "s3cret" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_refused_by_each_server_is_a_refusal(server: NatsServer) -> None:
    here = Server("127.0.0.1", server.port)
    settings = ConnectionSettings(servers=(here, Server("localhost", server.port)))

    with pytest.raises(AuthenticationFailed):
        NatsConnection(settings).connect()


def test_refused_by_one_of_two_servers_names_both(server: NatsServer) -> None:
    settings = ConnectionSettings(
        servers=(Server("127.0.0.1", server.port), Server("127.0.0.1", 1)),
    )

    with pytest.raises(NoServers, match="Authorization Violation") as caught:
        NatsConnection(settings).connect()

    assert [type(cause) for _, cause in caught.value.causes] == [
        AuthenticationFailed,
        ConnectionRefusedError,
    ]


def test_token_is_let_in(login: Login, tmp_path: Path) -> None:
    config = {"authorization": {"token": "s3cret"}}
    with run_nats_server(tmp_path / "store", config=config) as server:
        login(server, token="s3cret").round_trip(2)
        with pytest.raises(AuthenticationFailed):
            login(server, token="wrong")


def test_nkey_is_let_in(login: Login, server: NatsServer, seed: str, folder: Path) -> None:
    path = folder / "user.nk"
    path.write_text(f"{seed}\n")

    login(server, nkey_seed_file=str(path)).round_trip(2)


def test_unknown_nkey_is_refused(login: Login, server: NatsServer, folder: Path) -> None:
    path = folder / "user.nk"
    path.write_text(new_key(nkeys.PREFIX_BYTE_USER)[0])

    with pytest.raises(AuthenticationFailed, match="Authorization Violation"):
        login(server, nkey_seed_file=str(path))


def test_file_is_read_again_at_each_connect(
    login: Login, server: NatsServer, seed: str, folder: Path
) -> None:
    path = folder / "user.nk"
    path.write_text(new_key(nkeys.PREFIX_BYTE_USER)[0])
    connection = NatsConnection(settings_of(server, Credentials(nkey_seed_file=str(path))))
    with pytest.raises(AuthenticationFailed):
        connection.connect()

    path.write_text(seed)
    connection.connect()

    connection.round_trip(2)
    connection.close()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot read nkey_seed_file '.*user.nk': No such file"),
        ("", r"expected a user's nkey seed \(SU…\) in nkey_seed_file '.*user.nk'"),
        ("SUNOTASEED", "expected a user's nkey seed"),
        ("ünsinn", "expected a user's nkey seed"),
    ],
    ids=["missing", "empty", "short", "nonsense"],
)
def test_bad_seed_file_is_named(
    login: Login, server: NatsServer, folder: Path, text: str | None, problem: str
) -> None:
    path = folder / "user.nk"
    if text is not None:
        path.write_text(text)

    with pytest.raises(AuthenticationFailed, match=problem) as caught:
        login(server, nkey_seed_file=str(path))

    assert not text or text not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"no markers", b"\xff\xfe"], ids=["empty", "text", "binary"]
)
def test_bad_credentials_file_is_named(
    login: Login, server: NatsServer, folder: Path, content: bytes
) -> None:
    path = folder / "user.creds"
    path.write_bytes(content)

    with pytest.raises(AuthenticationFailed, match=r"credentials_file '.*user\.creds'"):
        login(server, credentials_file=str(path))


def test_credentials_do_not_show_secrets() -> None:
    shown = repr(
        ConnectionSettings(credentials=Credentials(user="ann", password="pw-1", token="tok-1"))
    )

    assert "ann" in shown
    assert "pw-1" not in shown
    assert "tok-1" not in shown


# Operator mode


def encode_jwt(claims: dict[str, object], seed: str) -> str:
    """Return a NATS JWT (ed25519-nkey) signed with *seed*."""

    def b64(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    claims = {**claims, "iat": int(time.time()), "iss": public_key(seed)}
    digest = hashlib.new("sha512_256", json.dumps(claims).encode()).digest()
    claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
    head = b64(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    body = b64(json.dumps(claims).encode())
    signature = nkeys.from_seed(bytearray(seed.encode())).sign(f"{head}.{body}".encode())
    return f"{head}.{body}.{b64(signature)}"


class Operator:
    """An operator with one account, who can issue users."""

    def __init__(self) -> None:
        self.seed, public = new_key(nkeys.PREFIX_BYTE_OPERATOR)
        self.jwt = encode_jwt(
            {"sub": public, "name": "op", "nats": {"type": "operator", "version": 2}}, self.seed
        )
        self.account_seed, self.account = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
        _, self.system_account = new_key(nkeys.PREFIX_BYTE_ACCOUNT)

    def account_jwt(self, account: str) -> str:
        limits = dict.fromkeys(
            ("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1
        )
        claims = {"type": "account", "version": 2, "limits": {**limits, "wildcards": True}}
        return encode_jwt({"sub": account, "name": account[:4], "nats": claims}, self.seed)

    def credentials(self, lifetime: float | None = None) -> str:
        """Return the text of a .creds file, for a user who expires after *lifetime* seconds."""
        seed, public = new_key(nkeys.PREFIX_BYTE_USER)
        claims: dict[str, object] = {
            "sub": public,
            "name": "user",
            "nats": {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1},
        }
        if lifetime is not None:
            claims["exp"] = int(time.time() + lifetime)
        jwt = encode_jwt(claims, self.account_seed)
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            "************************* IMPORTANT *************************\n"
            "NKEY Seed printed below can be used to sign and prove identity.\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )

    @property
    def config(self) -> str:
        accounts = ", ".join(
            f"{account}: {self.account_jwt(account)}"
            for account in (self.account, self.system_account)
        )
        return (
            f"operator: {self.jwt}\nsystem_account: {self.system_account}\n"
            f"resolver: MEMORY\nresolver_preload: {{ {accounts} }}\n"
        )


def test_credentials_file_is_let_in(login: Login, tmp_path: Path) -> None:
    operator = Operator()
    path = tmp_path / "user.creds"
    path.write_text(operator.credentials())
    with run_nats_server(tmp_path / "store", config=operator.config) as server:
        connection = login(server, credentials_file=str(path))

        connection.round_trip(2)


def test_credentials_of_another_operator_are_refused(login: Login, tmp_path: Path) -> None:
    path = tmp_path / "user.creds"
    path.write_text(Operator().credentials())
    with (
        run_nats_server(tmp_path / "store", config=Operator().config) as server,
        pytest.raises(AuthenticationFailed),
    ):
        login(server, credentials_file=str(path))


def test_credentials_that_expire_are_a_lost_connection(login: Login, tmp_path: Path) -> None:
    operator = Operator()
    path = tmp_path / "user.creds"
    path.write_text(operator.credentials(lifetime=2.0))
    with run_nats_server(tmp_path / "store", config=operator.config) as server:
        connection = login(server, credentials_file=str(path))

        with pytest.raises(ConnectionLost, match="User Authentication Expired"):
            connection.wait(lambda: False, 10)

        def is_refused() -> bool:
            try:
                login(server, credentials_file=str(path))
            except AuthenticationFailed:
                return True
            except NoServers:  # let in at the last moment, and dropped at once
                return False
            return False

        eventually(is_refused)


# What you may


def test_request_on_a_denied_subject_fails_at_once(login: Login, server: NatsServer) -> None:
    connection = login(server, user="worker", password="pw")
    began = time.monotonic()

    with pytest.raises(PermissionDenied) as caught:
        connection.request(b"Other.Subject", timeout=10)

    assert time.monotonic() - began < 1.0
    assert caught.value.operation == "publish"
    assert caught.value.subject.lower() == "other.subject"
    connection.round_trip(2)


def test_other_requests_go_on_after_a_denied_one(login: Login, server: NatsServer) -> None:
    connection = login(server, user="worker", password="pw")
    connection.subscribe(b"Tasks.echo", lambda msg: connection.publish(msg.reply, msg.payload))
    answers: dict[str, object] = {}

    connection.request_nowait(b"Tasks.echo", b"1", b"", lambda a: answers.update(first=a))
    connection.request_nowait(b"Other", b"2", b"", lambda a: answers.update(second=a))
    connection.request_nowait(b"Tasks.echo", b"3", b"", lambda a: answers.update(third=a))

    assert connection.wait(lambda: len(answers) == 3, 5)
    assert isinstance(answers["second"], PermissionDenied)
    assert isinstance(answers["first"], Msg)
    assert isinstance(answers["third"], Msg)


def test_denied_publish_is_told_and_raised_by_round_trip(login: Login, server: NatsServer) -> None:
    connection = login(server, user="worker", password="pw")
    told: list[Exception] = []
    connection.on_error = told.append

    connection.publish(b"Other", b"")
    with pytest.raises(PermissionDenied):
        connection.round_trip(2)

    connection.round_trip(2)
    assert [type(error) for error in told] == [PermissionDenied]


def test_denied_publish_is_logged_when_nobody_listens(
    login: Login, server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    connection = login(server, user="worker", password="pw")

    connection.publish(b"Other", b"")
    connection.wait(lambda: bool(connection._denials), 2)

    assert "may not publish to 'other'" in caplog.text.lower()


def test_denied_subscription_is_raised_by_the_next_wait(login: Login, server: NatsServer) -> None:
    connection = login(server, user="worker", password="pw")
    sid = connection.subscribe(b"Other.>", print)

    with pytest.raises(PermissionDenied) as caught:
        connection.wait(lambda: False, 5)

    assert (caught.value.operation, caught.value.subject.lower()) == ("subscribe", "other.>")
    assert sid not in connection._handlers
    connection.round_trip(2)


def test_denied_subscription_is_raised_by_check(login: Login, server: NatsServer) -> None:
    connection = login(server, user="worker", password="pw")
    connection.subscribe(b"Other", print)
    connection.publish(b"Tasks.x", b"")

    def denied() -> bool:
        connection.read_available()
        return bool(connection._denials)

    eventually(denied)
    with pytest.raises(PermissionDenied):
        connection.check()
    connection.check()


def test_request_without_permission_for_its_inbox_fails_at_once(
    login: Login, server: NatsServer
) -> None:
    connection = login(server, user="no-inbox", password="pw")

    for _ in range(2):
        with pytest.raises(PermissionDenied) as caught:
            connection.request(b"Tasks.x", timeout=10)
        assert caught.value.operation == "subscribe"
        assert caught.value.subject.upper().startswith("_INBOX.")

    connection.round_trip(2)


def test_callbacks_are_told_that_there_is_no_inbox(login: Login, server: NatsServer) -> None:
    connection = login(server, user="no-inbox", password="pw")
    answers: list[Msg | PermissionDenied] = []
    for _ in range(3):
        connection.request_nowait(b"Tasks.x", b"", b"", answers.append)

    with pytest.raises(PermissionDenied):
        connection.request(b"Tasks.x", timeout=5)

    assert [type(answer) for answer in answers] == [PermissionDenied] * 3


def test_inbox_of_ones_own_can_be_allowed(login: Login, server: NatsServer) -> None:
    connection = login(server, {"inbox_prefix": "Tasks.inbox"}, user="no-inbox", password="pw")
    connection.subscribe(b"Tasks.echo", lambda msg: connection.publish(msg.reply, msg.payload))

    assert connection.request(b"Tasks.echo", b"hi", timeout=5).payload == b"hi"


def test_too_many_subscriptions_are_told(login: Login, tmp_path: Path) -> None:
    config = {"max_subscriptions": 2}
    with run_nats_server(tmp_path / "store", config=config) as server:
        connection = login(server)
        told: list[Exception] = []
        connection.on_error = told.append

        for number in range(3):
            connection.subscribe(b"s%d" % number, print)
        connection.round_trip(2)

        assert "maximum subscriptions exceeded" in str(told).lower()
        connection.round_trip(2)


def test_too_many_connections_are_a_reason(login: Login, tmp_path: Path) -> None:
    with run_nats_server(tmp_path / "store", config={"max_connections": 1}) as server:
        login(server)

        with pytest.raises(NoServers, match=r"(?i)maximum connections exceeded"):
            login(server)
