"""TLS against real servers, with an authority made for the run."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from kombu_jetstream.connection import ConnectionSettings, Credentials, NatsConnection, Server
from kombu_jetstream.errors import (
    CertificateRejected,
    ConnectionLost,
    NoServers,
    TLSNotOffered,
)
from kombu_jetstream.protocol import Msg
from kombu_jetstream.server import NatsServer
from tests.servers import run_nats_server

pytestmark = [pytest.mark.tls, pytest.mark.nats29]

# Python 3.12 warns of a fork while there are other threads: that is what is tested.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Certificates:
    """An authority, a server's certificate for localhost, and a client's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        self.authority.cert_pem.write_to_path(self.ca_file)
        self.server = self.issue("server", "localhost", "127.0.0.1")
        self.client = self.issue("client", "worker@example.org")

    def issue(self, name: str, *identities: str) -> tuple[str, str]:
        """Return the files of a new certificate and its key."""
        made = self.authority.issue_cert(*identities)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        for number, blob in enumerate(made.cert_chain_pems):
            blob.write_to_path(str(certificate), append=number > 0)
        made.private_key_pem.write_to_path(str(key))
        return str(certificate), str(key)

    def server_tls(self, **more: object) -> dict[str, object]:
        certificate, key = self.server
        return {"cert_file": certificate, "key_file": key, "ca_file": self.ca_file, **more}

    def context(self, *, client: tuple[str, str] | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca_file)
        if client is not None:
            context.load_cert_chain(*client)
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secure_server(
    tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[NatsServer]:
    config = {"tls": certificates.server_tls()}
    with run_nats_server(tmp_path_factory.mktemp("secure"), config=config) as server:
        yield server


@pytest.fixture
def connect() -> Iterator[Callable[..., NatsConnection]]:
    made: list[NatsConnection] = []

    def open_one(
        server: NatsServer | int, tls: ssl.SSLContext | None, host: str = "localhost", **options
    ) -> NatsConnection:
        port = server if isinstance(server, int) else server.port
        made.append(
            NatsConnection(ConnectionSettings(servers=(Server(host, port),), tls=tls, **options))
        )
        made[-1].connect()
        return made[-1]

    yield open_one
    for connection in made:
        connection.close()


Connect = Callable[..., NatsConnection]


def test_messages_go_through_tls(
    connect: Connect, secure_server: NatsServer, certificates: Certificates
) -> None:
    connection = connect(secure_server, certificates.context())
    got: list[Msg] = []
    connection.subscribe(b"a", got.append)
    payload = os.urandom(1_000_000)

    connection.publish(b"a", payload)

    assert connection.wait(lambda: bool(got), 5)
    assert got[0].payload == payload
    assert isinstance(connection._sock, ssl.SSLSocket)
    assert connection._sock.version() == "TLSv1.3"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_certificate_is_checked_against_the_host(
    connect: Connect, secure_server: NatsServer, certificates: Certificates, host: str
) -> None:
    connect(secure_server, certificates.context(), host).round_trip(2)


def test_wrong_host_name_is_a_rejected_certificate(
    connect: Connect, secure_server: NatsServer, certificates: Certificates
) -> None:
    with pytest.raises(CertificateRejected, match=r"(?i)hostname mismatch.*broker\.example"):
        connect(secure_server, certificates.context(), tls_hostname="broker.example")


def test_tls_hostname_replaces_the_host(
    connect: Connect, tmp_path: Path, certificates: Certificates
) -> None:
    certificate, key = certificates.issue("other", "nats.example")
    tls = certificates.server_tls(cert_file=certificate, key_file=key)
    with run_nats_server(tmp_path / "store", config={"tls": tls}) as server:
        with pytest.raises(CertificateRejected):
            connect(server, certificates.context())

        connect(server, certificates.context(), tls_hostname="nats.example").round_trip(2)


def test_unknown_authority_is_a_rejected_certificate(
    connect: Connect, secure_server: NatsServer
) -> None:
    with pytest.raises(CertificateRejected, match=r"(?i)unable to get local issuer") as caught:
        connect(secure_server, ssl.create_default_context())

    assert caught.value.server == f"localhost:{secure_server.port}"


def test_server_that_demands_tls_of_itself_uses_the_systems_authorities(
    secure_server: NatsServer,
) -> None:
    settings = ConnectionSettings(servers=(Server("localhost", secure_server.port, tls=True),))

    with pytest.raises(CertificateRejected, match=r"(?i)unable to get local issuer"):
        NatsConnection(settings).connect()


def test_unchecked_certificate_is_the_callers_choice(
    connect: Connect, secure_server: NatsServer
) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE

    connect(secure_server, context, "127.0.0.1").round_trip(2)


def test_plain_client_is_told_that_the_server_demands_tls(
    connect: Connect, secure_server: NatsServer
) -> None:
    with pytest.raises(NoServers, match="demands TLS; use jetstreams://"):
        connect(secure_server, None)


def test_no_credential_is_sent_to_a_server_without_tls(certificates: Certificates) -> None:
    said: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        with listener, client:
            client.sendall(b'INFO {"headers":true,"auth_required":true,"nonce":"abc"}\r\n')
            client.settimeout(5)
            said.append(client.recv(4096))

    thread = threading.Thread(target=serve)
    thread.start()
    connection = NatsConnection(
        ConnectionSettings(
            servers=(Server("127.0.0.1", listener.getsockname()[1]),),
            credentials=Credentials(user="ann", password="s3cret", token="t0ken"),
            tls=certificates.context(),
        )
    )

    with pytest.raises(TLSNotOffered):
        connection.connect()

    thread.join(5)
    assert said == [b""]


def test_bytes_slipped_in_before_the_handshake_are_refused(certificates: Certificates) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        with listener, client:
            client.sendall(b'INFO {"headers":true,"tls_required":true}\r\nMSG a 1 5\r\nslip')
            client.settimeout(5)
            client.recv(4096)

    thread = threading.Thread(target=serve)
    thread.start()
    settings = ConnectionSettings(
        servers=(Server("127.0.0.1", listener.getsockname()[1]),), tls=certificates.context()
    )

    with pytest.raises(NoServers, match="nothing between INFO and the TLS handshake"):
        NatsConnection(settings).connect()

    thread.join(5)


def test_tls_offered_but_not_demanded_is_used(
    connect: Connect, tmp_path: Path, certificates: Certificates
) -> None:
    config = {"tls": certificates.server_tls(), "allow_non_tls": True}
    with run_nats_server(tmp_path / "store", config=config) as server:
        secure = connect(server, certificates.context())
        plain = connect(server, None)

        assert secure.info.tls_available
        assert isinstance(secure._sock, ssl.SSLSocket)
        assert not isinstance(plain._sock, ssl.SSLSocket)
        secure.round_trip(2)
        plain.round_trip(2)


# Client certificates


@pytest.fixture(scope="module")
def mutual_server(
    tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[NatsServer]:
    config = {"tls": certificates.server_tls(verify=True)}
    with run_nats_server(tmp_path_factory.mktemp("mutual"), config=config) as server:
        yield server


def test_client_certificate_is_accepted(
    connect: Connect, mutual_server: NatsServer, certificates: Certificates
) -> None:
    connect(mutual_server, certificates.context(client=certificates.client)).round_trip(2)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_missing_client_certificate_is_rejected(
    connect: Connect,
    mutual_server: NatsServer,
    certificates: Certificates,
    version: ssl.TLSVersion,
) -> None:
    context = certificates.context()
    context.maximum_version = version

    with pytest.raises(CertificateRejected, match="did not accept our certificate, or wants one"):
        connect(mutual_server, context)


def test_client_certificate_of_another_authority_is_rejected(
    connect: Connect, mutual_server: NatsServer, certificates: Certificates, tmp_path: Path
) -> None:
    stranger = Certificates(tmp_path)

    with pytest.raises(CertificateRejected):
        connect(mutual_server, certificates.context(client=stranger.client))


def test_client_certificate_can_be_the_user(
    connect: Connect, tmp_path: Path, certificates: Certificates
) -> None:
    config = {
        "tls": certificates.server_tls(verify_and_map=True),
        "authorization": {"users": [{"user": "worker@example.org"}]},
    }
    with run_nats_server(tmp_path / "store", config=config) as server:
        connect(server, certificates.context(client=certificates.client)).round_trip(2)


# The handshake first


@pytest.fixture(scope="module")
def tls_first_server(
    tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[NatsServer]:
    config = {"tls": certificates.server_tls(handshake_first=True)}
    with run_nats_server(tmp_path_factory.mktemp("first"), config=config) as server:
        yield server


@pytest.mark.requires_nats("2.10")
def test_handshake_first(
    connect: Connect, tls_first_server: NatsServer, certificates: Certificates
) -> None:
    connect(tls_first_server, certificates.context(), tls_handshake_first=True).round_trip(2)


@pytest.mark.requires_nats("2.10")
@pytest.mark.parametrize("with_tls", [True, False], ids=["tls", "plain"])
def test_server_that_waits_for_the_handshake_is_recognised(
    connect: Connect, tls_first_server: NatsServer, certificates: Certificates, with_tls: bool
) -> None:
    context = certificates.context() if with_tls else None

    with pytest.raises(NoServers, match="begins with TLS needs tls_handshake_first"):
        connect(tls_first_server, context, connect_timeout=0.3)


def test_server_that_does_not_begin_with_tls_is_recognised(
    connect: Connect, secure_server: NatsServer, certificates: Certificates
) -> None:
    with pytest.raises(NoServers, match="does not answer with TLS; leave out tls_handshake_first"):
        connect(secure_server, certificates.context(), tls_handshake_first=True)


def test_handshake_is_bounded_by_the_timeout(certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = ConnectionSettings(
            servers=(Server("127.0.0.1", silent.getsockname()[1]),),
            tls=certificates.context(),
            tls_handshake_first=True,
            connect_timeout=0.2,
        )
        began = time.monotonic()

        with pytest.raises(NoServers, match=r"finish the TLS handshake within 0\.2 s"):
            NatsConnection(settings).connect()

    assert time.monotonic() - began < 1.0


# Threads and processes


def noting(numbers: list[int]) -> Callable[[Msg], None]:
    """Return a handler that appends the number a message carries."""
    return lambda msg: numbers.append(int(msg.payload))


def test_two_threads_write_while_the_main_thread_reads(
    connect: Connect, secure_server: NatsServer, certificates: Certificates
) -> None:
    connection = connect(secure_server, certificates.context())
    got: dict[bytes, list[int]] = {b"t1": [], b"t2": []}
    for subject, numbers in got.items():
        connection.subscribe(subject, noting(numbers))

    def write(subject: bytes) -> None:
        for number in range(10_000):
            connection.publish(subject, b"%d" % number)

    threads = [threading.Thread(target=write, args=(subject,)) for subject in got]
    for thread in threads:
        thread.start()

    assert connection.wait(lambda: sum(map(len, got.values())) == 20_000, 60)
    for thread in threads:
        thread.join()
    assert got == {subject: list(range(10_000)) for subject in got}


def test_full_socket_does_not_break_the_stream(
    connect: Connect, tmp_path: Path, certificates: Certificates
) -> None:
    with run_nats_server(tmp_path / "store", config={"tls": certificates.server_tls()}) as server:
        connection = connect(server, certificates.context())
        got: list[int] = []
        connection.subscribe(b"a", lambda msg: got.append(int(msg.payload[:6])))
        connection.round_trip(2)
        server.pause()
        thaw = threading.Timer(0.3, server.resume)
        thaw.start()

        for number in range(100):
            connection.publish(b"a", b"%06d" % number + os.urandom(100_000))

        assert connection.wait(lambda: len(got) == 100, 20)
        assert got == list(range(100))
        thaw.join()


def test_what_openssl_holds_back_is_dispatched_at_once(
    connect: Connect, secure_server: NatsServer, certificates: Certificates
) -> None:
    connection = connect(secure_server, certificates.context())
    got: list[Msg] = []

    def fail_at_first(msg: Msg) -> None:
        got.append(msg)
        if len(got) == 1:
            raise ZeroDivisionError

    connection.subscribe(b"a", fail_at_first)
    with connection.corked():
        for _ in range(60):
            connection.publish(b"a", bytes(1000))
    connection.flush()
    with pytest.raises(ZeroDivisionError):
        connection.wait(lambda: False, 5)

    assert connection.wait(lambda: len(got) == 60, 2)


@forks
def test_child_connects_anew_and_the_parent_goes_on(
    connect: Connect, secure_server: NatsServer, certificates: Certificates
) -> None:
    connection = connect(secure_server, certificates.context())
    got: list[bytes] = []
    connection.subscribe(b"family", lambda msg: got.append(msg.payload))
    connection.round_trip(2)

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with pytest.raises(ConnectionLost, match="a forked one needs its own"):
                connection.publish(b"family", b"never")
            connection.close()
            own = NatsConnection(connection.settings)
            own.connect()
            own.publish(b"family", b"child")
            own.round_trip(2)
            own.close()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    connection.publish(b"family", b"parent")
    connection.round_trip(2)

    assert os.waitstatus_to_exitcode(status) == 0
    assert got == [b"child", b"parent"]


def test_server_that_goes_away_is_a_lost_connection(
    connect: Connect, tmp_path: Path, certificates: Certificates
) -> None:
    with run_nats_server(tmp_path / "store", config={"tls": certificates.server_tls()}) as server:
        connection = connect(server, certificates.context())
        server.kill()

        with pytest.raises(ConnectionLost):
            connection.wait(lambda: False, 5)
        assert not connection.is_open
