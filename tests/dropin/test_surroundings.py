"""A rank that does not log, a spool that cannot be used, a server that is down."""

from __future__ import annotations

import logging
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.utils.async_logging.run_operations import RunOperations

import flowbuffer
from support.backends import make_run
from support.stored import rows
from support.switch import T


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
