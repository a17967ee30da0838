# ruff: noqa: ARG005  the lambdas of a table have the same arguments
"""Which run a call logs to, and what a run has when it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric

import flowbuffer
from flowbuffer.dropin import known_runs
from flowbuffer.dropin.arguments import NotBuffered
from flowbuffer.dropin.buffered_run import BufferedRun
from support.backends import copy_sqlite, make_run
from support.stored import rows, stored
from support.switch import HELD, elsewhere, outcome, values


def test_nested_runs(sqlite_uri: str) -> None:
    """Points go to the run that is active, and its parents get theirs."""
    mlflow.set_tracking_uri(sqlite_uri)
    flowbuffer.enable()
    ids = []
    with mlflow.start_run() as parent:
        mlflow.log_metric("k", 1.0)
        for number in range(3):
            with mlflow.start_run(nested=True) as child:
                ids.append(child.info.run_id)
                mlflow.log_metric("k", 10.0 + number)
                mlflow.log_param("number", number)
            mlflow.log_metric("k", 2.0 + number)
            mlflow.set_tag("last", number)
    assert values(sqlite_uri, parent.info.run_id, "k") == [1.0, 2.0, 3.0, 4.0]
    assert stored(sqlite_uri, parent.info.run_id)["params"] == {}
    for number, run_id in enumerate(ids):
        found = stored(sqlite_uri, run_id)
        assert (found["params"], found["status"]) == ({"number": str(number)}, "FINISHED")
        assert found["histories"] == {"k": [(repr(10.0 + number), 0)]}


def test_a_call_without_a_run_starts_one(sqlite_uri: str) -> None:
    """As with MLflow alone, the first call starts a run if none is active."""
    mlflow.set_tracking_uri(sqlite_uri)
    flowbuffer.enable()
    mlflow.log_metric("k", 1.0)
    run = mlflow.active_run()
    assert run is not None
    mlflow.log_param("p", 1)
    mlflow.end_run()
    found = stored(sqlite_uri, run.info.run_id)
    assert (found["latest"], found["params"]) == ({"k": "1.0"}, {"p": "1"})


def test_several_tracking_uris(sqlite_template: Path, tmp_path: Path) -> None:
    """Clients of several tracking URIs in one process log each to its own store, and the fluent
    functions to the one that is set."""
    uris = [copy_sqlite(sqlite_template, tmp_path / f"{name}.db") for name in "ab"]
    ids = [make_run(uri) for uri in uris]
    flowbuffer.enable()
    for value in range(20):
        for uri, run_id in zip(uris, ids, strict=True):
            MlflowClient(uri).log_metric(run_id, uri[-4:-3], -value)
            mlflow.set_tracking_uri(uri)
            with mlflow.start_run(run_id=run_id):
                mlflow.log_metric("fluent", -value)
            if value == 10:
                mlflow.log_metric("other", 1.0, run_id=run_id)
    flowbuffer.disable()
    for uri, run_id in zip(uris, ids, strict=True):
        for key in (uri[-4:-3], "fluent"):
            assert values(uri, run_id, key) == [float(-value) for value in range(20)]
        assert set(stored(uri, run_id)["histories"]) == {uri[-4:-3], "fluent", "other"}


def test_set_tracking_uri_within_a_run(sqlite_template: Path, tmp_path: Path) -> None:
    """With another tracking URI set while a run is active, each call does what it does with MLflow
    alone: the run is unknown there; back again, it is known."""
    answers = []
    for name, on in (("stock", False), ("on", True)):
        here = copy_sqlite(sqlite_template, tmp_path / f"{name}.db")
        there = copy_sqlite(sqlite_template, tmp_path / f"{name} there.db")
        if on:
            flowbuffer.enable(linger_s=HELD)
        mlflow.set_tracking_uri(here)
        run_id = mlflow.start_run().info.run_id
        mlflow.log_metric("k", 1.0)
        mlflow.set_tracking_uri(there)
        said = [
            outcome(lambda c, r: mlflow.log_metric("k", 2.0), run_id),
            outcome(lambda c, r: mlflow.log_param("p", 2.0), run_id),
            outcome(lambda c, r: mlflow.set_tags({"t": 2.0}), run_id),
        ]
        mlflow.set_tracking_uri(here)
        mlflow.log_metric("k", 3.0)
        mlflow.end_run()
        flowbuffer.disable()
        answers.append((said, stored(here, run_id)))
    assert answers[0] == answers[1]
    assert answers[0][1]["histories"] == {"k": [("1.0", 0), ("3.0", 0)]}


ENDS: dict[str, tuple[Callable[[str], object], str]] = {
    "end_run": (lambda _: mlflow.end_run(), "FINISHED"),
    "end_run failed": (lambda _: mlflow.end_run("FAILED"), "FAILED"),
    "set_terminated": (lambda run: MlflowClient().set_terminated(run), "FINISHED"),
    "killed": (lambda run: MlflowClient().set_terminated(run, "KILLED"), "KILLED"),
}


@pytest.mark.parametrize(("end", "status"), ENDS.values(), ids=ENDS)
def test_an_ended_run_has_everything(
    run_id: str, sqlite_uri: str, end: Callable[[str], object], status: str
) -> None:
    """P7: whatever ends a run, all that was logged is stored before it is marked ended; it takes
    more afterwards, as with MLflow alone."""
    flowbuffer.enable(linger_s=HELD)
    for value in range(50):
        mlflow.log_metric("k", -value)
    mlflow.log_param("p", 1)
    mlflow.set_tag("t", 1)
    end(run_id)
    assert rows(sqlite_uri) == (50, 1, 1)
    assert elsewhere(sqlite_uri).get_run(run_id).info.status == status
    MlflowClient().log_metric(run_id, "k", 1.0)
    with pytest.raises(MlflowException, match="Changing param values"):
        MlflowClient().log_param(run_id, "p", 2)
    flowbuffer.disable()
    assert values(sqlite_uri, run_id, "k")[-1] == 1.0


def test_a_failed_block_has_everything(sqlite_uri: str) -> None:
    """P7: an exception in a with block marks the run FAILED, with all that was logged."""
    mlflow.set_tracking_uri(sqlite_uri)
    flowbuffer.enable(linger_s=HELD)

    def train() -> None:
        with mlflow.start_run():
            mlflow.log_metrics({"k": 1.0, "j": 2.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert rows(sqlite_uri) == (2, 0, 0)
    (run,) = elsewhere(sqlite_uri).search_runs(["0"])
    assert run.info.status == "FAILED"


def test_a_new_run_is_not_looked_for(sqlite_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged at once to a run that was just made costs no request to look for it; later,
    when others may have logged to it, and once it was deleted, it is looked for."""
    looked: list[str] = []
    monkeypatch.setattr(known_runs, "_NEW_FOR_S", 600.0)
    ask = known_runs._ask
    monkeypatch.setattr(
        known_runs, "_ask", lambda client, run: (looked.append(run), ask(client, run))[1]
    )
    client = MlflowClient(sqlite_uri)
    with flowbuffer.enable():
        new, old, deleted = (client.create_run("0").info.run_id for _ in range(3))
        client.log_metric(new, "loss", 1.0)
        assert looked == []
        client.delete_run(deleted)
        with pytest.raises(MlflowException, match="active"):
            client.log_metric(deleted, "loss", 1.0)
        looked.clear()
        monkeypatch.setattr(known_runs, "_NEW_FOR_S", -1.0)
        client.log_metric(old, "loss", 1.0)
        assert looked == [old]
    assert values(sqlite_uri, new, "loss") == values(sqlite_uri, old, "loss") == [1.0]


