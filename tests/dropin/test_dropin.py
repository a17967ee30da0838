# ruff: noqa: ARG005  the lambdas of a table have the same arguments
"""The switch: MLflow's own calls are buffered, and nothing that programs rely on is another."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import numpy as np
import pytest
import requests
from mlflow import MlflowClient, MlflowException
from mlflow.entities import LoggedModelOutput, Metric, Param, RunTag
from mlflow.tracking import fluent
from mlflow.tracking._tracking_service.client import TrackingServiceClient
from mlflow.utils.async_logging.run_operations import RunOperations

import flowbuffer
from flowbuffer import SettingError
from flowbuffer.backends.mlflow_client import delivery_client
from flowbuffer.backends.mlflow_transport import MlflowTransport
from flowbuffer.commands import cli
from flowbuffer.dropin import known_runs
from flowbuffer.dropin.arguments import NotBuffered
from flowbuffer.dropin.buffered_run import BufferedRun
from flowbuffer.logger import by_run
from support.backends import MlflowServer, copy_sqlite, make_run
from support.jobs import StartJob, Store
from support.sampling import part_of_table
from support.stored import models, rows, stored
from support.waiting import PATIENCE_S, slack_s, wait_until

FLUENT = ("log_metric", "log_metrics", "log_param", "log_params", "set_tag", "set_tags")
METHODS = ("log_metric", "log_param", "set_tag", "log_batch")
#: What is logged stays in the spool until somebody waits for it.
HELD = 3600.0


@pytest.fixture(autouse=True)
def switched_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No switch, logger, known run, active model or asynchronous logging passes between tests."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "false")  # so that it is taken back
    monkeypatch.delenv("MLFLOW_ENABLE_ASYNC_LOGGING")
    yield
    flowbuffer.disable()
    mlflow.clear_active_model()
    for logger in by_run.all_loggers():
        logger.close(0)
    by_run._loggers.clear()
    known_runs._runs.clear()
    known_runs._new_runs.clear()
    known_runs._told.clear()


@pytest.fixture
def run_id(sqlite_uri: str) -> str:
    """The active run."""
    mlflow.set_tracking_uri(sqlite_uri)
    return mlflow.start_run().info.run_id


def now_ms() -> int:
    return flowbuffer.clock.SYSTEM_CLOCK.now_ns() // 1_000_000  # type: ignore[attr-defined]


def values(uri: str, run_id: str, key: str) -> list[float]:
    """A history, past this process's switch."""
    return [m.value for m in elsewhere(uri).get_metric_history(run_id, key)]


def elsewhere(uri: str) -> Any:
    """A client as in another process."""
    return delivery_client(uri, 10.0)


# On and off.


def functions() -> dict[str, Any]:
    """All that the switch may replace."""
    places = {
        "mlflow": (mlflow, FLUENT),
        "fluent": (fluent, FLUENT),
        "client": (MlflowClient, METHODS),
        "service": (TrackingServiceClient, ("get_run", "get_metric_history", "search_runs")),
    }
    return {
        f"{where}.{name}": getattr(owner, name)
        for where, (owner, names) in places.items()
        for name in names
    }


def test_on_and_off() -> None:
    """enable replaces MLflow's calls, disable gives back the very same; both may be repeated."""
    before = functions()
    for _ in range(2):
        flowbuffer.enable()
        flowbuffer.enable(linger_s=1.0)
        on = functions()
        assert not [name for name in before if on[name] is before[name]]
        assert on["mlflow.log_metric"] is on["fluent.log_metric"]
        assert on["mlflow.log_metric"].__doc__ == before["mlflow.log_metric"].__doc__
        assert on["mlflow.log_metric"].__name__ == "log_metric"
        flowbuffer.disable()
        flowbuffer.disable()
        assert functions() == before


def test_a_with_block(run_id: str, sqlite_uri: str) -> None:
    """`with flowbuffer.enable()` disables at the end, by an exception too, and what was logged is
    delivered then."""
    before = functions()
    with flowbuffer.enable(linger_s=HELD):
        mlflow.log_metric("k", 1.0)
        assert functions() != before
        assert rows(sqlite_uri) == (0, 0, 0)
    assert functions() == before
    assert values(sqlite_uri, run_id, "k") == [1.0]
    with pytest.raises(ZeroDivisionError), flowbuffer.enable():
        raise ZeroDivisionError
    assert functions() == before


