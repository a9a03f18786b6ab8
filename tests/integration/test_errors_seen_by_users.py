"""Bad input and bad servers, as kombu's user meets them: the right class, words that help, soon."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.exceptions import OperationalError

from kombu_jetstream.errors import (
    AuthenticationFailed,
    CertificateRejected,
    ConnectionLost,
    JetStreamUnavailable,
    NoServers,
    OptionsError,
    PermissionDenied,
    TLSNotOffered,
    TopologyMismatch,
)
from kombu_jetstream.server import NatsServer
from tests.messaging import Received, declare, drain_quiet, send, take_all
from tests.servers import RedisServer, api_request, free_port, run_nats_server

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]

WORK = Queue("work", Exchange("work"), "work")

#: Denied to each user by its name: what a worker with ``provision="off"`` needs, one at a time.
DENIED = {
    "publish": "*.medium.*",
    "pull": "$JS.API.CONSUMER.MSG.NEXT.>",
    "registry": "$JS.API.DIRECT.GET.>",
    "streams": "$JS.API.STREAM.>",
    "consumers": "$JS.API.CONSUMER.CREATE.>",
}


def fails(make: Callable[[], Any], error: type[BaseException], match: str, within: float) -> Any:
    """Check that *make* raises *error* soon, and return it."""
    start = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        make()
    assert time.monotonic() - start < within
    return caught.value


def open_url(url: str, ssl: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: Connection(url, ssl=ssl, transport_options=options).connect()


@pytest.mark.parametrize(
    ("url", "options", "match"),
    [
        ("jetstream://", {"visibilty_timeout": 5}, "did you mean 'visibility_timeout'"),
        ("jetstream://", {"visibility_timeout": "1h"}, "expected .* seconds > 0, got '1h'"),
        ("jetstream://?publish_windw=3", {}, "did you mean 'publish_window'"),
        ("jetstream://host:port", {}, "expected the port of host 'host'"),
        ("jetstream://host/a.b", {}, "1 to 64 letters"),
        ("jetstream://?publish_timeout=3", {"publish_timeout": 4}, "say it once"),
    ],
)
def test_options(url: str, options: dict[str, Any], match: str) -> None:
    error = fails(open_url(url, **options), OptionsError, match, 3)

    assert isinstance(error, ValueError)
    assert not isinstance(error, Connection("jetstream://").connection_errors)


def test_no_server() -> None:
    port = free_port()
    connection = Connection(f"jetstream://127.0.0.1:{port}")

    error = fails(connection.connect, NoServers, f"127.0.0.1:{port}: .*refused", 3)
    assert isinstance(error, connection.recoverable_connection_errors)

    def publish() -> None:
        connection.Producer().publish(1, retry=True, retry_policy={"max_retries": 1})

    fails(publish, OperationalError, f"127.0.0.1:{port}: .*refused", 6)


def test_no_server_among_several() -> None:
    ports = [free_port(), free_port()]
    url = f"jetstream://127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}"

    fails(open_url(url), NoServers, f":{ports[0]}: .*:{ports[1]}: ", 3)


def test_a_name_nobody_has() -> None:
    fails(open_url("jetstream://no-such-host.invalid"), NoServers, "no-such-host", 10)


def test_another_service_behind_the_port(redis_server: RedisServer) -> None:
    """One that waits for the client to speak looks like a server that is too slow."""
    url = f"jetstream://127.0.0.1:{redis_server.port}"

    connection = Connection(url, connect_timeout=1)
    fails(connection.connect, NoServers, "expected INFO .* nothing came", 8)


def test_http_behind_the_port(tmp_path: Path) -> None:
    port = free_port()
    with run_nats_server(tmp_path / "store", config={"http": f"127.0.0.1:{port}"}):
        connection = Connection(f"jetstream://127.0.0.1:{port}", connect_timeout=1)
        fails(connection.connect, NoServers, "expected INFO|NATS protocol", 8)


def test_no_jetstream(tmp_path: Path) -> None:
    config = {"accounts": {"A": {"users": [{"user": "u", "password": "p"}]}}}
    with run_nats_server(tmp_path / "store", config=config) as server:
        url = f"jetstream://u:p@{server.host}:{server.port}"
        connection = Connection(url)
        error = fails(connection.connect, JetStreamUnavailable, "has no JetStream", 8)

    assert "`jetstream: enabled` to the account" in str(error)
    assert isinstance(error, connection.recoverable_connection_errors)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server with a user who may do all, and one for each thing that is denied."""
    users: list[dict[str, Any]] = [{"user": "all", "password": "secret"}]
    for user, subject in DENIED.items():
        users.append(
            {
                "user": user,
                "password": "secret",
                "permissions": {"publish": {"deny": [subject]}, "subscribe": {"allow": [">"]}},
            }
        )
    users.append(
        {
            "user": "inbox",
            "password": "secret",
            "permissions": {"subscribe": {"deny": ["_INBOX.>"]}},
        }
    )
    config = {
        "accounts": {"A": {"jetstream": "enabled", "users": users}},
    }
    with run_nats_server(tmp_path_factory.mktemp("guarded"), config=config) as server:
        yield server


