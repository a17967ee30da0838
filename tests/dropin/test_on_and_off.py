"""The switch goes on and off, for what a program took from MLflow before or meanwhile, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.tracking import fluent
from mlflow.tracking._tracking_service.client import TrackingServiceClient
from mlflow.utils.async_logging.run_operations import RunOperations

import flowbuffer
from flowbuffer import SettingError
from support.backends import make_run
from support.stored import rows, stored
from support.switch import HELD, values
from support.waiting import wait_until

FLUENT = ("log_metric", "log_metrics", "log_param", "log_params", "set_tag", "set_tags")
METHODS = ("log_metric", "log_param", "set_tag", "log_batch")


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