def test_what_was_taken_while_on(run_id: str, sqlite_uri: str) -> None:
    """Functions that a program took from MLflow while the switch was on are MLflow's own once it is
    off, and buffer once it is on again."""
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("known", 1.0)
    log_metric, log_params, set_tag = mlflow.log_metric, mlflow.log_params, mlflow.set_tag
    log_batch = MlflowClient().log_batch
    flowbuffer.disable()
    log_metric("a", 1.0)
    log_params({"p": 1})
    set_tag("t", 1)
    log_batch(run_id, [Metric("b", 2.0, 1, 0)])
    assert rows(sqlite_uri) == (3, 1, 1)
    assert type(log_metric("c", 1.0, synchronous=False)) is RunOperations
    mlflow.flush_async_logging()
    assert rows(sqlite_uri) == (4, 1, 1)
    flowbuffer.enable(linger_s=HELD)
    log_metric("a", 2.0)
    log_metric("a", 1.0)
    assert rows(sqlite_uri) == (4, 1, 1)
    flowbuffer.disable()
    assert values(sqlite_uri, run_id, "a") == [1.0, 2.0, 1.0]


def test_what_a_silent_rank_took(
    run_id: str, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a rank that does not log, too, what was taken is MLflow's own once the switch is off."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    flowbuffer.enable(ranks="0")
    log_metric, log_batch = mlflow.log_metric, MlflowClient().log_batch
    log_metric("a", 1.0)
    assert rows(sqlite_uri) == (0, 0, 0)
    flowbuffer.disable()
    log_metric("a", 1.0)
    log_batch(run_id, [Metric("b", 2.0, 1, 0)])
    assert rows(sqlite_uri) == (2, 0, 0)


def test_what_was_imported_before(run_id: str, sqlite_uri: str) -> None:
    """Functions that a program took from MLflow before enable store what they log, in one order
    with the others where steps rise."""
    taken = {name: getattr(mlflow, name) for name in FLUENT}
    flowbuffer.enable(linger_s=HELD)
    for value in range(40):
        (taken["log_metric"], mlflow.log_metric)[value % 2]("k", -value, step=value)
        (mlflow.log_metrics, taken["log_metrics"])[value % 2]({"j": -value}, step=value)
    taken["log_param"]("a", 1)
    mlflow.log_param("b", 2)
    taken["log_params"]({"b": 2, "c": 3})
    mlflow.set_tag("t", 1)
    taken["set_tag"]("t", 2)
    mlflow.set_tags({"u": 1})
    taken["set_tags"]({"u": 2})
    flowbuffer.disable()
    for key in ("k", "j"):
        assert values(sqlite_uri, run_id, key) == [float(-value) for value in range(40)]
    found = stored(sqlite_uri, run_id)
    assert (found["params"], found["tags"]) == (
        {"a": "1", "b": "2", "c": "3"},
        {"t": "2", "u": "2"},
    )


def test_what_was_imported_before_stays_as_it_is(run_id: str, sqlite_uri: str) -> None:
    """Functions that a program took from MLflow before enable store synchronously, as they did."""
    taken = [getattr(mlflow, name) for name in FLUENT]
    flowbuffer.enable(linger_s=HELD)
    for log, arguments in zip(
        taken,
        (("k", 1.0), ({"k": 2.0},), ("p", 1), ({"q": 1},), ("t", 1), ({"u": 1},)),
        strict=True,
    ):
        log(*arguments)
    assert rows(sqlite_uri) == (2, 2, 2)
    assert run_id


def test_a_bad_setting_is_an_error_and_changes_nothing() -> None:
    """A setting that does not exist, or is out of its range, raises and replaces nothing."""
    before = functions()
    for settings in ({"linger_s": -1}, {"unknown": 1}):
        with pytest.raises((SettingError, TypeError)):
            flowbuffer.enable(**settings)
    assert functions() == before


def test_switched_off_by_the_variable(
    run_id: str, sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLOWBUFFER_ENABLED=0: enable() changes nothing, and flowbuffer's own functions are plain
    MLflow."""
    monkeypatch.setenv("FLOWBUFFER_ENABLED", "0")
    before = functions()
    with flowbuffer.enable():
        assert functions() == before
        mlflow.log_metric("k", 1.0)
        flowbuffer.log_metric("k", 2.0)
        flowbuffer.log_param("p", 1)
        assert rows(sqlite_uri) == (2, 1, 0)
    assert not (tmp_path / "spool").exists()
    assert run_id


def test_enable_again_changes_the_settings(sqlite_uri: str) -> None:
    """Enabled again, runs that are logged to for the first time from then on have the new
    settings; the others keep theirs."""
    mlflow.set_tracking_uri(sqlite_uri)
    own = MlflowClient()
    first, second = make_run(sqlite_uri), make_run(sqlite_uri)
    flowbuffer.enable(linger_s=HELD)
    own.log_metric(first, "k", 1.0)
    flowbuffer.enable(linger_s=0.0)
    own.log_metric(second, "k", 1.0)
    wait_until(lambda: rows(sqlite_uri)[0])
    assert values(sqlite_uri, second, "k") == [1.0]
    own.log_metric(first, "k", 2.0)
    assert values(sqlite_uri, first, "k") == []


# What is buffered.

#: MLflow stores equal points once; flowbuffer moves the second one, because none may vanish.
TIMES = itertools.count(1_700_000_000_000)

FIRST_CALLS: dict[str, Callable[[str], object]] = {
    "log_metric": lambda _: mlflow.log_metric("k", 1.0, 3),
    "log_metric of a run": lambda run: mlflow.log_metric("k", 1.0, run_id=run),
    "log_metrics": lambda _: mlflow.log_metrics({"k": 1.0, "j": 2}),
    "log_metrics of a run": lambda run: mlflow.log_metrics({"k": 1.0}, run_id=run),
    "log_param": lambda _: mlflow.log_param("p", 1),
    "log_params": lambda _: mlflow.log_params({"p": 1, "q": None}),
    "log_params of a run": lambda run: mlflow.log_params({"p": 1}, run_id=run),
    "set_tag": lambda _: mlflow.set_tag("t", 1),
    "set_tags": lambda _: mlflow.set_tags({"t": 1}),
    "client.log_metric": lambda run: MlflowClient().log_metric(run, "k", 1.0),
    "client.log_param": lambda run: MlflowClient().log_param(run, "p", 1),
    "client.set_tag": lambda run: MlflowClient().set_tag(run, "t", 1),
    "client.log_batch": lambda run: MlflowClient().log_batch(
        run, [Metric("k", 1.0, next(TIMES), 0)], [Param("p", "1")], [RunTag("t", "1")]
    ),
}


@pytest.mark.parametrize("call", FIRST_CALLS.values(), ids=FIRST_CALLS)
def test_each_call_is_buffered(run_id: str, sqlite_uri: str, call: Callable[[str], object]) -> None:
    """Each of the calls is buffered, the first one of a process and those after it, and stores in
    the end what MLflow alone stores."""
    own_id = make_run(sqlite_uri)
    with mlflow.start_run(run_id=own_id, nested=True):
        call(own_id)
        call(own_id)
    mlflow.MlflowClient().update_run(own_id, "RUNNING")
    before = rows(sqlite_uri)
    flowbuffer.enable(linger_s=HELD)
    call(run_id)
    assert rows(sqlite_uri) == before
    call(run_id)
    assert rows(sqlite_uri) == before
    flowbuffer.disable()
    assert stored(sqlite_uri, run_id) == stored(sqlite_uri, own_id)


def test_any_mixture_keeps_the_order(run_id: str, sqlite_uri: str) -> None:
    """P2: one thread's metrics, tags and parameters, through all six functions and the client's
    four methods in any mixture, keep the order in which they were logged."""
    own = MlflowClient()
    flowbuffer.enable()
    count = 0

    def log(how: int) -> None:
        nonlocal count
        count += 1
        value = float(-count)  # falls, with one step, in a few milliseconds
        metric = Metric("k", value, now_ms(), 0)
        calls = (
            lambda: mlflow.log_metric("k", value),
            lambda: mlflow.log_metrics({"k": value, "other": value}),
            lambda: own.log_metric(run_id, "k", value),
            lambda: own.log_batch(run_id, [metric]),
            lambda: mlflow.log_metric("k", value, run_id=run_id),
            lambda: mlflow.log_metrics({"k": value}, run_id=run_id),
            lambda: flowbuffer.log_metric("k", value),
        )
        calls[how % len(calls)]()
        tags = (
            lambda: mlflow.set_tag("t", count),
            lambda: mlflow.set_tags({"t": count}),
            lambda: own.set_tag(run_id, "t", count),
            lambda: own.log_batch(run_id, tags=[RunTag("t", str(count))]),
            lambda: flowbuffer.set_tag("t", count),
        )
        tags[how % len(tags)]()
        params = (
            lambda: mlflow.log_param(f"p{count}", count),
            lambda: mlflow.log_params({f"p{count}": count}),
            lambda: own.log_param(run_id, f"p{count}", count),
            lambda: own.log_batch(run_id, params=[Param(f"p{count}", str(count))]),
        )
        params[how % len(params)]()

    for how in np.random.default_rng(0).integers(0, 7 * 5 * 4, 400).tolist():
        log(how)
    flowbuffer.disable()
    assert values(sqlite_uri, run_id, "k") == [float(-value) for value in range(1, 401)]
    found = stored(sqlite_uri, run_id)
    assert found["tags"] == {"t": "400"}
    assert found["params"] == {f"p{number}": str(number) for number in range(1, 401)}
    assert found["latest"]["k"] == "-400.0"


def test_own_functions_and_mlflows_keep_one_order(run_id: str, sqlite_uri: str) -> None:
    """P2: flowbuffer's own functions and MLflow's log to one run in one order, whichever came
    first."""
    flowbuffer.log_metric("k", 1.0)
    flowbuffer.enable(linger_s=HELD)
    for value in range(60):
        (flowbuffer.log_metric, mlflow.log_metric)[value % 2]("k", float(-value))
    assert len(by_run.all_loggers()) == 1
    flowbuffer.disable()
    assert values(sqlite_uri, run_id, "k") == [1.0, *(float(-value) for value in range(60))]


def test_time_and_step_are_kept(run_id: str, sqlite_uri: str) -> None:
    """P3: an explicit time and step are stored as they are; a point without a time has that of its
    call."""
    flowbuffer.enable()
    start_ms = now_ms()
    mlflow.log_metric("now", 1.0)
    mlflow.log_metric("then", 1.0, step=-7, timestamp=1_234_567_890_123)
    mlflow.log_metrics({"then": 2.0}, step=1 << 40, timestamp=1_234_567_890_124)
    MlflowClient().log_metric(run_id, "then", 3.0, 1_234_567_890_125, 5)
    end_ms = now_ms()
    flowbuffer.disable()
    (now,) = elsewhere(sqlite_uri).get_metric_history(run_id, "now")
    assert start_ms <= now.timestamp <= end_ms
    found = elsewhere(sqlite_uri).get_metric_history(run_id, "then")
    assert [(m.timestamp, m.step) for m in found] == [
        (1_234_567_890_123, -7),
        (1_234_567_890_124, 1 << 40),
        (1_234_567_890_125, 5),
    ]


def test_threads(run_id: str, sqlite_uri: str) -> None:
    """P2: each of several threads, with a client or with run_id=, keeps its order, and every row is
    there once."""
    flowbuffer.enable()
    failed: list[BaseException] = []

    def log(name: str) -> None:
        try:
            own = MlflowClient()
            for value in range(150):
                if value % 2:
                    own.log_metric(run_id, name, -value)
                else:
                    mlflow.log_metric(name, -value, run_id=run_id)
                own.set_tag(run_id, name, value)
                own.log_param(run_id, f"{name}/{value}", value)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=log, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flowbuffer.disable()
    assert not failed
    for number in range(4):
        assert values(sqlite_uri, run_id, f"t{number}") == [float(-v) for v in range(150)]
    found = stored(sqlite_uri, run_id)
    assert found["tags"] == {f"t{number}": "149" for number in range(4)}
    assert len(found["params"]) == 600


# synchronous=.

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
    run_id: str, sqlite_uri: str, caplog: pytest.LogCaptureFixture, capsys: Any, tmp_path: Path
) -> None:
    """Another value for a parameter that another process has logged meanwhile: the operation's
    wait() raises MLflow's error, flush counts it, and the log and `flowbuffer rejected` say so."""
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0)
    elsewhere(sqlite_uri).log_param(run_id, "p", "theirs")
    good = mlflow.log_params({"q": 1}, synchronous=False)
    bad = mlflow.log_param("p", "mine", synchronous=False)
    with pytest.raises(MlflowException, match="Changing param values"):
        bad.wait()
    good.wait()
    assert flowbuffer.flush(PATIENCE_S).rejected == 1
    assert caplog.text.count("'p' was rejected") == 1
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


# Read your own writes.


def parent_of_new_run(run_id: str) -> Any:
    with mlflow.start_run(nested=True, parent_run_id=run_id) as child:
        return mlflow.get_parent_run(child.info.run_id)


READS: dict[str, Callable[[str], object]] = {
    "mlflow.get_run": lambda run: mlflow.get_run(run).data.metrics["k"],
    "client.get_run": lambda run: MlflowClient().get_run(run).data.params["p"],
    "get_metric_history": lambda run: MlflowClient().get_metric_history(run, "k")[0].value,
    "client.search_runs": lambda run: next(
        one.data.metrics["k"] for one in MlflowClient().search_runs(["0"], "metrics.k = 1")
    ),
    "mlflow.search_runs": lambda run: mlflow.search_runs(["0"], "params.p = '1'")["metrics.k"][0],
    "a list of runs": lambda run: mlflow.search_runs(["0"], "tags.t = '1'", output_format="list")[
        0
    ].data.metrics["k"],
    "parent run": lambda run: parent_of_new_run(run).data.metrics["k"],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_find_what_was_logged(
    run_id: str, sqlite_uri: str, read: Callable[[str], object]
) -> None:
    """What reads a run finds everything that this process has logged to it before."""
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0)
    mlflow.log_param("p", 1)
    mlflow.set_tag("t", 1)
    assert rows(sqlite_uri) == (0, 0, 0)
    assert read(run_id) in (1.0, "1")
    assert rows(sqlite_uri) == (1, 1, 1)


def test_plain_http_reads_find_what_was_logged(server_sqlite: MlflowServer) -> None:
    """A plain request for metrics finds everything that this process has logged to that server; one
    to another server waits for nothing."""
    mlflow.set_tracking_uri(server_sqlite.uri)
    run_id = mlflow.start_run().info.run_id
    asked = {"run_id": run_id, "metric_key": "k"}
    flowbuffer.enable(linger_s=HELD)

    def read(uri: str) -> list[float]:
        answer = requests.get(f"{uri}/api/2.0/mlflow/metrics/get-history", asked, timeout=30)
        return [metric["value"] for metric in answer.json().get("metrics", ())]

    mlflow.log_metric("k", 2.0)
    mlflow.log_metric("k", 1.0)
    assert read(server_sqlite.uri.replace("127.0.0.1", "localhost")) == []
    assert read(server_sqlite.uri) == [2.0, 1.0]


def test_reads_of_another_run_wait_for_nothing(run_id: str, sqlite_uri: str) -> None:
    """get_run waits for the run that it reads, not for others."""
    other = make_run(sqlite_uri)
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0)
    mlflow.get_run(other)
    assert rows(sqlite_uri) == (0, 0, 0)
    mlflow.get_run(run_id)
    assert rows(sqlite_uri) == (1, 0, 0)


