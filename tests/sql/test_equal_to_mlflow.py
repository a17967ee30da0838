"""What is written in bulk is, row for row and error for error, what MLflow's own store writes.

Hypothesis makes batches of all that MLflow takes, and of some that it refuses; sends parts of them
again; deletes, restores and ends the run in between. One run gets all of it from MLflow, one in
bulk, and a third one by turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import mlflow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric
from mlflow.tracking._tracking_service.utils import _get_store
from packaging.version import Version

from flowbuffer.backends.base import Request
from flowbuffer.backends.metric_columns import MetricColumns
from flowbuffer.backends.mlflow_client import database_of, delivery_client
from flowbuffer.metric_key import MetricKey
from support import sampling
from support.tables import tables

#: MLflow's session finds rows of a batch that are one row in the table.
pytestmark = pytest.mark.filterwarnings("ignore:New instance:sqlalchemy.exc.SAWarning")

#: Before 3.17 MLflow refuses some batches for ever that are stored in bulk: see
#: ``backends/stored_nans.py``.
REFUSES_AGAIN = Version(mlflow.__version__) < Version("3.17")

_LARGEST = 1.7976931348623157e308
Point = tuple[str, float, int, int]

#: Few of each, so that equal points and ties are the rule.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 5e-324, -5e-324, 2.2250738585072014e-308, 0.1 + 0.2, 1e300]),
    st.sampled_from([math.inf, -math.inf, _LARGEST, -_LARGEST]),
    st.builds(float, st.just("nan")),  # each an object of its own, which equals no other
    st.floats(),
)
TIMES = st.one_of(st.integers(0, 2), st.sampled_from([1_700_000_000_000, 2**63 - 1]))
STEPS = st.one_of(st.integers(-1, 2), st.sampled_from([-(2**63), 2**63 - 1]))
#: The second of two names may be the first one in another order of letters than that of the codes.
NAMES = ["a", "B", "b", "A", "a/b", "a b", "ä", "a.b", "a_b", "a-b", "Z" * 250]
KEYS = st.sampled_from([*NAMES, "about a model", "about a dataset", "about both"])
ALLOWED = st.tuples(KEYS, VALUES, TIMES, STEPS)
REFUSED = st.one_of(
    st.tuples(st.sampled_from(["", "a\nb", "../a", "a//b", "x" * 251]), VALUES, TIMES, STEPS),
    st.tuples(KEYS, VALUES, st.integers(-2, -1), STEPS),
    st.tuples(KEYS, VALUES, TIMES, st.sampled_from([2**63, -(2**63) - 1])),
)
#: Mostly what MLflow takes.
BATCHES = st.one_of(
    st.lists(ALLOWED, min_size=1, max_size=12),
    st.lists(st.tuples(st.sampled_from(NAMES), VALUES, TIMES, STEPS), min_size=1, max_size=40),
    st.lists(st.one_of(ALLOWED, REFUSED), min_size=1, max_size=5),
)
EVENTS = st.lists(
    st.one_of(
        BATCHES,
        st.tuples(st.just("again"), st.integers(0, 9), st.integers(0, 9)),
        st.sampled_from(["delete", "restore", "end", "nowhere"]),
    ),
    min_size=1,
    max_size=8,
)


class Pair:
    """MLflow's store and ours of one database, with a model."""

    def __init__(self, uri: str) -> None:
        self.plain = _get_store(uri)
        self.engine = self.plain.engine
        self.mlflow = MlflowClient(uri)
        self.bulk = delivery_client(uri, 10.0)
        self.model_id = self.mlflow.create_logged_model("0").model_id
        assert database_of(self.bulk).why_not() == ""

    def run(self) -> str:
        return self.mlflow.create_run("0").info.run_id

    def about(self, key: str) -> tuple[str, str, str]:
        """The model, the dataset and its digest; empty where there is none."""
        model = self.model_id if key in ("about a model", "about both") else ""
        return model, *(("data", "1") if key in ("about a dataset", "about both") else ("", ""))

    def by_mlflow(self, run_id: str, points: list[Point]) -> None:
        fields = ("model_id", "dataset_name", "dataset_digest")
        metrics = []
        for key, *rest in points:
            about = {name: text or None for name, text in zip(fields, self.about(key), strict=True)}
            metrics.append(Metric(key, *rest, **about))
        self.plain.log_batch(run_id, metrics, [], [])

    def in_bulk(self, run_id: str, points: list[Point]) -> None:
        keys = [
            MetricKey(key, *self.about(key)).stored(key) if any(self.about(key)) else key
            for key, *_ in points
        ]
        _, *columns = zip(*points, strict=True)
        request = Request(run_id, keys, *map(list, columns))
        self.bulk.log_batch(run_id, metrics=MetricColumns(request), synchronous=False)


def outcome(log: Callable[..., None], *arguments: Any) -> tuple[Any, ...]:
    """What a call raised, by class, MLflow's code, and what it said; nothing if it did not."""
    try:
        log(*arguments)
    except MlflowException as error:
        said = str(error).replace(arguments[0], "the run").split("\n")[0]
        # What the database says of a row depends on the statement.
        return type(error), error.error_code, said if error.error_code[0] != "B" else ""
    return ()


