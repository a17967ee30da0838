"""Which requests a server stores in bulk: what MLflow would certainly take, and as it would."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow.server.handlers as handlers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.protos.service_pb2 import LogBatch
from mlflow.tracking._tracking_service.utils import _get_store
from mlflow.utils.proto_json_utils import parse_dict

from flowbuffer.server.body import Batch, batch_of
from flowbuffer.server.switch import enable
from flowbuffer.server.way import Way
from flowbuffer.sql.store import checked
from support.backends import make_run
from support.tables import tables

STOCK = handlers.HANDLERS[LogBatch]
GOOD = {"key": "a", "value": 0.5, "timestamp": 1, "step": 2}

VALUES = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "nan", "inf", "1.5", ""]),
    st.sampled_from([None, True, [], 2**70, 10**400]),
)
WHOLES = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.sampled_from([2**63, -(2**70), 1.0, 1.5, "1", None, True])
)
METRICS = st.fixed_dictionaries(
    {"key": st.one_of(st.sampled_from(["a", "b", ""]), st.none()), "value": VALUES},
    optional={"timestamp": WHOLES, "step": WHOLES, "model_id": st.just("m"), "runId": st.just("")},
)
PLAIN = st.fixed_dictionaries(
    {"key": st.text(), "value": VALUES, "timestamp": WHOLES, "step": WHOLES}
)


def fits(number: int) -> bool:
    """Whether it has 64 bits."""
    return -(2**63) <= number < 2**63


def exact(batch: Batch) -> list[tuple[Any, ...]]:
    """Its metrics, told apart to the bit."""
    columns = (batch.names, map(float.hex, batch.values), batch.times, batch.steps)
    return [*zip(*columns, strict=True)]


@given(st.lists(st.one_of(PLAIN, METRICS), max_size=3))
def test_what_is_plain_is_what_protobuf_makes_of_it(metrics: list[Any]) -> None:
    """Whatever is taken past protobuf is what protobuf would have made of it, to the bit, and it
    would have taken it."""
    body = json.loads(json.dumps({"run_id": "r", "metrics": metrics}))
    batch = batch_of(body)
    if batch is not None and all(fits(n) for n in (*batch.times, *batch.steps)):
        parse_dict(body, message := LogBatch())
        made = message.metrics
        assert exact(batch) == [(m.key, m.value.hex(), m.timestamp, m.step) for m in made]
    elif batch is not None:
        assert checked(*batch) is None


def test_what_clients_send_is_plain() -> None:
    """A client's batch of metrics is taken, with NaN and the infinities as it sends them."""
    values = [0.5, 3, "NaN", "Infinity", "-Infinity", -0.0]
    body = {"run_id": "r", "metrics": [{**GOOD, "value": value} for value in values]}
    for more in ({}, {"params": [], "tags": []}):
        batch = batch_of(body | more)
        assert batch is not None
        assert list(map(repr, batch.values)) == ["0.5", "3.0", "nan", "inf", "-inf", "-0.0"]
        assert (*batch.times, *batch.steps) == (1,) * 6 + (2,) * 6


MLFLOWS = {
    "no object": [],
    "a text": json.dumps({"run_id": "r", "metrics": [GOOD]}),
    "nothing": {},
    "no run": {"metrics": [GOOD]},
    "the other name of a run": {"runId": "r", "metrics": [GOOD]},
    "no metrics": {"run_id": "r", "metrics": []},
    "metrics that are none": {"run_id": "r", "metrics": [1]},
    "a key more": {"run_id": "r", "metrics": [{**GOOD, "model_id": "m"}]},
    "a key less": {"run_id": "r", "metrics": [{"key": "a", "value": 1.0, "timestamp": 1}]},
    "a value in words": {"run_id": "r", "metrics": [{**GOOD, "value": "much"}]},
    "NaN as a number": {"run_id": "r", "metrics": [{**GOOD, "value": math.nan}]},
    "a yes": {"run_id": "r", "metrics": [{**GOOD, "value": True}]},
    "a text for a step": {"run_id": "r", "metrics": [{**GOOD, "step": "2"}]},
    "a parameter beside": {"run_id": "r", "metrics": [GOOD], "params": [{"key": "p"}]},
    "a tag beside": {"run_id": "r", "metrics": [GOOD], "tags": [{"key": "t"}]},
    "no list of tags": {"run_id": "r", "metrics": [GOOD], "tags": None},
    "a field that nobody knows": {"run_id": "r", "metrics": [GOOD], "more": 1},
    "more than MLflow takes": {"run_id": "r", "metrics": [GOOD] * 1001},
}


@pytest.mark.parametrize("name", MLFLOWS)
def test_what_is_not_plain_is_left_to_mlflow(name: str) -> None:
    """A body that MLflow would refuse, or may, or would do more with, is left to its own code."""
    assert batch_of(MLFLOWS[name]) is None


