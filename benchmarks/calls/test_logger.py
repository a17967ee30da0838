"""What a call costs its caller, against the least that a buffer could do and against MLflow.

Each round runs the other side first (as pytest-benchmark's untimed setup), so that both see the
same moments of a machine that others use too. Calls are timed twice: in a plain loop, for the cost
of one, and each by itself, for the percentiles (with the cost of the timer subtracted; it is as
large as the floor's, so no ratio near the floor is taken from those).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median

import mlflow
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from conftest import Report
from flowbuffer import MetricLogger, Settings
from support.backends import free_port, make_run
from support.waiting import wait_until

CALLS = 10_000
ROUNDS = 30

LogMetric = Callable[[str, float, int], object]


class Floor:
    """The least that a call which buffers has to do: keep the point and its time."""

    def __init__(self) -> None:
        self.points: deque[tuple[str, float, int, int]] = deque()

    def log_metric(self, key: str, value: float, step: int) -> None:
        self.points.append((key, value, step, time.time_ns()))


class Costs:
    """The costs of calls, in ns."""

    def __init__(self) -> None:
        self.ns: list[int] = []  # of single calls
        self.loops_ns: list[float] = []  # of one call, from a loop of many

    def loop(self, log_metric: LogMetric, count: int) -> None:
        """Call `log_metric` `count` times and time every 1000 as one: a loop that the machine
        interrupts is then an outlier."""
        clock = time.perf_counter_ns
        for first in range(0, count, 1000):
            steps = range(first, min(first + 1000, count))
            start = clock()
            for step in steps:
                log_metric("loss", 0.5, step)
            self.loops_ns.append((clock() - start) / len(steps))

    def time(self, log_metric: LogMetric, count: int) -> None:
        """Call `log_metric` `count` times and time each."""
        add, clock = self.ns.append, time.perf_counter_ns
        for step in range(count):
            start = clock()
            log_metric("loss", 0.5, step)
            add(clock() - start)

    @property
    def each(self) -> float:
        """Of one call in a loop: the median of the loops."""
        return median(self.loops_ns)

    def at(self, percent: float) -> float:
        return max(float(np.percentile(self.ns, percent)) - _TIMER_NS, 1.0)

    def __str__(self) -> str:
        return " / ".join(f"{self.at(percent) / 1000:.2f}" for percent in (50, 99, 99.9))


def _timer_ns() -> float:
    """What timing nothing shows."""
    costs, clock = [], time.perf_counter_ns
    for _ in range(100_000):
        start = clock()
        costs.append(clock() - start)
    return float(np.median(costs))


_TIMER_NS = _timer_ns()


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetricLogger]:
    """A logger whose server is down: hardly anything happens beside the calls."""
    settings = Settings(spool_dir=tmp_path_factory.mktemp("idle"))
    uri = f"http://127.0.0.1:{free_port()}"
    logger = MetricLogger("a-run", tracking_uri=uri, settings=settings)
    logger.log_metric("loss", 0.5, 0)
    wait_until(lambda: logger.stats().last_error)  # everything is imported and has been used
    yield logger
    logger.close(timeout=0)


@pytest.fixture
def busy(sqlite_uri: str) -> Iterator[MetricLogger]:
    """A logger that delivers to a SQLite file, in this process, for as long as it is measured."""
    logger = MetricLogger(make_run(sqlite_uri), tracking_uri=sqlite_uri)
    logger.log_metric("loss", 0.5, 0)
    logger.flush()
    for step in range(CALLS):
        logger.log_metric("loss", 0.5, step)
    yield logger
    logger.close(timeout=100)  # nothing of it goes on beside the other benchmarks


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_log_metric(
    state: str, request: pytest.FixtureRequest, benchmark: BenchmarkFixture, report: Report
) -> None:
    logger: MetricLogger = request.getfixturevalue(state)
    floor, floor_costs, costs = Floor(), Costs(), Costs()
    calls, rounds = (CALLS, ROUNDS) if state == "idle" else (CALLS // 2, ROUNDS // 3)

    def other_side() -> None:
        floor.points.clear()
        floor_costs.time(floor.log_metric, calls)
        costs.time(logger.log_metric, calls)
        floor.points.clear()
        floor_costs.loop(floor.log_metric, calls)

    benchmark.pedantic(
        costs.loop, (logger.log_metric, calls), setup=_once(other_side), rounds=rounds
    )
    beside = "" if state == "idle" else ", while it delivers"
    each = f"{costs.each:.0f} / {floor_costs.each:.0f} ns"
    report(f"log_metric / floor{beside}", costs.each / floor_costs.each, "at most", 5, each)
    said = f"µs at p50 / p99 / p99.9: {costs}; floor {floor_costs}"
    ratio = costs.at(99.9) / floor_costs.at(99.9)
    report(f"the same at p99.9{beside}", ratio, "at most", 2, said)


def test_log_metric_against_the_client(
    sqlite_uri: str, idle: MetricLogger, benchmark: BenchmarkFixture, report: Report
) -> None:
    client = mlflow.MlflowClient(sqlite_uri)
    run_id = make_run(sqlite_uri)

    def their_call(key: str, value: float, step: int) -> object:
        return client.log_metric(run_id, key, value, step=step, synchronous=False)

    ratio, said = _compared(their_call, idle, benchmark)
    report("MlflowClient.log_metric(synchronous=False) / log_metric", ratio, "at least", 20, said)


def test_log_metric_against_fluent(
    sqlite_uri: str, idle: MetricLogger, benchmark: BenchmarkFixture, report: Report
) -> None:
    mlflow.set_tracking_uri(sqlite_uri)
    mlflow.start_run()

    def their_call(key: str, value: float, step: int) -> object:
        return mlflow.log_metric(key, value, step, synchronous=False)

    ratio, said = _compared(their_call, idle, benchmark)
    report("mlflow.log_metric(synchronous=False) / log_metric", ratio, "at least", 200, said)


def _compared(
    their_call: LogMetric, logger: MetricLogger, benchmark: BenchmarkFixture
) -> tuple[float, str]:
    """How many times cheaper `log_metric` is than `their_call`, in the median."""
    their_costs, costs = Costs(), Costs()
    operations = []

    def log_metric(key: str, value: float, step: int) -> None:
        operations.append(their_call(key, value, step))

    def other_side() -> None:
        their_costs.time(log_metric, 100)
        for operation in operations:
            operation.wait()  # their threads would slow us down
        operations.clear()

    benchmark.pedantic(costs.time, (logger.log_metric, CALLS), setup=_once(other_side), rounds=5)
    return their_costs.at(50) / costs.at(50), f"µs at p50 / p99 / p99.9: {their_costs}; {costs}"


def test_log_metrics_of_20(idle: MetricLogger, benchmark: BenchmarkFixture, report: Report) -> None:
    metrics = {f"metric{number}": 0.5 for number in range(20)}
    single, many = Costs(), Costs()

    def log_metrics(_: str, __: float, step: int) -> None:
        idle.log_metrics(metrics, step)

    def other_side() -> None:
        single.time(idle.log_metric, CALLS)

    benchmark.pedantic(
        many.time, (log_metrics, CALLS // 20), setup=_once(other_side), rounds=ROUNDS
    )
    said = f"{many.at(50) / 20:.0f} / {single.at(50):.0f} ns"
    report(
        "log_metrics of 20, per metric / log_metric",
        many.at(50) / 20 / single.at(50),
        "at most",
        0.6,
        said,
    )


def test_log_series_of_100_000(
    idle: MetricLogger, benchmark: BenchmarkFixture, report: Report
) -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    costs = Costs()

    def log_series(*_: object) -> None:
        idle.log_series("series", values)

    benchmark.pedantic(costs.time, (log_series, 1), rounds=ROUNDS)
    report("log_series of 100,000, ns per point", costs.at(50) / len(values), "at most", 60)


def test_log_metric_in_8_threads(
    idle: MetricLogger, benchmark: BenchmarkFixture, report: Report
) -> None:
    alone, together = Costs(), Costs()

    def one_thread() -> None:
        alone.time(idle.log_metric, CALLS)

    def eight_threads() -> None:
        # So many calls that the interpreter switches between the threads (every 5 ms).
        arguments = (idle.log_metric, 5 * CALLS)
        threads = [threading.Thread(target=together.time, args=arguments) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    benchmark.pedantic(eight_threads, setup=_once(one_thread), rounds=5)
    said = f"µs at p50 / p99 / p99.9: {together}; one thread {alone}"
    ratio = together.at(50) / alone.at(50)
    report("log_metric in 8 threads / in one, median", ratio, "at most", 2, said)


def _once(run: Callable[[], object]) -> Callable[[], None]:
    """As a setup for pytest-benchmark, which takes what a setup returns for arguments."""

    def setup() -> None:
        run()

    return setup
