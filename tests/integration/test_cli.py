from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import celery
import click
import pytest
import redis
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from celery_ext.broker import Broker, run
from celery_ext.cli import jetstream
from kombu_jetstream.server import NatsServer
from tests.letters import application, bury, letters, queued
from tests.servers import (
    ROOT,
    RedisServer,
    eventually,
    free_port,
    nats_server_binary,
    nats_server_version,
    python_env,
    run_python,
)

EX_OK, EX_FAILURE, EX_USAGE, EX_UNAVAILABLE, CLICK_USAGE = 0, 1, 64, 69, 2

Cli: TypeAlias = Callable[..., Result]


@pytest.fixture
def app(shared_nats_server: NatsServer, namespace: str) -> Iterator[celery.Celery]:
    with application(shared_nats_server.broker_url, namespace, queues=("celery", "a b.c")) as app:
        yield app


def runner_of(app: celery.Celery) -> Cli:
    """Run ``celery jetstream`` with *app*, as ``celery -A`` does."""

    def invoke(*args: str, input: str | None = None, quiet: bool = False) -> Result:
        context = CLIContext(app=app, no_color=True, workdir=None, quiet=quiet)
        result = CliRunner().invoke(jetstream, args, obj=context, input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def cli(app: celery.Celery) -> Cli:
    return runner_of(app)


@pytest.fixture
def nowhere() -> Cli:
    """The command with an app whose broker does not run."""
    url = f"jetstream://127.0.0.1:{free_port()}"
    return runner_of(celery.Celery(broker=url, set_as_current=False))


@pytest.fixture
def empty(shared_nats_server: NatsServer) -> Cli:
    """The command with an app that never used its broker."""
    url = f"{shared_nats_server.broker_url}/never_used"
    return runner_of(celery.Celery(broker=url, set_as_current=False))


def data(result: Result) -> Any:
    assert result.exit_code == EX_OK, result.output
    return json.loads(result.stdout)


def walk(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names of all commands below *group*."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from walk(command, (*path, name))
        else:
            yield (*path, name)


COMMANDS = sorted(walk(jetstream))

#: What the commands that ask the broker need to run.
ARGUMENTS: dict[tuple[str, ...], list[str]] = {
    ("queues", "pause"): ["celery"],
    ("queues", "resume"): ["celery"],
    ("queues", "purge"): ["celery", "--force"],
    ("queues", "delete"): ["celery", "--force"],
    ("dlq", "show"): ["1"],
    ("dlq", "replay"): ["--all", "--force"],
    ("dlq", "delete"): ["--all", "--force"],
    ("dlq", "purge"): ["--force"],
    ("scheduled", "cancel"): ["x", "--force"],
}
#: These do not ask the broker, run for ever, or wait for workers.
OTHERS = {("permissions",), ("server",), ("exporter",)}
ASKING = [path for path in COMMANDS if path not in OTHERS and path[0] != "migrate"]


# -- all commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_a_help_text_of_whole_sentences(
    path: tuple[str, ...], empty: Cli
) -> None:
    result = empty(*path, "--help")

    assert result.exit_code == EX_OK
    summary = result.stdout.split("\n\n")[1].strip()
    assert summary[0].isupper()
    assert summary.endswith(".")


def test_no_summary_of_a_command_is_cut(empty: Cli) -> None:
    for group in ((), ("dlq",), ("queues",), ("scheduled",)):
        assert "..." not in empty(*group, "--help").stdout.split("Commands:")[1]


@pytest.mark.parametrize("path", ASKING, ids=" ".join)
def test_without_a_server_every_command_says_so_in_one_line(
    path: tuple[str, ...], nowhere: Cli
) -> None:
    result = nowhere(*path, *ARGUMENTS.get(path, []))

    assert result.exit_code == EX_UNAVAILABLE
    assert "no NATS server could be reached" in result.output
    assert "Connection refused" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("path", ASKING, ids=" ".join)
def test_on_an_empty_server_every_command_ends_in_peace(path: tuple[str, ...], empty: Cli) -> None:
    result = empty(*path, *ARGUMENTS.get(path, []), *["--dry-run"] * (path == ("provision",)))

    # What is named has to exist.
    names_something = path[0] == "queues" and path[1] != "list"
    names_something |= path in {("dlq", "show"), ("scheduled", "cancel")}
    assert result.exit_code == (EX_FAILURE if names_something else EX_OK), result.output


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("redis://localhost", {}, "expected broker_url to be jetstream://…, got redis://"),
        ("jetstream://localhost", {"visibilty_timeout": 1}, "did you mean 'visibility_timeout'?"),
    ],
    ids=["another transport", "an unknown option"],
)
def test_a_bad_configuration_is_a_usage_error(
    url: str, options: dict[str, Any], expected: str
) -> None:
    app = celery.Celery(broker=url, set_as_current=False)
    app.conf.broker_transport_options = options

    for command in ("status", "health", "doctor"):
        result = runner_of(app)(command)

        assert result.exit_code == EX_USAGE, command
        assert expected in result.stderr


