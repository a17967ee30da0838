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
    FlowbufferError,
    Handle,
    InvalidArgument,
    InvalidPoint,
    MetricLogger,
    SettingError,
    Settings,
    SpoolFull,
    WaitTimeout,
)
from flowbuffer.logger import active_run
from flowbuffer.notices import tell_outage
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
            MetricLogger(wrong)


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
        lambda logger: logger.log_metrics({"a": np.ones(2)}),
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
        logger.log_metrics(MappingProxyType({"a": np.ones(1)}))
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


# What is told.


def test_a_handle_says_what_it_is_about(tmp_path: Path) -> None:
    """A handle, and a wait that is in vain, name keys, steps and the run, and no byte of a file."""
    logger = MetricLogger("run 7", spool_dir=tmp_path / "spool", offline=False, linger_s=3600)
    one = logger.log_metric("loss", 1.0, 3)
    many = logger.log_metrics({f"k{number}": 0.0 for number in range(5)}, 4)
    series = logger.log_series("lr", np.zeros(1500))
    parameter = logger.log_param("depth", 3)
    assert repr(one) == "<Handle of 'loss' at step 3 of run run 7>"
    assert repr(many) == (
        "<Handle of 5 points of run run 7: 'k0' at step 4, 'k1' at step 4, 'k2' at step 4, ...>"
    )
    assert repr(series) == "<Handle of 1,500 points of 'lr' of run run 7>"
    assert repr(parameter) == "<Handle of the parameter 'depth' of run run 7>"
    with pytest.raises(WaitTimeout, match=r"not delivered within 0 s: 'loss' at step 3 of run"):
        one.wait(0)
    logger.close(0)
    for path in (tmp_path / "spool").glob("*/*/*"):
        path.unlink()
    assert repr(one) == "<Handle of a point of run run 7>"
    assert repr(many) == "<Handle of 5 points of run run 7>"
    assert repr(Handle((None, "it was dropped"))) == "<Handle of points that were not stored>"


def test_what_is_dropped_is_told_when_it_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P6: with when_full="drop_newest" the first drop is told, once, with what helps; a full spool
    that raises says the same."""
    full = {"spool_dir": tmp_path / "spool", "offline": True, "max_spool_bytes": 1 << 20}
    with MetricLogger("run", **full, when_full="drop_newest") as logger:
        while not logger.stats().dropped:
            logger.log_series("k", np.zeros(10_000))
        logger.log_series("k", np.zeros(10_000))
    assert caplog.text.count("points are dropped (when_full='drop_newest')") == 1
    assert "flowbuffer status" in caplog.text
    logger = MetricLogger("run", **full, when_full="raise")
    with pytest.raises(SpoolFull, match=r"flowbuffer status, or raise max_spool_bytes"):
        logger.log_metric("k", 1.0)
    logger.close()


def test_an_outage_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever finds out that delivery of a run is held up, or goes on, it is told once, in one
    wording."""
    for _ in range(2):
        tell_outage("a", "")
        tell_outage("a", "503")
        tell_outage("a", "no connection")
        tell_outage("b", "503")
        tell_outage("a", "")
    said = [record.getMessage() for record in caplog.records]
    held_up = "delivery is held up, and the points are safe in the spool: 503"
    assert said == [
        f"run a: {held_up}",
        f"run b: {held_up}",
        "run a: delivery goes on",
        f"run a: {held_up}",
        "run a: delivery goes on",
    ]


@pytest.mark.parametrize("way", ["logger", "function"])
def test_a_server_that_is_down_is_told_soon(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Where a run has to be started and the server does not answer, that is an error after seconds
    and not after minutes, which says what helps."""
    monkeypatch.setattr(active_run, "_ANSWER_S", 0.2)
    mlflow.set_tracking_uri("http://user:hushhush@127.0.0.1:1")
    with pytest.raises(FlowbufferError, match="FLOWBUFFER_OFFLINE=1") as caught:
        MetricLogger() if way == "logger" else flowbuffer.log_metric("k", 1.0)
    assert str(caught.value).startswith("no run can be started: http://127.0.0.1:1 did not answer")
    assert "hushhush" not in str(caught.value)


def test_the_last_line_of_a_run_that_is_gone_is_true(
    sqlite_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """P7: nobody is told that a collector goes on where the run is gone: the last line names the
    server, and what helps."""
    run_id = make_run(sqlite_uri)
    logger = MetricLogger(run_id, tracking_uri=sqlite_uri)
    logger.log_metric("k", 1.0).wait(30)
    client(sqlite_uri).delete_run(run_id)
    logger.log_metric("k", 2.0)
    logger.close(30)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"1 point of run {run_id} cannot be delivered to {sqlite_uri}" in last
    assert f"restore it on {sqlite_uri}" in last
    assert f"flowbuffer clean --pending {run_id[:8]}" in last
    assert "goes on" not in last


def test_offline_nobody_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Offline, flush and close do not wait for what nobody delivers, and the last line says what
    does."""
    logger = MetricLogger("run", spool_dir=tmp_path / "spool", offline=True)
    logger.log_metric("k", 1.0)
    assert logger.flush(60).seconds < 30
    assert logger.close(60).seconds < 30
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1 point of run run is not delivered yet (flowbuffer is offline)" in last
    assert "flowbuffer sync --spool" in last
