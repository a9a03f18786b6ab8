"""Measure this transport beside Redis and RabbitMQ: ``python -m tests.benchmarks``.

Starts every broker it finds, repeats each workload on all of them in turns (A B C A B C …, so
that a machine whose speed drifts treats all alike), prints medians, spread and ratios, and writes
``results.json``, ``report.md`` and charts.  What cannot be started is named and left out.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from . import brokers, charts
from .brokers import Broker
from .results import Results, document, markdown, number, promises, promises_markdown, rows
from .workloads import CONTENDERS, WORKLOADS, Bench, Contender, Workload

#: Rounds without ``--rounds``, and with ``--quick``.
ROUNDS = 5
QUICK_ROUNDS = 3

#: How much of the full counts and times ``--quick`` does.
QUICK_SCALE = 0.2

PACKAGES = ("kombu-jetstream", "kombu", "celery", "amqp", "redis", "gevent")

console = Console()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORKLOAD",
        help="this workload, or all that begin so; again for more: " + ", ".join(WORKLOADS),
    )
    parser.add_argument("--rounds", type=int, help=f"rounds, {ROUNDS} unless told")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROUNDS} rounds of {QUICK_SCALE:.0%}% of the work: a first look",
    )
    parser.add_argument("--scale", type=float, help="how much of the work, 1.0 is all")
    parser.add_argument(
        "--broker",
        action="append",
        default=[],
        metavar="KIND=URL",
        help="use the broker at this URL (it must be empty); kinds: " + ", ".join(brokers.KINDS),
    )
    parser.add_argument("--without", action="append", default=[], metavar="KIND", help="leave out")
    parser.add_argument(
        "--out", type=Path, help="folder for results.json, report.md and the charts"
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", help="measure nothing, read these results.json instead"
    )
    parser.add_argument(
        "--document", type=Path, help="renew the tables of this page, charts beside it in img/"
    )
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if options.scale is None:
        options.scale = QUICK_SCALE if options.quick else 1.0
    unknown = [name for name in options.only or () if not list(_chosen([name]))]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}, there are {', '.join(WORKLOADS)}")
    return options


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _chosen(only: Iterable[str] | None) -> Iterator[Workload]:
    for name, workload in WORKLOADS.items():
        if only is None or any(name.startswith(stem) for stem in only):
            yield workload


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    # Whatever ends this program ends its servers.
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _leave)
    if options.results is not None:
        results = Results.load(options.results[0])
        for path in options.results[1:]:
            results.update(Results.load(path))
    else:
        results = measure_all(options)
    show(results)
    if options.out is not None:
        write(results, options.out)
    if options.document is not None:
        options.document.write_text(document(results, options.document))
        charts.draw(results, options.document.parent / "img")
    return 1 if results.failures else 0


# Measuring


def measure_all(options: argparse.Namespace) -> Results:
    workloads = list(_chosen(options.only))
    results = Results(facts=facts(options))
    folder = Path(tempfile.mkdtemp(prefix="benchmarks-"))
    try:
        with ExitStack() as stack:
            running = start_brokers(workloads, options, folder, results, stack)
            bench = Bench(running, folder, options.scale)
            measure_in_turns(bench, workloads, options.rounds, results, options.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def start_brokers(
    workloads: Iterable[Workload],
    options: argparse.Namespace,
    folder: Path,
    results: Results,
    stack: ExitStack,
) -> dict[str, Broker]:
    """Start what *workloads* need; note what is missing."""
    given = dict(each.split("=", 1) for each in options.broker)
    needed = {CONTENDERS[name].broker for workload in workloads for name in workload.contenders}
    running: dict[str, Broker] = {}
    for kind in brokers.KINDS:
        if kind not in needed:
            continue
        if kind in options.without:
            results.missing[kind] = "left out as asked"
        elif kind in given:
            running[kind] = brokers.External(given[kind])
        else:
            with console.status(f"starting {kind}"):
                try:
                    running[kind] = brokers.start(kind, folder / kind)
                except (brokers.Unavailable, AssertionError, OSError) as exc:
                    results.missing[kind] = str(exc)
        if kind in running:
            stack.callback(running[kind].stop)
            results.facts["brokers"][kind] = running[kind].version()
            console.print(f"{kind}: {results.facts['brokers'][kind]}")
        else:
            console.print(f"[yellow]without {kind}: {escape(results.missing[kind])}")
    return running


def measure_in_turns(
    bench: Bench,
    workloads: Sequence[Workload],
    rounds: int,
    results: Results,
    out: Path | None,
) -> None:
    total = sum(
        (1 if workload.once else rounds) * len(present(bench, workload)) for workload in workloads
    )
    columns = (
        TextColumn("{task.description:<48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=total)
        for workload in workloads:
            contenders = present(bench, workload)
            failed: set[str] = set()
            for _ in range(1 if workload.once else rounds):
                batches = [contenders] if workload.together else [[each] for each in contenders]
                for batch in batches:
                    labels = ", ".join(each.key for each in batch)
                    progress.update(bar, description=f"{workload.name}: {labels}")
                    able = [each for each in batch if each.key not in failed]
                    failed |= measure(bench, workload, able, results)
                    progress.advance(bar, len(batch))
            if workload.clean is not None:
                for each in contenders:
                    workload.clean(bench, each)
            if out is not None:  # an interrupted run keeps what it has
                write(results, out, with_charts=False)


def present(bench: Bench, workload: Workload) -> list[Contender]:
    """Return the contenders of *workload* whose broker runs."""
    contenders = [CONTENDERS[name] for name in workload.contenders]
    return [contender for contender in contenders if contender.broker in bench.brokers]


def measure(
    bench: Bench, workload: Workload, contenders: Sequence[Contender], results: Results
) -> set[str]:
    """Measure *contenders* once, at the same time if there are several; return who failed."""
    failed = set()
    with ThreadPoolExecutor(max(1, len(contenders))) as threads:
        measured = [(each, threads.submit(workload.measure, bench, each)) for each in contenders]
    for contender, future in measured:
        try:
            results.add(workload.name, contender.key, future.result())
        except (RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as exc:
            failed.add(contender.key)
            results.failures[f"{workload.name}: {contender.label}"] = str(exc)
            console.print(f"[red]{workload.name}, {contender.label}: {escape(str(exc))}")
    return failed


# What it was measured on


def facts(options: argparse.Namespace) -> dict[str, object]:
    """Return what a reader must know of a run: the machine, the versions, the settings."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores, {_memory()}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "brokers": {},
        "rounds": options.rounds,
        "scale": options.scale,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# What came out


