"""Figures of a run: medians, spread and ratios, as tables, JSON and Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .workloads import CONTENDERS, WORKLOADS, Metric, Workload

__all__ = ["Promise", "Results", "Row", "promises", "rows"]

#: Of a document of this program.
FORMAT = 1


@dataclass
class Results:
    """All that one run measured."""

    #: the machine, versions, and how the program was called
    facts: dict[str, Any] = field(default_factory=dict)
    #: why contenders are left out, by the names of their brokers
    missing: dict[str, str] = field(default_factory=dict)
    #: figures by workload, contender and metric, one for each round
    figures: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    #: what went wrong, by workload and contender
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, workload: str, contender: str, figures: dict[str, float]) -> None:
        metrics = self.figures.setdefault(workload, {}).setdefault(contender, {})
        for metric, value in figures.items():
            metrics.setdefault(metric, []).append(value)

    def values(self, workload: str, contender: str, metric: str) -> list[float]:
        return self.figures.get(workload, {}).get(contender, {}).get(metric, [])

    def median(self, workload: str, contender: str, metric: str) -> float | None:
        values = self.values(workload, contender, metric)
        return statistics.median(values) if values else None

    def update(self, other: Results) -> None:
        """Take the workloads of *other*, a later run on the same machine, instead of ours."""
        self.figures.update(other.figures)
        self.failures.update(other.failures)
        self.missing = {
            kind: why for kind, why in self.missing.items() if kind not in other.facts["brokers"]
        }
        self.facts["brokers"].update(other.facts["brokers"])

    def save(self, path: Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=False)
        path.write_text(text + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        document = json.loads(path.read_text())
        if document.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a document of format {FORMAT}")
        return cls(**document)


@dataclass(frozen=True)
class Row:
    """One line of a table: one contender and metric of a workload."""

    metric: Metric
    contender: str
    median: float
    low: float
    high: float
    #: how many times better the first contender is; None for itself
    ratio: float | None

    @property
    def label(self) -> str:
        return CONTENDERS[self.contender].label


def rows(results: Results, workload: Workload) -> Iterator[Row]:
    for metric in workload.metrics:
        for contender in workload.contenders:
            values = results.values(workload.name, contender, metric.name)
            if values:
                yield Row(
                    metric,
                    contender,
                    statistics.median(values),
                    min(values),
                    max(values),
                    _advantage(results, workload, metric, contender),
                )


def _advantage(
    results: Results, workload: Workload, metric: Metric, contender: str
) -> float | None:
    first = workload.contenders[0]
    if contender == first:
        return None
    better, worse = (first, contender) if metric.better == "higher" else (contender, first)
    return ratio(results, (workload.name, better, metric.name), (workload.name, worse, metric.name))


Which = tuple[str, str, str]


def ratio(results: Results, above: Which, below: Which) -> float | None:
    """Return the median over the rounds of one figure over another.

    Within a round the two were measured one after the other, so that a machine whose speed drifts
    moves both.
    """
    pairs = zip(results.values(*above), results.values(*below), strict=False)
    ratios = [a / b for a, b in pairs if b]
    return statistics.median(ratios) if ratios else None


def number(value: float) -> str:
    """Return *value* with three significant digits or more, and thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def markdown(results: Results, workload: Workload) -> str:
    """Return the table of one workload."""
    several = len(workload.metrics) > 1
    head = ["", "median", "lowest to highest", "we are better by"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|---|"]
    for row in rows(results, workload):
        name = f"{row.metric.title}: {row.label}" if several else row.label
        unit = row.metric.unit
        cells = [
            name,
            f"**{number(row.median)}** {unit}".replace(" /", "/").strip(),
            f"{number(row.low)} to {number(row.high)}",
            f"{row.ratio:.2f} x" if row.ratio is not None else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Promise:
    """What this transport says of itself: one figure over another is at least (most) a limit."""

    text: str
    above: Which
    below: Which | None
    limit: float
    at_least: bool = True

    def found(self, results: Results) -> float | None:
        if self.below is None:
            return results.median(*self.above)
        return ratio(results, self.above, self.below)

    def is_kept(self, found: float) -> bool:
        return found >= self.limit if self.at_least else found <= self.limit


def _promises() -> Iterator[Promise]:
    ours = ("publish", "jetstream", "rate")
    name = "publish, each confirmed"
    yield Promise(f"{name}: Redis", ours, ("publish", "redis", "rate"), 2.5)
    yield Promise(f"{name}: RabbitMQ with confirms", ours, ("publish", "confirmed", "rate"), 3.0)
    yield Promise(f"{name}: raw-socket limit", ours, ("publish", "limit", "rate"), 0.55)
    ours, name = ("pipelined", "pipelined", "rate"), "publish, pipelined"
    yield Promise(f"{name}: RabbitMQ, unconfirmed", ours, ("pipelined", "rabbitmq", "rate"), 1.1)
    yield Promise(f"{name}: Redis", ours, ("pipelined", "redis", "rate"), 8.0)
    for prefetch in ("prefetch 8", "prefetch 256"):
        ours, name = ("consume", "jetstream", prefetch), f"consume and ack, {prefetch}"
        yield Promise(f"{name}: RabbitMQ", ours, ("consume", "rabbitmq", prefetch), 1.8)
        yield Promise(f"{name}: Redis", ours, ("consume", "redis", prefetch), 15.0)
    yield Promise(
        "delay(), confirmed: Redis",
        ("delay", "jetstream", "delay"),
        ("delay", "redis", "delay"),
        1.2,
    )
    yield Promise(
        "delay(), pipelined: RabbitMQ, unconfirmed",
        ("delay", "pipelined", "delay"),
        ("delay", "rabbitmq", "delay"),
        1.05,
    )
    for pool in ("prefork", "threads", "solo", "gevent"):
        work = f"worker-{pool}"
        ours = (work, "jetstream", "tasks")
        yield Promise(f"worker, {pool}: RabbitMQ", ours, (work, "rabbitmq", "tasks"), 1.05)
        yield Promise(f"worker, {pool}: Redis", ours, (work, "redis", "tasks"), 2.3)
    yield Promise(
        "worker, hooks of celery_ext",
        ("hooks", "jetstream", "tasks"),
        ("hooks", "no-hooks", "tasks"),
        0.97,
    )
    for metric in ("started p50", "started p99", "answered p50", "answered p99"):
        for other, label in (("rabbitmq", "RabbitMQ"), ("redis", "Redis")):
            yield Promise(
                f"latency, {metric}: {label}",
                ("latency", other, metric),
                ("latency", "jetstream", metric),
                1.0,
            )
    yield Promise(
        "idle worker, CPU: Redis",
        ("idle", "redis", "worker CPU"),
        ("idle", "jetstream", "worker CPU"),
        1.0,
    )
    yield Promise(
        "100,000 tasks an hour ahead, MB", ("eta", "jetstream", "growth"), None, 20.0, False
    )
    yield Promise(
        "1,000,000 waiting against 1,000",
        ("depth", "jetstream", "consume at 1000000"),
        ("depth", "jetstream", "consume at 1000"),
        0.85,
    )
    for many in ("200", "one of 200"):
        yield Promise(
            f"{many} queues against 1",
            ("queues", "jetstream", many),
            ("queues", "jetstream", "1"),
            0.85,
        )
    for metric in ("publish", "prefetch 8", "prefetch 256"):
        yield Promise(
            f"three levels against one, {metric}",
            ("levels", "jetstream", metric),
            ("levels", "one-level", metric),
            0.9,
        )


def promises() -> Sequence[Promise]:
    return tuple(_promises())


def promises_markdown(results: Results) -> str:
    lines = ["| compared | promised | found |", "|---|---|---|"]
    for promise in promises():
        found = promise.found(results)
        if found is None:
            continue
        sign = "at least" if promise.at_least else "at most"
        unit = " x" if promise.below is not None else ""
        mark = "" if promise.is_kept(found) else " (missed)"
        lines.append(
            f"| {promise.text} | {sign} {promise.limit:g}{unit} | **{found:.2f}**{unit}{mark} |"
        )
    return "\n".join(lines)


def document(results: Results, path: Path) -> str:
    """Return the text of *path* with its tables renewed.

    A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; NAME is a workload's or
    "promises".
    """
    text = path.read_text()
    tables = {name: markdown(results, workload) for name, workload in WORKLOADS.items()}
    tables["promises"] = promises_markdown(results)
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            _, end, after = rest.partition("<!-- end -->")
            text = f"{before}{mark}{table}\n{end}{after}"
    return text
