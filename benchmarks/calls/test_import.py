"""What importing costs: every training process pays it, some only that flowbuffer is installed."""

import subprocess
import sys
import time
from statistics import median

from pytest_benchmark.fixture import BenchmarkFixture

from conftest import Report

ROUNDS = 15

LOAD_PLUGIN = """
import time, typing  # MLflow has imported typing by then
from importlib.metadata import entry_points
[plugin] = entry_points(group="mlflow.tracking_store", name="flowbuffer")
start = time.perf_counter()
plugin.load()
print(time.perf_counter() - start)
"""


def run(code: str) -> float:
    """The seconds that a fresh interpreter takes for `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def said(code: str) -> float:
    """The number that a fresh interpreter prints for `code`."""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    return float(done.stdout)


def test_import(benchmark: BenchmarkFixture, report: Report) -> None:
    nothing, standard, ours = [], [], []

    def other_sides() -> None:
        nothing.append(run("pass"))
        standard.append(run("import asyncio, json, logging"))

    def import_flowbuffer() -> None:
        ours.append(run("from flowbuffer import MetricLogger"))

    benchmark.pedantic(import_flowbuffer, setup=other_sides, rounds=ROUNDS)
    empty_s = median(nothing)
    ours_ms, standard_ms = (1000 * (median(times) - empty_s) for times in (ours, standard))
    report(
        "from flowbuffer import MetricLogger / import asyncio, json, ...",
        ours_ms / standard_ms,
        note=f"{ours_ms:.0f} ms / {standard_ms:.0f} ms over {1000 * empty_s:.0f} ms for nothing",
    )


def test_import_leaves_the_heavy_ones_alone() -> None:
    heavy = ("mlflow", "numpy", "pandas")
    run(
        "import sys; from flowbuffer import MetricLogger; "
        f"sys.exit(any(m in sys.modules for m in {heavy}))"
    )


def test_plugin(report: Report) -> None:
    """`-X importtime` does not show what MLflow imports by name, as its plugins are."""
    plugin_ms = 1000 * median(said(LOAD_PLUGIN) for _ in range(ROUNDS))
    report(
        "import mlflow, where flowbuffer is not switched on: more, in ms", plugin_ms, "at most", 5
    )


def test_import_of_mlflow_takes_no_more_than_the_plugin() -> None:
    ours = {"flowbuffer", "flowbuffer.dropin.plugin"}
    run(f"import sys, mlflow; sys.exit({{m for m in sys.modules if 'flowbuffer' in m}} != {ours})")
