from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.proxy import TcpProxy
from tests.servers import eventually


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while chunk := self.request.recv(65536):
            self.request.sendall(chunk)


@pytest.fixture
def echo_port() -> Iterator[int]:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            """A reset is what these tests are about."""

    with Server(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo_port: int, proxy_to: Callable[[int], TcpProxy]) -> TcpProxy:
    return proxy_to(echo_port)


@pytest.fixture
def client(proxy: TcpProxy) -> Iterator[socket.socket]:
    with socket.create_connection((proxy.host, proxy.port), timeout=5) as client:
        assert _echoed(client, b"hello") == b"hello"
        yield client


def _echoed(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    back = b""
    while len(back) < len(data):
        chunk = client.recv(65536)
        if not chunk:
            break
        back += chunk
    return back


def test_bytes_pass_both_ways(proxy: TcpProxy, client: socket.socket) -> None:
    data = bytes(range(256)) * 1000

    assert _echoed(client, data) == data
    # It counts what it has sent, and who gets it may be faster.
    eventually(lambda: proxy.bytes_up == proxy.bytes_down == len(data) + 5)


def test_cut_resets_open_connections_and_lets_new_ones_in(
    proxy: TcpProxy, client: socket.socket
) -> None:
    assert proxy.cut() == 1

    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with socket.create_connection((proxy.host, proxy.port), timeout=5) as again:
        assert _echoed(again, b"again") == b"again"


def test_orderly_cut_is_an_end_of_file(proxy: TcpProxy, client: socket.socket) -> None:
    proxy.cut(reset=False)

    assert client.recv(1) == b""


def test_refused_until_resumed(proxy: TcpProxy, client: socket.socket) -> None:
    proxy.refuse()

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port), timeout=5)
    assert _echoed(client, b"still open") == b"still open"

    proxy.resume()

    with socket.create_connection((proxy.host, proxy.port), timeout=5) as again:
        assert _echoed(again, b"again") == b"again"


def test_frozen_connection_goes_on_where_it_was(proxy: TcpProxy, client: socket.socket) -> None:
    proxy.freeze()
    client.sendall(b"late")
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(4)

    proxy.resume()

    client.settimeout(5)
    assert client.recv(4) == b"late"


def test_delay_is_added_to_each_direction(proxy: TcpProxy, client: socket.socket) -> None:
    proxy.delay = 0.1
    start = time.monotonic()

    assert _echoed(client, b"slow") == b"slow"

    assert 0.2 <= time.monotonic() - start < 1


def test_end_of_a_client_is_passed_on(proxy: TcpProxy, client: socket.socket) -> None:
    client.close()

    eventually(lambda: proxy.connections == 0)
