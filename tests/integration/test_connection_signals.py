"""Signal handlers that come in the middle of the connection's work.

In a process of their own: an exception out of nowhere would harm the test runner as well, and
coverage, which has locks of its own.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kombu_jetstream.server import NatsServer
from tests.servers import run_python

pytestmark = pytest.mark.nats29

PREAMBLE = """
import json, signal, sys
from kombu_jetstream.connection import *
from kombu_jetstream.errors import ConnectionLost

settings = ConnectionSettings(servers=(Server("127.0.0.1", int(sys.argv[1])),))

def connect():
    connection = NatsConnection(settings)
    connection.connect()
    return connection

def interrupt(work):
    def handler(*_):
        work()
        signal.setitimer(signal.ITIMER_REAL, 0.0005)  # after it, or it may interrupt itself
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005)
"""

PUBLISHING = """
connection = connect()
sent = []
got = {"main": [], "handler": []}
for name, numbers in got.items():
    connection.subscribe(name.encode(), lambda msg, to=numbers: to.append(int(msg.payload)))

def publish():
    sent.append(len(sent))
    connection.publish(b"handler", b"%d" % sent[-1])

interrupt(publish)
for number in range(20_000):
    connection.publish(b"main", b"%d" % number)
signal.setitimer(signal.ITIMER_REAL, 0)
connection.round_trip(20)
print(json.dumps({"sent": sent, **got}))
"""

RAISING = """
class SoftTimeLimit(Exception):
    pass

def expire():
    raise SoftTimeLimit

subscriber = connect()
body = b"x" * 3000
said = {"limits": 0, "tries": 0, "whole": 0, "other": 0, "reasons": []}

def count(msg):
    said["whole" if msg.payload == body else "other"] += 1

subscriber.subscribe(b"limits", count)
subscriber.round_trip(5)
for _ in range(300):
    connection = connect()
    try:
        interrupt(expire)
        while True:
            said["tries"] += 1
            connection.publish(b"limits", body)
    except SoftTimeLimit:
        said["limits"] += 1
    try:
        connection.round_trip(5)
    except ConnectionLost as exc:
        said["reasons"].append(str(exc))
    connection.close()
    subscriber.round_trip(5)
print(json.dumps(said))
"""


def said_by(program: str, server: NatsServer) -> dict[str, Any]:
    ran = run_python(PREAMBLE + program, args=[str(server.port)])
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout))


def test_signal_handler_may_publish(shared_nats_server: NatsServer) -> None:
    said = said_by(PUBLISHING, shared_nats_server)

    assert said["sent"]
    assert said["handler"] == said["sent"]
    assert said["main"] == list(range(20_000))


def test_exception_of_a_signal_handler_never_garbles_or_repeats_what_is_sent(
    shared_nats_server: NatsServer,
) -> None:
    said = said_by(RAISING, shared_nats_server)

    assert said["limits"] == 300
    assert 0 < said["whole"] <= said["tries"]
    assert said["other"] == 0
    assert [reason for reason in said["reasons"] if "interrupted while" not in reason] == []
