"""A wrapper or a mock that somebody puts on MLflow's calls sees with the switch on what it sees
with MLflow alone, what it does takes effect, and afterwards calls are buffered again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import fluent
from mlflow.tracking._tracking_service import utils
from mlflow.tracking._tracking_service.client import TrackingServiceClient
from mlflow.utils.autologging_utils.client import MlflowAutologgingQueueingClient

import flowbuffer
from support.backends import make_run
from support.stored import rows
from support.switch import HELD, T


def log_all(run_id: str) -> None:
    """Each kind of call once."""
    own = MlflowClient()
    mlflow.log_metric("a", 1.0, step=1)
    mlflow.log_metrics({"b": 1.0}, step=1)
    mlflow.log_param("p", 1)
    mlflow.log_params({"q": 1})
    mlflow.set_tag("t", 1)
    mlflow.set_tags({"u": 1})
    own.log_metric(run_id, "c", 1.0, step=1)
    own.log_param(run_id, "r", 1)
    own.set_tag(run_id, "v", 1)
    own.log_batch(run_id, [Metric("d", 1.0, T, 1)])


PLACES: dict[str, tuple[Any, str]] = {
    f"{owner.__name__}.{name}": (owner, name)
    for owner in (MlflowClient, TrackingServiceClient)
    for name in ("log_metric", "log_param", "set_tag", "log_batch")
}


def counting(owner: Any, name: str, calls: list[str]) -> Callable[..., Any]:
    """A wrapper that looks like what it wraps."""
    original = getattr(owner, name)

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), PLACES.values(), ids=PLACES)
def test_a_wrapper_sees_each_call(sqlite_uri: str, owner: Any, name: str, before: bool) -> None:
    """A wrapper is called as often as with MLflow alone, put there before or after the switch is
    on; what delivery does is not shown to it. Taken away again, calls are buffered."""
    mlflow.set_tracking_uri(sqlite_uri)
    seen: list[list[str]] = []
    for on in (False, True):
        calls: list[str] = []
        with mlflow.start_run() as run:
            log_all(run.info.run_id)
        with mlflow.start_run() as run:
            if on and not before:
                flowbuffer.enable(delivery="thread")
                mlflow.log_metric("known", 1.0)
            with mock.patch.object(owner, name, counting(owner, name, calls)):
                if on and before:
                    flowbuffer.enable(delivery="thread")
                log_all(run.info.run_id)
                found = len(calls)
                if owner is not SqlAlchemyStore:
                    mlflow.get_run(run.info.run_id)
                    assert len(calls) == found
        seen.append(calls)
        flowbuffer.disable()
    assert seen[0] == seen[1]
    assert seen[0]
    flowbuffer.enable(linger_s=HELD)
    before_rows = rows(sqlite_uri)
    with mlflow.start_run() as run:
        log_all(run.info.run_id)
        assert rows(sqlite_uri) == before_rows


def test_a_wrapper_that_changes_things(sqlite_uri: str) -> None:
    """What a wrapper makes of a call is stored, and nothing else is changed by it."""
    mlflow.set_tracking_uri(sqlite_uri)
    real = MlflowClient.log_batch

    def prefixed(self: Any, run_id: str, metrics: Any = (), *args: Any, **kwargs: Any) -> Any:
        metrics = [Metric(f"pre/{m.key}", m.value, m.timestamp, m.step) for m in metrics]
        return real(self, run_id, metrics, *args, **kwargs)

    for earlier in (True, False):
        if earlier:
            flowbuffer.enable()
        real = MlflowClient.log_batch
        with mock.patch.object(MlflowClient, "log_batch", prefixed):
            flowbuffer.enable()
            with mlflow.start_run() as run:
                mlflow.log_metrics({"a": 1.0})
                mlflow.log_metric("b", 1.0)
            assert set(mlflow.get_run(run.info.run_id).data.metrics) == {"pre/a", "b"}
        flowbuffer.disable()


MOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autospec": lambda: mock.patch.object(MlflowClient, "log_metric", autospec=True),
    "the client's class": lambda: mock.patch.object(fluent, "MlflowClient", autospec=True),
    "the service": lambda: mock.patch.object(TrackingServiceClient, "log_metric"),
    "the service's class": lambda: mock.patch("mlflow.tracking.client.TrackingServiceClient"),
    "the store": lambda: mock.patch.object(SqlAlchemyStore, "log_metric"),
    "whoever makes stores": lambda: mock.patch.object(utils, "_get_store"),
}


@pytest.mark.parametrize("make", MOCKS.values(), ids=MOCKS)
def test_a_mock_takes_the_call(
    sqlite_uri: str, make: Callable[[], AbstractContextManager[Any]]
) -> None:
    """What a mock took is not logged; after it, calls are buffered again."""
    mlflow.set_tracking_uri(sqlite_uri)
    flowbuffer.enable(linger_s=HELD)
    with mlflow.start_run() as run:
        mlflow.log_metric("k", 1.0)
        with make():
            mlflow.log_metric("k", 2.0)
        mlflow.log_metric("k", 3.0)
        before = rows(sqlite_uri)
        mlflow.log_metric("buffered", 1.0)
        assert rows(sqlite_uri) == before
        history = MlflowClient().get_metric_history(run.info.run_id, "k")
        assert [point.value for point in history] == [1.0, 3.0]


def test_a_store_of_ones_own(sqlite_uri: str) -> None:
    """A method that is put on the one store, not on its class."""
    mlflow.set_tracking_uri(sqlite_uri)
    store = MlflowClient()._tracking_client.store
    flowbuffer.enable(linger_s=HELD)
    with mlflow.start_run():
        mlflow.log_metric("k", 1.0)
        with mock.patch.object(store, "log_metric", wraps=store.log_metric) as wrapper:
            mlflow.log_metric("k", 2.0)
        assert wrapper.call_count == 1
        mlflow.log_metric("k", 3.0)
        assert rows(sqlite_uri)[0] == 2


def test_a_partial_that_was_taken_before(sqlite_uri: str) -> None:
    """A partial of a method, taken before the switch was on, is MLflow's own."""
    mlflow.set_tracking_uri(sqlite_uri)
    run_id = make_run(sqlite_uri)
    log = partial(MlflowClient().log_metric, run_id, "k", step=1)
    flowbuffer.enable(linger_s=HELD)
    MlflowClient().log_metric(run_id, "k", 1.0)
    log(2.0)
    assert rows(sqlite_uri)[0] == 1
    flowbuffer.disable()
    history = MlflowClient().get_metric_history(run_id, "k")
    assert sorted(point.value for point in history) == [1.0, 2.0]


