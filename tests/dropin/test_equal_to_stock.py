# ruff: noqa: ARG005  the calls of a table have the same arguments
"""With the switch on a call does what it does with MLflow alone, whatever it is given: it returns
or raises the same, and the store has the same afterwards."""

from __future__ import annotations

import enum
from collections import ChainMap, OrderedDict, UserDict, defaultdict
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType, SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

import flowbuffer
from support.backends import MlflowServer
from support.sampling import part_of_table
from support.switch import HELD, Call, T, assert_as_by_mlflow


class Name(str, enum.Enum):
    LOSS = "loss"


class Text(str):
    __slots__ = ()


class Loud(str):
    __slots__ = ()

    def __str__(self) -> str:
        return self.upper()


class OwnMetric(Metric):  # type: ignore[misc]
    @property
    def value(self) -> float:
        return 2 * super().value  # type: ignore[no-any-return]


class Tensor:
    """As a 0-d tensor of any framework."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value


class Cursed:
    def __float__(self) -> float:
        raise RuntimeError("no")

    def __str__(self) -> str:
        raise RuntimeError("no")


def half_of(entities: list[Any]) -> Iterator[Any]:
    yield entities[0]
    raise LookupError("the other half")


def metrics(count: int = 3) -> list[Metric]:
    return [Metric("m", float(n), T + n, n) for n in range(count)]


def params(count: int = 3) -> list[Param]:
    return [Param(f"p{n}", str(n)) for n in range(count)]


def tags(count: int = 3) -> list[RunTag]:
    return [RunTag(f"t{n}", str(n)) for n in range(count)]


def array_of(entities: list[Any]) -> Any:
    found = np.empty(len(entities), dtype=object)
    found[:] = entities
    return found


def changed_afterwards(client: MlflowClient, run_id: str) -> None:
    given = metrics(), params(), tags()
    client.log_batch(run_id, *given)
    for one in given:
        one.clear()
    logged = {"a": 1.0}
    mlflow.log_metrics(logged)
    logged["b"] = 2.0


def refused_again(client: MlflowClient, run_id: str, params: Any) -> None:
    """A parameter that MLflow itself has stored is known."""
    client.log_batch(run_id, params=params)
    mlflow.log_param("p0", "another")


KEYS: dict[str, Call] = {
    f"{name} as {what}": call
    for name, key in {
        "enum": Name.LOSS,
        "text": Text("loss"),
        "loud": Loud("loss"),
        "numpy": np.str_("loss"),
        "bytes": b"loss",
        "tuple": ("loss",),
        "number": 5,
        "float": 1.5,
        "none": None,
    }.items()
    for what, call in {
        "key": lambda c, r, key=key: mlflow.log_metric(key, 1.0),
        "client's key": lambda c, r, key=key: c.log_metric(r, key, 1.0),
        "known key": lambda c, r, key=key: [
            mlflow.log_metric("loss", 1.0),
            mlflow.log_metric(key, 2.0, step=1),
        ],
        "key of metrics": lambda c, r, key=key: mlflow.log_metrics({"a": 1.0, key: 1.0}),
        "key in a batch": lambda c, r, key=key: c.log_batch(r, [Metric(key, 1.0, T, 0)]),
        "param's key": lambda c, r, key=key: mlflow.log_param(key, 1),
        "param's value": lambda c, r, key=key: mlflow.log_param("p", key),
        "params in a batch": lambda c, r, key=key: c.log_batch(r, params=[Param(key, key)]),
        "tag": lambda c, r, key=key: mlflow.set_tag(key, 1),
        "tag's value": lambda c, r, key=key: mlflow.set_tag("t", key),
        "tags": lambda c, r, key=key: mlflow.set_tags({"a": 1, key: key}),
        "tags in a batch": lambda c, r, key=key: c.log_batch(r, tags=[RunTag("t", key)]),
        "run": lambda c, r, key=key: (
            c.log_metric(type(key)(r) if key == "loss" else key, "k", 1.0)
            if type(key) is not Name
            else None
        ),
    }.items()
}

VALUES: dict[str, Call] = {
    f"{name} as {what}": call
    for name, value in {
        "tensor": Tensor(1.5),
        "0-d": np.array(1.5),
        "1-d": np.array([1.5]),
        "two": np.array([1.5, 2.5]),
        "float16": np.float16(1.5),
        "uint8": np.uint8(200),
        "bool": True,
        "numpy bool": np.bool_(True),
        "decimal": Decimal("0.1"),
        "fraction": Fraction(1, 3),
        "series": pd.Series([1.5]),
        "text": "1.5",
        "no number": "abc",
        "numpy text": np.str_("1.5"),
        "bytes": b"1.5",
        "huge": 10**400,
        "large": 2**80,
        "complex": 1j,
        "cursed": Cursed(),
        "object": object(),
        "nan": float("nan"),
    }.items()
    for what, call in {
        "value": lambda c, r, value=value: mlflow.log_metric("k", value),
        "client's value": lambda c, r, value=value: c.log_metric(r, "k", value, T, 1),
        "value of metrics": lambda c, r, value=value: mlflow.log_metrics({"a": 1, "k": value}),
        "value in a batch": lambda c, r, value=value: c.log_batch(
            r, [Metric("a", 1.0, T, 0), Metric("k", value, T, 0)]
        ),
    }.items()
}

INTEGERS: dict[str, Call] = {
    f"{name} as {what}": call
    for name, number in {
        "bool": True,
        "float": 2.0,
        "half": 2.5,
        "nan": float("nan"),
        "text": "2",
        "decimal": Decimal(2),
        "huge": 1 << 63,
        "least": -(1 << 63),
        "negative": -1,
        "none": None,
        "list": [2],
    }.items()
    for what, call in {
        "step": lambda c, r, number=number: mlflow.log_metric("k", 1.0, step=number),
        "step of a known key": lambda c, r, number=number: [
            mlflow.log_metric("k", 1.0),
            mlflow.log_metric("k", 2.0, step=number),
        ],
        "client's step": lambda c, r, number=number: c.log_metric(r, "k", 1.0, T, number),
        "step of metrics": lambda c, r, number=number: mlflow.log_metrics({"k": 1.0}, number),
        "step in a batch": lambda c, r, number=number: c.log_batch(
            r, [Metric("k", 1.0, T, number)]
        ),
        "time": lambda c, r, number=number: c.log_metric(r, "k", 1.0, number),
        "time in a batch": lambda c, r, number=number: c.log_batch(
            r, [Metric("k", 1.0, number, 1)]
        ),
    }.items()
}

SEQUENCES: dict[str, Call] = {
    f"{shape} of {kind}": call
    for shape, shaped in {
        "tuple": tuple,
        "array": array_of,
        "series": pd.Series,
        "generator": iter,
        "view": lambda entities: dict(enumerate(entities)).values(),
        "iterator that raises": half_of,
        "nothing": lambda entities: (),
        "none": lambda entities: None,
        "text": lambda entities: "ab",
        "number": lambda entities: 5,
        "mapping": lambda entities: dict(enumerate(entities)),
        "strangers": lambda entities: [SimpleNamespace(key="k", value="1")],
        "halves": lambda entities: [entities[0], object()],
    }.items()
    for kind, call in {
        "metrics": lambda c, r, shaped=shaped: c.log_batch(r, shaped(metrics())),
        "params": lambda c, r, shaped=shaped: c.log_batch(r, params=shaped(params())),
        "tags": lambda c, r, shaped=shaped: c.log_batch(r, tags=shaped(tags())),
        "all": lambda c, r, shaped=shaped: c.log_batch(
            r, shaped(metrics()), shaped(params()), shaped(tags())
        ),
        "params, again": lambda c, r, shaped=shaped: refused_again(c, r, shaped(params())),
    }.items()
}

MAPPINGS: dict[str, Call] = {
    f"{shape} of {kind}": call
    for shape, shaped in {
        "ordered": OrderedDict,
        "default": lambda items: defaultdict(float, items),
        "user": UserDict,
        "chain": lambda items: ChainMap({}, dict(items)),
        "proxy": MappingProxyType,
        "series": pd.Series,
        "list": lambda items: list(items.items()),
        "keys": lambda items: items.keys(),
        "none": lambda items: None,
    }.items()
    for kind, call in {
        "metrics": lambda c, r, shaped=shaped: mlflow.log_metrics(shaped({"a": 1.0, "b": 2.0})),
        "params": lambda c, r, shaped=shaped: mlflow.log_params(shaped({"a": 1.0, "b": 2.0})),
        "tags": lambda c, r, shaped=shaped: mlflow.set_tags(shaped({"a": 1.0, "b": 2.0})),
    }.items()
}

OTHERS: dict[str, Call] = {
    "own metrics": lambda c, r: c.log_batch(r, [OwnMetric("k", 1.0, T, 0)]),
    "changed afterwards": changed_afterwards,
    "by keywords": lambda c, r: c.log_batch(
        tags=tags(1), run_id=r, params=params(1), metrics=metrics(1)
    ),
    "a mixture": lambda c, r: c.log_batch(r, metrics(1), tags=tags(1)),
    "an argument twice": lambda c, r: c.log_batch(r, [], metrics=[]),
    "an unknown argument": lambda c, r: c.log_batch(r, metric=[]),
    "no run": lambda c, r: c.log_batch(metrics=metrics()),
    "1500 metrics, 250 params, 250 tags": lambda c, r: c.log_batch(
        r, [Metric(f"m{n}", 1.0, T, 0) for n in range(1500)], params(250), tags(250)
    ),
    "a conflict among many": lambda c, r: [
        c.log_param(r, "p120", "another"),
        c.log_batch(r, [], params(150)),
    ],
    "surrogates": lambda c, r: mlflow.log_param("p", "\ud800"),
    "a null character": lambda c, r: mlflow.set_tag("t", "a\0b"),
    "a dataset by halves": lambda c, r: c.log_metric(r, "k", 1.0, dataset_name="d"),
}

TABLES = {
    "keys": KEYS,
    "values": VALUES,
    "integers": INTEGERS,
    "sequences": SEQUENCES,
    "mappings": MAPPINGS,
    "others": OTHERS,
}


@pytest.mark.timeout(600)  # some hundred runs
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_calls_on_a_database(sqlite_uri: str, table: dict[str, Call]) -> None:
    """Each call does on a SQLite store what it does with MLflow alone."""
    assert_as_by_mlflow(part_of_table(table, 3), sqlite_uri)


#: What MLflow's client for servers takes otherwise than its databases do.
SERVER_TABLES = {"keys": KEYS, "integers": INTEGERS}


@pytest.mark.timeout(600)  # some hundred runs
@pytest.mark.parametrize("table", SERVER_TABLES.values(), ids=SERVER_TABLES)
def test_calls_on_a_server(server_sqlite: MlflowServer, table: dict[str, Call]) -> None:
    """So does each call on a tracking server."""
    assert_as_by_mlflow(part_of_table(table, 4), server_sqlite.uri, known_only=True)


NUMPY_INTEGERS: dict[str, Call] = {
    "step": lambda c, r: mlflow.log_metric("k", 1.0, step=np.int64(3)),
    "client's step": lambda c, r: c.log_metric(r, "k", 1.0, step=np.int32(3)),
    "step in a batch": lambda c, r: c.log_batch(r, [Metric("k", 1.0, T, np.uint8(3))]),
}


@pytest.mark.parametrize("call", NUMPY_INTEGERS.values(), ids=NUMPY_INTEGERS)
def test_a_numpy_integer_is_the_integer_that_it_is(sqlite_uri: str, call: Call) -> None:
    """Steps that are NumPy's are stored as on a server, where MLflow's own SQLite store writes
    their bytes, which nothing can read again."""
    mlflow.set_tracking_uri(sqlite_uri)
    flowbuffer.enable(linger_s=HELD)
    with mlflow.start_run() as run:
        call(MlflowClient(), run.info.run_id)
    (point,) = MlflowClient().get_metric_history(run.info.run_id, "k")
    assert (point.step, type(point.step)) == (3, int)
