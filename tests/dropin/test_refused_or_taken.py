# ruff: noqa: ARG005  the lambdas of a table have the same arguments
"""What MLflow would refuse, and what it takes: each call is made with MLflow alone, then with the
switch on as the first call of a run, and on a run that is known."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric, Param, RunTag

import flowbuffer
from support.backends import MlflowServer, make_run
from support.sampling import part_of_table
from support.stored import stored
from support.switch import HELD, Call, T, assert_as_by_mlflow, elsewhere, outcome, values
from support.waiting import PATIENCE_S

METRIC_CASES: dict[str, Call] = {
    "invalid key": lambda c, r: mlflow.log_metric("bad key?", 1.0),
    "key as path": lambda c, r: mlflow.log_metric("a/../b", 1.0),
    "no key": lambda c, r: mlflow.log_metric("", 1.0),
    "long key": lambda c, r: mlflow.log_metric("k" * 251, 1.0),
    "longest key": lambda c, r: mlflow.log_metric("k" * 250, 1.0),
    "key None": lambda c, r: mlflow.log_metric(None, 1.0),
    "key number": lambda c, r: mlflow.log_metric(1, 1.0),
    "key list": lambda c, r: mlflow.log_metric(["k"], 1.0),
    "text": lambda c, r: mlflow.log_metric("k", "text"),
    "text of a number": lambda c, r: mlflow.log_metric("k", "1.5"),
    "None": lambda c, r: mlflow.log_metric("k", None),
    "list": lambda c, r: mlflow.log_metric("k", [1.0]),
    "bool": lambda c, r: mlflow.log_metric("k", True),
    "float32": lambda c, r: mlflow.log_metric("k", np.float32(0.1)),
    "0-d array": lambda c, r: mlflow.log_metric("k", np.array(1.5)),
    "array of one": lambda c, r: mlflow.log_metric("k", np.array([1.5])),
    "array of two": lambda c, r: mlflow.log_metric("k", np.array([1.5, 2])),
    "decimal": lambda c, r: mlflow.log_metric("k", Decimal("1.5")),
    "fraction": lambda c, r: mlflow.log_metric("k", Fraction(3, 2)),
    "complex": lambda c, r: mlflow.log_metric("k", 1j),
    "huge": lambda c, r: mlflow.log_metric("k", 10**400),
    "nan": lambda c, r: mlflow.log_metric("k", float("nan")),
    "inf": lambda c, r: mlflow.log_metric("k", float("-inf")),
    "step": lambda c, r: mlflow.log_metric("k", 1.0, step=-(1 << 40)),
    "step text": lambda c, r: mlflow.log_metric("k", 1.0, step="3"),
    "step float": lambda c, r: mlflow.log_metric("k", 1.0, step=1.5),
    "step whole float": lambda c, r: mlflow.log_metric("k", 1.0, step=2.0),
    "step bool": lambda c, r: mlflow.log_metric("k", 1.0, step=True),
    "step large": lambda c, r: mlflow.log_metric("k", 1.0, step=1 << 63),
    "time": lambda c, r: mlflow.log_metric("k", 1.0, timestamp=1_234_567_890_123),
    "time 0": lambda c, r: mlflow.log_metric("k", 1.0, timestamp=0),
    "time negative": lambda c, r: mlflow.log_metric("k", 1.0, timestamp=-1),
    "time text": lambda c, r: mlflow.log_metric("k", 1.0, timestamp="now"),
    "time float": lambda c, r: mlflow.log_metric("k", 1.0, timestamp=1_234_567_890_123.0),
    "metrics": lambda c, r: mlflow.log_metrics({"a": 1, "b": np.float64(2), "c": True}, 7),
    "metrics, one bad key": lambda c, r: mlflow.log_metrics({"a": 1, "b?": 2, "c": 3}),
    "metrics, one bad value": lambda c, r: mlflow.log_metrics({"a": 1, "b": "text"}),
    "no metrics": lambda c, r: mlflow.log_metrics({}),
    "1001 metrics": lambda c, r: mlflow.log_metrics({f"k{n}": n for n in range(1001)}),
    "unknown run": lambda c, r: mlflow.log_metric("k", 1.0, run_id="0" * 32),
    "no id of a run": lambda c, r: mlflow.log_metric("k", 1.0, run_id="?"),
    "metrics, unknown run": lambda c, r: mlflow.log_metrics({"k": 1.0}, run_id="0" * 32),
    "unknown argument": lambda c, r: mlflow.log_metric("k", 1.0, unknown=1),
    "no value": lambda c, r: mlflow.log_metric("k"),
    "client": lambda c, r: c.log_metric(r, "k", 1.0, step=3),
    "client by keywords": lambda c, r: c.log_metric(
        run_id=r, key="k", value=1, timestamp=5, step=3
    ),
    "client, time 0": lambda c, r: c.log_metric(r, "k", 1.0, timestamp=0, step=None),
    "client, text": lambda c, r: c.log_metric(r, "k", "text"),
    "client, bad key": lambda c, r: c.log_metric(r, "k?", 1.0),
    "client, run None": lambda c, r: c.log_metric(None, "k", 1.0),
    "client, run number": lambda c, r: c.log_metric(7, "k", 1.0),
    "client, unknown run": lambda c, r: c.log_metric("0" * 32, "k", 1.0),
}

TEXT_CASES: dict[str, Call] = {
    "param": lambda c, r: mlflow.log_param("p", 1),
    "param None": lambda c, r: mlflow.log_param("p", None),
    "param empty": lambda c, r: mlflow.log_param("p", ""),
    "param list": lambda c, r: mlflow.log_param("p", [1, {"a": 2}]),
    "param bad key": lambda c, r: mlflow.log_param("p?", 1),
    "param key None": lambda c, r: mlflow.log_param(None, 1),
    "param long key": lambda c, r: mlflow.log_param("k" * 251, 1),
    "param longest": lambda c, r: mlflow.log_param("p", "x" * 6000),
    "param too long": lambda c, r: mlflow.log_param("p", "x" * 6001),
    "params too long": lambda c, r: mlflow.log_params({"p": "x" * 7000, "q": 1}),
    "param twice": lambda c, r: [mlflow.log_param("p", 1), mlflow.log_param("p", "1")],
    "param changed": lambda c, r: [mlflow.log_param("p", 1), mlflow.log_param("p", 2)],
    "params, one changed": lambda c, r: [
        mlflow.log_params({"p": 1, "q": 1}),
        mlflow.log_params({"o": 1, "p": 2, "r": 1}),
    ],
    "params, one bad": lambda c, r: mlflow.log_params({"p": 1, "q?": 1}),
    "params twice": lambda c, r: [mlflow.log_params({"p": 1}), mlflow.log_params({"p": 1, "q": 2})],
    "no params": lambda c, r: mlflow.log_params({}),
    "101 params": lambda c, r: mlflow.log_params({f"p{n}": n for n in range(101)}),
    "params, unknown run": lambda c, r: mlflow.log_params({"p": 1}, run_id="0" * 32),
    "tag": lambda c, r: mlflow.set_tag("t", 1),
    "tag None": lambda c, r: mlflow.set_tag("t", None),
    "tag bad key": lambda c, r: mlflow.set_tag("t?", 1),
    "tag long key": lambda c, r: mlflow.set_tag("k" * 251, 1),
    "tag too long": lambda c, r: mlflow.set_tag("t", "x" * 8001),
    "tag longest": lambda c, r: mlflow.set_tag("t", "é" * 8000),
    "tag changed": lambda c, r: [mlflow.set_tag("t", 1), mlflow.set_tag("t", 2)],
    "tags, one bad": lambda c, r: mlflow.set_tags({"t": 1, "u?": 1}),
    "no tags": lambda c, r: mlflow.set_tags({}),
    "101 tags": lambda c, r: mlflow.set_tags({f"t{n}": n for n in range(101)}),
    "run name": lambda c, r: mlflow.set_tag("mlflow.runName", "new name"),
    "run name among tags": lambda c, r: mlflow.set_tags({"t": 1, "mlflow.runName": "new name"}),
    "note": lambda c, r: mlflow.set_tag("mlflow.note.content", "*note*"),
    "client param": lambda c, r: c.log_param(r, "p", 1),
    "client param changed": lambda c, r: [c.log_param(r, "p", 1), c.log_param(r, "p", 2)],
    "client param, unknown run": lambda c, r: c.log_param("0" * 32, "p", 1),
    "client tag": lambda c, r: c.set_tag(r, "t", 1),
    "client tag, unknown run": lambda c, r: c.set_tag("0" * 32, "t", 1),
}

BATCH_CASES: dict[str, Call] = {
    "batch": lambda c, r: c.log_batch(
        r, [Metric("k", 1.0, T, 1), Metric("k", 2.0, T, 2)], [Param("p", "1")], [RunTag("t", "1")]
    ),
    "empty": lambda c, r: c.log_batch(r),
    "empty, unknown run": lambda c, r: c.log_batch("0" * 32),
    "unknown run": lambda c, r: c.log_batch("0" * 32, tags=[RunTag("t", "1")]),
    "run None": lambda c, r: c.log_batch(None, tags=[RunTag("t", "1")]),
    "equal metrics": lambda c, r: c.log_batch(r, [Metric("k", 1.0, T, 1), Metric("j", 1.0, T, 1)]),
    "1001 metrics": lambda c, r: c.log_batch(r, [Metric("k", n, T, n) for n in range(1001)]),
    "bad key": lambda c, r: c.log_batch(r, [Metric("j", 1.0, T, 1), Metric("k?", 1.0, T, 1)]),
    "bad value": lambda c, r: c.log_batch(r, [Metric("j", 1.0, T, 1), Metric("k", "x", T, 1)]),
    "no time": lambda c, r: c.log_batch(r, [Metric("k", 1.0, None, 1)]),
    "time 0": lambda c, r: c.log_batch(r, [Metric("k", 1.0, 0, 1)]),
    "time negative": lambda c, r: c.log_batch(r, [Metric("k", 1.0, -5, 1)]),
    "step None": lambda c, r: c.log_batch(r, [Metric("k", 1.0, T, None)]),
    "step text": lambda c, r: c.log_batch(r, [Metric("k", 1.0, T, "1")]),
    "param number": lambda c, r: c.log_batch(r, params=[Param("p", 1)]),
    "param None": lambda c, r: c.log_batch(r, params=[Param("p", None)]),
    "param too long": lambda c, r: c.log_batch(r, params=[Param("p", "x" * 6001)]),
    "param twice": lambda c, r: c.log_batch(r, params=[Param("p", "1"), Param("p", "1")]),
    "param conflict": lambda c, r: c.log_batch(r, params=[Param("p", "1"), Param("p", "2")]),
    "param changed": lambda c, r: [
        c.log_batch(r, params=[Param("p", "1")]),
        c.log_batch(r, [Metric("k", 1.0, T, 1)], [Param("p", "2")], [RunTag("t", "1")]),
    ],
    "101 params": lambda c, r: c.log_batch(r, params=[Param(f"p{n}", "1") for n in range(101)]),
    "101 tags": lambda c, r: c.log_batch(r, tags=[RunTag(f"t{n}", "1") for n in range(101)]),
    "tag twice": lambda c, r: c.log_batch(r, tags=[RunTag("t", "1"), RunTag("t", "2")]),
    "tag None": lambda c, r: c.log_batch(r, tags=[RunTag("t", None)]),
    "tag number": lambda c, r: c.log_batch(r, tags=[RunTag("t", 5)]),
    "tag bad": lambda c, r: c.log_batch(r, [Metric("k", 1.0, T, 1)], tags=[RunTag("t?", "5")]),
    "run name": lambda c, r: c.log_batch(r, tags=[RunTag("mlflow.runName", "new name")]),
    "tuples": lambda c, r: c.log_batch(r, (Metric("k", 1.0, T, 1),), (Param("p", "1"),), ()),
}


ALL_CASES = {"metrics": METRIC_CASES, "texts": TEXT_CASES, "batches": BATCH_CASES}


@pytest.mark.parametrize("cases", ALL_CASES.values(), ids=ALL_CASES)
def test_calls_are_refused_or_taken_as_by_mlflow(sqlite_uri: str, cases: dict[str, Call]) -> None:
    """What MLflow would refuse raises MLflow's own error, with its code and words, at the call; all
    else returns what MLflow returns; and the store has the same afterwards."""
    assert_as_by_mlflow(part_of_table(cases, 2), sqlite_uri)


#: Of each table those that a server sees differently from a file.
SERVER_CASES = {
    name: case
    for cases, names in (
        (METRIC_CASES, ("invalid key", "text", "nan", "unknown run")),
        (TEXT_CASES, ("param changed", "param too long", "params, one changed")),
        (BATCH_CASES, ("batch", "param conflict", "1001 metrics")),
    )
    for name, case in cases.items()
    if name in names
}


def test_a_server_refuses_and_takes_the_same(server_sqlite: MlflowServer) -> None:
    """So it is with a tracking server."""
    assert_as_by_mlflow(SERVER_CASES, server_sqlite.uri)


LOG_TO_RUN: dict[str, Call] = {
    "log_metric": lambda c, r: c.log_metric(r, "k", 1.0),
    "log_param": lambda c, r: c.log_param(r, "p", 1),
    "set_tag": lambda c, r: c.set_tag(r, "t", 1),
    "log_batch": lambda c, r: c.log_batch(r, [Metric("k", 1.0, T, 1)]),
    "fluent": lambda c, r: mlflow.log_metric("k", 1.0, run_id=r),
    "fluent metrics": lambda c, r: mlflow.log_metrics({"k": 1.0}, run_id=r),
    "fluent params": lambda c, r: mlflow.log_params({"k": 1.0}, run_id=r),
}


@pytest.mark.parametrize("call", LOG_TO_RUN.values(), ids=LOG_TO_RUN)
def test_a_deleted_run_refuses(sqlite_uri: str, call: Call) -> None:
    """A deleted run raises what MLflow raises, whether it was known before its deletion or not, and
    takes calls again once it is restored; what was logged before is there."""
    mlflow.set_tracking_uri(sqlite_uri)
    own = MlflowClient()
    answers = []
    for on in (False, True):
        for known in (False, True):
            run_id = make_run(sqlite_uri)
            if on:
                flowbuffer.enable(linger_s=HELD)
            if known:
                own.log_metric(run_id, "before", 1.0)
            own.delete_run(run_id)
            refused = outcome(call, run_id)
            own.restore_run(run_id)
            taken = outcome(call, run_id)
            flowbuffer.disable()
            answers.append((refused, taken, stored(sqlite_uri, run_id, without=["before"])))
            assert values(sqlite_uri, run_id, "before") == [1.0] * known
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert answers[0][0] is not None


@pytest.mark.parametrize("params", ["buffered", "stored", "of another process"])
def test_a_changed_parameter_raises(run_id: str, sqlite_uri: str, params: str) -> None:
    """Another value for a parameter raises at the call if this process has logged it, buffered or
    not, or the run had it when it was first used; the same value again is nothing new."""
    flowbuffer.enable(linger_s=HELD)
    own = MlflowClient()
    if params == "of another process":
        elsewhere(sqlite_uri).log_param(run_id, "p", 1)
    mlflow.log_metric("k", 1.0)
    if params == "buffered":
        mlflow.log_param("p", 1)
    elif params == "stored":
        mlflow.log_param("p", 1, synchronous=True)
    for call in (
        lambda: mlflow.log_param("p", 2),
        lambda: mlflow.log_params({"q": 1, "p": 2}),
        lambda: own.log_param(run_id, "p", 2),
        lambda: own.log_batch(run_id, params=[Param("p", "2")]),
        lambda: mlflow.log_param("p", 2, synchronous=False).wait(),
    ):
        with pytest.raises(MlflowException, match="Changing param values"):
            call()
    assert mlflow.log_param("p", 1) == 1
    assert mlflow.log_param("p", "1") == "1"
    mlflow.log_params({"p": 1, "r": 2})
    flowbuffer.disable()
    assert stored(sqlite_uri, run_id)["params"]["p"] == "1"
    assert stored(sqlite_uri, run_id)["params"]["r"] == "2"


@pytest.mark.parametrize("how", ["log_params", "log_batch", "log_param"])
def test_parameters_stored_synchronously_are_known(run_id: str, how: str) -> None:
    """A parameter that this process stored with synchronous=True, by any call, is known: another
    value raises at the call."""
    own = MlflowClient()
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0)
    if how == "log_params":
        mlflow.log_params({"p": 1}, synchronous=True)
    elif how == "log_batch":
        own.log_batch(run_id, params=[Param("p", "1")], synchronous=True)
    else:
        own.log_param(run_id, "p", 1, synchronous=True)
    with pytest.raises(MlflowException, match="Changing param values"):
        mlflow.log_param("p", 2)
    mlflow.log_param("p", 1)
    assert flowbuffer.flush(PATIENCE_S).rejected == 0


def test_a_resumed_run_knows_its_parameters(sqlite_uri: str) -> None:
    """A run that another process has logged parameters to, resumed here, refuses other values at
    the call."""
    mlflow.set_tracking_uri(sqlite_uri)
    run_id = make_run(sqlite_uri)
    elsewhere(sqlite_uri).log_param(run_id, "p", 1)
    elsewhere(sqlite_uri).set_terminated(run_id)
    flowbuffer.enable(linger_s=HELD)
    with mlflow.start_run(run_id=run_id):
        with pytest.raises(MlflowException, match="Changing param values"):
            mlflow.log_param("p", 2)
        mlflow.log_param("p", 1)
        mlflow.log_param("q", 3)
    assert stored(sqlite_uri, run_id)["params"] == {"p": "1", "q": "3"}