def test_reads_in_a_loop(run_id: str) -> None:
    """Each read finds the point logged just before it, also on an old client."""
    own = MlflowClient()
    flowbuffer.enable(linger_s=HELD)
    for value in range(20):
        mlflow.log_metric("k", float(-value))
        assert own.get_run(run_id).data.metrics["k"] == -value
        assert len(own.get_metric_history(run_id, "k")) == value + 1


def test_a_read_without_a_wait(run_id: str, sqlite_uri: str) -> None:
    """read_timeout_s=0 reads at once; what was logged arrives later."""
    flowbuffer.enable(linger_s=HELD, read_timeout_s=0)
    mlflow.log_metric("k", 1.0)
    assert mlflow.get_run(run_id).data.metrics == {}
    assert len(mlflow.search_runs(["0"])) == 1
    flowbuffer.disable()
    assert values(sqlite_uri, run_id, "k") == [1.0]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is delivered until it is set."""
    opened = threading.Event()
    original = MlflowTransport._log_batch

    def log_batch(self: Any, request: Any) -> None:
        opened.wait(PATIENCE_S)
        original(self, request)

    monkeypatch.setattr(MlflowTransport, "_log_batch", log_batch)
    yield opened
    opened.set()


def test_a_read_waits_for_a_bounded_time(
    run_id: str, sqlite_uri: str, gate: threading.Event
) -> None:
    """A read waits for read_timeout_s at most, and then reads what is there."""
    clock = flowbuffer.clock.SYSTEM_CLOCK  # type: ignore[attr-defined]
    flowbuffer.enable(read_timeout_s=0.3)
    mlflow.log_metric("k", 1.0)
    for read in (mlflow.get_run, lambda _: mlflow.search_runs(["0"])):
        start_s = clock.monotonic_s()
        read(run_id)
        assert 0.3 <= clock.monotonic_s() - start_s < 2 + slack_s()
    assert rows(sqlite_uri) == (0, 0, 0)
    gate.set()
    flowbuffer.enable(read_timeout_s=PATIENCE_S)
    assert mlflow.get_run(run_id).data.metrics == {"k": 1.0}


# What MLflow would refuse, and what it takes. Each call is made with MLflow alone, then with the
# switch on as the first call of a run, and on a run that is known.

Case = Callable[[MlflowClient, str], object]

METRIC_CASES: dict[str, Case] = {
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

TEXT_CASES: dict[str, Case] = {
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

T = 1_700_000_000_000
BATCH_CASES: dict[str, Case] = {
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


def outcome(call: Case, run_id: str) -> object:
    """What a call returns, or raises."""
    try:
        return call(MlflowClient(), run_id)
    except Exception as error:
        words = re.sub(r"\b\d{13}\b", "TIME", str(error).replace(run_id, "RUN"))
        return type(error), getattr(error, "error_code", None), words


def outcomes(
    cases: dict[str, Case], uri: str, *, on: bool, known: bool = False
) -> dict[str, tuple[object, str, object]]:
    """What each call does on a run of its own, the run's name, and what it has afterwards."""
    mlflow.set_tracking_uri(uri)
    own = MlflowClient()
    ids = {name: own.create_run("0", run_name="old name").info.run_id for name in cases}
    if on:
        flowbuffer.enable(linger_s=HELD)
    answers = {}
    for name, run_id in ids.items():
        mlflow.start_run(run_id=run_id)
        if known:
            mlflow.log_metric("known", 1.0)
        answers[name] = outcome(cases[name], run_id)
        fluent._active_run_stack.get().pop()  # it has not ended
    flowbuffer.disable()
    return {
        name: (
            answers[name],
            own.get_run(run_id).info.run_name,
            stored(uri, run_id, without=["known"]),
        )
        for name, run_id in ids.items()
    }


