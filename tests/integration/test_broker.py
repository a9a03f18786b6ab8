"""How the command line connects: nats-py with the application's own settings."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import nkeys
import pytest
import trustme

from celery_ext.broker import Broker, gather, run
from celery_ext.replay import WRONG_LAST_SEQUENCE
from kombu_jetstream.errors import (
    ApiError,
    AuthenticationFailed,
    CertificateRejected,
    ConnectionLost,
    ConnectionRejected,
    JetStreamTransportError,
    MessageTooLarge,
    NoResponders,
    NoServers,
    PermissionDenied,
    ProtocolError,
    PublishRejected,
    RequestTimeout,
    TLSNotOffered,
)
from kombu_jetstream.server import NatsServer
from tests.proxy import TcpProxy
from tests.servers import free_port, run_nats_server

pytestmark = pytest.mark.nats29


def app_of(url: str, *, tls: Any = None, **options: Any) -> celery.Celery:
    app = celery.Celery(broker=url, set_as_current=False)
    app.conf.update(broker_transport_options=options, broker_use_ssl=tls)
    app.conf.broker_connection_timeout = 2.0
    return app


async def whoami(broker: Broker) -> str:
    info = await broker.api("INFO")
    return f"{broker.server} {info['type']}"


def logged_in(app: celery.Celery) -> bool:
    return "account_info_response" in run(app, whoami)


# -- logging in ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seed() -> tuple[str, str]:
    """A user's nkey seed and public key."""
    raw = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return raw.decode(), nkeys.from_seed(bytearray(raw)).public_key.decode()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, seed: tuple[str, str]) -> Iterator[int]:
    """Port of a server that knows a user by password and one by nkey."""
    users = [{"user": "shop", "password": "p/ss:w"}, {"nkey": seed[1]}]
    config = {"authorization": {"users": users}}
    with run_nats_server(tmp_path_factory.mktemp("nats store"), config=config) as server:
        yield server.port


def test_a_user_logs_in_with_a_password(guarded: int) -> None:
    assert logged_in(app_of(f"jetstream://shop:p%2Fss%3Aw@127.0.0.1:{guarded}"))


def test_a_user_logs_in_with_an_nkey(guarded: int, seed: tuple[str, str], folder: Path) -> None:
    (folder / "user.nk").write_text(f"{seed[0]}\n")

    url = f"jetstream://127.0.0.1:{guarded}"
    assert logged_in(app_of(url, nkey_seed_file=str(folder / "user.nk")))


def test_a_token_logs_in(folder: Path) -> None:
    with run_nats_server(folder / "store", config={"authorization": {"token": "s3cr3t"}}) as server:
        assert logged_in(app_of(f"jetstream://s3cr3t@127.0.0.1:{server.port}"))


@pytest.mark.parametrize(
    ("user_info", "options"),
    [
        ("", {}),
        ("shop:wrong@", {}),
        ("token@", {}),
        ("", {"nkey_seed_file": "/nowhere/seed"}),
        ("", {"credentials_file": "/nowhere/creds"}),
    ],
    ids=["nobody", "wrong password", "token", "no seed file", "no credentials file"],
)
def test_a_refused_log_in_says_where_to_look_and_no_secret(
    guarded: int, user_info: str, options: dict[str, Any]
) -> None:
    began = time.monotonic()

    with pytest.raises(AuthenticationFailed) as caught:
        run(app_of(f"jetstream://{user_info}127.0.0.1:{guarded}", **options), whoami)

    assert time.monotonic() - began < 2
    told = "cannot log in to server" if "file" in str(options) else "refused the credentials"
    assert told in str(caught.value)
    assert f"server 127.0.0.1:{guarded}" in str(caught.value)
    assert "wrong" not in str(caught.value)
    assert "token@" not in str(caught.value)


# -- TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of an authority, and of a server's and a client's certificate of it."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    paths = {"ca": str(folder / "ca.pem")}
    authority.cert_pem.write_to_path(paths["ca"])
    for name, identity in (("server", "localhost"), ("client", "worker@example.org")):
        made = authority.issue_cert(identity)
        paths[name] = str(folder / f"{name}.pem")
        made.private_key_and_cert_chain_pem.write_to_path(paths[name])
    return paths


