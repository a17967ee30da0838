"""How soon a database has what was logged, against MLflow's own `log_batch` in a loop.

    python benchmarks/jobs/database_speed.py [--points N] [--bare N] [--rounds N] [--postgres]

A `MetricLogger` from the first call to the return of `flush()`, single points, 20 and 1,000 keys,
and MLflow's `log_batch` with 1,000 metrics at a time, in turn, each to a fresh database; points a
second, the median of the rounds. The loop is given fewer points, because it takes so long. Target:
on SQLite 10 times the loop at 20 keys and 5 times at 1,000; on PostgreSQL 10 times. The exit status
is 1 if not.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

TARGETS = {("SQLite", 20): 10.0, ("SQLite", 1000): 5.0}
BATCH = 1000

Point = tuple[str, float, int]  # key, value, step


def points_of(count: int, keys: int) -> list[Point]:
    """A training loop's points: all keys at every step."""
    return [(f"metric{n % keys}", n / count, n // keys) for n in range(count)]


def with_loop(uri: str, points: list[Point]) -> float:
    """Points/s of a bare loop."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from support.backends import make_run

    client, run_id = MlflowClient(uri), make_run(uri)
    start_s = time.perf_counter()
    for at in range(0, len(points), BATCH):
        now_ms = time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now_ms, step) for key, value, step in points[at : at + BATCH]]
        client.log_batch(run_id, metrics)
    return len(points) / (time.perf_counter() - start_s)


def with_flowbuffer(uri: str, points: list[Point]) -> float:
    """Points/s of a logger, from the first call to the return of `flush()`."""
    from flowbuffer import MetricLogger
    from support.backends import make_run

    with tempfile.TemporaryDirectory() as folder:
        settings = {"spool_dir": Path(folder) / "spool", "shutdown_timeout_s": 600}
        with MetricLogger(make_run(uri), tracking_uri=uri, **settings) as logger:
            start_s = time.perf_counter()
            for key, value, step in points:
                logger.log_metric(key, value, step)
            found = logger.flush()
            seconds = time.perf_counter() - start_s
        assert (found.delivered, found.pending, found.rejected) == (len(points), 0, 0), found
    return len(points) / seconds


def cpu_s() -> float:
    """CPU of this process, its threads and the children that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@contextmanager
def databases(postgres: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """What makes a fresh database, and its name."""
    from support.backends import Postgres, copy_sqlite, new_sqlite

    if postgres:
        with Postgres() as server:
            yield "PostgreSQL", server.new_database
        return
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.db"
        new_sqlite(template)
        made = iter(range(1_000_000))
        yield "SQLite", lambda: copy_sqlite(template, Path(folder) / f"{next(made)}.db")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=500_000)
    parser.add_argument("--bare", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--postgres", action="store_true")
    given = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    missed = False
    print(f"{'database':<12}{'keys':>6}{'bare':>10}{'flowbuffer':>12}{'ratio':>8}{'us CPU':>8}")
    with databases(given.postgres) as (name, new):
        for keys in (20, 1000):
            bare, ours, cpu = [], [], []
            for _ in range(given.rounds):
                bare.append(with_loop(new(), points_of(given.bare, keys)))
                uri, before_s = new(), cpu_s()
                ours.append(with_flowbuffer(uri, points_of(given.points, keys)))
                cpu.append(1e6 * (cpu_s() - before_s) / given.points)
            ratio = statistics.median(our / their for our, their in zip(ours, bare, strict=True))
            print(
                f"{name:<12}{keys:>6}{statistics.median(bare):>10,.0f}"
                f"{statistics.median(ours):>12,.0f}{ratio:>8.1f}{statistics.median(cpu):>8.1f}",
                flush=True,
            )
            missed |= ratio < TARGETS.get((name, keys), 10.0)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
