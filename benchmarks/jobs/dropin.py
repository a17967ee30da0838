"""MLflow's own calls in one run: stock synchronous, stock asynchronous, and buffered.

    python benchmarks/jobs/dropin.py [--calls N] [--rows N] [--backend sqlite|server] [--json FILE]

Every measurement is a process of its own that knows nothing of flowbuffer, on a SQLite file and on
a local `mlflow server`; "asynchronous" is MLFLOW_ENABLE_ASYNC_LOGGING, which is `synchronous=False`
for every call, "buffered" is FLOWBUFFER_ENABLED=1. Four tables: what a call costs the
caller; the rows that are not stored after a process that did not end its run; the rows that come
back in another order, or as one, when a key is logged without steps; and what becomes of a forked
child's rows. Rows are counted in the database, after the collector process has ended. Targets for
buffered calls: at most 5 us for `mlflow.log_metric`, and no row lost or out of order; the exit
status is 1 if not.
"""

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import (
    Store,
    append_json,
    await_collector,
    environment_of_a_stranger,
    fresh_stores,
    load,
    settle_mlflow,
)

WAYS = {
    "synchronous": {},
    "asynchronous": {"MLFLOW_ENABLE_ASYNC_LOGGING": "true"},
    "buffered": {"FLOWBUFFER_ENABLED": "1"},
}
KINDS = {
    "mlflow.log_metric": 1,
    "mlflow.log_metric(run_id=)": 1,
    "MlflowClient().log_metric": 1,
    "mlflow.log_metrics, 20": 5,  # a fifth of the calls
    "mlflow.log_param": 5,
}
BUFFERED_TIMES = 10  # as many calls, because they are cheap
TARGET_US = 5.0
ENDS = ("active run, returns", "active run, os._exit", "client, returns", "client, os._exit")
FORKS = ("os.fork", "multiprocessing")
CHILD_S = 20.0
LONGEST_S = 120.0


# ---------------------------------------------------------------- the processes that log


def log_calls(run_id: str, kind: str, calls: str) -> None:
    """Print the median and p99.9 of a kind of call in us, and the first call's."""
    import mlflow
    import numpy as np

    client = mlflow.MlflowClient()
    metrics = {f"metric{number}": 0.5 for number in range(20)}
    call: Callable[[int], object] = {
        "mlflow.log_metric": lambda step: mlflow.log_metric("loss", 0.5, step),
        "mlflow.log_metric(run_id=)": lambda step: mlflow.log_metric(
            "loss", 0.5, step, run_id=run_id
        ),
        "MlflowClient().log_metric": lambda step: client.log_metric(run_id, "loss", 0.5, step=step),
        "mlflow.log_metrics, 20": lambda step: mlflow.log_metrics(metrics, step),
        "mlflow.log_param": lambda step: mlflow.log_param(f"param{step}", step),
    }[kind]
    taken_ns = np.zeros(int(calls), np.int64)
    with mlflow.start_run(run_id):
        start_ns = time.perf_counter_ns()
        call(0)  # starts what there is to start
        first_us = (time.perf_counter_ns() - start_ns) / 1000
        for step in range(len(taken_ns)):
            start_ns = time.perf_counter_ns()
            call(step + 1)
            taken_ns[step] = time.perf_counter_ns() - start_ns
    p50_us, p999_us = np.percentile(taken_ns, [50, 99.9]) / 1000
    print(json.dumps({"p50": p50_us, "p99.9": p999_us, "first": first_us}))


def end_without_end_run(run_id: str, end: str, rows: str) -> None:
    """Log, and end in the middle of it."""
    import mlflow

    client = mlflow.MlflowClient()
    if "active run" in end:
        mlflow.start_run(run_id)
    for step in range(int(rows)):
        if "active run" in end:
            mlflow.log_metric("loss", step / 7, step)
        else:
            client.log_metric(run_id, "loss", step / 7, step=step)
    if "os._exit" in end:
        os._exit(0)