@pytest.fixture(scope="module", params=["after INFO", "handshake first"])
def tls_server(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    certificates: dict[str, str],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Port of a server that wants a client's certificate, and the options to connect to it."""
    first = request.param == "handshake first"
    tls = {"cert_file": certificates["server"], "key_file": certificates["server"]}
    config = {"tls": {**tls, "ca_file": certificates["ca"], "verify": True}}
    if first:
        config["tls"]["handshake_first"] = True
    with run_nats_server(tmp_path_factory.mktemp("nats store"), config=config) as server:
        yield server.port, {"tls_handshake_first": True} if first else {}


@pytest.mark.tls
@pytest.mark.requires_nats("2.11")
def test_tls_with_certificates_on_both_sides(
    tls_server: tuple[int, dict[str, Any]], certificates: dict[str, str]
) -> None:
    port, options = tls_server
    tls = {"ca_certs": certificates["ca"], "certfile": certificates["client"]}

    assert logged_in(app_of(f"jetstreams://localhost:{port}", tls=tls, **options))


@pytest.mark.tls
@pytest.mark.requires_nats("2.11")
@pytest.mark.parametrize("known", ["ca", "nothing"])
def test_a_certificate_that_does_not_please_is_named(
    tls_server: tuple[int, dict[str, Any]], certificates: dict[str, str], known: str
) -> None:
    port, options = tls_server
    tls = {"ca_certs": certificates["ca"]} if known == "ca" else True

    with pytest.raises(JetStreamTransportError) as caught:
        run(app_of(f"jetstreams://localhost:{port}", tls=tls, **options), whoami)

    # A client's missing certificate shows with the first read, in whatever words.
    assert isinstance(caught.value, (CertificateRejected, NoServers))
    if known == "nothing":
        assert isinstance(caught.value, CertificateRejected)


@pytest.mark.tls
def test_no_credential_is_sent_to_a_server_without_tls() -> None:
    heard = bytearray()
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b'INFO {"version":"2.15.1","max_payload":1048576}\r\n')
                while data := connection.recv(4096):
                    heard.extend(data)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TLSNotOffered):
            run(app_of(f"jetstreams://s3cr3t@127.0.0.1:{listener.getsockname()[1]}"), whoami)
        thread.join(5)

    assert heard == b""


@pytest.mark.tls
def test_a_server_that_offers_tls_without_demanding_it_gets_it(
    certificates: dict[str, str], folder: Path
) -> None:
    tls = {"cert_file": certificates["server"], "key_file": certificates["server"]}
    config = {"tls": tls, "allow_non_tls": True}
    with run_nats_server(folder / "store", config=config) as server:

        async def cipher(broker: Broker) -> Any:
            transport: Any = broker.client._transport
            return transport._io_writer.get_extra_info("cipher")

        context = ssl.create_default_context(cafile=certificates["ca"])
        assert run(app_of(f"jetstreams://localhost:{server.port}", tls=context), cipher)
        assert run(app_of(f"jetstream://localhost:{server.port}"), cipher) is None


# -- servers that are not there --------------------------------------------------------------------


def test_the_next_server_and_the_next_url_are_tried(shared_nats_server: NatsServer) -> None:
    port, dead = shared_nats_server.port, free_port()

    assert logged_in(app_of(f"jetstream://127.0.0.1:{dead},127.0.0.1:{port}"))
    assert logged_in(app_of(f"jetstream://127.0.0.1:{dead};jetstream://127.0.0.1:{port}"))


def test_all_servers_that_do_not_answer_are_told() -> None:
    one, other = free_port(), free_port()

    with pytest.raises(NoServers) as caught:
        run(app_of(f"jetstream://127.0.0.1:{one},127.0.0.1:{other}"), whoami)

    told = f"(127.0.0.1:{one}: Connection refused; 127.0.0.1:{other}: Connection refused)"
    assert told in str(caught.value)


