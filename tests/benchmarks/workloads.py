"""What is measured: contenders, workloads, and how one measurement is made.

A measurement is one contender doing one workload once, in processes of its own; it gives one or
several figures.  `__main__` repeats them in turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.servers import eventually, python_env, session_members

from .brokers import Broker
from .processes import cpu_seconds, resident_megabytes

__all__ = ["CONTENDERS", "WORKLOADS", "Bench", "Contender", "Metric", "Workload"]

Figures = dict[str, float]

#: Seconds a client may take for anything.
CLIENT_TIMEOUT = 900.0

#: Seconds a worker may take to start, or to run one task.
WORKER_TIMEOUT = 60.0

#: Bytes of a message's body, where nothing else is said.
BODY = 800


@dataclass(frozen=True)
class Contender:
    """A way to use a broker."""

    key: str
    label: str
    #: one of `brokers.KINDS`
    broker: str
    #: transport options
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Celery settings
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: where its streams are, for those that need streams of their own
    namespace: str | None = None
    #: name of the client in `clients`, when it is not the workload's
    client: str | None = None


CONTENDERS = {
    contender.key: contender
    for contender in (
        Contender("jetstream", "JetStream", "nats"),
        Contender(
            "pipelined",
            "JetStream, confirms pipelined",
            "nats",
            {"publish_confirms": "pipelined"},
        ),
        Contender("redis", "Redis", "redis"),
        Contender("redis-aof", "Redis with AOF", "redis-aof"),
        Contender("confirmed", "RabbitMQ with confirms", "rabbitmq", {"confirm_publish": True}),
        Contender("rabbitmq", "RabbitMQ", "rabbitmq"),
        Contender("limit", "limit: raw socket, one PubAck at a time", "nats", client="raw"),
        Contender("one-level", "one level", "nats", {"priority_levels": 1}, namespace="one_level"),
        Contender("r1", "cluster, 1 replica", "nats-three", {"stream_replicas": 1}, namespace="r1"),
        Contender(
            "r3", "cluster, 3 replicas", "nats-three", {"stream_replicas": 3}, namespace="r3"
        ),
        Contender(
            "r3-pipelined",
            "cluster, 3 replicas, pipelined",
            "nats-three",
            {"stream_replicas": 3, "publish_confirms": "pipelined"},
            namespace="r3",
        ),
        Contender("no-hooks", "without celery_ext", "nats", settings={"jetstream_hooks": False}),
    )
}


@dataclass(frozen=True)
class Metric:
    name: str
    title: str
    unit: str = "/s"
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Workload:
    """Something to measure, and who does it; the first contender is the one others are set to."""

    name: str
    title: str
    contenders: tuple[str, ...]
    metrics: tuple[Metric, ...]
    measure: Callable[[Bench, Contender], Figures]
    #: undoes what the measurements left behind
    clean: Callable[[Bench, Contender], object] | None = None
    #: all contenders at the same time: nothing competes, and it takes long
    together: bool = False
    #: measured once whatever the number of rounds: it takes minutes and hardly varies
    once: bool = False


class Bench:
    """Where measurements are made: the running brokers, a folder, and how much to do."""

    def __init__(self, brokers: Mapping[str, Broker], folder: Path, scale: float) -> None:
        self.brokers = brokers
        self.folder = folder
        self.scale = scale
        self._serial = 0

    def count(self, number: int) -> int:
        return max(20, int(number * self.scale))

    def seconds(self, number: float) -> float:
        return max(0.1, number * self.scale)

    def new_name(self, stem: str) -> str:
        """Return a name of a queue nobody used before."""
        self._serial += 1
        return f"{stem}-{self._serial}"

    def url(self, contender: Contender) -> str:
        url = self.brokers[contender.broker].url
        return f"{url}/{contender.namespace}" if contender.namespace is not None else url

    def env(self, contender: Contender, queue: str, **more: Any) -> dict[str, str]:
        """Return the environment of a producer or worker of `app`."""
        settings = {**contender.settings, **more.pop("settings", {})}
        return python_env(
            {
                "BROKER_URL": self.url(contender),
                "TRANSPORT_OPTIONS": json.dumps(dict(contender.options)),
                "APP_SETTINGS": json.dumps(settings),
                "QUEUE": queue,
                **more,
            }
        )

    def client(
        self,
        name: str,
        contender: Contender,
        *,
        queue: str = "benchmark",
        env: Mapping[str, str] | None = None,
        **parameters: Any,
    ) -> Figures:
        """Run one of `clients` in a process of its own and return its figures."""
        parameters = {
            "url": self.url(contender),
            "options": dict(contender.options),
            "queue": queue,
            **parameters,
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.clients", name, json.dumps(parameters)],
            env=env if env is not None else self.env(contender, queue),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=CLIENT_TIMEOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{name} of {contender.label} failed: {done.stderr[-2000:]}")
        figures: Figures = json.loads(done.stdout.splitlines()[-1])
        return figures

    @contextlib.contextmanager
    def worker(
        self, contender: Contender, queue: str, pool: str, concurrency: int, **env: Any
    ) -> Iterator[Worker]:
        """Run a worker of `app` on *queue*."""
        counter = self.folder / f"{queue}.count"
        counter.touch()
        worker = Worker(
            self.env(contender, queue, COUNTER=str(counter), **env),
            counter,
            self.folder / f"{queue}.log",
            pool,
            concurrency,
        )
        try:
            yield worker
        finally:
            worker.stop()

    def delete_queue(self, contender: Contender, queue: str) -> None:
        self.client("delete_queues", contender, queues=[queue])


class Worker:
    """A worker process with its defaults, but for ``-l warning``: logging is not measured."""

    def __init__(
        self, env: Mapping[str, str], counter: Path, log: Path, pool: str, concurrency: int
    ) -> None:
        self.counter = counter
        self._log = log
        command = [sys.executable, "-m", "celery", "-A", "tests.benchmarks.app", "worker"]
        command += ["-P", pool, "-c", str(concurrency), "-l", "warning", "-n", f"{log.stem}@bench"]
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                command,
                env=dict(env),
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def done(self) -> int:
        """Return how many tasks it ran."""
        return self.counter.stat().st_size

    def wait_done(self, count: int, within: float = WORKER_TIMEOUT) -> None:
        def reached() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker ended: {self._log.read_text()[-2000:]}")
            return self.done >= count

        eventually(reached, within, every=0.002, what=f"{count} tasks are done")

    def cpu_seconds(self) -> float:
        """Return the CPU time of the worker and its children so far."""
        return cpu_seconds(session_members(self.process.pid))

    def resident_megabytes(self) -> float:
        """Return the memory of the process that talks to the broker."""
        return resident_megabytes(self.process.pid)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        for pid in session_members(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


# How each is measured


def publish(bench: Bench, contender: Contender) -> Figures:
    figures = bench.client(
        contender.client or "publish",
        contender,
        queue=bench.new_name("publish"),
        sizes=[BODY],
        seconds=bench.seconds(1.5),
    )
    return {"rate": figures[str(BODY)]}


def consume(bench: Bench, contender: Contender) -> Figures:
    figures = bench.client(
        "consume",
        contender,
        queue=bench.new_name("consume"),
        sizes=[BODY],
        prefetches=[8, 256],
        count=bench.count(40_000),
        seconds=bench.seconds(2.0),
    )
    return {f"prefetch {prefetch}": figures[f"{prefetch}/{BODY}"] for prefetch in (8, 256)}


def sizes(bench: Bench, contender: Contender) -> Figures:
    published = bench.client(
        "publish",
        contender,
        queue=bench.new_name("sizes"),
        sizes=SIZES,
        seconds=bench.seconds(0.8),
    )
    figures = {f"publish {size}": published[str(size)] for size in SIZES}
    for size in SIZES:
        consumed = bench.client(
            "consume",
            contender,
            queue=bench.new_name("sizes"),
            sizes=[size],
            prefetches=[8],
            count=bench.count(8000 if size < 100_000 else 800),
            seconds=bench.seconds(1.0),
        )
        figures[f"consume {size}"] = consumed[f"8/{size}"]
    return figures


def delay(bench: Bench, contender: Contender) -> Figures:
    return bench.client(
        "delay", contender, queue=bench.new_name("delay"), seconds=bench.seconds(2.0)
    )


def run_tasks(pool: str, concurrency: int) -> Callable[[Bench, Contender], Figures]:
    """Have a worker run tasks that wait already, and count from the first tenth on."""

    def measure(bench: Bench, contender: Contender) -> Figures:
        queue = bench.new_name(f"worker-{pool}")
        count = bench.count(8000)
        filler = CONTENDERS.get(_FILLED_BY.get(contender.key, ""), contender)
        bench.client("send_tasks", filler, queue=queue, count=count)
        with bench.worker(contender, queue, pool, concurrency) as worker:
            worker.wait_done(count // 10)
            first, start = worker.done, time.perf_counter()
            end = start + bench.seconds(3.0)
            while worker.done < count and time.perf_counter() < end:
                time.sleep(0.002)
            rate = (worker.done - first) / (time.perf_counter() - start)
        bench.delete_queue(contender, queue)
        return {"tasks": rate}

    return measure


#: The same queue, filled faster.
_FILLED_BY = {"jetstream": "pipelined"}


def latency(bench: Bench, contender: Contender) -> Figures:
    queue = bench.new_name("latency")
    settings = {"result_backend": "rpc://"}
    with bench.worker(contender, queue, "prefork", 2, settings=settings):
        figures = bench.client(
            "latency",
            contender,
            queue=queue,
            env=bench.env(contender, queue, settings=settings),
            count=bench.count(500),
            rate=100,
        )
    bench.delete_queue(contender, queue)
    return figures


def idle(bench: Bench, contender: Contender) -> Figures:
    queue = bench.new_name("idle")
    broker = bench.brokers[contender.broker]
    with bench.worker(contender, queue, "prefork", 2) as worker:
        bench.client("send_tasks", contender, queue=queue, count=1)
        worker.wait_done(1)
        time.sleep(bench.seconds(3.0))  # what starting up still does
        worker_before, server_before = worker.cpu_seconds(), cpu_seconds(broker.pids())
        asked_before, start = broker.requests(), time.monotonic()
        time.sleep(bench.seconds(30.0))
        minutes = (time.monotonic() - start) / 60
        figures = {
            "worker CPU": (worker.cpu_seconds() - worker_before) / minutes,
            "server CPU": (cpu_seconds(broker.pids()) - server_before) / minutes,
        }
        asked = broker.requests()
        if asked is not None and asked_before is not None:
            figures["requests"] = (asked - asked_before) / minutes
    bench.delete_queue(contender, queue)
    return figures


def eta(bench: Bench, contender: Contender) -> Figures:
    queue = bench.new_name("eta")
    filler = CONTENDERS.get(_FILLED_BY.get(contender.key, ""), contender)
    with bench.worker(contender, queue, "prefork", 2) as worker:
        bench.client("send_tasks", contender, queue=queue, count=1)
        worker.wait_done(1)
        time.sleep(bench.seconds(3.0))
        before = worker.resident_megabytes()
        bench.client("send_tasks", filler, queue=queue, count=bench.count(100_000), countdown=3600)
        after = _settled(worker.resident_megabytes, bench.seconds(10.0), bench.seconds(300.0))
    bench.delete_queue(contender, queue)
    return {"growth": after - before}


def _settled(value: Callable[[], float], quiet: float, within: float) -> float:
    """Return *value* when it did not rise for *quiet* seconds."""
    highest, since = value(), time.monotonic()
    end = since + within
    while time.monotonic() < min(end, since + quiet):
        time.sleep(quiet / 20)
        if value() > highest + 0.5:
            highest, since = value(), time.monotonic()
    return value()


def depth(bench: Bench, contender: Contender) -> Figures:
    return (
        bench.client(
            "depth",
            contender,
            queue="depth",
            depths=[bench.count(waiting) for waiting in DEPTHS],
            size=200,
            prefetch=8,
            chunk=min(900, bench.count(900)),
            seconds=bench.seconds(1.0),
        )
        | {}
    )


def named_depth(bench: Bench, contender: Contender) -> Figures:
    """Name the figures by the full depths, whatever the scale."""
    figures = depth(bench, contender)
    return {
        f"{verb} at {waiting}": figures[f"{verb} at {bench.count(waiting)}"]
        for verb in ("consume", "publish")
        for waiting in DEPTHS
    }


def clean_depth(bench: Bench, contender: Contender) -> None:
    names = [f"depth-{bench.count(waiting)}" for waiting in DEPTHS]
    bench.client("delete_queues", contender, queues=names)


def queues(bench: Bench, contender: Contender) -> Figures:
    return bench.client(
        "queues",
        contender,
        queue="queues",
        numbers=NUMBERS,
        size=BODY,
        prefetch=8,
        count=bench.count(8000),
        seconds=bench.seconds(1.5),
    )


def clean_queues(bench: Bench, contender: Contender) -> None:
    names = [f"queues-{number}-{index}" for number in NUMBERS for index in range(number)]
    bench.client("delete_queues", contender, queues=names)


def levels(bench: Bench, contender: Contender) -> Figures:
    return {"publish": publish(bench, contender)["rate"], **consume(bench, contender)}


def costs(bench: Bench, contender: Contender) -> Figures:
    return bench.client(
        "costs",
        contender,
        queue=bench.new_name("costs"),
        count=bench.count(20_000),
        size=BODY,
        pids=bench.brokers[contender.broker].pids(),
    )


SIZES = [200, 4096, 204_800]
DEPTHS = [1000, 100_000, 1_000_000]
NUMBERS = [1, 20, 200]

_BROKERS = ("jetstream", "redis", "redis-aof", "rabbitmq")

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "publish",
            "kombu publish, each confirmed",
            ("jetstream", "redis", "redis-aof", "confirmed", "limit"),
            (Metric("rate", "messages"),),
            publish,
        ),
        Workload(
            "pipelined",
            "kombu publish, confirms pipelined or none",
            ("pipelined", "redis", "redis-aof", "rabbitmq"),
            (Metric("rate", "messages"),),
            publish,
        ),
        Workload(
            "consume",
            "kombu consume and acknowledge",
            _BROKERS,
            (Metric("prefetch 8", "prefetch 8"), Metric("prefetch 256", "prefetch 256")),
            consume,
        ),
        Workload(
            "delay",
            "Celery delay()",
            ("jetstream", "pipelined", "redis", "redis-aof", "confirmed", "rabbitmq"),
            (Metric("delay", "calls"),),
            delay,
        ),
        *(
            Workload(
                f"worker-{pool}",
                f"Celery worker, tasks that do nothing, {pool} -c {concurrency}",
                _BROKERS,
                (Metric("tasks", "tasks"),),
                run_tasks(pool, concurrency),
            )
            for pool, concurrency in (("prefork", 2), ("threads", 2), ("solo", 1), ("gevent", 100))
        ),
        Workload(
            "hooks",
            "What the hooks of celery_ext cost a worker, prefork -c 2",
            ("jetstream", "no-hooks"),
            (Metric("tasks", "tasks"),),
            run_tasks("prefork", 2),
        ),
        Workload(
            "latency",
            "Round trip of one task at 100 tasks/s",
            _BROKERS,
            tuple(
                Metric(f"{what} {percentile}", f"{title}, {percentile}", "ms", "lower")
                for what, title in (("started", "delay() to start"), ("answered", "to the result"))
                for percentile in ("p50", "p99")
            ),
            latency,
        ),
        Workload(
            "idle",
            "Idle worker, prefork -c 2, per minute",
            _BROKERS,
            (
                Metric("worker CPU", "worker CPU", "s", "lower"),
                Metric("server CPU", "server CPU", "s", "lower"),
                Metric("requests", "requests", "", "lower"),
            ),
            idle,
            together=True,
        ),
        Workload(
            "eta",
            "Growth of a worker with 100,000 tasks an hour ahead",
            _BROKERS,
            (Metric("growth", "memory", "MB", "lower"),),
            eta,
            once=True,
        ),
        Workload(
            "depth",
            "Throughput against messages waiting, prefetch 8, 200-byte bodies",
            ("jetstream", "redis", "rabbitmq"),
            tuple(
                Metric(f"{verb} at {waiting}", f"{verb}, {waiting:,} waiting")
                for verb in ("consume", "publish")
                for waiting in DEPTHS
            ),
            named_depth,
            clean=clean_depth,
        ),
        Workload(
            "queues",
            "Consume from many queues, prefetch 8",
            ("jetstream", "redis", "rabbitmq"),
            tuple(
                Metric(name, f"{name} queue{'s' * (name != '1')}")
                for name in ("1", "20", "one of 20", "200", "one of 200")
            ),
            queues,
            clean=clean_queues,
        ),
        Workload(
            "sizes",
            "Message sizes, prefetch 8",
            ("jetstream", "redis", "rabbitmq"),
            tuple(
                Metric(f"{verb} {size}", f"{verb}, {size:,} bytes")
                for verb in ("publish", "consume")
                for size in SIZES
            ),
            sizes,
        ),
        Workload(
            "levels",
            "Three priority levels against one",
            ("jetstream", "one-level"),
            (
                Metric("publish", "publish, each confirmed"),
                Metric("prefetch 8", "consume, prefetch 8"),
                Metric("prefetch 256", "consume, prefetch 256"),
            ),
            levels,
        ),
        Workload(
            "replicas",
            "One replica against three, three servers on this machine",
            ("r1", "r3", "r3-pipelined"),
            (
                Metric("publish", "publish"),
                Metric("prefetch 8", "consume, prefetch 8"),
                Metric("prefetch 256", "consume, prefetch 256"),
            ),
            levels,
        ),
        Workload(
            "costs",
            "CPU for one message, pipelined, prefetch 256",
            ("pipelined", "r3-pipelined"),
            tuple(
                Metric(f"{verb}: {who}", f"{verb}, {title}", "us", "lower")
                for verb in ("publish", "consume")
                for who, title in (
                    ("client", "client"),
                    ("leader", "stream's leader"),
                    ("others", "other servers"),
                )
            ),
            costs,
        ),
    )
}
