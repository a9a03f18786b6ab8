"""Run the shop with a real nats-server and a real worker, show it, stop everything.

``make demo`` runs this. Exit code 0 means that everything shown was as expected, 1 that
something was not, 130 that Ctrl-C ended it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kombu_jetstream.server import NatsServer, ServerError

EXAMPLES = Path(__file__).resolve().parent

#: Seconds for anything to happen that takes a fraction of one.
PATIENCE = 30.0

#: Parcels of the burst: a queue long enough to watch it shrink.
PARCELS = 200


class Unexpected(Exception):
    """Something shown was not as it should be."""


class Show:
    """Prints headings and lines, and notes what differs from what was expected."""

    def __init__(self) -> None:
        self.failures = 0

    def title(self, text: str) -> None:
        print(f"\n{text}\n{'=' * len(text)}", flush=True)

    def heading(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def fact(self, name: str, value: object) -> None:
        print(f"  {name:<34} {value}", flush=True)

    def check(self, name: str, value: object, good: bool) -> None:
        self.failures += not good
        self.fact(name, value if good else f"{value}   <-- not as expected")

    def result(self, call: str, expected: object, get: Callable[[], object]) -> None:
        """Show what *get* returns and how long that took."""
        start = time.monotonic()
        value = get()
        self.check(call, f"{value!r}   ({_milliseconds(start)})", value == expected)


def _milliseconds(start: float) -> str:
    return f"{(time.monotonic() - start) * 1000:.0f} ms"


class Worker:
    """``celery worker`` with beat on the shop, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.log_path = folder / "worker.log"
        self._command = [sys.executable, "-m", "celery", "-A", "shop", "worker"]
        self._command += ["--beat", "--schedule", str(folder / "beat-schedule")]
        self._command += ["--concurrency", "2", "--loglevel", "INFO"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=EXAMPLES,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(lambda: " ready." in self.log(), "the worker is ready", self._check_alive)

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            raise Unexpected("the worker ended by itself")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stop(self) -> int:
        """Let it end what it does and return its exit code; kill it when that takes long."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def wait_for(
    predicate: Callable[[], Any], what: str, meanwhile: Callable[[], None] | None = None
) -> None:
    deadline = time.monotonic() + PATIENCE
    while not predicate():
        if meanwhile is not None:
            meanwhile()
        if time.monotonic() > deadline:
            raise Unexpected(f"after {PATIENCE:g} s still not true: {what}")
        time.sleep(0.02)


@contextlib.contextmanager
def broker(folder: Path, url: str | None, show: Show) -> Iterator[str]:
    """A nats-server of our own, unless the user brought a broker."""
    if url is not None:
        show.fact("broker", "the given one")
        yield url
        return
    with NatsServer(folder / "nats store") as server:
        show.fact("nats-server", f"port {server.port}, its files in {server.store_dir}")
        yield server.broker_url


def demonstrate(show: Show, worker: Worker) -> None:
    # Imported here: the project reads BROKER_URL when it is imported.
    from shop import app, tasks

    show.heading("One task")
    show.result("price.delay('tea').get()", 450, lambda: _get(tasks.price.delay("tea")))
    show.result("and again, now connected", 450, lambda: _get(tasks.price.delay("tea")))

    show.heading("A chain of three, the second of which fails once and is retried after 0.5 s")
    show.result(
        "place_order(1, 'tea').get()",
        "order 1: tea for 4.50",
        lambda: _get(tasks.place_order(1, "tea")),
    )
    show.fact("retries in the worker's log", worker.log().count("] retry: Retry in "))

    show.heading("A group, and one more task with all its results (a chord)")
    show.result(
        "price_of_basket([...]).get()",
        450 + 1200 + 3900 + 2550,
        lambda: _get(tasks.price_of_basket(["tea", "cup", "pot", "tray"])),
    )

    show.heading("A periodic task, sent by celery beat every two seconds")
    wait_for(lambda: _runs_of(worker, "look_through_shelves"), "the periodic task ran")
    show.fact("times look_through_shelves ran", _runs_of(worker, "look_through_shelves"))

    show.heading(f"A queue of {PARCELS} parcels, and how it shrinks")
    start = time.monotonic()
    sent = [tasks.wrap.delay(number) for number in range(PARCELS)]
    show.fact(f"{PARCELS} times wrap.delay()", _milliseconds(start))
    for parcel in (sent[PARCELS // 4], sent[PARCELS // 2], sent[PARCELS * 3 // 4]):
        _get(parcel)
        show.fact(f"{_done(sent)} wrapped", f"{_waiting(app)} in the queue")
    wrapped = sorted(_get(parcel) for parcel in sent)
    show.check("all wrapped", len(wrapped), wrapped == list(range(PARCELS)))
    wait_for(lambda: _waiting(app) == 0, "the queue is empty")
    show.check("left in the queue", _waiting(app), True)

    show.heading("What celery inspect says")
    inspect = app.control.inspect(timeout=2.0)
    for name, stats in (inspect.stats() or {}).items():
        totals = ", ".join(
            f"{number} {task.rpartition('.')[2]}" for task, number in sorted(stats["total"].items())
        )
        show.fact("worker", f"{name}, pid {stats['pid']}")
        show.fact("tasks taken", totals)
    queues = [q["name"] for qs in (inspect.active_queues() or {}).values() for q in qs]
    show.check("queues", ", ".join(queues), queues == ["celery"])
    active = [task for running in (inspect.active() or {}).values() for task in running]
    show.fact("tasks running now", len(active))


def _get(result: Any) -> Any:
    # Results in a folder are looked for, by default only twice a second.
    return result.get(timeout=PATIENCE, interval=0.01)


def _runs_of(worker: Worker, task_name: str) -> int:
    return sum(
        task_name in line and "] succeeded in " in line for line in worker.log().splitlines()
    )


def _done(results: list[Any]) -> int:
    return sum(result.ready() for result in results)


def _waiting(app: Any) -> int:
    """Messages in the default queue, as the broker counts them."""
    with app.connection_for_read() as connection:
        queue = app.amqp.queues["celery"].bind(connection.default_channel)
        return int(queue.queue_declare(passive=True).message_count)


def run(broker_url: str | None) -> int:
    show = Show()
    folder = Path(tempfile.mkdtemp(prefix="jetstream-demo-"))
    worker = Worker(folder)
    show.title("An unchanged Celery project on NATS JetStream")
    try:
        with broker(folder, broker_url, show) as url:
            os.environ.update(BROKER_URL=url, SHOP_RESULTS=str(folder / "results"))
            show.fact("broker_url", url)
            try:
                start = time.monotonic()
                worker.start()
                show.fact("celery worker", f"ready after {_milliseconds(start)}")
                demonstrate(show, worker)
                show.heading("The end")
            finally:
                exit_code = worker.stop()
            show.check("the worker ended with", exit_code, exit_code == 0)
    except (Unexpected, ServerError) as exc:
        print(f"\nerror: {exc}", file=sys.stderr)
        show.failures += 1
    except Exception:
        show.failures += 1
        raise
    finally:
        if show.failures and worker.log():
            print(f"\nThe worker's log ends with:\n{worker.log()[-4000:]}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
    print("\nEverything is stopped and removed." if not show.failures else "\nThe demo failed.")
    return 1 if show.failures else 0


def _interrupt(number: int, frame: object) -> None:
    # One is enough: a second must not end the cleaning up.
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--broker-url", help="use this broker instead of a nats-server started for the demo"
    )
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    sys.path.insert(0, str(EXAMPLES))
    try:
        return run(options.broker_url)
    except KeyboardInterrupt:
        print("\nInterrupted; everything is stopped and removed.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