def url_of(server: NatsServer, user: str, namespace: str, password: str = "secret") -> str:
    return f"jetstream://{user}:{password}@{server.host}:{server.port}/{namespace}"


@pytest.mark.parametrize("user", ["all", "nobody"])
def test_a_wrong_password(guarded: NatsServer, namespace: str, user: str) -> None:
    url = url_of(guarded, user, namespace, "not-the-password")
    connection = Connection(url)

    error = fails(connection.connect, AuthenticationFailed, "refused the credentials", 3)

    assert isinstance(error, OperationalError)
    assert "not-the-password" not in str(error) + repr(error) + connection.as_uri()
    # Trying again would be refused again: neither kombu's retries nor Celery's worker do.
    start = time.monotonic()
    with pytest.raises(AuthenticationFailed):
        connection.ensure_connection(max_retries=5, interval_start=1)
    assert time.monotonic() - start < 1


def prepared(guarded: NatsServer, namespace: str) -> Connection:
    """Make all there is to make, as a user who may."""
    connection = Connection(url_of(guarded, "all", namespace))
    declare(connection, WORK)
    return connection


@pytest.mark.parametrize("confirms", ["each", "pipelined"])
def test_no_permission_to_publish(guarded: NatsServer, namespace: str, confirms: str) -> None:
    with prepared(guarded, namespace) as all_may:
        url = url_of(guarded, "publish", namespace)
        options = {"publish_confirms": confirms, "provision": "off"}
        with Connection(url, transport_options=options) as connection:

            def publish() -> None:
                send(connection, 1, to=WORK)
                connection.connection.flush()

            error = fails(publish, PermissionDenied, f"publish to '{namespace}.medium.work'", 2)
            assert isinstance(error, connection.channel_errors)
            assert not isinstance(error, connection.recoverable_connection_errors)
            send(connection, 2, to=WORK, priority=9)  # another stream is allowed
            connection.connection.flush()
        assert take_all(all_may, WORK) == [2]


def test_no_permission_to_consume(guarded: NatsServer, namespace: str) -> None:
    with prepared(guarded, namespace) as all_may:
        send(all_may, 1, to=WORK)
        url = url_of(guarded, "pull", namespace)
        with Connection(url, transport_options={"provision": "off"}) as connection:
            received = Received(connection.channel(), "work")

            def consume() -> None:
                received.consume()
                drain_quiet(connection, 5)

            fails(consume, PermissionDenied, "CONSUMER.MSG.NEXT", 4)
            fails(
                lambda: connection.channel().basic_get("work"),
                PermissionDenied,
                "CONSUMER.MSG.NEXT",
                4,
            )


def test_no_permission_to_read_the_registry(guarded: NatsServer, namespace: str) -> None:
    with prepared(guarded, namespace):
        url = url_of(guarded, "registry", namespace)
        with Connection(url, transport_options={"provision": "off"}) as connection:
            fails(
                lambda: send(connection, 1, to=WORK),
                PermissionDenied,
                f"DIRECT.GET.{namespace}_registry",
                4,
            )


@pytest.mark.parametrize("user", ["streams", "consumers"])
def test_no_permission_to_provision(guarded: NatsServer, namespace: str, user: str) -> None:
    connection = Connection(url_of(guarded, user, namespace))
    with connection:
        fails(lambda: declare(connection, WORK), PermissionDenied, "may not publish to", 4)
    # What was made by others is used, if it is not to be made again.
    with (
        prepared(guarded, namespace),
        Connection(
            url_of(guarded, user, namespace), transport_options={"provision": "off"}
        ) as allowed,
    ):
        send(allowed, 1, to=WORK)
        assert take_all(allowed, WORK) == [1]


def test_no_permission_for_replies(guarded: NatsServer, namespace: str) -> None:
    fails(
        open_url(url_of(guarded, "inbox", namespace)),
        PermissionDenied,
        "may not subscribe to '_INBOX",
        4,
    )


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Files of an authority, a server's certificate and its key."""
    folder = tmp_path_factory.mktemp("certificates")
    ca = trustme.CA()
    issued = ca.issue_cert("localhost", "127.0.0.1")
    files = tuple(str(folder / name) for name in ("ca.pem", "server.pem", "server.key"))
    ca.cert_pem.write_to_path(files[0])
    issued.cert_chain_pems[0].write_to_path(files[1])
    issued.private_key_pem.write_to_path(files[2])
    return files[0], files[1], files[2]


@pytest.mark.tls
def test_tls_is_not_offered(shared_nats_server: NatsServer) -> None:
    plain = shared_nats_server.broker_url

    for open_it in (
        open_url(plain.replace("jetstream:", "jetstreams:")),
        open_url(plain, ssl=True),
    ):
        error = fails(open_it, TLSNotOffered, "no credential was sent", 3)
        assert isinstance(error, OperationalError)


