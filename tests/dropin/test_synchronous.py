"""What ``synchronous=`` asks for, and MLflow's own settings of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric
from mlflow.utils.async_logging.run_operations import RunOperations

import flowbuffer
from flowbuffer.commands import cli
from support.backends import make_run
from support.listening import listening
from support.stored import rows
from support.switch import HELD, elsewhere, values
from support.waiting import PATIENCE_S

SYNCHRONOUS: dict[str, Callable[[str, Any], object]] = {
    "log_metric": lambda _, flag: mlflow.log_metric("k", 1.0, synchronous=flag),
    "log_metrics": lambda _, flag: mlflow.log_metrics({"k": 1.0}, synchronous=flag),
    "log_param": lambda _, flag: mlflow.log_param("p", 1, synchronous=flag),
    "log_params": lambda _, flag: mlflow.log_params({"p": 1}, synchronous=flag),
    "set_tag": lambda _, flag: mlflow.set_tag("t", 1, synchronous=flag),
    "set_tags": lambda _, flag: mlflow.set_tags({"t": 1}, synchronous=flag),
    "client.log_metric": lambda run, flag: MlflowClient().log_metric(
        run, "k", 1.0, synchronous=flag
    ),
    "client.log_param": lambda run, flag: MlflowClient().log_param(run, "p", 1, synchronous=flag),
    "client.set_tag": lambda run, flag: MlflowClient().set_tag(run, "t", 1, synchronous=flag),
    "client.log_batch": lambda run, flag: MlflowClient().log_batch(
        run, [Metric("k", 1.0, 1_700_000_000_000, 0)], synchronous=flag
    ),
}


@pytest.mark.parametrize("call", SYNCHRONOUS.values(), ids=SYNCHRONOUS)
def test_synchronous_returns_when_it_is_stored(
    run_id: str, sqlite_uri: str, call: Callable[[str, Any], object]
) -> None:
    """synchronous=True returns when the value is stored, with what MLflow returns, and what the
    thread had logged before is stored then, too."""
    expected = call(make_run(sqlite_uri), True) if "client" in repr(call) else None
    flowbuffer.enable(linger_s=HELD)
    for known in (False, True):
        mlflow.log_metric("before", float(known))
        count = sum(rows(sqlite_uri))
        returned = call(run_id, True)
        assert not isinstance(returned, RunOperations)
        assert returned in (expected, 1, None)
        # A parameter or tag that is there already is the same row.
        assert sum(rows(sqlite_uri)) >= count + (1 if known else 2)
        assert values(sqlite_uri, run_id, "before") == [0.0, 1.0][: known + 1]


@pytest.mark.parametrize("call", SYNCHRONOUS.values(), ids=SYNCHRONOUS)
def test_asynchronous_gives_an_operation(
    run_id: str, sqlite_uri: str, call: Callable[[str, Any], object]
) -> None:
    """synchronous=False returns at once an operation of MLflow's type, whose wait() returns when
    that call is stored."""
    flowbuffer.enable(linger_s=HELD)
    for _ in range(2):
        before = rows(sqlite_uri)
        operation = call(run_id, False)
        assert type(operation) is RunOperations
        assert rows(sqlite_uri) == before
        operation.wait()
    assert sum(rows(sqlite_uri)) in (1, 2)


@pytest.mark.parametrize("call", SYNCHRONOUS.values(), ids=SYNCHRONOUS)
def test_what_mlflow_is_told_about_asynchronous_logging(
    run_id: str,
    sqlite_uri: str,
    call: Callable[[str, Any], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without synchronous=, MLFLOW_ENABLE_ASYNC_LOGGING and mlflow.config.enable_async_logging say
    what happens: an operation, or stored when the call returns; if they say nothing, buffered."""
    flowbuffer.enable(linger_s=HELD)
    operation = None
    for say in (
        partial(monkeypatch.setenv, "MLFLOW_ENABLE_ASYNC_LOGGING", "true"),
        partial(mlflow.config.enable_async_logging, True),
        mlflow.config.enable_async_logging,
    ):
        say()
        operation = call(run_id, None)
        assert type(operation) is RunOperations
    assert rows(sqlite_uri) == (0, 0, 0)
    for say in (
        partial(monkeypatch.setenv, "MLFLOW_ENABLE_ASYNC_LOGGING", "false"),
        partial(mlflow.config.enable_async_logging, False),
    ):
        say()
        assert not isinstance(call(run_id, None), RunOperations)
        assert type(call(run_id, False)) is RunOperations
    assert sum(rows(sqlite_uri))
    monkeypatch.delenv("MLFLOW_ENABLE_ASYNC_LOGGING")
    before = sum(rows(sqlite_uri))
    assert not isinstance(call(run_id, None), RunOperations)
    mlflow.log_metric("new", 1.0)
    assert sum(rows(sqlite_uri)) == before


def test_a_stored_error_is_raised(run_id: str, sqlite_uri: str) -> None:
    """synchronous=True raises what the store raised, with its error code, also for what only the
    store can know."""
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0)
    elsewhere(sqlite_uri).log_param(run_id, "p", "theirs")
    for call in (
        partial(mlflow.log_param, "p", "mine", synchronous=True),
        partial(mlflow.log_params, {"p": "mine"}, synchronous=True),
        partial(MlflowClient().log_param, run_id, "p", "mine", synchronous=True),
    ):
        with pytest.raises(MlflowException, match="Changing param values") as raised:
            call()
        assert raised.value.error_code == "INVALID_PARAMETER_VALUE"
    elsewhere(sqlite_uri).delete_run(run_id)
    with pytest.raises(MlflowException, match="must be in the 'active' state"):
        mlflow.set_tag("t", 1, synchronous=True)


def test_an_operation_raises_what_delivery_was_refused(
    run_id: str, sqlite_uri: str, capsys: Any, tmp_path: Path
) -> None:
    """Another value for a parameter that another process has logged meanwhile: the operation's
    wait() raises MLflow's error, flush counts it, and the log and `flowbuffer rejected` say so."""
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0)
    elsewhere(sqlite_uri).log_param(run_id, "p", "theirs")
    good = mlflow.log_params({"q": 1}, synchronous=False)
    bad = mlflow.log_param("p", "mine", synchronous=False)
    with listening() as said:
        with pytest.raises(MlflowException, match="Changing param values"):
            bad.wait()
        good.wait()
        assert flowbuffer.flush(PATIENCE_S).rejected == 1
    assert "".join(said).count("'p' was rejected") == 1
    assert cli.main(["rejected", "--spool", str(tmp_path / "spool")]) == 0
    assert "mine" in capsys.readouterr().out
    assert mlflow.get_run(run_id).data.params == {"p": "theirs", "q": "1"}


def test_an_operation_of_many_points(run_id: str, sqlite_uri: str) -> None:
    """One operation is about all points of its call, however many batches they go in."""
    flowbuffer.enable(linger_s=HELD)
    metrics = [Metric("k", float(v), 1_700_000_000_000, v) for v in range(1000)]
    MlflowClient().log_batch(run_id, metrics, synchronous=False).wait()
    assert rows(sqlite_uri)[0] == 1000
    operation = mlflow.log_metrics({f"m{n}": n for n in range(900)}, synchronous=False)
    operation.wait()
    assert rows(sqlite_uri)[0] == 1900
    for operation in (
        mlflow.log_metrics({}, synchronous=False),
        mlflow.log_params({}, synchronous=False),
    ):
        if operation is not None:
            operation.wait()
