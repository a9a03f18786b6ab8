"""The connection against real servers, plain text; TLS and log-in have files of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kombu_jetstream.connection import ConnectionSettings, NatsConnection, Server
from kombu_jetstream.endpoint import poll_socket
from kombu_jetstream.errors import (
    ConnectionLost,
    MessageTooLarge,
    NoResponders,
    NoServers,
    ProtocolError,
    RequestTimeout,
)
from kombu_jetstream.protocol import Msg, encode_headers, encode_pub, parse_headers, status_code
from kombu_jetstream.server import NatsServer
from tests.proxy import TcpProxy
from tests.servers import (
    NatsCluster,
    api_request,
    eventually,
    free_port,
    run_nats_server,
    run_python,
)

pytestmark = pytest.mark.nats29

Connect = Callable[..., NatsConnection]


def settings_of(*ports: int, **options: Any) -> ConnectionSettings:
    return ConnectionSettings(servers=tuple(Server("127.0.0.1", port) for port in ports), **options)


@pytest.fixture
def connect(shared_nats_server: NatsServer) -> Iterator[Connect]:
    """Connects to the module's server, or to the *port* given; closes at the end."""
    made = []

    def open_one(*ports: int, **options: Any) -> NatsConnection:
        connection = NatsConnection(settings_of(*(ports or (shared_nats_server.port,)), **options))
        made.append(connection)
        connection.connect()
        return connection

    yield open_one
    for connection in made:
        connection.close()


@pytest.fixture
def scripted() -> Iterator[Callable[[bytes], NatsConnection]]:
    """Connects to a server that says the given bytes after the log-in, and closes."""
    made: list[NatsConnection] = []
    threads: list[threading.Thread] = []

    def connect_to(script: bytes) -> NatsConnection:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            client, _ = listener.accept()
            with listener, client:
                client.sendall(b'INFO {"headers":true}\r\n')
                said = b""
                while b"PING\r\n" not in said:
                    said += client.recv(4096)
                client.sendall(b"PONG\r\n")
                while b"SUB " not in said:
                    chunk = client.recv(4096)
                    if not chunk:
                        return
                    said += chunk
                client.sendall(script)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        connection = NatsConnection(settings_of(listener.getsockname()[1]))
        connection.connect()
        made.append(connection)
        return connection

    yield connect_to
    for connection in made:
        connection.close()
    for thread in threads:
        thread.join(5)


def noting(numbers: list[int]) -> Callable[[Msg], None]:
    """Return a handler that appends the number a message carries."""
    return lambda msg: numbers.append(int(msg.payload))


