"""The benchmark program runs to its end.  What it measures is no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, python_env, redis_server_binary


def run_benchmarks(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *options],
        cwd=ROOT,
        env=python_env(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.slow
def test_benchmarks_measure_each_contender_and_write_their_results(folder: Path) -> None:
    done = run_benchmarks(
        *("--scale", "0.01", "--rounds", "1", "--without", "rabbitmq", "--out", str(folder)),
        *("--only", "publish", "--only", "consume", "--only", "worker-solo"),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert results["failures"] == {}
    expected = {"jetstream"}
    if redis_server_binary() is not None:
        expected |= {"redis", "redis-aof"}
    for workload in ("publish", "consume", "worker-solo"):
        figures = results["figures"][workload]
        assert expected <= set(figures)
        for metrics in figures.values():
            assert all(len(values) == 1 and values[0] > 0 for values in metrics.values())
    assert (folder / "report.md").stat().st_size > 0


def test_a_broker_that_is_left_out_is_named(folder: Path) -> None:
    done = run_benchmarks(
        *("--scale", "0.01", "--rounds", "1", "--out", str(folder), "--only", "consume"),
        *("--without", "rabbitmq", "--without", "redis", "--without", "redis-aof"),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: rabbitmq (left out as asked)" in done.stdout
    results = json.loads((folder / "results.json").read_text())
    assert set(results["missing"]) == {"rabbitmq", "redis", "redis-aof"}


def test_an_unknown_workload_is_an_error_of_usage() -> None:
    done = run_benchmarks("--only", "nonsense")

    assert done.returncode == 2
    assert "no workload 'nonsense'" in done.stderr