ALL_CASES = {"metrics": METRIC_CASES, "texts": TEXT_CASES, "batches": BATCH_CASES}


@pytest.mark.parametrize("cases", ALL_CASES.values(), ids=ALL_CASES)
def test_calls_are_refused_or_taken_as_by_mlflow(sqlite_uri: str, cases: dict[str, Case]) -> None:
    """What MLflow would refuse raises MLflow's own error, with its code and words, at the call; all
    else returns what MLflow returns; and the store has the same afterwards."""
    assert_as_by_mlflow(part_of_table(cases, 2), sqlite_uri)


def assert_as_by_mlflow(cases: dict[str, Case], uri: str) -> None:
    expected = outcomes(cases, uri, on=False)
    for known in (False, True):
        found = outcomes(cases, uri, on=True, known=known)
        assert {name: found[name] for name in cases if found[name] != expected[name]} == {}


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


LOG_TO_RUN: dict[str, Case] = {
    "log_metric": lambda c, r: c.log_metric(r, "k", 1.0),
    "log_param": lambda c, r: c.log_param(r, "p", 1),
    "set_tag": lambda c, r: c.set_tag(r, "t", 1),
    "log_batch": lambda c, r: c.log_batch(r, [Metric("k", 1.0, T, 1)]),
    "fluent": lambda c, r: mlflow.log_metric("k", 1.0, run_id=r),
    "fluent metrics": lambda c, r: mlflow.log_metrics({"k": 1.0}, run_id=r),
    "fluent params": lambda c, r: mlflow.log_params({"k": 1.0}, run_id=r),
}