def is_again(point: Point, seen: set[Any]) -> bool:
    """Whether a NaN, or what is stored as the largest number, was seen before."""
    key, value, *when = point
    row = key, *when, math.isnan(value), value > 0
    if abs(value) < _LARGEST or row not in seen:
        seen.add(row)
        return False
    return True


def check(pair: Pair, events: list[Any]) -> None:
    runs = pair.run(), pair.run(), pair.run()
    sent: list[list[Point]] = []
    missing, deleted = "", False
    seen: set[Any] = set()
    for number, event in enumerate(events):
        if event == "nowhere":
            missing = "" if missing else "0" * 32
        elif event in ("delete", "restore"):
            deleted = event == "delete"
            for run_id in runs:
                (pair.mlflow.delete_run if deleted else pair.mlflow.restore_run)(run_id)
        elif event == "end":
            for run_id in () if deleted else runs:
                pair.mlflow.set_terminated(run_id)
        else:
            if isinstance(event, tuple):
                points = [one for batch in sent[event[1] :] for one in batch][event[2] :][:60]
            else:
                points = event
                sent.append(points)
            points = [one for one in points if not (REFUSES_AGAIN and is_again(one, seen))]
            if points:
                ways = pair.by_mlflow, pair.in_bulk, (pair.by_mlflow, pair.in_bulk)[number % 2]
                said = [
                    outcome(way, missing or run_id, points)
                    for way, run_id in zip(ways, runs, strict=True)
                ]
                assert said[0] == said[1] == said[2]
    of_mlflow, of_bulk, by_turns = (tables(pair.engine, run_id) for run_id in runs)
    assert of_bulk == of_mlflow
    assert by_turns == of_mlflow


NAN, OTHER_NAN = float("nan"), float("nan")
#: What is likely to go wrong, whatever Hypothesis thinks of.
TIES = [
    [("a", 0.0, 1, 1), ("a", NAN, 1, 1), ("a", -0.0, 1, 1)],
    [("a", OTHER_NAN, 1, 1), ("a", 0.0, 1, 1), ("a", math.inf, 1, 1), ("a", _LARGEST, 1, 1)],
    [("b", -0.0, 1, 1), ("b", 0.0, 1, 1), ("b", 1.0, 0, 2), ("b", 1.0, 9, 1)],
    [("first is none", 0.0, 1, 1), ("first is none", NAN, 1, 1)],
    [("first is NaN", NAN, 1, 1), ("first is NaN", 0.0, 1, 1)],
    [("number then NaN", 0.0, 1, 1), ("NaN then number", NAN, 1, 1)],
    [("number then NaN", NAN, 1, 1), ("NaN then number", 0.0, 1, 1)],
    [("A", 1.0, 5, 5), ("A", 1.0, 5, 5), ("A", 9.0, 9, 4)],
]


DRIVERS = [
    pytest.param(
        name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")
    )
    for name in ("psycopg2", "psycopg")
]
GOOD = ("a", 1.0, 1, 1)
REFUSALS = [
    [GOOD, ("a\nb", 1.0, 1, 1)],
    [GOOD, ("x" * 251, 1.0, 1, 1)],
    [GOOD, ("", 1.0, 1, 1)],
    [GOOD, ("a", 1.0, -1, 1)],
    [GOOD, ("a", 1.0, 1, 2**63)],
    "delete",
    [GOOD],
    "restore",
    "end",
    [GOOD],
    "nowhere",
    [GOOD],
]
ABOUT = [
    [GOOD, ("about a model", math.nan, 1, 1), ("about a model", 2.0, 1, 2)],
    [("about a dataset", 1.0, 1, 1), ("about a dataset", 1.0, 1, 1)],
    [("about both", math.inf, 1, 1), GOOD],
]


@pytest.fixture(scope="module")
def pairs() -> Callable[[str], Pair]:
    found: dict[str, Pair] = {}
    return lambda uri: found.get(uri) or found.setdefault(uri, Pair(uri))


def whatever_is_logged(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Calls a test with events: those that found something once, and so many others."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        test = given(events=EVENTS)(test)
        for events in (ABOUT, REFUSALS, [*TIES, ("again", 0, 0)], TIES):
            test = example(events=events)(test)
        return settings(
            max_examples=2000 if sampling.every else examples,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )(test)

    return decorate


@whatever_is_logged(25)
def test_sqlite_has_what_mlflow_writes(
    sqlite_uri: str, pairs: Callable[[str], Pair], events: list[Any]
) -> None:
    """SQLite: whatever is logged, every row and every error is MLflow's."""
    check(pairs(sqlite_uri), events)


@pytest.mark.parametrize("driver", DRIVERS)
@whatever_is_logged(10)
def test_postgresql_has_what_mlflow_writes(
    driver: str, postgres_uri: str, pairs: Callable[[str], Pair], events: list[Any]
) -> None:
    """PostgreSQL: whatever is logged, every row and every error is MLflow's."""
    check(pairs(postgres_uri.replace("psycopg2", driver)), events)


def test_many_keys_are_mlflows_rows(sqlite_uri: str, pairs: Callable[[str], Pair]) -> None:
    """A batch of more rows than a statement has, of a thousand keys, is what MLflow writes."""
    pair = pairs(sqlite_uri)
    first = [(f"key {n}", n / 7, n % 3, -n) for n in range(1000)]
    second = [(f"key {n % 1000}", n / 3, n % 5, n % 11 - 5) for n in range(1000)]
    check(pair, [first, second, ("again", 0, 30)])