# What MLflow's own tests of its client for autologging do.


@pytest.mark.parametrize("synchronous", [True, False])
def test_the_client_of_autologging(sqlite_uri: str, synchronous: bool) -> None:
    """A mock on log_batch that goes on to the method that was there is called once for each batch
    of the program."""
    mlflow.set_tracking_uri(sqlite_uri)
    flowbuffer.enable(delivery="thread")
    original = MlflowClient().log_batch
    with (
        mock.patch.object(MlflowClient, "log_batch", side_effect=original) as batches,
        mlflow.start_run() as run,
    ):
        own = MlflowAutologgingQueueingClient()
        own.log_params(run_id=run.info.run_id, params={"a": "b"})
        own.flush(synchronous=synchronous).await_completion()
        assert mlflow.get_run(run.info.run_id).data.params == {"a": "b"}
        assert batches.call_count == 1


def test_the_client_of_autologging_fails(sqlite_uri: str) -> None:
    """A mock that fails makes the call fail, and nothing is stored."""
    mlflow.set_tracking_uri(sqlite_uri)
    flowbuffer.enable(delivery="thread")
    own = MlflowAutologgingQueueingClient()
    pending = own.create_run(experiment_id="0")
    own.log_metrics(run_id=pending, metrics={"a": 1})
    own.set_terminated(run_id=pending, status="KILLED")
    failing = mock.patch.object(MlflowClient, "log_batch", side_effect=ValueError("no"))
    with failing, pytest.raises(mlflow.MlflowException, match="no"):
        own.flush()
    (run,) = mlflow.search_runs(["0"], output_format="list")
    assert (run.info.status, run.data.metrics) == ("KILLED", {})