@pytest.mark.parametrize("call", LOG_TO_RUN.values(), ids=LOG_TO_RUN)
def test_a_deleted_run_refuses(sqlite_uri: str, call: Case) -> None:
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


# Models and datasets.


def about_models(case: Callable[[MlflowClient, str, list[str]], object], uri: str) -> object:
    """What the run and two models have after a case."""
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run() as run:
        run_id = run.info.run_id
        ids = [mlflow.create_external_model(name).model_id for name in ("one", "two")]
        mlflow.log_metric("known", 1.0, run_id=run_id)
        case(MlflowClient(), run_id, ids)
        mlflow.clear_active_model()
    flowbuffer.disable()
    return stored(uri, run_id), models(uri)


def with_active_model(c: MlflowClient, r: str, ids: list[str]) -> None:
    mlflow.log_metric("before", 1.0)
    mlflow.set_active_model(model_id=ids[0])
    mlflow.log_metric("k", 1.0)
    mlflow.log_metric("k", 0.5, run_id=r)
    mlflow.log_metrics({"k": 2.0, "j": 1.0}, step=1)
    c.log_metric(r, "k", 3.0, step=2)
    c.log_batch(r, [Metric("k", 4.0, T, 3)])  # given, and past: what follows has its own time
    mlflow.log_metric("k", 5.0, step=3, model_id=ids[1])
    mlflow.log_param("p", 1)
    mlflow.set_tag("t", 1)
    mlflow.clear_active_model()
    mlflow.log_metric("after", 1.0)