def run_in_child(work: Callable[[], None]) -> None:
    """Fork, run *work* in the child, and fail when it raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# Connecting


def test_connecting_tells_what_the_server_is(connect: Connect) -> None:
    connection = connect()

    assert connection.is_open
    assert connection.info.jetstream
    assert connection.info.version >= (2, 9)
    assert connection.max_payload == connection.info.max_payload == 1024 * 1024
    assert connection.pid == os.getpid()
    assert os.fstat(connection.fileno())


def test_server_knows_the_name_of_the_client(tmp_path: Path) -> None:
    http_port = free_port()
    with run_nats_server(tmp_path / "store", config={"http_port": http_port}) as server:
        connection = NatsConnection(settings_of(server.port, name="worker-1"))
        connection.connect()
        with socket.create_connection(("127.0.0.1", http_port)) as monitor:
            monitor.sendall(b"GET /connz HTTP/1.0\r\n\r\n")
            said = monitor.makefile().read()
        connection.close()

    [entry] = json.loads(said.partition("\r\n\r\n")[2] or said.partition("\n\n")[2])["connections"]
    assert (entry["name"], entry["lang"]) == ("worker-1", "python-kombu-jetstream")


def test_next_server_is_tried_when_one_is_down(
    connect: Connect, shared_nats_server: NatsServer
) -> None:
    connection = connect(free_port(), shared_nats_server.port)

    assert connection.server == Server("127.0.0.1", shared_nats_server.port)


def test_no_server_names_each_and_its_cause() -> None:
    ports = free_port(), free_port()
    connection = NatsConnection(settings_of(*ports))

    with pytest.raises(NoServers) as caught:
        connection.connect()

    assert [server for server, _ in caught.value.causes] == [f"127.0.0.1:{p}" for p in ports]
    assert all(isinstance(cause, ConnectionRefusedError) for _, cause in caught.value.causes)
    assert not connection.is_open
    with pytest.raises(ConnectionLost, match="not connected"):
        connection.publish(b"a", b"")


def test_unknown_host_is_a_cause() -> None:
    connection = NatsConnection(ConnectionSettings(servers=(Server("no-such-host.invalid"),)))

    with pytest.raises(NoServers, match=r"no-such-host\.invalid:4222"):
        connection.connect()


def test_failed_connect_can_be_tried_again(tmp_path: Path) -> None:
    port = free_port()
    connection = NatsConnection(settings_of(port))
    with pytest.raises(NoServers):
        connection.connect()

    with run_nats_server(tmp_path / "store", port=port):
        connection.connect()

        connection.round_trip(2)
        connection.close()


def test_silent_server_costs_no_more_than_the_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        connection = NatsConnection(settings_of(silent.getsockname()[1], connect_timeout=0.2))
        began = time.monotonic()

        with pytest.raises(NoServers, match=r"expected INFO .* within 0\.2 s"):
            connection.connect()

    assert 0.2 <= time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak the NATS protocol"),
        (b"\x00" * 70_000, "does not speak the NATS protocol"),
        (b"", "closed it"),
    ],
    ids=["http", "zeros", "closes"],
)
def test_another_service_is_recognised(greeting: bytes, reason: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        with client, suppress(OSError):
            client.sendall(greeting)

    thread = threading.Thread(target=serve)
    thread.start()
    connection = NatsConnection(settings_of(listener.getsockname()[1], connect_timeout=2.0))

    with pytest.raises(NoServers, match=reason):
        connection.connect()

    thread.join()
    listener.close()


def test_connecting_twice_is_an_error_of_the_caller(connect: Connect) -> None:
    connection = connect()

    with pytest.raises(RuntimeError, match="already connected"):
        connection.connect()

    connection.round_trip(2)


# Messages


def test_published_message_arrives_with_reply_and_headers(connect: Connect) -> None:
    publisher, subscriber = connect(), connect()
    got: list[Msg] = []
    sid = subscriber.subscribe(b"greetings.*", got.append)
    subscriber.round_trip(2)

    publisher.publish(
        b"greetings.de", "grüß".encode(), b"answers", encode_headers([("A", "1"), ("B", "ü")])
    )

    assert subscriber.wait(lambda: bool(got), 2)
    [msg] = got
    assert msg[:3] == (sid, b"greetings.de", b"answers")
    assert msg.payload == "grüß".encode()
    assert parse_headers(msg.headers).fields == {"A": "1", "B": "ü"}


def test_each_message_of_a_queue_group_goes_to_one_member(connect: Connect) -> None:
    connection = connect()
    first: list[Msg] = []
    second: list[Msg] = []
    connection.subscribe(b"jobs", first.append, b"workers")
    connection.subscribe(b"jobs", second.append, b"workers")

    for _ in range(50):
        connection.publish(b"jobs", b"")
    connection.round_trip(2)

    assert len(first) + len(second) == 50
    assert first
    assert second


def test_messages_keep_their_order(connect: Connect) -> None:
    publisher, subscriber = connect(), connect()
    got: list[int] = []
    subscriber.subscribe(b"ordered", lambda msg: got.append(int(msg.payload)))
    subscriber.round_trip(2)

    with publisher.corked():
        for number in range(20_000):
            publisher.publish(b"ordered", b"%d" % number)

    assert subscriber.wait(lambda: len(got) == 20_000, 10)
    assert got == list(range(20_000))


def test_unsubscribed_handler_gets_what_was_on_the_way_and_no_more(connect: Connect) -> None:
    publisher, subscriber = connect(), connect()
    got: list[bytes] = []
    sid = subscriber.subscribe(b"s", lambda msg: got.append(msg.payload))
    subscriber.round_trip(2)
    publisher.publish(b"s", b"before")
    publisher.round_trip(2)

    subscriber.unsubscribe(sid)
    subscriber.unsubscribe(sid)
    subscriber.round_trip(2)
    publisher.publish(b"s", b"after")
    publisher.round_trip(2)
    subscriber.round_trip(2)

    assert got == [b"before"]
    assert sid not in subscriber._handlers


def test_payload_of_the_maximum_size_arrives(connect: Connect) -> None:
    connection = connect()
    got: list[Msg] = []
    connection.subscribe(b"large", got.append)
    headers = encode_headers([("A", "1")])
    payload = os.urandom(connection.max_payload - len(headers))

    connection.publish(b"large", payload, headers=headers)

    assert connection.wait(lambda: bool(got), 5)
    assert got[0].payload == payload


def test_headers_count_towards_the_maximum_size(connect: Connect) -> None:
    connection = connect()
    headers = encode_headers([("A", "1")])
    payload = bytes(connection.max_payload - len(headers) + 1)

    with pytest.raises(MessageTooLarge) as caught:
        connection.publish(b"large", payload, headers=headers)
    with pytest.raises(MessageTooLarge):
        connection.request(b"large", payload, headers, timeout=1)

    assert (caught.value.size, caught.value.limit) == (1024 * 1024 + 1, 1024 * 1024)
    connection.round_trip(2)
    assert not connection._requests


@pytest.mark.parametrize("subject", [b"", b"a b", b"a.*", b"a\r\nPUB b 0\r\n", b"a..b"])
def test_bad_subjects_are_refused_before_anything_is_sent(connect: Connect, subject: bytes) -> None:
    connection = connect()

    with pytest.raises(ValueError, match="expected a subject to publish to"):
        connection.publish(subject, b"")
    with pytest.raises(ValueError, match="expected a subject to publish to"):
        connection.request(subject, b"", timeout=1)
    with pytest.raises(ValueError, match="expected a subject to subscribe to"):
        connection.subscribe(subject.replace(b"*", b""), print)

    connection.round_trip(2)


def test_encoded_commands_can_be_written_as_they_are(connect: Connect) -> None:
    connection = connect()
    got: list[Msg] = []
    connection.subscribe(b"raw", got.append)

    connection.write(encode_pub(b"raw", b"1") + encode_pub(b"raw", b"2"))
    connection.round_trip(2)

    assert [msg.payload for msg in got] == [b"1", b"2"]


# Requests


def test_request_returns_the_answer(connect: Connect) -> None:
    connection, responder = connect(), connect()
    responder.subscribe(b"double", lambda msg: responder.publish(msg.reply, msg.payload * 2))
    responder.round_trip(2)
    done: list[bool] = []
    thread = threading.Thread(target=responder.wait, args=(lambda: bool(done), 10))
    thread.start()

    answers = [connection.request(b"double", b"%d" % n, timeout=2).payload for n in range(20)]
    done.append(True)
    connection.publish(b"double", b"", b"wake")
    thread.join()

    assert answers == [b"%d" % n * 2 for n in range(20)]


def test_jetstream_api_answers(connect: Connect) -> None:
    answer = connect().request(b"$JS.API.INFO", timeout=5)

    assert json.loads(answer.payload)["type"].endswith("account_info_response")


def test_request_nobody_listens_to_fails_at_once(connect: Connect) -> None:
    connection = connect()
    began = time.monotonic()

    with pytest.raises(NoResponders) as caught:
        connection.request(b"nobody.here", b"", timeout=10)

    assert caught.value.subject == "nobody.here"
    assert time.monotonic() - began < 1.0


def test_request_without_an_answer_times_out_and_is_forgotten(connect: Connect) -> None:
    connection = connect()
    asked: list[Msg] = []
    connection.subscribe(b"mute", asked.append)
    began = time.monotonic()

    with pytest.raises(RequestTimeout, match=r"'mute' within 0\.1 s"):
        connection.request(b"mute", timeout=0.1)

    assert 0.1 <= time.monotonic() - began < 0.5
    assert not connection._requests
    connection.publish(asked[0].reply, b"too late")
    connection.round_trip(2)


def test_answers_of_many_requests_reach_their_callbacks(connect: Connect) -> None:
    connection = connect()
    connection.subscribe(b"echo", lambda msg: connection.publish(msg.reply, msg.payload))
    answers: dict[int, bytes] = {}

    def note(number: int) -> Callable[[object], None]:
        def callback(answer: object) -> None:
            assert isinstance(answer, Msg)
            assert number not in answers
            answers[number] = answer.payload

        return callback

    with connection.corked():
        for number in range(300):
            connection.request_nowait(b"echo", b"%d" % number, b"", note(number))

    assert connection.wait(lambda: len(answers) == 300, 5)
    assert answers == {number: b"%d" % number for number in range(300)}


def test_callback_gets_a_message_with_status_when_nobody_listens(connect: Connect) -> None:
    connection = connect()
    answers: list[object] = []

    connection.request_nowait(b"nobody.here", b"", b"", answers.append)

    assert connection.wait(lambda: bool(answers), 2)
    [answer] = answers
    assert isinstance(answer, Msg)
    assert status_code(answer.headers) == 503


def test_cancelled_request_is_not_answered(connect: Connect) -> None:
    connection = connect()
    answers: list[object] = []

    connection.cancel(connection.request_nowait(b"nobody.here", b"", b"", answers.append))
    connection.cancel(b"never was")
    connection.round_trip(2)

    assert answers == []


def test_inboxes_are_unique_and_have_the_prefix(connect: Connect) -> None:
    connection = connect(inbox_prefix="_INBOX_priv")

    inboxes = {connection.new_inbox() for _ in range(100)} | {connect().new_inbox()}

    assert len(inboxes) == 101
    got: list[Msg] = []
    inbox = next(inbox for inbox in inboxes if inbox.startswith(b"_INBOX_priv."))
    connection.subscribe(inbox, got.append)
    connection.publish(inbox, b"hi")
    connection.round_trip(2)
    assert [msg.payload for msg in got] == [b"hi"]


# Waiting


def test_wait_honours_its_timeout(connect: Connect) -> None:
    connection = connect()
    began = time.monotonic()

    assert not connection.wait(lambda: False, 0.1)

    assert 0.1 <= time.monotonic() - began < 0.3
    assert connection.wait(lambda: True, 0)


def test_wait_of_no_time_reads_what_is_there(connect: Connect) -> None:
    connection = connect()
    got: list[Msg] = []
    connection.subscribe(b"now", got.append)
    connection.publish(b"now", b"")
    poll_socket(connection.fileno(), True, False, 2)

    assert connection.wait(lambda: bool(got), 0)


def test_read_available_does_not_wait(connect: Connect) -> None:
    connection = connect()
    got: list[Msg] = []
    connection.subscribe(b"here", got.append)
    connection.round_trip(2)

    assert connection.read_available() is False
    connection.publish(b"here", b"")
    poll_socket(connection.fileno(), True, False, 2)

    assert connection.read_available() is True
    assert len(got) == 1


def test_handler_may_publish_and_wait_itself(connect: Connect) -> None:
    connection = connect()
    connection.subscribe(b"inner", lambda msg: connection.publish(msg.reply, b"done"))
    order: list[object] = []

    def outer(msg: Msg) -> None:
        order.append(msg.payload)
        if msg.payload == b"1":
            order.append(connection.request(b"inner", timeout=2).payload)

    connection.subscribe(b"outer", outer)
    for number in (b"1", b"2", b"3"):
        connection.publish(b"outer", number)

    assert connection.wait(lambda: len(order) == 4, 2)
    assert [entry for entry in order if entry != b"done"] == [b"1", b"2", b"3"]


def test_error_of_a_handler_reaches_the_reader_and_loses_no_other_message(
    connect: Connect,
) -> None:
    connection = connect()
    got: list[bytes] = []

    def handler(msg: Msg) -> None:
        if msg.payload == b"2":
            raise ZeroDivisionError
        got.append(msg.payload)

    connection.subscribe(b"some", handler)
    with connection.corked():
        for number in (b"1", b"2", b"3"):
            connection.publish(b"some", number)

    with pytest.raises(ZeroDivisionError):
        connection.wait(lambda: len(got) == 2, 5)
    began = time.monotonic()

    assert connection.wait(lambda: len(got) == 2, 5)
    assert got == [b"1", b"3"]
    assert time.monotonic() - began < 1.0


def test_threads_can_wait_at_the_same_time(connect: Connect) -> None:
    connection = connect()
    connection.subscribe(b"echo", lambda msg: connection.publish(msg.reply, msg.payload))
    connection.round_trip(2)
    wrong: list[object] = []

    def ask(name: bytes) -> None:
        for number in range(200):
            payload = b"%b-%d" % (name, number)
            try:
                answer = connection.request(b"echo", payload, timeout=5).payload
            except Exception as exc:
                answer = repr(exc).encode()
            if answer != payload:
                wrong.append((payload, answer))

    threads = [threading.Thread(target=ask, args=(b"%d" % n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert wrong == []


def test_waiting_thread_sees_what_another_one_read(connect: Connect) -> None:
    connection = connect()
    got: list[Msg] = []
    connection.subscribe(b"seen", got.append)
    connection.round_trip(2)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(connection.wait(lambda: bool(got), 5)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    began = time.monotonic()

    connection.publish(b"seen", b"")
    for thread in threads:
        thread.join(5)

    assert found == [True, True, True]
    assert time.monotonic() - began < 1.0


def test_waiter_that_missed_what_another_read_does_not_wait_for_more(connect: Connect) -> None:
    connection = connect()
    got: list[Msg] = []
    connection.subscribe(b"seen", got.append)
    looks: list[int] = []

    def ready() -> bool:
        looks.append(len(got))
        if len(looks) == 1:  # the message comes and is dispatched after this look
            other = threading.Thread(target=connection.round_trip, args=(5,))
            connection.publish(b"seen", b"")
            other.start()
            other.join()
        return looks[-1] == 1

    began = time.monotonic()
    assert connection.wait(ready, 5)

    assert time.monotonic() - began < 1.0


# Corking


def test_corked_writes_are_sent_together_at_the_end(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connect()
    with connection.corked():
        with connection.corked():
            connection.publish(b"a", b"x")
        connection.publish(b"a", b"y")

        assert bytes(connection._out) == encode_pub(b"a", b"x") + encode_pub(b"a", b"y")

    assert not connection._out


def test_cork_holds_no_more_than_its_limit(connect: Connect) -> None:
    connection = connect()
    largest = 0

    with connection.corked():
        for _ in range(300):
            connection.publish(b"a", bytes(1000))
            largest = max(largest, len(connection._out))

    assert 60_000 < largest <= 65_536


def test_waiting_sends_what_is_corked(connect: Connect) -> None:
    connection = connect()
    got: list[Msg] = []
    connection.subscribe(b"a", got.append)

    with connection.corked():
        connection.publish(b"a", b"")
        assert connection.wait(lambda: bool(got), 2)


def test_flush_sends_what_is_corked(connect: Connect) -> None:
    connection = connect()

    with connection.corked():
        connection.publish(b"a", b"")
        connection.flush()
        assert not connection._out


# The end of a connection


def test_killed_server_is_a_lost_connection_and_stays_one(nats_server: NatsServer) -> None:
    connection = NatsConnection(settings_of(nats_server.port))
    connection.connect()

    nats_server.kill()

    with pytest.raises(ConnectionLost) as caught:
        connection.wait(lambda: False, 5)
    assert not connection.is_open
    for use in (
        lambda: connection.publish(b"a", b""),
        lambda: connection.wait(lambda: False, 0),
        lambda: connection.round_trip(1),
        connection.read_available,
        connection.fileno,
        connection.check,
        connection.connect,
    ):
        with pytest.raises(ConnectionLost, match=str(caught.value)):
            use()
    connection.close()
    connection.close()


def test_what_was_sent_before_the_end_is_delivered_first(
    scripted: Callable[[bytes], NatsConnection],
) -> None:
    connection = scripted(b"MSG a 1 1\r\n1\r\nMSG a 1 1\r\n2\r\nMSG a 1 5\r\ncut")
    got: list[bytes] = []
    connection.subscribe(b"a", lambda msg: got.append(msg.payload))

    with pytest.raises(ConnectionLost, match="closed it"):
        connection.wait(lambda: False, 5)

    assert got == [b"1", b"2"]


def test_what_a_failed_write_had_read_can_still_be_dispatched(
    scripted: Callable[[bytes], NatsConnection],
) -> None:
    connection = scripted(b"MSG a 1 1\r\n1\r\nPING\r\nMSG a 1 1\r\n2\r\n")
    got: list[bytes] = []
    connection.subscribe(b"a", lambda msg: got.append(msg.payload))

    def write_until_it_fails() -> None:
        while True:
            connection.write(encode_pub(b"a", bytes(1000)))

    with pytest.raises(ConnectionLost):
        write_until_it_fails()
    connection.dispatch_received()

    assert got == [b"1", b"2"]


def test_nonsense_in_the_middle_is_a_lost_connection(
    scripted: Callable[[bytes], NatsConnection],
) -> None:
    connection = scripted(b"MSG a 1 1\r\n1\r\nMSG a 1 -1\r\n")
    got: list[bytes] = []
    connection.subscribe(b"a", lambda msg: got.append(msg.payload))

    with pytest.raises(ProtocolError, match="a number from 0"):
        connection.wait(lambda: False, 5)

    assert got == [b"1"]
    assert not connection.is_open


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("User Authentication Expired", ConnectionLost),
        ("Stale Connection", ConnectionLost),
        ("Slow Consumer", ConnectionLost),
        ("something new", ConnectionLost),
    ],
)
def test_last_words_are_final_whatever_they_are(
    scripted: Callable[[bytes], NatsConnection], words: str, error: type[Exception]
) -> None:
    connection = scripted(f"-ERR '{words}'\r\n".encode())
    connection.subscribe(b"a", print)

    with pytest.raises(error, match=words):
        connection.wait(lambda: False, 5)


@pytest.mark.parametrize(
    "words", ["Invalid Subject", "Invalid Publish Subject", "Maximum Subscriptions Exceeded"]
)
def test_errors_the_server_survives_are_told(
    scripted: Callable[[bytes], NatsConnection], words: str
) -> None:
    connection = scripted(f"-ERR '{words}'\r\nMSG a 1 1\r\n1\r\n".encode())
    told: list[Exception] = []
    got: list[Msg] = []
    connection.on_error = told.append
    connection.subscribe(b"a", got.append)

    assert connection.wait(lambda: bool(got), 5)

    assert words in str(told)


def test_new_connection_works_after_a_restart(nats_server: NatsServer) -> None:
    first = NatsConnection(settings_of(nats_server.port))
    first.connect()
    nats_server.restart()
    with pytest.raises(ConnectionLost):
        first.round_trip(5)

    second = NatsConnection(first.settings)
    second.connect()

    second.round_trip(2)
    second.close()


def test_reset_connection_is_lost(nats_proxy: TcpProxy) -> None:
    connection = NatsConnection(settings_of(nats_proxy.port))
    connection.connect()

    nats_proxy.cut(reset=True)

    with pytest.raises(ConnectionLost):
        connection.wait(lambda: False, 5)


def test_closed_connection_says_so(connect: Connect) -> None:
    connection = connect()
    connection.publish(b"a", b"")

    connection.close()

    assert not connection.is_open
    with pytest.raises(ConnectionLost, match="closed by this client"):
        connection.publish(b"a", b"")


def test_close_wakes_a_waiting_thread(connect: Connect) -> None:
    connection = connect()
    errors: list[Exception] = []

    def wait() -> None:
        try:
            connection.wait(lambda: False, None)
        except ConnectionLost as exc:
            errors.append(exc)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: connection._pollers == 1)

    connection.close()

    for thread in threads:
        thread.join(2)
        assert not thread.is_alive()
    assert len(errors) == 2
    assert connection._sock is not None
    assert connection._sock.fileno() == -1


def test_last_words_of_the_server_are_the_reason(connect: Connect) -> None:
    connection = connect()
    connection.write(b"NONSENSE\r\n")

    with pytest.raises(ConnectionLost, match="Unknown Protocol Operation"):
        connection.wait(lambda: False, 5)


def test_last_words_of_the_server_are_the_reason_of_a_failed_write(connect: Connect) -> None:
    connection = connect()
    connection.write(b"NONSENSE\r\n")
    poll_socket(connection.fileno(), True, False, 2)

    def write_until_it_fails() -> None:
        while True:
            connection.write(encode_pub(b"a", bytes(1000)))

    with pytest.raises(ConnectionLost, match="Unknown Protocol Operation"):
        write_until_it_fails()


def test_too_large_message_written_raw_is_named_as_the_reason(connect: Connect) -> None:
    connection = connect()
    connection.write(encode_pub(b"a", bytes(connection.max_payload + 1)))

    with pytest.raises(ConnectionLost, match=r"(?i)maximum payload"):
        connection.wait(lambda: False, 5)


# Silence


def test_pings_of_the_server_are_answered(tmp_path: Path) -> None:
    config = {"ping_interval": "100ms", "ping_max": 2}
    with run_nats_server(tmp_path / "store", config=config) as server:
        connection = NatsConnection(settings_of(server.port))
        connection.connect()

        connection.wait(lambda: False, 1.0)

        assert connection.is_open
        connection.round_trip(2)
        connection.close()


def test_keepalive_answers_for_an_owner_who_does_not_read(tmp_path: Path) -> None:
    config = {"ping_interval": "200ms", "ping_max": 2}
    with run_nats_server(tmp_path / "store", config=config) as server:
        connection = NatsConnection(settings_of(server.port, ping_interval=0.05))
        connection.connect()
        deadline = time.monotonic() + 1.5

        while time.monotonic() < deadline:
            connection.keepalive(time.monotonic())
            time.sleep(0.01)

        connection.round_trip(2)
        connection.close()


def test_neglected_connection_is_read_by_another_thread(connect: Connect) -> None:
    connection = connect()
    got: list[Msg] = []
    connection.subscribe(b"a", got.append)
    connection.round_trip(2)
    connection.read_neglected()
    connection.publish(b"a", b"")
    poll_socket(connection.fileno(), True, False, 2)

    connection.read_neglected()

    assert len(got) == 1
    # the PONG that wakes who began to wait for the socket meanwhile
    assert poll_socket(connection.fileno(), True, False, 2)[0]


def test_server_says_stale_to_who_does_not_answer(tmp_path: Path) -> None:
    config = {"ping_interval": "100ms", "ping_max": 1}
    with run_nats_server(tmp_path / "store", config=config, debug=True) as server:
        connection = NatsConnection(settings_of(server.port))
        connection.connect()
        eventually(lambda: "Stale Client Connection" in server.log())

        with pytest.raises(ConnectionLost, match="Stale Connection"):
            connection.wait(lambda: False, 5)


def test_silent_server_is_pinged_and_then_given_up(nats_proxy: TcpProxy) -> None:
    connection = NatsConnection(settings_of(nats_proxy.port, ping_interval=30.0))
    connection.connect()
    connection.keepalive(0.0)
    connection.keepalive(29.0)
    assert not connection._pings
    nats_proxy.freeze()

    connection.keepalive(31.0)
    connection.keepalive(32.0)
    assert len(connection._pings) == 1
    connection.keepalive(62.0)
    assert len(connection._pings) == 2

    with pytest.raises(ConnectionLost, match="left 2 pings unanswered"):
        connection.keepalive(93.0)
    assert not connection.is_open


def test_answered_ping_starts_the_clock_again(connect: Connect) -> None:
    connection = connect(ping_interval=30.0)
    connection.keepalive(0.0)
    connection.keepalive(31.0)
    connection.keepalive(62.0)
    connection.round_trip(2)

    for now in (93.0, 94.0, 122.0):
        connection.keepalive(now)

    assert not connection._pings
    assert connection.is_open


def test_round_trip_to_a_frozen_server_times_out(nats_server: NatsServer) -> None:
    connection = NatsConnection(settings_of(nats_server.port))
    connection.connect()
    nats_server.pause()

    with pytest.raises(RequestTimeout):
        connection.round_trip(0.1)

    nats_server.resume()
    connection.round_trip(2)
    connection.close()


# A full socket


def test_server_that_takes_no_byte_is_a_lost_connection(nats_server: NatsServer) -> None:
    connection = NatsConnection(settings_of(nats_server.port, write_timeout=0.3))
    connection.connect()
    nats_server.pause()

    def fill() -> None:
        for _ in range(1000):
            connection.publish(b"a", bytes(100_000))

    began = time.monotonic()
    with pytest.raises(ConnectionLost, match=r"took no byte for 0\.3 s"):
        fill()

    assert 0.3 <= time.monotonic() - began < 3.0
    assert not connection.is_open
    nats_server.resume()


def test_writing_goes_on_when_the_server_does(nats_server: NatsServer) -> None:
    sender = NatsConnection(settings_of(nats_server.port))
    sender.connect()
    got: list[Msg] = []
    receiver = NatsConnection(settings_of(nats_server.port))
    receiver.connect()
    receiver.subscribe(b"a", got.append)
    receiver.round_trip(2)
    nats_server.pause()
    thaw = threading.Timer(0.3, nats_server.resume)
    thaw.start()

    for number in range(200):
        sender.publish(b"a", b"%06d" % number + bytes(100_000))

    assert receiver.wait(lambda: len(got) == 200, 20)
    assert [int(msg.payload[:6]) for msg in got] == list(range(200))
    thaw.join()
    sender.close()
    receiver.close()


def test_slow_server_may_take_longer_than_the_timeout() -> None:
    size = 16_000_000
    taken: list[int] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)

    def serve() -> None:
        client, _ = listener.accept()
        with listener, client:
            client.sendall(b'INFO {"headers":true,"max_payload":100000000}\r\n')
            said = b""
            while b"PING\r\n" not in said:
                said += client.recv(4096)
            client.sendall(b"PONG\r\n")
            while 0 not in taken:
                time.sleep(0.02)  # its slowness, not a wait for anything
                taken.append(len(client.recv(400_000, socket.MSG_WAITALL)))

    thread = threading.Thread(target=serve)
    thread.start()
    connection = NatsConnection(settings_of(listener.getsockname()[1], write_timeout=0.2))
    connection.connect()
    began = time.monotonic()

    connection.publish(b"slow", bytes(size))

    assert time.monotonic() - began > 0.3
    connection.close()
    thread.join(10)
    assert sum(taken) > size


def test_client_reads_while_it_waits_to_write(connect: Connect) -> None:
    connection = connect()
    received = 0

    def count(msg: Msg) -> None:
        nonlocal received
        received += 1

    connection.subscribe(b"echo", count)
    for _ in range(300):
        connection.publish(b"echo", bytes(200_000))

    assert connection.wait(lambda: received == 300, 20)


def test_threads_that_write_into_a_full_socket_keep_their_messages_whole(
    nats_server: NatsServer,
) -> None:
    sender = NatsConnection(settings_of(nats_server.port))
    sender.connect()
    receiver = NatsConnection(settings_of(nats_server.port))
    receiver.connect()
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def note(msg: Msg) -> None:
        thread, number, body = msg.payload.split(b" ", 2)
        assert body == b"x" * 50_000
        got[int(thread)].append(int(number))

    receiver.subscribe(b"a", note)
    receiver.round_trip(2)
    nats_server.pause()
    thaw = threading.Timer(0.3, nats_server.resume)

    def write(thread: int) -> None:
        for number in range(100):
            sender.publish(b"a", b"%d %d " % (thread, number) + b"x" * 50_000)

    threads = [threading.Thread(target=write, args=(n,)) for n in got]
    for thread in [thaw, *threads]:
        thread.start()

    assert receiver.wait(lambda: sum(map(len, got.values())) == 300, 30)
    for thread in [thaw, *threads]:
        thread.join()
    assert got == {n: list(range(100)) for n in got}
    sender.close()
    receiver.close()


def test_two_threads_write_while_the_main_thread_reads(connect: Connect) -> None:
    connection = connect()
    got: dict[bytes, list[int]] = {b"t1": [], b"t2": []}
    for subject, numbers in got.items():
        connection.subscribe(subject, noting(numbers))

    def write(subject: bytes) -> None:
        for number in range(10_000):
            connection.publish(subject, b"%d" % number)

    threads = [threading.Thread(target=write, args=(subject,)) for subject in got]
    for thread in threads:
        thread.start()

    assert connection.wait(lambda: sum(map(len, got.values())) == 20_000, 30)
    for thread in threads:
        thread.join()
    assert got == {subject: list(range(10_000)) for subject in got}


# fork

# Python 3.12 warns of a fork while there are other threads: that is what is tested.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
def test_child_connects_anew_and_the_parent_goes_on(connect: Connect) -> None:
    connection = connect()
    got: list[bytes] = []
    connection.subscribe(b"family", lambda msg: got.append(msg.payload))
    connection.round_trip(2)

    def child() -> None:
        assert not connection.is_open
        with pytest.raises(ConnectionLost, match="a forked one needs its own"):
            connection.publish(b"family", b"never")
        with pytest.raises(ConnectionLost, match="a forked one needs its own"):
            connection.wait(lambda: False, 0)
        connection.close()
        own = NatsConnection(connection.settings)
        own.connect()
        own.publish(b"family", b"child")
        own.round_trip(2)
        own.close()

    run_in_child(child)
    connection.publish(b"family", b"parent")
    connection.round_trip(2)

    assert got == [b"child", b"parent"]


WITH_A_CHILD = """
import os, sys
from kombu_jetstream.connection import *