def show(results: Results) -> None:
    for workload in WORKLOADS.values():
        table = Table(title=workload.title, title_justify="left", title_style="bold")
        for column in ("", "", "median", "lowest", "highest", "we are better by"):
            justify = "left" if not column else "right"
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for row in rows(results, workload):
            table.add_row(
                row.metric.title,
                row.label,
                f"{number(row.median)} {row.metric.unit}",
                number(row.low),
                number(row.high),
                f"{row.ratio:.2f} x" if row.ratio is not None else "",
            )
        if table.row_count:
            console.print(table)
    table = Table(title="Promises", title_justify="left", title_style="bold")
    for column in ("", "promised", "found"):
        table.add_column(column)
    for promise in promises():
        found = promise.found(results)
        if found is not None:
            sign = "at least" if promise.at_least else "at most"
            colour = "green" if promise.is_kept(found) else "red"
            table.add_row(promise.text, f"{sign} {promise.limit:g}", f"[{colour}]{found:.2f}")
    if table.row_count:
        console.print(table)
    for what, why in results.missing.items():
        console.print(f"[yellow]left out: {what} ({escape(why)})")


def write(results: Results, folder: Path, *, with_charts: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / "results.json")
    parts = ["# Results", *(f"- {name}: {value}" for name, value in results.facts.items()), ""]
    parts += ["## Promises", "", promises_markdown(results), ""]
    for name in results.figures:
        workload = WORKLOADS[name]
        parts += [f"## {workload.title}", "", markdown(results, workload), ""]
    (folder / "report.md").write_text("\n".join(parts))
    if with_charts:
        try:
            drawn = charts.draw(results, folder)
        except ImportError:
            console.print(
                '[yellow]no charts: pip install "kombu-jetstream[bench]" brings matplotlib'
            )
        else:
            console.print(f"{folder}: results.json, report.md, {len(drawn)} charts")


if __name__ == "__main__":
    sys.exit(main())