def with_model_id(c: MlflowClient, r: str, ids: list[str]) -> None:
    for value in range(6):
        mlflow.log_metric("k", -value, model_id=ids[value % 2])
        mlflow.log_metric("k", -value - 0.5)
    mlflow.log_metrics({"k": 1.0, "j": 2.0}, step=4, model_id=ids[0])
    mlflow.log_metrics({"k": 1.5}, step=4, model_id=ids[1], run_id=r)
    c.log_metric(r, "m", 1.0, model_id=ids[0])
    c.log_batch(r, [Metric("m", 2.0, T * 2, 1, model_id=ids[1]), Metric("m", 3.0, T * 2, 2)])


def with_dataset(c: MlflowClient, r: str, ids: list[str]) -> None:
    data = mlflow.data.from_numpy(np.arange(3.0), name="data")
    mlflow.log_metric("k", 1.0, dataset=data)
    mlflow.log_metric("k", 2.0, dataset=data, model_id=ids[0])
    mlflow.log_metrics({"k": 3.0, "j": 1.0}, step=1, dataset=data, model_id=ids[1])
    mlflow.log_metrics({"k": 4.0}, dataset=data, run_id=r)
    c.log_metric(r, "k", 5.0, dataset_name="data", dataset_digest=data.digest, model_id=ids[0])