connection = NatsConnection(ConnectionSettings(servers=(Server("127.0.0.1", int(sys.argv[1])),)))
connection.connect()
connection.subscribe(b"mine", print)
connection.round_trip(5)
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    os.close(1)
    os.close(2)
    os.write(tell, b"x")
    import signal
    signal.alarm(30)
    signal.pause()
os.read(ready, 1)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""


def test_child_does_not_keep_a_dead_parents_connection_open(
    connect: Connect, shared_nats_server: NatsServer
) -> None:
    watcher = connect()

    ran = run_python(WITH_A_CHILD, args=[str(shared_nats_server.port)])
    child = int(ran.stdout)

    def nobody_listens() -> bool:
        try:
            watcher.request(b"mine", timeout=0.1)
        except NoResponders:
            return True
        except RequestTimeout:
            return False
        return False

    try:
        eventually(nobody_listens, 3, what="the server noticed the death")
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


@forks
def test_child_does_not_hang_on_the_locks_of_other_threads(connect: Connect) -> None:
    connection = connect()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with connection._lock, connection._reader:
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)

    def child() -> None:
        signal.alarm(5)
        for use in (
            lambda: connection.publish(b"a", b""),
            lambda: connection.wait(lambda: False, 1),
            connection.read_available,
        ):
            with pytest.raises(ConnectionLost, match="a forked one needs its own"):
                use()
        own = NatsConnection(connection.settings)
        own.connect()
        own.round_trip(2)

    run_in_child(child)
    release.set()
    thread.join()
    connection.round_trip(2)