def test_a_server_that_says_nothing_is_given_up(proxy_to: Any, nats_server: NatsServer) -> None:
    proxy: TcpProxy = proxy_to(nats_server.port)
    proxy.freeze()
    app = app_of(proxy.broker_url)
    app.conf.broker_connection_timeout = 0.3
    began = time.monotonic()

    with pytest.raises(NoServers, match=r"no answer within 0\.3 s"):
        run(app, whoami)

    assert time.monotonic() - began < 2


def test_a_server_of_another_kind_is_told_from_a_dead_one() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ProtocolError, match="it is another service"):
            run(app_of(f"jetstream://127.0.0.1:{listener.getsockname()[1]}"), whoami)
        thread.join(5)


def test_a_connection_that_breaks_ends_the_work_with_an_error(
    proxy_to: Any, nats_server: NatsServer
) -> None:
    proxy: TcpProxy = proxy_to(nats_server.port)

    async def work(broker: Broker) -> None:
        await broker.api("INFO")
        proxy.cut()
        await broker.api("INFO")

    with pytest.raises(ConnectionLost):
        run(app_of(proxy.broker_url), work, timeout=2)


def test_an_answer_that_does_not_come_is_a_timeout(proxy_to: Any, nats_server: NatsServer) -> None:
    proxy: TcpProxy = proxy_to(nats_server.port)

    async def work(broker: Broker) -> None:
        proxy.freeze()
        try:
            await broker.api("INFO")
        finally:
            proxy.resume()

    with pytest.raises(RequestTimeout, match=r"no answer to '\$JS.API.INFO' within 0\.4 s"):
        run(app_of(proxy.broker_url), work, timeout=0.4)


# -- what the server says no to --------------------------------------------------------------------


def test_denials_are_told_at_once_and_by_subject(folder: Path) -> None:
    permissions = {"publish": ["mine.>"], "subscribe": ["_INBOX.>"]}
    silent = {"publish": [">"], "subscribe": ["elsewhere"]}
    users = [
        {"user": "a", "password": "b", "permissions": permissions},
        {"user": "deaf", "password": "b", "permissions": silent},
    ]
    with run_nats_server(folder / "store", config={"authorization": {"users": users}}) as server:
        began = time.monotonic()

        async def both(broker: Broker) -> list[Any]:
            requests = [broker.request(f"Not.Mine.{n}") for n in range(3)]
            return await asyncio_results(requests)

        found = run(app_of(f"jetstream://a:b@127.0.0.1:{server.port}"), both)
        assert [(type(exc), exc.subject) for exc in found] == [
            (PermissionDenied, f"Not.Mine.{n}") for n in range(3)
        ]
        with pytest.raises(PermissionDenied) as caught:
            run(app_of(f"jetstream://deaf:b@127.0.0.1:{server.port}"), whoami)
        assert caught.value.operation == "subscribe"
        assert time.monotonic() - began < 3


async def asyncio_results(work: list[Any]) -> list[Any]:
    import asyncio

    return await asyncio.gather(*work, return_exceptions=True)


def test_refusals_have_the_servers_number(nats_server: NatsServer) -> None:
    async def work(broker: Broker) -> None:
        with pytest.raises(ApiError) as api:
            await broker.api("STREAM.INFO.none")
        assert api.value.err_code == 10059
        assert await broker.find("STREAM.INFO.none") is None
        await broker.api(
            "STREAM.CREATE.one",
            {"name": "one", "subjects": ["one.>"], "max_msgs": 1, "discard": "new"},
        )
        assert (await broker.publish("one.a", b"", {"Nats-Msg-Id": "x"})).seq == 1
        assert (await broker.publish("one.a", b"", {"Nats-Msg-Id": "x"})).duplicate
        with pytest.raises(PublishRejected, match="maximum messages exceeded") as full:
            await broker.publish("one.a", b"", {})
        assert full.value.err_code == 10077
        with pytest.raises(NoResponders):
            await broker.publish("two.a", b"", {})
        with pytest.raises(MessageTooLarge):
            await broker.publish("one.a", b"x" * 1024 * 1024, {"More": "than that"})
        # and the connection is as good as before
        assert await broker.find("STREAM.INFO.one") is not None

    run(app_of(nats_server.broker_url), work)


