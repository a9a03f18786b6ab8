"""A TCP proxy in front of a real server, to make the network fail on demand."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque

#: Bytes read at once, and bytes one direction may hold before reading pauses.
CHUNK_BYTES = 65536
BUFFER_BYTES = 4 * 1024 * 1024

#: Makes close() send a reset, as a crashed peer or a firewall does.
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class _Pipe:
    """Bytes on their way from one socket to another, each chunk with its due time."""

    def __init__(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        self.source, self.target, self.up = source, target, up
        self.chunks: deque[tuple[float, bytes]] = deque()
        self.held_bytes = 0
        self.ended = False

    def is_due(self, now: float) -> bool:
        return bool(self.chunks) and self.chunks[0][0] <= now


class TcpProxy:
    """Forward connections to *target_port*, until told otherwise.

    ``cut()`` ends what is open, ``refuse()`` lets nobody in, ``freeze()`` accepts and
    forwards nothing, ``delay`` is seconds added to each direction, ``resume()`` is
    health. ``port`` never changes. One thread serves everything; all methods may be
    called from any other.
    """

    def __init__(self, target_port: int, target_host: str = "127.0.0.1") -> None:
        self.target = (target_host, target_port)
        self.host = "127.0.0.1"
        self.delay = 0.0
        #: Connections accepted so far, bytes forwarded to and from the server.
        self.accepted = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._lock = threading.RLock()
        self._pipes: list[_Pipe] = []
        self._frozen_up = self._frozen_down = False
        self._closed = False
        self._listener: socket.socket | None = None
        self.port = 0
        self._listen()
        self._wake_out, self._wake_in = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="tcp-proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def broker_url(self) -> str:
        return f"jetstream://{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections are open at this moment."""
        with self._lock:
            return len(self._pipes) // 2

    def cut(self, *, reset: bool = True) -> int:
        """End all open connections, by a reset or by an orderly close; return how many."""
        with self._lock:
            count = len(self._pipes) // 2
            for pipe in list(self._pipes):
                self._drop(pipe, reset=reset)
        self._wake()
        return count

    def refuse(self) -> None:
        """Refuse new connections; what is open goes on (see ``cut``)."""
        with self._lock:
            if self._listener is not None:
                self._listener.close()
                self._listener = None
        self._wake()

    def down(self) -> None:
        """Refuse new connections and cut the open ones: the server is gone."""
        self.refuse()
        self.cut()

    def freeze(self, *, up: bool = True, down: bool = True) -> None:
        """Forward nothing in these directions, and close nothing: a dead route."""
        with self._lock:
            self._frozen_up, self._frozen_down = up, down
        self._wake()

    def resume(self) -> None:
        """Accept, forward, without delay."""
        with self._lock:
            self._frozen_up = self._frozen_down = False
            self.delay = 0.0
            if self._listener is None and not self._closed:
                self._listen()
        self._wake()

    def close(self) -> None:
        self._closed = True
        self.down()
        self._thread.join(5)
        self._wake_in.close()
        self._wake_out.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_in.send(b"x")

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(128)
        listener.setblocking(False)
        self.port = int(listener.getsockname()[1])
        self._listener = listener

    def _serve(self) -> None:
        while not self._closed:
            with selectors.DefaultSelector() as selector:
                with self._lock:
                    timeout = self._register(selector)
                ready = {key.fileobj: mask for key, mask in selector.select(timeout)}
            if self._wake_out in ready:
                self._wake_out.recv(4096)
            with self._lock:
                if self._listener is not None and self._listener in ready:
                    self._accept(self._listener)
                self._forward()

    def _register(self, selector: selectors.BaseSelector) -> float | None:
        """Select what can make progress now; return seconds to the next due chunk."""
        now = time.monotonic()
        wanted: dict[socket.socket, int] = {self._wake_out: selectors.EVENT_READ}
        if self._listener is not None:
            wanted[self._listener] = selectors.EVENT_READ
        waits = []
        for pipe in self._pipes:
            if self._is_frozen(pipe):
                continue
            if not pipe.ended and pipe.held_bytes < BUFFER_BYTES:
                wanted[pipe.source] = wanted.get(pipe.source, 0) | selectors.EVENT_READ
            if pipe.is_due(now):
                wanted[pipe.target] = wanted.get(pipe.target, 0) | selectors.EVENT_WRITE
            elif pipe.chunks:
                waits.append(pipe.chunks[0][0] - now)
        for sock, events in wanted.items():
            selector.register(sock, events)
        return min(waits, default=None)

    def _is_frozen(self, pipe: _Pipe) -> bool:
        return self._frozen_up if pipe.up else self._frozen_down

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        try:
            server = socket.create_connection(self.target, timeout=2)
        except OSError:
            client.close()
            return
        self.accepted += 1
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipes += [_Pipe(client, server, up=True), _Pipe(server, client, up=False)]

    def _forward(self) -> None:
        now = time.monotonic()
        for pipe in list(self._pipes):
            if pipe not in self._pipes or self._is_frozen(pipe):
                continue
            try:
                self._read(pipe, now)
                self._write(pipe, now)
            except OSError:
                self._drop(pipe, reset=True)
                continue
            if pipe.ended and not pipe.chunks:
                self._drop(pipe, reset=False)

    def _read(self, pipe: _Pipe, now: float) -> None:
        while not pipe.ended and pipe.held_bytes < BUFFER_BYTES:
            try:
                chunk = pipe.source.recv(CHUNK_BYTES)
            except BlockingIOError:
                return
            if not chunk:
                pipe.ended = True
                return
            pipe.chunks.append((now + self.delay, chunk))
            pipe.held_bytes += len(chunk)

    def _write(self, pipe: _Pipe, now: float) -> None:
        while pipe.is_due(now):
            due, chunk = pipe.chunks[0]
            try:
                sent = pipe.target.send(chunk)
            except BlockingIOError:
                return
            pipe.held_bytes -= sent
            if pipe.up:
                self.bytes_up += sent
            else:
                self.bytes_down += sent
            if sent < len(chunk):
                pipe.chunks[0] = (due, chunk[sent:])
                return
            pipe.chunks.popleft()

    def _drop(self, pipe: _Pipe, *, reset: bool) -> None:
        """Close both ends of the connection that *pipe* is half of."""
        ends = {pipe.source, pipe.target}
        self._pipes = [other for other in self._pipes if other.source not in ends]
        for sock in ends:
            with contextlib.suppress(OSError):
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                sock.close()