def with_outputs(c: MlflowClient, r: str, ids: list[str]) -> None:
    mlflow.log_metric("k", 1.0, step=3, run_id=r)
    c.log_outputs(r, [LoggedModelOutput(ids[0], step=3), LoggedModelOutput(ids[1], step=4)])
    for step in (3, 4, 5):
        mlflow.log_metric("k", 2.0, step=step, run_id=r)
        mlflow.log_metrics({"j": 3.0}, step=step, run_id=r)
        mlflow.log_metric("l", 4.0, step=step)


def with_an_old_output(c: MlflowClient, r: str, ids: list[str]) -> None:
    c.log_outputs(r, [LoggedModelOutput(ids[0], step=0)])
    mlflow.end_run()
    with mlflow.start_run(run_id=r):
        mlflow.log_metric("k", 1.0)
        mlflow.log_metrics({"j": 1.0, "l": 2.0})
        mlflow.log_metric("k", 1.0, step=1)


def with_outputs_of_another_process(c: MlflowClient, _: str, ids: list[str]) -> None:
    run_id = c.create_run("0").info.run_id
    known_runs._new_runs.clear()  # another process needs some time to hear of the run
    elsewhere(mlflow.get_tracking_uri()).log_outputs(run_id, [LoggedModelOutput(ids[0], step=2)])
    for number in range(3):
        mlflow.log_metric(f"k{number}", 1.0, step=2, run_id=run_id)
        mlflow.log_metrics({f"j{number}": 1.0}, step=2, run_id=run_id)


ABOUT_MODELS = (
    with_active_model,
    with_model_id,
    with_dataset,
    with_outputs,
    with_an_old_output,
    with_outputs_of_another_process,
)


@pytest.mark.parametrize("case", ABOUT_MODELS)
def test_models_have_their_metrics(
    sqlite_template: Path, tmp_path: Path, case: Callable[[MlflowClient, str, list[str]], object]
) -> None:
    """Metrics with model_id, with a dataset, with an active model, or of a run with models reach
    the logged models, and the run, as with MLflow alone."""
    expected = about_models(case, copy_sqlite(sqlite_template, tmp_path / "stock.db"))
    assert any(expected[1].values())
    flowbuffer.enable(linger_s=HELD)
    assert about_models(case, copy_sqlite(sqlite_template, tmp_path / "on.db")) == expected


def test_models_are_read_with_their_metrics(run_id: str) -> None:
    """get_logged_model and search_logged_models find what was logged just before."""
    model = mlflow.create_external_model("one")
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0, model_id=model.model_id)
    assert [m.value for m in mlflow.get_logged_model(model.model_id).metrics] == [1.0]
    mlflow.log_metric("k", 2.0, step=1, model_id=model.model_id)
    (found,) = mlflow.search_logged_models(output_format="list")
    assert sorted(m.value for m in found.metrics) == [1.0, 2.0]
    assert run_id


# Runs, and their ends.


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


# Who else is there.


