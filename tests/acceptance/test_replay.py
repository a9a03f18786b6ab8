"""Dead letters go back through the command, into a real worker, each once."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from celery_ext.broker import run
from celery_ext.dlq import DeadLetters
from kombu_jetstream import envelope
from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import Site, celery_command, run_celery, start_all
from tests.letters import bury, message_of
from tests.servers import eventually, run_nats_server

#: Letters, and how many of them are replayed before the command is killed again.
LETTERS, KILL_EVERY = 3000, 700


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with run_nats_server(tmp_path_factory.mktemp("nats store")) as server:
        yield server


def noop(number: int) -> bytes:
    message = message_of("noop", f"task-{number}", "celery")
    message["body"] = (
        '[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
    )
    return envelope.encode(message)


@pytest.mark.slow
@pytest.mark.requires_nats("2.12")
def test_a_replay_that_is_killed_again_and_again_runs_each_task_once(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{server.broker_url}/again")
    start_all([site.worker()])
    task_ids = bury(site.client, LETTERS, task="noop", payload=noop)

    def left() -> int:
        counts = run(site.client, lambda broker: DeadLetters(broker).counts())
        return counts.get("celery", 0)

    kills = 0
    while before := left():
        command = celery_command("jetstream", "dlq", "replay", "--all", "--force")
        process = subprocess.Popen(command, env=site.env(), stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None and left() > before - KILL_EVERY:
                pass
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        finally:
            process.kill()
            process.wait()

    assert kills >= 2
    site.wait_ended(task_ids, within=60)
    site.assert_each_ran_once(task_ids)


def test_the_command_tells_what_died_and_runs_it_again(
    server: NatsServer, make_site: Callable[..., Site]
) -> None:
    site = make_site(f"{server.broker_url}/told")
    start_all([site.worker()])
    (task_id,) = site.send("fail", 1, "no such card")

    def listed(*arguments: str) -> list[dict[str, object]]:
        done = run_celery(site.env(), "jetstream", "dlq", "list", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    (letter,) = eventually(listed, 20.0)
    assert letter["task_id"] == task_id
    assert letter["reason"] == "task_failed"
    assert letter["message"] == "no such card"
    assert letter["replayed"] == 0

    done = run_celery(site.env(), "jetstream", "dlq", "replay", str(letter["id"]))

    assert (done.returncode, done.stdout) == (0, "replayed 1 letter\n")
    (again,) = eventually(lambda: listed("--error", "ValueError"), 20.0)
    assert (again["task_id"], again["replayed"]) == (task_id, 1)
    assert again["id"] != letter["id"]
    assert site.ledger.starts("fail") == {task_id: 2}
