"""Charts of a run, as SVG for the documentation.  Needs matplotlib (the extra "bench")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import Results
from .workloads import CONTENDERS, DEPTHS, NUMBERS, WORKLOADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

#: One colour for a contender in all charts; ours stands out.
_COLOURS = {
    "jetstream": "#2a6fdb",
    "pipelined": "#7fb2ff",
    "redis": "#c0392b",
    "redis-aof": "#e39a92",
    "rabbitmq": "#e67e22",
    "confirmed": "#f5c08a",
    "limit": "#9aa0a6",
    "one-level": "#7fb2ff",
    "r1": "#2a6fdb",
    "r3": "#7fb2ff",
    "r3-pipelined": "#b9d5ff",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what *results* have into *folder* and return the files."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "benchmark", "font.size": 9})
    charts: dict[str, Callable[[Results], Any]] = {
        "publish": lambda r: _bars(r, ["publish", "pipelined"]),
        "consume": lambda r: _bars(r, ["consume"]),
        "celery": lambda r: _bars(
            r, ["delay", *(name for name in WORKLOADS if name.startswith("worker-"))]
        ),
        "latency": lambda r: _bars(r, ["latency"]),
        "depth": lambda r: _lines(r, "depth", "consume at {}", DEPTHS, "messages waiting"),
        "queues": lambda r: _lines(r, "queues", "{}", NUMBERS, "queues"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, chart in charts.items():
        figure = chart(results)
        if figure is not None:
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            files.append(path)
    return files


def _bars(results: Results, names: Iterable[str]) -> Any:
    """One panel for each workload and metric, one bar for each contender."""
    import matplotlib.pyplot as plt

    panels = [
        (WORKLOADS[name], metric)
        for name in names
        for metric in WORKLOADS[name].metrics
        if results.median(name, WORKLOADS[name].contenders[0], metric.name) is not None
    ]
    if not panels:
        return None
    rows = [sum(bool(results.values(w.name, c, m.name)) for c in w.contenders) for w, m in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(7.5, 0.55 * len(panels) + 0.27 * sum(rows)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [n + 1.5 for n in rows]},
    )
    for axis, (workload, metric) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, results, workload.name, workload.contenders, metric.name)
        several = len(workload.metrics) > 1
        title = f"{workload.title}: {metric.title}" if several else workload.title
        unit = "per second" if metric.unit == "/s" else metric.unit
        axis.set_title(f"{title} ({unit})", loc="left", fontsize=9)
    return figure


def _panel(
    axis: Axes, results: Results, workload: str, contenders: Iterable[str], metric: str
) -> None:
    shown = [name for name in contenders if results.values(workload, name, metric)]
    for place, name in enumerate(shown):
        values = results.values(workload, name, metric)
        median = results.median(workload, name, metric)
        assert median is not None
        axis.barh(place, median, color=_COLOURS.get(name, "#9aa0a6"))
        axis.plot([min(values), max(values)], [place, place], color="#333333", linewidth=1)
        text = f" {median:,.0f}" if median >= 100 else f" {median:.1f}"
        axis.text(max(values), place, text, va="center", fontsize=8)
    axis.set_yticks(range(len(shown)), [CONTENDERS[name].label for name in shown])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(results: Results, workload: str, metric: str, points: Iterable[int], label: str) -> Any:
    """Throughput against a number, from 0 on, one line for each contender."""
    import matplotlib.pyplot as plt

    lines = {
        name: [
            (point, results.median(workload, name, metric.format(point)))
            for point in points
            if results.values(workload, name, metric.format(point))
        ]
        for name in WORKLOADS[workload].contenders
    }
    if not any(lines.values()):
        return None
    figure, axis = plt.subplots(figsize=(7.5, 3), layout="constrained")
    for name, line in lines.items():
        if line:
            xs, ys = zip(*line, strict=True)
            axis.plot(xs, ys, "o-", color=_COLOURS[name], label=CONTENDERS[name].label)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel(label)
    axis.set_ylabel("messages per second")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure
