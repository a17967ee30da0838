"""Each of MLflow's calls is buffered, and any mixture of them keeps its order."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

import flowbuffer
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.logger import by_run
from support.backends import make_run
from support.stored import rows, stored
from support.switch import HELD, elsewhere, values


def now_ms() -> int:
    return SYSTEM_CLOCK.now_ns() // 1_000_000


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