def log_without_steps(run_id: str, values: str, rows: str) -> None:
    """Log one key as fast as it goes: values that fall, or values that are equal."""
    import mlflow

    with mlflow.start_run(run_id):
        for number in range(int(rows)):
            mlflow.log_metric("loss", -float(number) if values == "falling" else 0.5)


def log_and_fork(run_id: str, fork: str, rows: str) -> None:
    """Log, and have a forked child log to the same run; print whether it ended in time."""
    import multiprocessing

    import mlflow

    mlflow.start_run(run_id)
    for step in range(int(rows)):
        mlflow.log_metric("parent", step / 7, step)

    def child() -> None:
        client = mlflow.MlflowClient()
        for step in range(int(rows)):
            client.log_metric(run_id, "child", step / 7, step=step)

    if fork == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(CHILD_S)
        ended = process.exitcode is not None
        process.kill()
    else:
        pid = os.fork()
        if pid == 0:
            child()
            sys.exit()  # through everything that is to be done at the interpreter's end
        ended = _waited(pid)
    print(json.dumps({"hangs": not ended}), flush=True)


def _waited(pid: int) -> bool:
    deadline_s = time.monotonic() + CHILD_S
    while time.monotonic() < deadline_s:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return False


JOBS = {
    job.__name__: job for job in (log_calls, end_without_end_run, log_without_steps, log_and_fork)
}


# ---------------------------------------------------------------- the process that measures


@dataclass
class Backend:
    """Where the jobs log to, and what was found there."""

    store: Store
    found: list[dict[str, object]] = field(default_factory=list)

    def run(self, way: str, job: str, *arguments: object) -> tuple[str, dict[str, object]]:
        """Have a job log to a new run one way; the run, and what the job printed.

        What it printed has "hangs" if it had to be killed, and "seconds", its own.
        """
        from support.backends import make_run

        uri = self.store.uri
        run_id = make_run(uri)
        env = environment_of_a_stranger(MLFLOW_TRACKING_URI=uri, **WAYS[way])
        with tempfile.TemporaryDirectory() as folder, open(f"{folder}/stderr", "w+") as stderr:
            start_s = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, __file__, "--job", job, run_id, *map(str, arguments)],
                env={**env, "FLOWBUFFER_SPOOL_DIR": f"{folder}/spool"},
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
            try:
                printed, _ = process.communicate(timeout=LONGEST_S)
                hangs = False
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                printed, _ = process.communicate()
                hangs = True
            seconds = time.monotonic() - start_s
            if process.returncode:
                stderr.seek(0)
                print(stderr.read()[-2000:], file=sys.stderr)
            await_collector(Path(folder) / "spool")
        said = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        found: dict[str, object] = {
            "hangs": hangs,
            "seconds": seconds,
            "status": process.returncode,
        }
        for line in said:
            found |= line | {"hangs": hangs or line.get("hangs", False)}
        return run_id, found

    def rows(self, run_id: str, key: str = "loss") -> int:
        """How many points of a metric are stored."""
        with sqlite3.connect(self.store.database) as connection:
            query = "SELECT COUNT(*) FROM metrics WHERE run_uuid = ? AND key = ?"
            return int(connection.execute(query, (run_id, key)).fetchone()[0])

    def values(self, run_id: str) -> list[float]:
        """The values of "loss" as MLflow gives them back."""
        from support.backends import history

        return [point.value for point in history(self.store.uri, run_id, "loss")]

    def keep(self, table: str, **figures: object) -> None:
        """For --json."""
        self.found.append({"table": table, "backend": self.store.name, **figures})


def show(name: str, *cells: object) -> None:
    print(f"  {name:<38}" + "".join(f"{cell!s:>22}" for cell in cells), flush=True)


