"""What `import flowbuffer` costs: every training process pays it."""

import subprocess
import sys
import time
from statistics import median

from pytest_benchmark.fixture import BenchmarkFixture

from conftest import Report

ROUNDS = 15


def run(code: str) -> float:
    """The seconds that a fresh interpreter takes for `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def test_import(benchmark: BenchmarkFixture, report: Report) -> None:
    nothing, standard, ours = [], [], []

    def other_sides() -> None:
        nothing.append(run("pass"))
        standard.append(run("import asyncio, json, logging"))

    def import_flowbuffer() -> None:
        ours.append(run("import flowbuffer"))

    benchmark.pedantic(import_flowbuffer, setup=other_sides, rounds=ROUNDS)
    empty_s = median(nothing)
    ours_ms, standard_ms = (1000 * (median(times) - empty_s) for times in (ours, standard))
    report(
        "import flowbuffer / import asyncio, json, logging",
        ours_ms / standard_ms,
        note=f"{ours_ms:.0f} ms / {standard_ms:.0f} ms over {1000 * empty_s:.0f} ms for nothing",
    )


def test_import_leaves_the_heavy_ones_alone() -> None:
    heavy = ("mlflow", "numpy", "pandas")
    run(f"import sys, flowbuffer; sys.exit(any(m in sys.modules for m in {heavy}))")
