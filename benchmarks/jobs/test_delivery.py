"""How soon points are in the backend, against a bare loop of `log_batch` on the same backend.

The loop is the most that MLflow's client can do: it knows all the points beforehand, and sends
them 1000 at a time in the order of the calls. Both sides get a fresh run, in turn, `--pairs`
times; the ratio is the median of the pairs.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from pytest_benchmark.fixture import BenchmarkFixture

from conftest import Report
from flowbuffer import MetricLogger
from support.backends import make_run

BATCH = 1000

Point = tuple[str, float, int]  # key, value, step


def points_of(count: int, keys: int) -> list[Point]:
    """A training loop's points: all keys at every step."""
    return [(f"metric{n % keys}", n / count, n // keys) for n in range(count)]


def with_loops(uri: str, points: list[Point], loops: int = 1) -> float:
    """Points/s of bare loops of `log_batch`, each in a thread, that share the batches."""
    run_id = make_run(uri)
    batches = [points[at : at + BATCH] for at in range(0, len(points), BATCH)]

    def loop(number: int) -> None:
        client = MlflowClient(uri)
        for batch in batches[number::loops]:
            now_ms = time.time_ns() // 1_000_000
            metrics = [Metric(key, value, now_ms, step) for key, value, step in batch]
            client.log_batch(run_id, metrics)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(loops)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(points) / (time.perf_counter() - start)


def with_flowbuffer(uri: str, points: list[Point]) -> float:
    """Points/s of one logger, from the first call until all is delivered."""
    with MetricLogger(make_run(uri), tracking_uri=uri) as logger:
        start = time.perf_counter()
        for key, value, step in points:
            logger.log_metric(key, value, step)
        found = logger.flush()
        seconds = time.perf_counter() - start
    assert (found.delivered, found.pending, found.rejected) == (len(points), 0, 0)
    return len(points) / seconds


Side = Callable[[list[Point]], float]
Compare = Callable[..., None]


@pytest.fixture
def compare(benchmark: BenchmarkFixture, report: Report, pytestconfig: pytest.Config) -> Compare:
    """Runs both sides in turn and adds a line to the table."""

    def compare(where: str, keys: int, target: float, their_side: Side, our_side: Side) -> None:
        points = points_of(pytestconfig.getoption("--points"), keys)
        theirs, ours = [], []

        def other_side() -> None:
            theirs.append(their_side(points))

        def own_side() -> None:
            ours.append(our_side(points))

        benchmark.pedantic(own_side, setup=other_side, rounds=pytestconfig.getoption("--pairs"))
        report(
            f"delivery to a {where}, {keys} key(s): flowbuffer / bare",
            median(our / their for our, their in zip(ours, theirs, strict=True)),
            "at least",
            target,
            f"{median(ours):,.0f} / {median(theirs):,.0f} points/s; "
            f"{len(ours)} pair(s) of {len(points):,}",
        )

    return compare


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("keys", "target"), [(1, 0.9), (20, 0.9), (1000, 1.3)])
def test_to_a_sqlite_file(keys: int, target: float, sqlite_uri: str, compare: Compare) -> None:
    compare(
        "SQLite file",
        keys,
        target,
        partial(with_loops, sqlite_uri),
        partial(with_flowbuffer, sqlite_uri),
    )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("keys", "target"), [(1, 0.9), (20, 0.9), (1000, 1.3)])
def test_to_a_server(keys: int, target: float, server_uri: str, compare: Compare) -> None:
    def fastest_loops(points: list[Point]) -> float:
        return max(with_loops(server_uri, points, loops) for loops in (1, 2, 4))

    compare(
        "server with 4 workers", keys, target, fastest_loops, partial(with_flowbuffer, server_uri)
    )
