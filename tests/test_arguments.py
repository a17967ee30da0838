"""What a caller may hand over, and the words for what he may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlflow
import numpy as np
import pytest

import flowbuffer
from flowbuffer import (
    DeliveryError,
    Handle,
    InvalidArgument,
    InvalidPoint,
    MetricLogger,
    SettingError,
    Settings,
)
from support.backends import client, history, make_run

# Who logs, to what.


def test_settings_as_keywords(sqlite_uri: str) -> None:
    """A logger takes settings by name, over those that it is given as a whole, over those of the
    environment."""
    run_id = make_run(sqlite_uri)
    for settings in (None, Settings(linger_s=3, ranks="0")):
        with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings, linger_s=0) as logger:
            assert logger.settings.linger_s == 0
            assert logger.settings.delivery == "thread"  # of the environment
            assert logger.settings.ranks == ("all" if settings is None else "0")
    with pytest.raises(SettingError, match=r"lingers is not a setting.*did you mean linger_s"):
        MetricLogger(run_id, tracking_uri=sqlite_uri, lingers=0)
    with pytest.raises(SettingError, match=r"settings is \{'linger_s': 1\}, a dict; it must be"):
        MetricLogger(run_id, tracking_uri=sqlite_uri, settings={"linger_s": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("named", [True, False], ids=["tracking_uri=", "MLflow's"])
def test_a_run_that_is_started_has_a_name_and_a_place(sqlite_uri: str, named: bool) -> None:
    """`experiment` and `run_name` are those of the run that is started; an experiment that is not
    there is created."""
    if not named:
        mlflow.set_tracking_uri(sqlite_uri)
    uri = sqlite_uri if named else None
    for _ in range(2):
        with MetricLogger(tracking_uri=uri, experiment="trees", run_name="oak") as logger:
            logger.log_metric("leaves", 3)
        run = client(sqlite_uri).get_run(logger.run_id)
        experiment = client(sqlite_uri).get_experiment(run.info.experiment_id)
        assert (experiment.name, run.info.run_name) == ("trees", "oak")
        assert run.info.status == "FINISHED"


def test_a_run_is_taken_for_its_id(sqlite_uri: str) -> None:
    """MLflow's run, active or not, stands for its id; what is no run is told at once."""
    mlflow.set_tracking_uri(sqlite_uri)
    with mlflow.start_run() as run, MetricLogger(run) as logger:
        logger.log_metric("k", 1.0)
    assert logger.run_id == run.info.run_id
    with MetricLogger(client(sqlite_uri).get_run(run.info.run_id)) as logger:
        logger.log_metric("k", 2.0)
    assert [one.value for one in history(sqlite_uri, run.info.run_id, "k")] == [1.0, 2.0]
    for wrong in (5, {}, ["a"], run.info):
        with pytest.raises(InvalidArgument, match="it must be a run's id"):
            MetricLogger(wrong)  # type: ignore[arg-type]


# What is logged.

WRONG_CALLS: dict[str, tuple[Callable[[MetricLogger], Handle], str]] = {
    "a list of pairs": (
        lambda logger: logger.log_metrics([("a", 1)]),  # type: ignore[arg-type]
        r"the metrics are \[\('a', 1\)\], a list; they must be a dict",
    ),
    "no metrics": (
        lambda logger: logger.log_metrics(None),  # type: ignore[arg-type]
        "the metrics are None, a NoneType; they must be a dict",
    ),
    "a text for parameters": (
        lambda logger: logger.log_params("x"),  # type: ignore[arg-type]
        "the parameters are 'x', a str; they must be a dict",
    ),
    "a list for tags": (
        lambda logger: logger.set_tags(["a"]),  # type: ignore[arg-type]
        r"the tags are \['a'\], a list; they must be a dict",
    ),
    "a number for tags": (
        lambda logger: logger.set_tags(5),  # type: ignore[arg-type]
        "the tags are 5, an int; they must be a dict",
    ),
    "a list for a key": (
        lambda logger: logger.log_metric(["a"], 1.0),  # type: ignore[arg-type]
        r"the key \['a'\].* a list; it must be a str",
    ),
    "a dict for a value": (
        lambda logger: logger.log_metric("a", {}),  # type: ignore[arg-type]
        "the value of 'a' is {}, a dict .*; it must be a number",
    ),
    "an array for a value": (
        lambda logger: logger.log_metrics({"a": np.ones(2)}),  # type: ignore[dict-item]
        "the value of 'a' is array.*, a ndarray .*; it must be a number",
    ),
    "a text for a step": (
        lambda logger: logger.log_metric("a", 1.0, "3"),  # type: ignore[arg-type]
        "the step '3', a str is not valid .* it must be a whole number",
    ),
    "a text for a series": (
        lambda logger: logger.log_series("a", "text"),
        "the values of 'a' have 0 dimensions; they must have 1",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
@pytest.mark.parametrize("enabled", [None, False], ids=["spooled", "straight to MLflow"])
def test_what_cannot_be_logged(sqlite_uri: str, wrong: str, enabled: bool | None) -> None:
    """P5: what has the wrong type raises InvalidPoint with what it is and what it must be; with
    strict=False it is counted, and the loop goes on."""
    call, words = WRONG_CALLS[wrong]
    run_id = make_run(sqlite_uri)
    if enabled is None or "dict" in words[-4:]:
        with MetricLogger(run_id, tracking_uri=sqlite_uri, enabled=enabled) as logger:
            with pytest.raises(InvalidPoint, match=words):
                call(logger)
            logger.log_metric("good", 1.0)
        assert logger.stats().delivered == 1
    with MetricLogger(run_id, tracking_uri=sqlite_uri, enabled=None, strict=False) as logger:
        handle = call(logger)
        assert handle.done()
        with pytest.raises(DeliveryError, match=words):
            handle.wait()
        logger.log_metric("good", 2.0)
    assert logger.stats().dropped == {"invalid": 1}
    assert logger.stats().delivered == 1


def test_whatever_has_items_is_a_dict(sqlite_uri: str) -> None:
    """What MLflow takes for a dict is one: a mapping of any class, and what only has `items()`."""

    class Pairs:
        def items(self) -> list[tuple[str, float]]:
            return [("a", 1.0)]

    run_id = make_run(sqlite_uri)
    with MetricLogger(run_id, tracking_uri=sqlite_uri) as logger:
        logger.log_metrics(MappingProxyType({"a": np.ones(1)}))  # type: ignore[arg-type]
        logger.log_metrics(Pairs())  # type: ignore[arg-type]
        logger.log_params(Pairs())  # type: ignore[arg-type]
    assert [one.value for one in history(sqlite_uri, run_id, "a")] == [1.0, 1.0]
    assert client(sqlite_uri).get_run(run_id).data.params == {"a": "1.0"}


@pytest.mark.parametrize("timeout", ["x", -1, -0.001, float("nan"), [], 1j], ids=str)
def test_what_is_no_timeout(tmp_path: Path, timeout: Any) -> None:
    """What waits says which time-outs there are, and does not wait for ever for a NaN."""
    logger = MetricLogger("run", spool_dir=tmp_path / "spool", offline=True)
    handle = logger.log_metric("a", 1.0)
    waits = (handle.wait, handle.exception, logger.flush, logger.close, flowbuffer.flush)
    for wait in waits:
        with pytest.raises(InvalidArgument, match=r"the timeout is .* it must be seconds, from 0"):
            wait(timeout)
    assert not logger.closed
    logger.close(np.float32(0))  # type: ignore[arg-type]