def test_a_silent_rank(sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a rank that does not log (ranks=0) every call returns at once what it should, starts no
    run, and stores nothing."""
    monkeypatch.setenv("RANK", "1")
    mlflow.set_tracking_uri(sqlite_uri)
    run_id = make_run(sqlite_uri)
    flowbuffer.enable(ranks="0")
    own = MlflowClient()
    assert mlflow.log_metric("k", 1.0) is None
    assert mlflow.log_metrics({"k": 1.0}) is None
    assert mlflow.log_param("p", 3) == 3
    assert mlflow.log_param("p", 4) == 4
    assert mlflow.set_tag("t", 1) is None
    assert own.log_param(run_id, "p", 5) == 5
    assert own.log_metric(run_id, "k", 1.0) is None
    operation = own.log_batch(run_id, [Metric("k", 1.0, T, 0)], synchronous=False)
    assert type(operation) is RunOperations
    operation.wait()
    mlflow.log_metric("k", 1.0, synchronous=False).wait()
    assert mlflow.active_run() is None
    mlflow.flush_async_logging()
    assert own.get_run(run_id).data.metrics == {}
    assert rows(sqlite_uri) == (0, 0, 0)
    assert not list((tmp_path / "spool").glob("*/*"))


def test_a_spool_that_cannot_be_used(
    run_id: str, sqlite_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing can be spooled the calls are MLflow's own, which is warned of once, with what
    would help."""
    (tmp_path / "spool").mkdir(mode=0o755)
    (tmp_path / "spool").chmod(0o755)
    flowbuffer.enable()
    with caplog.at_level(logging.WARNING, "flowbuffer"):
        for value in range(5):
            mlflow.log_metric("k", value, step=value)
            MlflowClient().log_metric(run_id, "j", value, step=value)
        assert mlflow.log_param("p", 1) == 1
        mlflow.set_tags({"t": 1})
    assert rows(sqlite_uri) == (10, 1, 1)
    assert caplog.text.count("not buffered") == 1
    assert "chmod" in caplog.text
    assert mlflow.get_run(run_id).data.metrics == {"k": 4.0, "j": 4.0}
    mlflow.end_run()


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
    assert rows(sqlite_uri) == (0, 0, 0)
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


def test_a_server_that_is_down(tmp_path: Path) -> None:
    """P5: a run that cannot be looked for, because the server is down, is logged to all the same:
    nothing raises, and the points are in the spool."""
    mlflow.set_tracking_uri("http://127.0.0.1:1")
    run_id = "0123456789abcdef0123456789abcdef"
    flowbuffer.enable(shutdown_timeout_s=0.0)
    own = MlflowClient()
    for value in range(10):
        own.log_metric(run_id, "k", value)
    own.log_param(run_id, "p", 1)
    assert flowbuffer.stats().pending == 11
    assert len(list((tmp_path / "spool" / run_id).iterdir())) == 1


# Children.


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit()"])
def test_a_forked_child(start_job: StartJob, store: Store, end: str) -> None:
    """What a forked child logs to its parent's run arrives once, beside what the parent had not
    delivered yet, and the parent's reads and end wait for it."""
    job = start_job(
        f"""
        flowbuffer.enable(linger_s=3600)
        client = mlflow.MlflowClient()
        mlflow.start_run(run_id=RUN)
        # In a forked child no run is active, so the run is named.
        def log(key, values):
            for value in values:
                mlflow.log_metric(key, -float(value), run_id=RUN)
                client.set_tag(RUN, key, value)
        log("parent", range(50))
        pid = os.fork()
        if pid == 0:
            log("child", range(50))
            client.log_param(RUN, "child", 1)
            {end}
        log("parent", range(50, 100))
        assert os.waitpid(pid, 0)[1] == 0
        found = [m.value for m in client.get_metric_history(RUN, "child")]
        assert found == [-float(value) for value in range(50)], found
        assert client.get_run(RUN).data.params == {{"child": "1"}}
        mlflow.end_run()
        """
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    assert store.values("parent") == [-float(value) for value in range(100)]
    assert store.values("child") == [-float(value) for value in range(50)]
    tags = dict(
        store.connection.execute("SELECT key, value FROM tags WHERE key NOT LIKE 'mlflow%'")
    )
    assert tags == {"parent": "99", "child": "49"}
    assert store.statuses() == ["FINISHED"]


def test_a_spawned_child(start_job: StartJob, store: Store) -> None:
    """A spawned child of a process with FLOWBUFFER_ENABLED=1 is buffered of itself, and its rows
    are there when the parent ends the run."""
    job = start_job(
        """
        import multiprocessing

        def work(number):
            assert hasattr(mlflow.log_metric, "flowbuffers")
            for step in range(50):
                mlflow.log_metric(f"child{number}", -float(step), run_id=RUN)

        if __name__ == "__main__":
            mlflow.start_run(run_id=RUN)
            mlflow.log_metric("parent", 1.0)
            context = multiprocessing.get_context("spawn")
            children = [context.Process(target=work, args=(n,)) for n in range(2)]
            for child in children:
                child.start()
            for child in children:
                child.join()
                assert child.exitcode == 0
            mlflow.end_run()
        """,
        FLOWBUFFER_ENABLED="1",
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    for number in range(2):
        assert store.values(f"child{number}") == [-float(step) for step in range(50)]
    assert store.values("parent") == [1.0]


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
