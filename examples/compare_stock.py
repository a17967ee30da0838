"""Run a script that uses only MLflow twice, stock and buffered, and compare.

Both times it is the same file, `stock_mlflow.py`, in a process of its own, with a fresh SQLite
file; the second time FLOWBUFFER_ENABLED=1 is set. `mlflow.log_metric` is timed from outside. At the
end both files are read back through MLflow; the exit status is 1 if they do not hold the same.
"""

import argparse
import fcntl
import json
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

SCRIPT = Path(__file__).with_name("stock_mlflow.py")
WAYS = {"stock": {}, "buffered": {"FLOWBUFFER_ENABLED": "1"}}


def run_timed(said: Path, arguments: list[str]) -> None:
    """Run the script in this process, with a stopwatch around `mlflow.log_metric`."""
    log_metric = mlflow.log_metric
    calls = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start_ns = time.perf_counter_ns()
        try:
            return log_metric(*args, **kwargs)
        finally:
            calls.append((start_ns, time.perf_counter_ns()))

    mlflow.log_metric = timed
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said.write_text(json.dumps(calls))


def measure(way: str, folder: Path, steps: int) -> dict[str, float]:
    """Run the script one way; what it took."""
    said, spool = folder / "calls.json", folder / "spool"
    foreign = ("MLFLOW_", "FLOWBUFFER_")
    start_s = time.perf_counter()
    subprocess.run(
        [sys.executable, __file__, "--timed", said, f"--steps={steps}"],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": store(folder),
            "FLOWBUFFER_SPOOL_DIR": str(spool),
            **WAYS[way],
        },
        cwd=folder,
        check=True,
    )
    total_s = time.perf_counter() - start_s
    wait_for_collector(spool)
    calls = np.array(json.loads(said.read_text()))
    p50_us, p999_us = np.percentile(calls[:, 1] - calls[:, 0], [50, 99.9]) / 1000
    return {
        "a call of mlflow.log_metric, median, µs": p50_us,
        "a call of mlflow.log_metric, p99.9, µs": p999_us,
        "the training loop, s": (calls[-1, 1] - calls[0, 0]) / 1e9,
        "the whole process until it has ended, s": total_s,
    }


def wait_for_collector(spool: Path) -> None:
    """Until the process that delivers has ended too, so that its files can be deleted."""
    if spool.exists():  # stock MLflow has none
        with (spool / "collector.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def stored(folder: Path) -> dict[str, Any]:
    """What MLflow has of each run, but for what no two runs share: ids and times."""
    client = mlflow.MlflowClient(store(folder))
    runs = client.search_runs(["0"])
    names = {run.info.run_id: run.info.run_name for run in runs}
    return {
        run.info.run_name: {
            "status": run.info.status,
            "params": run.data.params,
            "tags": {key: names.get(value, value) for key, value in run.data.tags.items()},
            "histories": {
                key: [
                    (point.step, point.value)
                    for point in client.get_metric_history(run.info.run_id, key)
                ]
                for key in sorted(run.data.metrics)
            },
        }
        for run in runs
    }


def show_differences(stock: dict[str, Any], buffered: dict[str, Any]) -> bool:
    """Print for each run whether both files hold the same of it; whether they do."""
    same = True
    print(f"\n{'run':<10}{'status':>10}{'params':>8}{'tags':>6}{'metrics':>9}{'points':>8}")
    for name in sorted({*stock, *buffered}):
        one, other = stock.get(name, {}), buffered.get(name, {})
        if found := other or one:
            histories = found["histories"]
            print(
                f"{name:<10}{found['status']:>10}{len(found['params']):>8}{len(found['tags']):>6}"
                f"{len(histories):>9}{sum(map(len, histories.values())):>8,}",
                end="  ",
            )
        different = [part for part in one or other if one.get(part) != other.get(part)]
        print(f"DIFFERENT: {', '.join(different)}" if different else "the same")
        same &= not different
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training (%(default)s)")
    parser.add_argument("--timed", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.timed:
        run_timed(given.timed, [f"--steps={given.steps}"])
        return 0

    for chatty in ("mlflow", "alembic"):  # about the tables that they create in a new file
        logging.getLogger(chatty).setLevel(logging.WARNING)
    print(f"running {SCRIPT.name} twice, stock and with FLOWBUFFER_ENABLED=1", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {way: Path(scratch) / way for way in WAYS}
        figures = {}
        for way, folder in folders.items():
            folder.mkdir()
            mlflow.MlflowClient(store(folder)).get_experiment("0")  # creates the tables
            figures[way] = measure(way, folder, given.steps)
        print(f"\n{'':<42}{'stock':>10}{'buffered':>10}")
        for name, value in figures["stock"].items():
            print(f"{name:<42}{value:>10,.2f}{figures['buffered'][name]:>10,.2f}")
        same = show_differences(*map(stored, folders.values()))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