# The store.


def batch(run_id: str, name: str = "a") -> Batch:
    return Batch(run_id, [name] * 3, [0.5, 1.5, 2.5], [1, 2, 3], [4, 5, 6])


@pytest.mark.parametrize("name", ["", "a\nb", "../a", "x" * 251])
def test_a_name_that_mlflow_refuses_is_left_to_it(name: str, sqlite_uri: str) -> None:
    """A metric that MLflow's store would refuse is not stored in bulk, and neither is its batch."""
    store, run_id = _get_store(sqlite_uri), make_run(sqlite_uri)
    way = Way(STOCK)
    assert way.log(store, batch(run_id))
    assert not way.log(store, batch(run_id, name))
    assert len(tables(store.engine, run_id)["metrics"]) == 3


def test_a_view_that_does_more_is_mlflows(sqlite_uri: str) -> None:
    """Where MLflow's view, or its store's log_batch, calls what is not known, or somebody replaced
    it, every batch goes MLflow's own way, and the reason is said."""
    store = _get_store(sqlite_uri)

    def view_of(file: str) -> Any:
        space: dict[str, Any] = {}
        code = "def _log_batch(): return _count(_get_tracking_store())"
        exec(compile(code, file, "exec"), space)
        return space["_log_batch"]

    newer = Way(view_of(handlers.__file__))
    assert newer.why_not(store) == "MLflow's _log_batch is new to it (_count)"
    assert not newer.log(store, batch(make_run(sqlite_uri)))
    assert Way(view_of("elsewhere.py")).why_not(store) == "somebody replaced its view"
    assert Way(STOCK).why_not(store) == ""


@pytest.mark.parametrize("name", ["initialize_backend_stores", "LogBatch"])
def test_a_server_made_otherwise_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where MLflow's server lacks a name that is used, it keeps its view, and that is said."""
    monkeypatch.delattr(handlers, name)
    enable()
    assert handlers.HANDLERS[LogBatch] is STOCK
    assert "MLflow's own way: this MLflow is new to it" in capsys.readouterr().err


def test_a_database_that_is_away_is_asked_again(sqlite_uri: str, tmp_path: Path) -> None:
    """Where the database does not answer, that batch is MLflow's, and the next one is looked at
    anew."""
    store, run_id, way = _get_store(sqlite_uri), make_run(sqlite_uri), Way(STOCK)
    file = Path(sqlite_uri.removeprefix("sqlite:///"))
    store.engine.dispose()
    file.rename(tmp_path / "elsewhere")
    file.mkdir()
    assert way.why_not(store) == "its database does not answer (OperationalError)"
    file.rmdir()
    (tmp_path / "elsewhere").rename(file)
    assert way.log(store, batch(run_id))


# Workspaces.


@pytest.fixture
def in_workspace(sqlite_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store with workspaces, and what puts a request into one."""
    if find_spec("mlflow.store.tracking.sqlalchemy_workspace_store") is None:
        pytest.skip("this MLflow has no workspaces")
    from mlflow.store.tracking.sqlalchemy_workspace_store import WorkspaceAwareSqlAlchemyStore
    from mlflow.utils.workspace_context import WorkspaceContext

    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    store = WorkspaceAwareSqlAlchemyStore(sqlite_uri, "artifacts")
    yield store, WorkspaceContext
    store.engine.dispose()


def test_a_run_of_another_workspace_is_not_found(in_workspace: Any) -> None:
    """With workspaces, too, batches are stored in bulk, and a run of another workspace is not
    there: the error is MLflow's, and nothing is stored."""
    store, workspace = in_workspace
    way = Way(STOCK)
    with workspace("default"):
        run_id = store.create_run("0", "somebody", 1, [], "run").info.run_id
        assert way.why_not(store) == ""
        assert way.log(store, batch(run_id))
    said = []
    for log in (lambda: way.log(store, batch(run_id)), lambda: store.log_batch(run_id, [], [], [])):
        with workspace("other"), pytest.raises(MlflowException) as refused:
            log()
        said.append((refused.value.error_code, str(refused.value)))
    assert said[0] == said[1]
    assert said[0][0] == "RESOURCE_DOES_NOT_EXIST"
    assert len(tables(store.engine, run_id)["metrics"]) == 3


def test_a_store_for_workspaces_that_does_more_is_left_to_mlflow(
    in_workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store for workspaces that does another step in its own way is not written in bulk."""
    store, _ = in_workspace
    monkeypatch.setattr(type(store), "_get_run", lambda *_, **__: None, raising=False)
    assert "WorkspaceAwareSqlAlchemyStore, and not" in Way(STOCK).why_not(store)
