from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.servers import Ledger, RedisServer, eventually, run_redis_server


def test_eventually_returns_the_first_true_value() -> None:
    values = iter([0, "", "found", "later"])

    assert eventually(lambda: next(values)) == "found"


def test_eventually_fails_with_the_last_assertion() -> None:
    def never() -> bool:
        raise AssertionError("as expected")

    with pytest.raises(AssertionError, match="as expected"):
        eventually(never, within=0.05)


def test_eventually_names_what_did_not_happen() -> None:
    with pytest.raises(AssertionError, match=r"a miracle not met within 0\.05 s"):
        eventually(lambda: False, within=0.05, what="a miracle")


@pytest.mark.redis
def test_redis_server_keeps_its_data_over_a_crash(folder: Path) -> None:
    with run_redis_server(folder) as server:
        assert _say(server, "SET k v") == b"+OK\r\n"
        server.kill()
        server.start()

        assert _say(server, "GET k") == b"$1\r\nv\r\n"


@pytest.mark.redis
def test_redis_server_knows_blmove(redis_server: RedisServer) -> None:
    assert _say(redis_server, "RPUSH a x") == b":1\r\n"

    assert _say(redis_server, "BLMOVE a b LEFT RIGHT 1") == b"$1\r\nx\r\n"


def _say(server: RedisServer, command: str) -> bytes:
    with socket.create_connection((server.host, server.port), timeout=5) as client:
        client.sendall(command.encode() + b"\r\n")
        return client.recv(1000)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "never started"),
        (["start"], "never ended"),
        (["start", "end", "start"], "too often started"),
        (["start", "end", "start", "end"], "too often started"),
    ],
    ids=["lost", "unfinished", "started twice", "ran twice"],
)
def test_ledger_tells_what_did_not_run_exactly_once(
    folder: Path, lines: list[str], message: str
) -> None:
    path = folder / "ledger"
    path.write_text("".join(f"id-1\tnoop\t{event}\t1\t0.5\n" for event in lines))

    with pytest.raises(AssertionError, match=message):
        Ledger(path).assert_each_ran_once(["id-1"])


def test_ledger_is_content_with_each_task_once(folder: Path) -> None:
    path = folder / "ledger"
    path.write_text("id-1\tnoop\tstart\t1\t0.5\nid-1\tnoop\tend\t1\t0.6\n")

    Ledger(path).assert_each_ran_once(["id-1"])
