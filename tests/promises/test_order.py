"""Order, timestamps and completeness on real stores (P2, P3): what was called comes back."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from flowbuffer import MetricLogger, Settings
from support.backends import MlflowServer, history, make_run
from support.waiting import PATIENCE_S
from support.workload import Workload, run

POINTS = 500
"""Per thread, in the parametrized workloads. `scripts/order` runs 50,000."""

TIE_VALUES = [1.0, 2.0, 3.0, 2.0, 1.0, 2.0, 3.0, 2.0, 1.0]
LARGEST = sys.float_info.max
"""SQL stores hold it in place of infinity."""


@dataclass(frozen=True)
class Backend:
    """Where to log, and the store itself, which is read faster than through its server."""

    uri: str
    store_uri: str


@pytest.fixture(params=["sqlite", "server_sqlite", "server_postgres"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "sqlite":
        uri = request.getfixturevalue("sqlite_uri")
        return Backend(uri, uri)
    server: MlflowServer = request.getfixturevalue(request.param)
    if request.param == "server_sqlite":
        return Backend(server.uri, f"sqlite:///{server.log.parent / 'mlflow.db'}")
    return Backend(server.uri, request.getfixturevalue("postgres_uri"))


@pytest.fixture
def logger(backend: Backend) -> Iterator[MetricLogger]:
    """A logger to a new run on the backend."""
    with MetricLogger(make_run(backend.uri), tracking_uri=backend.uri) as logger:
        yield logger


def points(logger: MetricLogger, uri: str, key: str = "key") -> list[tuple[float, int, int]]:
    """(value, step, timestamp) of a history, after everything is delivered."""
    assert logger.flush(timeout=PATIENCE_S).pending == 0
    return [(m.value, m.step, m.timestamp) for m in history(uri, logger.run_id, key)]


def values(logger: MetricLogger, uri: str, key: str = "key") -> list[float]:
    return [value for value, _, _ in points(logger, uri, key)]


@pytest.mark.parametrize(
    "work",
    [
        Workload(1, "none", points=POINTS),
        Workload(1, "none", own_keys=True, points=POINTS),
        Workload(1, "repeated", points=POINTS),
        Workload(20, "none", own_keys=True, points=POINTS),
        Workload(20, "rising", points=POINTS),
        Workload(1000, "repeated", points=2 * POINTS),
    ],
    ids=str,
)
def test_threads(backend: Backend, work: Workload):
    """P2, P3, P4: of 8 threads every point is there once, in the order of each thread's calls, with
    the time of its call unless a tie had to move."""
    read_uri = backend.store_uri if work.keys > 20 else backend.uri
    verdict, stats, _ = run(backend.uri, work, Settings.from_env(), read_uri=read_uri)
    assert verdict.good, verdict
    assert verdict.late <= stats.ties_moved
    assert verdict.late_most_ms <= stats.ties_moved_most_ms


def test_rising_steps_keep_the_time_of_the_call(backend: Backend):
    """P3: where no two points tie, every point has the time of its call, however threads mix."""
    work = Workload(20, "rising", own_keys=True, points=POINTS)
    verdict, _, _ = run(backend.uri, work, Settings.from_env())
    assert verdict.good, verdict
    assert verdict.late == 0


def test_ties_of_a_series_come_back(logger: MetricLogger, backend: Backend):
    """P2: the values of a series without steps come back in their order, also where they repeat."""
    logger.log_series("key", TIE_VALUES)
    logger.log_series("one step", TIE_VALUES, steps=[0] * 9)
    assert values(logger, backend.uri) == TIE_VALUES
    assert values(logger, backend.uri, "one step") == TIE_VALUES


def test_ties_in_one_millisecond_come_back(logger: MetricLogger, backend: Backend):
    """P2, P3: nine calls without a step, with one timestamp, come back in their order; each whose
    value does not rise is 1 ms later than the one before."""
    for value in TIE_VALUES:
        logger.log_metric("key", value, timestamp=1000)
    moved = [0, 0, 0, 1, 2, 2, 2, 3, 4]
    assert points(logger, backend.uri) == [
        (value, 0, 1000 + ms) for ms, value in zip(moved, TIE_VALUES, strict=True)
    ]
    stats = logger.stats()
    assert (stats.ties_moved, stats.ties_moved_most_ms) == (6, 4)


def test_same_value_in_one_millisecond_is_not_one_point(logger: MetricLogger, backend: Backend):
    """P2: points that agree in step and value are all there, whatever the millisecond; but the same
    time, given again, is the same point, as it is for MLflow."""
    for _ in range(100):
        logger.log_metric("key", 1.0, step=3)
        logger.log_metric("given", 1.0, step=3, timestamp=1000)
    assert values(logger, backend.uri) == [1.0] * 100
    assert values(logger, backend.uri, "given") == [1.0]


def test_special_values_arrive(logger: MetricLogger, backend: Backend):
    """P2: NaN and infinities are values like others, infinities as what SQL stores make of them."""
    given = [1.0, math.nan, math.inf, -math.inf, math.nan, -0.0, 5e-324]
    for value in given:
        logger.log_metric("key", value)
    logger.log_series("series", given)
    for key in ("key", "series"):
        found = values(logger, backend.uri, key)
        assert [math.isnan(value) for value in found] == [math.isnan(value) for value in given]
        found = [value for value in found if not math.isnan(value)]
        assert found == [1.0, LARGEST, -LARGEST, 0.0, 5e-324]


def test_numbers_of_all_kinds_arrive(logger: MetricLogger, backend: Backend):
    """P2: whatever has one value and `__float__` arrives as that value."""
    given = [True, False, 7, np.float32(0.5), np.float64(2.5), np.int64(-3), np.uint8(200)]
    given += [np.bool_(True), np.array(4.5), np.array(3, dtype=np.int16), 10**17]
    for step, value in enumerate(given):
        logger.log_metric("key", value, step=np.int32(step))
    assert points(logger, backend.uri)[0][1] == 0
    assert values(logger, backend.uri) == [float(value) for value in given]


def test_explicit_timestamps_are_kept(logger: MetricLogger, backend: Backend):
    """P3: timestamps that the caller gave are what comes back, with rising or falling steps."""
    times = [0, 1, 1_000, 1_500_000_000_000, 4_000_000_000_000]
    for step, time in enumerate(times):
        logger.log_metric("key", float(step), step=-step, timestamp=time)
    logger.log_metrics({"many": 1.0, "more": 2.0}, step=7, timestamp=times[3])
    logger.log_series("series", [5.0, 4.0, 3.0], steps=[3, 2, 1], timestamps=times[:3])
    assert points(logger, backend.uri) == [(float(i), -i, time) for i, time in enumerate(times)]
    assert points(logger, backend.uri, "many") == [(1.0, 7, times[3])]
    assert points(logger, backend.uri, "series") == [(5.0, 3, 0), (4.0, 2, 1), (3.0, 1, 1000)]
    assert logger.stats().ties_moved == 0


def test_explicit_timestamps_that_fall_are_left_alone(logger: MetricLogger, backend: Backend):
    """P2, P3: timestamps that run backwards stay as they are, so MLflow returns them sorted."""
    for step, time in enumerate([3000, 2000, 1000]):
        logger.log_metric("key", float(step), step=step, timestamp=time)
    assert points(logger, backend.uri) == [(2.0, 2, 1000), (1.0, 1, 2000), (0.0, 0, 3000)]
    assert logger.stats().ties_moved == 0


def test_explicit_timestamps_of_the_future_do_not_move_other_keys(
    logger: MetricLogger, backend: Backend
):
    """P3: a timestamp that the caller gave says nothing about the time of other keys' calls."""
    future = 4_000_000_000_000
    logger.log_metric("explicit", 1.0, timestamp=future)
    logger.log_metric("key", 2.0)
    assert points(logger, backend.uri, "explicit") == [(1.0, 0, future)]
    assert points(logger, backend.uri)[0][2] < future