def test_delete_tag_after_set_tag(run_id: str, sqlite_uri: str) -> None:
    """A tag that is set, deleted, and set again has the last value; one that is deleted last is
    gone, and does not come back."""
    flowbuffer.enable(linger_s=HELD)
    mlflow.set_tags({"a": 1, "b": 1})
    mlflow.delete_tag("a")
    MlflowClient().delete_tag(run_id, "b")
    mlflow.set_tag("b", 2)
    flowbuffer.disable()
    assert stored(sqlite_uri, run_id)["tags"] == {"b": "2"}


@pytest.mark.parametrize("flush", [mlflow.flush_async_logging, flowbuffer.flush])
def test_flush_delivers(run_id: str, sqlite_uri: str, flush: Callable[[], object]) -> None:
    """mlflow.flush_async_logging and flowbuffer.flush return when everything is stored, however it
    was logged."""
    other = make_run(sqlite_uri)
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0)
    mlflow.log_param("p", 1, synchronous=False)
    MlflowClient().set_tag(other, "t", 1)
    flowbuffer.log_metric("k", 2.0)
    assert rows(sqlite_uri) == (0, 0, 0)
    flush()
    assert rows(sqlite_uri) == (2, 1, 1)
    assert run_id


@pytest.mark.parametrize(
    "log",
    [
        lambda run: run.log_metric("k", 1.0, 0, None),
        lambda run: run.log_metrics({"k": 1.0}, 0, None),
        lambda run: run.log_params({"p": "1"}),
        lambda run: run.set_tags({"t": "1"}),
        lambda run: run.log_batch([Metric("k", 1.0, 1, 0)], [], [], None),
    ],
    ids=["metric", "metrics", "params", "tags", "batch"],
)
def test_a_run_that_another_thread_ends_meanwhile(
    run_id: str, sqlite_uri: str, log: Callable[[BufferedRun], object]
) -> None:
    """Between the look at the run and the store its logger may be closed, by a run that ends in
    another thread: MLflow takes the call then, and nothing is raised in it."""
    logger = flowbuffer.MetricLogger(run_id, tracking_uri=sqlite_uri)
    store = MlflowClient(sqlite_uri)._tracking_client.store
    run = BufferedRun(logger, store, {}, has_models=False)
    logger.close()
    with pytest.raises(NotBuffered):
        log(run)