@pytest.mark.parametrize(
    "path",
    [
        ("status",),
        ("doctor",),
        ("health",),
        ("ping",),
        ("provision",),
        ("permissions",),
        ("workers",),
        ("queues", "list"),
        ("dlq", "list"),
        ("dlq", "show"),
        ("dlq", "stats"),
        ("dlq", "replay"),
        ("scheduled", "list"),
    ],
    ids=" ".join,
)
def test_json_is_one_document_on_stdout_and_nothing_else(
    path: tuple[str, ...], cli: Cli, app: celery.Celery
) -> None:
    bury(app, 2)
    arguments = {
        ("dlq", "show"): ["1"],
        ("dlq", "replay"): ["--all", "--dry-run"],
        ("permissions",): ["worker"],
        ("workers",): ["--timeout", "0.1"],
    }.get(path, [])

    assert data(cli(*path, *arguments, "--json")) is not None


# -- status, health, ping, doctor ------------------------------------------------------------------


def test_status_counts_what_is_in_the_queues(cli: Cli, app: celery.Celery) -> None:
    for priority in (0, 1, 9, 9):
        app.send_task("shop.pay", priority=priority)
    if nats_server_version() >= (2, 12):
        app.send_task("shop.pay", countdown=600, queue="a b.c")
    bury(app, 3)
    with app.connection_for_read() as connection:
        held = connection.default_channel.basic_get("celery")

        found = data(cli("status", "--json", "--interval", "0"))

        assert held is not None
    queues = {queue.pop("name"): queue for queue in found["queues"]}
    assert queues["celery"].pop("oldest_age") >= 0
    assert queues["celery"] == {
        "ready": 3,
        "in_flight": 1,
        "delayed": 0,
        "redelivered": 0,
        "consumers": 0,
        "rate": None,
        "paused_until": None,
        "levels": {"high": 1, "medium": 1, "low": 1},
    }
    assert queues["a b.c"]["delayed"] == (1 if nats_server_version() >= (2, 12) else 0)
    assert found["dead_letters"]["count"] == 3
    assert found["dead_letters"]["queues"] == {"celery": 3}
    assert {stream["name"].rpartition("_")[2] for stream in found["streams"]} == {
        "high",
        "medium",
        "low",
        "dlq",
        "registry",
    }
    shown = cli("status", "--interval", "0").stdout
    assert "3 dead letters, the oldest" in shown
    assert "high 1 medium 1 low 1" in shown


