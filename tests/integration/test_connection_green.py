"""The connection in processes that gevent or eventlet patched, before or after it was imported."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from kombu_jetstream.server import NatsServer
from tests.servers import run_nats_server, run_python

PROGRAM = """
import json, os, sys
library, when, port, pid, ca_file = sys.argv[1:]
if when == "late":
    import kombu_jetstream.connection
if library == "gevent":
    import gevent.monkey
    gevent.monkey.patch_all()
    from gevent import sleep, spawn
else:
    import eventlet
    eventlet.monkey_patch()
    from eventlet import sleep, spawn
import signal, ssl, time
from kombu_jetstream.connection import *
from kombu_jetstream.errors import ConnectionLost

context = ssl.create_default_context(cafile=ca_file) if ca_file else None
settings = ConnectionSettings(servers=(Server("localhost", int(port)),), tls=context)
said = {"ticks": 0, "answers": 0, "large": 0}
deadline = time.monotonic() + 30

def until(ready):
    while not ready():
        assert time.monotonic() < deadline, said
        sleep(0.005)

def tick():
    while True:
        said["ticks"] += 1
        sleep(0.005)

connection = NatsConnection(settings)
connection.connect()
connection.subscribe(b"echo", lambda msg: connection.publish(msg.reply, msg.payload))
connection.round_trip(5)
spawn(tick)

def ask(number):
    for turn in range(50):
        payload = b"%d %d" % (number, turn)
        assert connection.request(b"echo", payload, timeout=10).payload == payload
        said["answers"] += 1

for number in range(10):
    spawn(ask, number)
until(lambda: said["answers"] == 500)

# Four greenlets find the socket full, and the others go on.
reader = NatsConnection(settings)
reader.connect()
bodies = []
reader.subscribe(b"large", lambda msg: bodies.append(msg.payload))
reader.round_trip(5)
os.kill(int(pid), signal.SIGSTOP)

def write(number):
    for turn in range(50):
        connection.publish(b"large", b"%d" % number * 100_000)

for number in range(4):
    spawn(write, number)
ticks = said["ticks"]
until(lambda: said["ticks"] > ticks + 20)
os.kill(int(pid), signal.SIGCONT)
reader.wait(lambda: len(bodies) == 200, 20)
said["large"] = sum(len(set(body)) == 1 and len(body) == 100_000 for body in bodies)

# One greenlet waits, another closes.
reason = []
def wait():
    try:
        connection.wait(lambda: False, None)
    except ConnectionLost as exc:
        reason.append(str(exc))
spawn(wait)
sleep(0.05)
connection.close()
until(lambda: reason)
said["reason"] = reason[0]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("authority") / "ca.pem")


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, ca_file: str
) -> Iterator[dict[str, NatsServer]]:
    """A server in plain text, and one with TLS."""
    folder: Path = tmp_path_factory.mktemp("servers")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(ca_file)
    certificate = folder / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    tls = {"cert_file": str(certificate), "key_file": str(certificate)}
    with (
        run_nats_server(folder / "plain") as plain,
        run_nats_server(folder / "secure", config={"tls": tls}) as secure,
    ):
        yield {"plain": plain, "tls": secure}


@pytest.mark.parametrize("encryption", ["plain", "tls"])
@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_greenlets_share_a_connection_and_none_stops_the_others(
    servers: dict[str, NatsServer], ca_file: str, library: str, when: str, encryption: str
) -> None:
    pytest.importorskip(library)
    server = servers[encryption]
    assert server.process is not None
    arguments = [library, when, str(server.port), str(server.process.pid)]
    try:
        ran = run_python(
            PROGRAM,
            args=[*arguments, ca_file * (encryption == "tls")],
            python_options=["-W", "ignore"],  # eventlet's own warnings are not ours to fail for
        )
    finally:
        server.process.send_signal(signal.SIGCONT)

    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["answers"] == 500
    assert said["large"] == 200
    assert "closed by this client" in said["reason"]