@pytest.mark.tls
def test_tls_with_and_without_trust(
    tmp_path: Path, namespace: str, authority: tuple[str, str, str]
) -> None:
    ca, certificate, key = authority
    config = {"tls": {"cert_file": certificate, "key_file": key}}
    with run_nats_server(tmp_path / "store", config=config) as server:
        url = f"jetstreams://127.0.0.1:{server.port}/{namespace}"

        fails(open_url(url), CertificateRejected, "local issuer certificate.*ca_certs", 3)
        fails(
            open_url(url.replace("jetstreams", "jetstream")),
            ConnectionLost,
            "demands TLS; use jetstreams://",
            3,
        )
        with Connection(url, ssl={"ca_certs": ca}) as connection:
            declare(connection, WORK)
            send(connection, 1, to=WORK)
            assert take_all(connection, WORK) == [1]


# Streams that are somebody else's


def make_stream(server: NatsServer, name: str, **config: Any) -> None:
    answer = api_request(server.url, f"STREAM.CREATE.{name}", {"name": name, **config})
    assert "error" not in answer, answer


def test_a_stream_with_other_settings(shared_nats_server: NatsServer, namespace: str) -> None:
    make_stream(
        shared_nats_server,
        f"{namespace}_medium",
        subjects=[f"{namespace}.medium.>"],
        retention="limits",
    )
    connection = Connection(f"{shared_nats_server.broker_url}/{namespace}")

    error = fails(
        connection.connect,
        TopologyMismatch,
        f"'{namespace}_medium' has retention 'limits', expected 'workqueue'",
        4,
    )

    assert "celery jetstream doctor" in str(error)
    assert isinstance(error, connection.channel_errors)


def test_a_stream_that_has_the_subjects(shared_nats_server: NatsServer, namespace: str) -> None:
    make_stream(shared_nats_server, f"{namespace}_other", subjects=[f"{namespace}.>"])

    fails(
        open_url(f"{shared_nats_server.broker_url}/{namespace}"),
        TopologyMismatch,
        "cannot be made, as another stream",
        4,
    )


# The modes of provisioning


def test_verify_makes_nothing_and_says_what_is_missing(
    shared_nats_server: NatsServer, namespace: str
) -> None:
    url = f"{shared_nats_server.broker_url}/{namespace}"

    fails(
        open_url(url, provision="verify"),
        TopologyMismatch,
        f"'{namespace}_(high|registry|dlq|medium|low)' has existence 'missing'",
        4,
    )

    names = api_request(shared_nats_server.url, "STREAM.NAMES", {"subject": f"{namespace}.>"})
    assert not names["streams"]


def test_verify_accepts_what_is_as_it_should_be_and_tells_a_difference(
    shared_nats_server: NatsServer, namespace: str
) -> None:
    url = f"{shared_nats_server.broker_url}/{namespace}"
    small = {"dead_letter_max_bytes": 1024**2}
    with Connection(url, transport_options=small) as connection:
        declare(connection, WORK)

    with Connection(url, transport_options={**small, "provision": "verify"}) as connection:
        declare(connection, WORK)
        send(connection, 1, to=WORK)
        assert take_all(connection, WORK) == [1]
        fails(
            lambda: declare(connection, Queue("new", Exchange("work"), "new")),
            TopologyMismatch,
            "consumer 'new' .* has existence 'missing'",
            4,
        )
    fails(
        open_url(url, provision="verify", stream_max_age=5000.0, **small),
        TopologyMismatch,
        r"max_age .*, expected 5000\.0",
        4,
    )


def test_a_difference_that_is_not_ours_to_judge_is_told_and_used(
    shared_nats_server: NatsServer, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{shared_nats_server.broker_url}/{namespace}"
    small = {"dead_letter_max_bytes": 1024**2}
    with Connection(url, transport_options=small) as connection:
        declare(connection, WORK)

    with Connection(url, transport_options={**small, "stream_max_age": 5000.0}) as connection:
        declare(connection, WORK)
        send(connection, 1, to=WORK)
        assert take_all(connection, WORK) == [1]

    told = [r.getMessage() for r in caplog.records if "max_age" in r.getMessage()]
    assert len(told) == 3
    assert all("celery jetstream provision" in text for text in told)


def test_off_asks_the_server_for_no_configuration(
    shared_nats_server: NatsServer, namespace: str
) -> None:
    url = f"{shared_nats_server.broker_url}/{namespace}"
    with Connection(url, transport_options={"dead_letter_max_bytes": 1024**2}) as connection:
        declare(connection, WORK)
    asked: list[bytes] = []

    with Connection(url, transport_options={"provision": "off"}) as connection:
        nats = connection.connection.nats
        nowait = nats.request_nowait

        def noted(subject: bytes, *args: Any) -> Any:
            asked.append(subject)
            return nowait(subject, *args)

        nats.request_nowait = noted
        declare(connection, WORK)
        send(connection, 1, to=WORK)
        received = Received(connection.channel(), WORK)
        received.consume()
        assert received.wait(1) == [1]

    assert asked
    assert not [s for s in asked if b"$JS.API.STREAM." in s or b"CONSUMER.CREATE" in s]