def test_status_measures_the_rate_of_deliveries(cli: Cli, app: celery.Celery) -> None:
    for _ in range(40):
        app.send_task("shop.pay")
    ended = threading.Event()

    def consume() -> None:
        with app.connection_for_read() as connection:
            channel = connection.default_channel
            while not ended.wait(0.02):
                message = channel.basic_get("celery")
                if message is not None:
                    message.ack()

    consumer = threading.Thread(target=consume)
    consumer.start()
    try:
        found = data(cli("status", "--json", "--interval", "0.3"))
    finally:
        ended.set()
        consumer.join()

    rates = {queue["name"]: queue["rate"] for queue in found["queues"]}
    assert rates["celery"] > 0
    assert rates["a b.c"] == 0


def test_status_of_one_queue_leaves_the_others_out(cli: Cli) -> None:
    found = data(cli("status", "--json", "--interval", "0", "-Q", "a b.c"))

    assert [queue["name"] for queue in found["queues"]] == ["a b.c"]
    missing = cli("status", "-Q", "nope")
    assert missing.exit_code == EX_FAILURE
    assert missing.stderr == "Error: no queue 'nope'\n"


def test_status_watches_until_it_is_interrupted(app: celery.Celery, namespace: str) -> None:
    process = start_cli(app, namespace, "status", "--watch", "--interval", "0.1")
    try:
        assert process.stdout is not None
        shown = [process.stdout.readline() for _ in range(7)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()

    assert sum("nats-server" in line for line in shown) >= 2
    assert (process.returncode, errors) == (EX_OK, "")


def start_cli(app: celery.Celery, namespace: str, *args: str) -> subprocess.Popen[str]:
    """The real command in a process, on an app made of the environment."""
    settings = {"broker_transport_options": {"namespace": namespace}}
    return subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tests.acceptance.app", "jetstream", *args],
        env=python_env({"BROKER_URL": app.conf.broker_url, "APP_SETTINGS": json.dumps(settings)}),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite in the background of a shell ignores SIGINT, and so would what it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def test_the_entry_point_brings_the_command_to_celery(app: celery.Celery, namespace: str) -> None:
    process = start_cli(app, namespace, "queues", "list", "--json")

    out, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (EX_OK, "")
    assert [queue["name"] for queue in json.loads(out)] == ["a b.c", "celery"]


def test_loading_the_command_imports_nothing_heavy() -> None:
    # On top of Celery's own commands, but not through celery.bin.celery: that loads the commands of
    # other packages, too.
    code = """
import sys
import celery.bin.control, celery.bin.worker, celery.worker.worker
before = set(sys.modules)
import celery_ext.cli
print(*(set(sys.modules) - before))
"""
    done = run_python(code)

    assert done.returncode == 0, done.stderr
    loaded = {name for name in done.stdout.split() if not name.startswith("celery_ext")}
    assert not {"asyncio", "nats", "rich", "prometheus_client", "ssl"} & loaded
    assert len(loaded) < 30, loaded


def test_health_is_yes_with_a_server_and_no_without(cli: Cli, nowhere: Cli) -> None:
    yes, no = cli("health", "--json"), nowhere("health", "--json")

    assert data(yes)["healthy"] is True
    assert data(yes)["checks"] == {"connection": True, "jetstream": True, "streams": True}
    assert no.exit_code == EX_UNAVAILABLE
    assert json.loads(no.stdout)["healthy"] is False
    assert "Connection refused" in json.loads(no.stdout)["reason"]


def test_health_without_jetstream_is_no(tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen(
        [str(nats_server_binary()), "-a", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        cli = runner_of(celery.Celery(broker=f"jetstream://127.0.0.1:{port}", set_as_current=False))
        eventually(lambda: "refused" not in cli("health").stderr, 10.0)

        result = cli("health")

        assert result.exit_code == EX_UNAVAILABLE
        assert "has no JetStream; start it with -js" in result.stderr
        status = cli("status")
        assert status.exit_code == EX_UNAVAILABLE
        assert "has no JetStream; start it with -js" in status.stderr
    finally:
        process.kill()
        process.wait()


def test_health_of_missing_streams_depends_on_who_makes_them(
    shared_nats_server: NatsServer,
) -> None:
    for provision, code in (("auto", EX_OK), ("off", EX_UNAVAILABLE)):
        app = celery.Celery(broker=f"{shared_nats_server.broker_url}/none", set_as_current=False)
        app.conf.broker_transport_options = {"provision": provision}

        result = runner_of(app)("health")

        assert result.exit_code == code
        assert "stream 'none_registry' is missing or has no leader" in result.stderr


def test_ping_tells_the_round_trip(cli: Cli) -> None:
    found = data(cli("ping", "--json", "--count", "3"))

    assert found["count"] == 3
    assert 0 < found["min"] <= found["mean"] <= found["max"] < 5


# -- queues ----------------------------------------------------------------------------------------


@pytest.mark.requires_nats("2.11")
def test_a_paused_queue_hands_out_nothing_until_it_is_resumed(cli: Cli, app: celery.Celery) -> None:
    app.send_task("shop.pay")

    assert cli("queues", "pause", "celery").stdout == "paused celery\n"

    (paused, other) = reversed(data(cli("queues", "list", "--json")))
    assert paused["paused_until"] > time.time() + 86400
    assert other["paused_until"] is None
    assert queued(app) == {}
    assert "paused" in cli("queues", "list").stdout

    assert cli("queues", "resume", "celery", "a b.c").exit_code == EX_OK

    assert queued(app).total() == 1


@pytest.mark.requires_nats("2.11")
def test_a_pause_with_an_end_ends(cli: Cli, app: celery.Celery) -> None:
    app.send_task("shop.pay")

    cli("queues", "pause", "celery", "--for", "5s")

    assert queued(app) == {}
    eventually(lambda: queued(app).total() == 1, 20.0)


def test_purge_asks_and_removes_only_what_nobody_holds(cli: Cli, app: celery.Celery) -> None:
    for _ in range(3):
        app.send_task("shop.pay")
    with app.connection_for_read() as connection:
        held = connection.default_channel.basic_get("celery")
        assert held is not None

        dry = cli("queues", "purge", "celery", "--dry-run")
        refused = cli("queues", "purge", "celery", input="n\n")
        assert dry.stderr == "would remove 2 ready messages of celery\n"
        assert refused.exit_code == EX_FAILURE
        assert "Remove 2 ready messages of celery? [y/N]" in refused.stderr
        (_, queue) = data(cli("queues", "list", "--json"))
        assert queue["ready"] == 2

        assert cli("queues", "purge", "celery", "--force").stdout == "removed 2 messages\n"

        held.reject(requeue=True)
    assert queued(app).total() == 1


def test_delete_removes_a_queue_with_all_that_is_its_own(cli: Cli, app: celery.Celery) -> None:
    app.send_task("shop.pay", queue="a b.c")
    app.send_task("shop.pay", queue="a b.c", countdown=600)
    app.send_task("shop.pay")

    assert cli("queues", "delete", "a b.c", "--force").stdout == "deleted a b.c\n"

    assert [queue["name"] for queue in data(cli("queues", "list", "--json"))] == ["celery"]
    assert data(cli("scheduled", "list", "--json")) == []

    async def left(broker: Broker) -> list[str]:
        found = [await broker.subjects(broker.names.stream(name), ">") for name in broker.levels]
        return sorted(subject.split(".", 1)[1] for each in found for subject in each)

    assert run(app, left) == ["medium.celery"]


# -- dead letters ----------------------------------------------------------------------------------


def test_dlq_list_prints_one_array_with_the_agreed_names(cli: Cli, app: celery.Celery) -> None:
    bury(app, 60)

    found = data(cli("dlq", "list", "--json"))

    assert len(found) == 60
    assert list(found[0]) == [
        "id",
        "reason",
        "task",
        "task_id",
        "queue",
        "error",
        "message",
        "attempts",
        "worker",
        "published_at",
        "died_at",
        "replayed",
    ]
    assert len(data(cli("dlq", "list", "--json", "--limit", "7"))) == 7
    assert data(cli("dlq", "list", "--json", "--task", "no.*")) == []


def test_dlq_list_is_a_table_with_a_hint_at_what_is_left_out(cli: Cli, app: celery.Celery) -> None:
    bury(app, 60, task="x\ny[red]")

    first = cli("dlq", "list")
    second = cli("dlq", "list", "--before", "11")

    lines = first.stdout.splitlines()
    assert len(lines) == 51
    titles = ["ID", "AGE", "DIED AT", "REASON", "TASK", "TASK ID", "QUEUE", "ERROR", "MESSAGE"]
    assert re.split("  +", lines[0]) == [*titles, "TRIES"]
    assert "x y[red]" in lines[1]
    assert first.stderr == "there are more: --before 11, or --limit\n"
    assert len(second.stdout.splitlines()) == 11
    assert second.stderr == ""


def test_dlq_show_has_the_traceback_and_the_original(cli: Cli, app: celery.Celery) -> None:
    bury(app, 1)

    text = cli("dlq", "show", "1").stdout

    assert "error:         ValueError" in text
    assert '"id": "task-0"' in text
    assert text.endswith("traceback:\n    Traceback …\n    ValueError: no such card\n")
    assert data(cli("dlq", "show", "1", "--json"))["original"]["headers"]["id"] == "task-0"


def test_dlq_replay_by_filter_asks_and_by_force_does_not(cli: Cli, app: celery.Celery) -> None:
    bury(app, 4, error=lambda n: "KeyError" if n else "ValueError")

    dry = cli("dlq", "replay", "--error", "KeyError", "--dry-run", "--json")
    refused = cli("dlq", "replay", "--error", "KeyError", input="\n")

    assert [letter["id"] for letter in data(dry)] == ["2", "3", "4"]
    assert dry.stderr == "would replay 3 letters\n"
    assert refused.exit_code == EX_FAILURE
    assert "Replay 3 dead letters to their queues? [y/N]" in refused.stderr
    assert len(letters(app)) == 4

    done = cli("dlq", "replay", "--error", "KeyError", "--force", "--json")

    assert data(done) == {
        "replayed": 3,
        "already_replayed": 0,
        "expired": 0,
        "failed": [],
        "in_doubt": [],
    }
    assert set(queued(app)) == {"task-1", "task-2", "task-3"}


def test_dlq_replay_by_id_to_another_queue(cli: Cli, app: celery.Celery) -> None:
    bury(app, 3)

    assert cli("dlq", "replay", "2", "--to-queue", "a b.c").stdout == "replayed 1 letter\n"

    assert queued(app, "a b.c") == {"task-1": 1}


def test_dlq_replay_fails_when_letters_stay(cli: Cli, app: celery.Celery) -> None:
    bury(app, 2, queue=lambda n: "gone" if n else "celery")

    result = cli("dlq", "replay", "--all", "--force")

    assert result.exit_code == EX_FAILURE
    assert result.stdout == "replayed 1 letter\n"
    assert result.stderr == "letter 2 stays: no queue 'gone'\n"


@pytest.mark.parametrize("verb", ["replay", "delete"])
@pytest.mark.parametrize(
    "arguments",
    [[], ["1", "--all"], ["1", "--task", "x"], ["--reason", "bored"], ["--since", "soon"]],
    ids=["nothing", "id and all", "id and filter", "unknown reason", "no moment"],
)
def test_dlq_wants_to_know_which_letters(cli: Cli, verb: str, arguments: list[str]) -> None:
    result = cli("dlq", verb, *arguments, "--force")

    assert result.exit_code == CLICK_USAGE
    assert result.stderr.startswith("Usage: ")


def test_dlq_delete_and_purge_ask(cli: Cli, app: celery.Celery) -> None:
    bury(app, 9, queue=lambda n: "a b.c" if n < 3 else "celery")

    for arguments, question in [
        (["delete", "1", "2"], "Delete 2 dead letters for good?"),
        (["delete", "--queue", "a b.c"], "Delete 3 dead letters for good?"),
        (["purge"], "Delete 9 dead letters for good?"),
        (["purge", "--queue", "a b.c"], "Delete 3 dead letters of queue 'a b.c' for good?"),
    ]:
        result = cli("dlq", *arguments, input="n\n")
        assert result.exit_code == EX_FAILURE
        assert question in result.stderr
        assert "would delete" in cli("dlq", *arguments, "--dry-run").stderr
    assert len(letters(app)) == 9

    assert cli("dlq", "delete", "9", "--force").stdout == "deleted 1 letter\n"
    assert cli("dlq", "delete", "--queue", "a b.c", "-f").stdout == "deleted 3 letters\n"
    assert cli("dlq", "purge", input="y\n").stdout == "deleted 5 letters\n"


def test_dlq_delete_tells_what_was_not_there(cli: Cli, app: celery.Celery) -> None:
    bury(app, 1)

    result = cli("dlq", "delete", "1", "99", "--force")

    assert result.exit_code == EX_FAILURE
    assert result.stdout == "deleted 1 letter\n"
    assert "1 letter of those named did not exist" in result.stderr


def test_dlq_replay_of_a_few(cli: Cli, app: celery.Celery) -> None:
    bury(app, 5)

    shown = data(cli("dlq", "replay", "--all", "--limit", "2", "--dry-run", "--json"))
    assert [letter["task_id"] for letter in shown] == ["task-0", "task-1"]
    asked = cli("dlq", "replay", "--all", "--limit", "2", input="n\n")
    assert "Replay 2 dead letters to their queues?" in asked.stderr
    assert cli("dlq", "replay", "--all", "--limit", "2", "--force").stdout == "replayed 2 letters\n"
    assert len(letters(app)) == 3


def test_dlq_show_prints_no_commands_of_a_terminal(cli: Cli, app: celery.Celery) -> None:
    bury(app, 1, message="\x1b[2J\x1b]0;title\x07 \ud800", traceback="\x1b[31mred\nsecond line")

    shown = cli("dlq", "show", "1").stdout

    assert not {"\x1b", "\x07", "\ud800"} & set(shown)
    assert "    second line\n" in shown


def test_queues_delete_tells_all_that_goes(cli: Cli, app: celery.Celery) -> None:
    app.send_task("shop.pay")
    for _ in range(2):
        app.send_task("shop.pay", countdown=3600)

    asked = cli("queues", "delete", "celery", input="n\n")

    assert "Delete celery with 3 messages (1 ready, 2 delayed)?" in asked.stderr


def test_without_jetstream_the_fallback_is_shown(
    nats_server: NatsServer, redis_server: RedisServer
) -> None:
    options: dict[str, Any] = {"fallback_url": redis_server.url, "fallback_after": 0.1}
    with application(nats_server.broker_url, "shown", **options) as app:
        nats_server.kill()
        for _ in range(3):
            app.send_task("shop.pay")
        invoke = runner_of(app)

        status = invoke("status", "--interval", "0")
        as_json = invoke("status", "--json", "--interval", "0")
        doctor = invoke("doctor", "--json")
        with redis.Redis.from_url(redis_server.url) as client:
            client.hset("unacked", "tag", "what a plain worker took")
        migrate = invoke("migrate", "status")
        of_one = invoke("migrate", "status", "-Q", "other", "--json")

    assert (status.exit_code, as_json.exit_code) == (EX_UNAVAILABLE, EX_UNAVAILABLE)
    assert "fallback: Redis has taken over, messages wait there: 3 of celery" in status.stdout
    assert "no NATS server could be reached" in status.stderr
    found = json.loads(as_json.stdout)
    assert found["server"] is None
    assert found["fallback"]["waiting"] == {"celery": 3}
    findings = json.loads(doctor.stdout)["findings"]
    assert "in Redis 3 messages wait, workers hold 0" in [f["message"] for f in findings]
    assert migrate.exit_code == EX_UNAVAILABLE
    assert re.search(r"celery +3 +\? +\?", migrate.stdout)
    assert "1 message taken by plain redis:// workers and not acknowledged" in migrate.stdout
    assert [each["queue"] for each in json.loads(of_one.stdout)["queues"]] == ["other"]


def test_a_server_that_does_not_answer_is_given_the_time_asked_for(proxy_to: Any) -> None:
    frozen = proxy_to(free_port())
    frozen.freeze()
    invoke = runner_of(celery.Celery(broker=frozen.broker_url, set_as_current=False))
    began = time.monotonic()

    assert invoke("health", "--timeout", "0.5").exit_code != EX_OK
    assert time.monotonic() - began < 3


def test_dlq_stats_groups(cli: Cli, app: celery.Celery) -> None:
    bury(app, 5, error=lambda n: "KeyError" if n else None)

    found = data(cli("dlq", "stats", "--json"))

    assert found["count"] == 5
    assert found["errors"] == {"KeyError": 4, "": 1}
    shown = cli("dlq", "stats", "--error", "KeyError").stdout
    assert shown.startswith("4 dead letters, ")
    assert "KeyError" in shown


# -- scheduled tasks -------------------------------------------------------------------------------


@pytest.mark.requires_nats("2.12")
def test_scheduled_tasks_are_listed_and_cancelled(cli: Cli, app: celery.Celery) -> None:
    ids = [app.send_task("shop.pay", countdown=100 * n, queue="a b.c").id for n in (3, 1, 2)]

    found = data(cli("scheduled", "list", "--json"))
    assert [waiting["task_id"] for waiting in found] == [ids[1], ids[2], ids[0]]
    assert len(data(cli("scheduled", "list", "--json", "--within", "4m"))) == 2
    assert cli("scheduled", "list", "--limit", "2").stderr == "there are more: --limit\n"

    refused = cli("scheduled", "cancel", ids[0], input="n\n")
    assert refused.exit_code == EX_FAILURE
    assert "Cancel 1 waiting task? [y/N]" in refused.stderr
    assert cli("scheduled", "cancel", "--queue", "a b.c", "-n").stderr == (
        "would cancel 3 waiting tasks\n"
    )

    done = cli("scheduled", "cancel", ids[0], "nope", "--force")
    assert done.exit_code == EX_FAILURE
    assert done.stdout == "cancelled 1 task\n"
    assert done.stderr == "task nope does not wait in the server\n"
    assert cli("scheduled", "cancel", "--queue", "a b.c", "-f").stdout == "cancelled 2 tasks\n"
    assert cli("scheduled", "cancel", "x", "--queue", "y").exit_code == CLICK_USAGE


# -- server and exporter ---------------------------------------------------------------------------


def test_server_runs_until_it_is_stopped(tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "celery", "jetstream", "server"),
            *("--port", str(port), "--store", str(tmp_path / "a store")),
        ],
        env=python_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("nats-server with JetStream is ready on")
        app = celery.Celery(broker=f"jetstream://127.0.0.1:{port}", set_as_current=False)
        assert runner_of(app)("health").exit_code == EX_OK
        process.terminate()
        out, errors = process.communicate(timeout=15)
    finally:
        process.kill()

    assert process.returncode == EX_OK, errors
    assert out.endswith("stopped\n")


def test_quiet_leaves_remarks_out(app: celery.Celery) -> None:
    result = runner_of(app)("dlq", "list", quiet=True)

    assert (result.stdout, result.stderr) == ("", "")