def measure_calls(backend: Backend, calls: int) -> bool:
    """The first table; whether the target is met."""
    show(f"us per call: p50, p99.9 ({backend.store.name})", *WAYS)
    met = True
    for kind, fewer in KINDS.items():
        cells = []
        for way in WAYS:
            number = max(calls // fewer * (BUFFERED_TIMES if way == "buffered" else 1), 10)
            _, found = backend.run(way, "log_calls", kind, number)
            backend.keep("calls", way=way, kind=kind, calls=number, **found)
            cells.append(f"{found['p50']:,.1f}  {found['p99.9']:,.1f}")
            if (way, kind) == ("buffered", "mlflow.log_metric"):
                met = float(str(found["p50"])) <= TARGET_US
        show(kind, *cells)
    return met


def measure_ends(backend: Backend, rows: int) -> bool:
    """The second table; whether nothing buffered is lost."""
    show(f"rows lost of {rows}, run not ended ({backend.store.name})", *WAYS)
    met = True
    for end in ENDS:
        cells = []
        for way in WAYS:
            run_id, found = backend.run(way, "end_without_end_run", end, rows)
            lost = rows - backend.rows(run_id)
            backend.keep("ends", way=way, end=end, rows=rows, lost=lost, **found)
            cells.append(f"{lost}{' HANGS' if found['hangs'] else ''}")
            met &= way != "buffered" or (lost == 0 and not found["hangs"])
        show(end, *cells)
    return met


def measure_order(backend: Backend, rows: int) -> bool:
    """The third table; whether nothing buffered is out of order."""
    show(f"one key, no steps, {rows} rows ({backend.store.name})", *WAYS)
    disordered, missing, met = [], [], True
    for way in WAYS:
        run_id, _ = backend.run(way, "log_without_steps", "falling", rows)
        stored = backend.values(run_id)
        disordered.append(sum(later >= earlier for earlier, later in pairwise(stored)))
        lost = rows - len(stored)
        run_id, _ = backend.run(way, "log_without_steps", "equal", rows)
        missing.append(rows - backend.rows(run_id))
        backend.keep(
            "order", way=way, rows=rows, disordered=disordered[-1], lost=lost, equal=missing[-1]
        )
        met &= way != "buffered" or not (disordered[-1] or lost or missing[-1])
    show("falling values: rows out of order", *disordered)
    show("equal values: rows lost", *missing)
    return met


def measure_forks(backend: Backend, rows: int) -> bool:
    """The fourth table; whether nothing buffered is lost, and no child hangs."""
    show(f"rows lost of {rows} + {rows} of a child ({backend.store.name})", *WAYS)
    met = True
    for fork in FORKS:
        cells = []
        for way in WAYS:
            run_id, found = backend.run(way, "log_and_fork", fork, rows)
            parent, child = (rows - backend.rows(run_id, key) for key in ("parent", "child"))
            backend.keep("forks", way=way, fork=fork, parent=parent, child=child, **found)
            cells.append(f"{parent} + {child}{' HANGS' if found['hangs'] else ''}")
            met &= way != "buffered" or not (parent or child or found["hangs"])
        show(fork, *cells)
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=1000, help="of a kind and way (%(default)s)")
    parser.add_argument("--rows", type=int, default=500, help="of each other job (%(default)s)")
    parser.add_argument("--backend", choices=("sqlite", "server"))
    parser.add_argument("--json", type=Path, help="append what was measured, an object a line")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        name, *arguments = given.job
        JOBS[name](*arguments)
        return 0

    settle_mlflow()
    met = True
    wanted = {"sqlite": ["SQLite"], "server": ["server"], None: ["SQLite", "server"]}
    with fresh_stores(wanted[given.backend]) as stores:
        for backend in map(Backend, stores):
            met &= measure_calls(backend, given.calls)
            met &= measure_ends(backend, given.rows)
            met &= measure_order(backend, given.rows)
            met &= measure_forks(backend, given.rows)
            print(f"  {load()}\n")
            append_json(given.json, backend.found)
    print("targets met" if met else "targets MISSED")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