# Clusters


@pytest.mark.cluster
def test_cluster_makes_its_servers_known(nats_cluster: Callable[..., NatsCluster]) -> None:
    cluster = nats_cluster(2)
    first, second = cluster.servers
    connection = NatsConnection(settings_of(first.port))
    connection.connect()

    def knows_both() -> bool:
        connection.wait(lambda: False, 0.05)
        return {server.port for server in connection.discovered_servers} == {
            first.port,
            second.port,
        }

    eventually(knows_both)
    assert connection.discovered_servers[0] == connection.settings.servers[0]
    assert connection.info.cluster == "test"

    second.stop()

    def knows_one() -> bool:
        connection.wait(lambda: False, 0.05)
        return len(connection.info.connect_urls) == 1

    eventually(knows_one)
    connection.close()


@pytest.mark.cluster
def test_lame_duck_is_announced(nats_cluster: Callable[..., NatsCluster]) -> None:
    cluster = nats_cluster(2, config={"lame_duck_duration": "30s", "lame_duck_grace_period": "1s"})
    first = cluster.servers[0]
    connection = NatsConnection(settings_of(first.port))
    connection.connect()
    assert not connection.info.lame_duck

    assert first.process is not None
    first.process.send_signal(signal.SIGUSR2)

    assert connection.wait(lambda: connection.info.lame_duck, 5)
    with pytest.raises(ConnectionLost):
        connection.wait(lambda: False, 10)
    second = NatsConnection(ConnectionSettings(servers=connection.discovered_servers))
    second.connect()
    assert second.server is not None
    assert second.server.port == cluster.servers[1].port
    second.close()


def test_nats_py_and_we_understand_each_other(nats_server: NatsServer) -> None:
    connection = NatsConnection(settings_of(nats_server.port))
    connection.connect()

    ours = json.loads(connection.request(b"$JS.API.INFO", timeout=5).payload)

    assert ours["type"] == api_request(nats_server.url, "INFO")["type"]
    connection.close()