@pytest.mark.requires_nats("2.12")
def test_a_batch_is_stored_as_a_whole_or_not_at_all(nats_server: NatsServer) -> None:
    async def work(broker: Broker) -> list[int]:
        await broker.api(
            "STREAM.CREATE.all", {"name": "all", "subjects": ["all.>"], "allow_atomic": True}
        )
        await broker.api("STREAM.CREATE.single", {"name": "single", "subjects": ["single.>"]})
        last = await broker.publish_batch([(f"all.{n}", b"x", {}) for n in range(5)])
        empty = {"Nats-Expected-Last-Subject-Sequence": "0"}
        with pytest.raises(PublishRejected) as caught:
            await broker.publish_batch([("all.9", b"", {}), ("all.1", b"", empty)])
        assert caught.value.err_code in WRONG_LAST_SEQUENCE
        with pytest.raises(PublishRejected):
            await broker.publish_batch([("single.9", b"", {}), ("single.1", b"", {})])
        found = [await broker.subjects(stream, ">") for stream in ("all", "single")]
        return [last, *map(len, found)]

    assert run(app_of(nats_server.broker_url), work) == [5, 5, 0]


def test_what_is_read_in_pages_is_complete_and_in_order(nats_server: NatsServer) -> None:
    async def work(broker: Broker) -> None:
        config = {"name": "s", "subjects": ["s.>"], "allow_direct": True}
        await broker.api("STREAM.CREATE.s", config)
        for number in range(57):
            subject = f"s.{'even' if number % 2 == 0 else 'odd'}"
            await broker.publish(subject, str(number).encode(), {"N": str(number)})
        pages = [page async for page in broker.pages("s", "s.even", 10)]
        whole = [stored for page in pages for stored in page]
        assert [int(stored.payload) for stored in whole] == list(range(0, 57, 2))
        assert max(map(len, pages)) <= 10
        heads = [stored async for stored in broker.headers("s", "s.odd", start_seq=10, stop_seq=20)]
        assert [stored.headers["N"] for stored in heads] == ["9", "11", "13", "15", "17"]
        assert {stored.payload for stored in heads} == {b""}
        assert {stored.size for stored in heads} == {1, 2}
        one = await broker.get("s", seq=heads[0].seq)
        assert one is not None
        assert (one.stored_ns, one.subject) == (heads[0].stored_ns, heads[0].subject)
        assert abs(one.stored_at - time.time()) < 60
        assert await broker.get("s", seq=999) is None
        assert [page async for page in broker.pages("none", ">", 10)] == []
        assert [stored async for stored in broker.headers("none", ">")] == []
        assert await broker.subjects("s", "s.*") == {"s.even": 29, "s.odd": 28}

    run(app_of(nats_server.broker_url), work)


def test_the_first_error_of_many_ends_the_others(nats_server: NatsServer) -> None:
    done: list[int] = []

    async def work(broker: Broker) -> list[int]:
        async def one(number: int) -> int:
            if number == 3:
                await broker.api("STREAM.INFO.none")
            await broker.api("INFO")
            done.append(number)
            return number

        assert await gather(one, range(3), at_once=2) == [0, 1, 2]
        assert await gather(one, [], at_once=2) == []
        return await gather(one, range(50), at_once=2)

    with pytest.raises(ApiError):
        run(app_of(nats_server.broker_url), work)

    assert len(done) < 20


def test_a_secret_is_in_no_error(guarded: int) -> None:
    for url in (f"jetstream://shop:s3cr3t@127.0.0.1:{guarded}", "redis://:s3cr3t@localhost"):
        with pytest.raises((ConnectionRejected, JetStreamTransportError)) as caught:
            run(app_of(url), whoami)
        assert "s3cr3t" not in str(caught.value)
        assert "s3cr3t" not in json.dumps([str(arg) for arg in caught.value.args])