MOCKED: dict[str, tuple[str, Callable[[], object]]] = {
    "log_metric": ("log_metric", lambda: mlflow.log_metric("k", 1.0)),
    "log_metrics": ("log_batch", lambda: mlflow.log_metrics({"k": 1.0})),
    "log_param": ("log_param", lambda: mlflow.log_param("p", 1)),
    "log_params": ("log_batch", lambda: mlflow.log_params({"p": 1})),
    "set_tag": ("set_tag", lambda: mlflow.set_tag("t", 1)),
    "set_tags": ("log_batch", lambda: mlflow.set_tags({"t": 1})),
}


@pytest.mark.parametrize("known", [False, True], ids=["first call", "known run"])
@pytest.mark.parametrize(("method", "call"), MOCKED.values(), ids=MOCKED)
def test_what_others_put_in_place_is_called(
    run_id: str, sqlite_uri: str, method: str, call: Callable[[], object], known: bool
) -> None:
    """A test's mock in the place of a client's method, or of the client itself, is called as with
    MLflow alone, with the same arguments, and nothing else is stored."""
    with mock.patch.object(MlflowClient, method) as stock:
        call()
    flowbuffer.enable(linger_s=HELD)
    if known:
        mlflow.log_metric("known", 1.0)
    with mock.patch.object(MlflowClient, method) as mocked:
        call()
    with mock.patch.object(fluent, "MlflowClient") as whole:
        call()
    flowbuffer.disable()
    assert rows(sqlite_uri) == (int(known), 0, 0)
    for found in (mocked, getattr(whole.return_value, method)):
        assert len(found.call_args_list) == 1
        told, expected = found.call_args.kwargs, stock.call_args.kwargs
        assert told.keys() == expected.keys()
        assert told["synchronous"] is expected["synchronous"]
    assert run_id


def test_a_function_in_the_place_of_a_method(run_id: str, sqlite_uri: str) -> None:
    """A plain function that took the place of a client's method is called, too."""
    calls: list[Any] = []
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("known", 1.0)
    with mock.patch.object(MlflowClient, "log_metric", lambda *_, **kwargs: calls.append(kwargs)):
        mlflow.log_metric("k", 1.0)
    assert [call["synchronous"] for call in calls] == [True]
    # MLflow 3.1 reads the run before it logs, and what was logged is there by then.
    reads = "run_id" in inspect.signature(fluent._get_model_ids_for_new_metric_if_exist).parameters
    assert rows(sqlite_uri) == (int(reads), 0, 0)
    assert run_id


@pytest.mark.usefixtures("run_id")
def test_what_others_put_in_place_stays(sqlite_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """disable leaves alone what somebody else has put in the place of ours; ours, put back by them
    afterwards, is MLflow's own."""
    monkeypatch.setattr(MlflowClient, "log_metric", MlflowClient.log_metric)  # taken back
    flowbuffer.enable(linger_s=HELD)
    with mock.patch.object(MlflowClient, "log_metric") as mocked:
        flowbuffer.disable()
        assert MlflowClient.log_metric is mocked
    assert not hasattr(MlflowClient.log_batch, "flowbuffers")
    assert hasattr(MlflowClient.log_metric, "flowbuffers")
    mlflow.log_metric("k", 1.0)
    assert rows(sqlite_uri) == (1, 0, 0)
    assert not Path("spool").exists()


def test_a_subclass_of_the_client(run_id: str, sqlite_uri: str) -> None:
    """A client of one's own class is buffered, too, and its own methods are called."""

    class Own(MlflowClient):  # type: ignore[misc]
        called = 0

        def log_metric(self, *args: Any, **kwargs: Any) -> Any:
            Own.called += 1
            return super().log_metric(*args, **kwargs)

    flowbuffer.enable(linger_s=HELD)
    own = Own()
    for value in range(3):
        own.log_metric(run_id, "k", value, step=value)
    own.log_param(run_id, "p", 1)
    assert (Own.called, rows(sqlite_uri)) == (3, (0, 0, 0))
    flowbuffer.disable()
    assert rows(sqlite_uri) == (3, 1, 0)
