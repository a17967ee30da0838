"""MetricLogger, on a real SQLite store: what it counts, forgives and passes through."""

from __future__ import annotations

import logging
import math
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import mlflow
import numpy as np
import pytest

import flowbuffer
from flowbuffer import (
    DeliveryError,
    FlowbufferError,
    InvalidPoint,
    MetricLogger,
    Settings,
    SpoolError,
)
from flowbuffer.spool import folders
from flowbuffer.spool.files import FileLock
from support.backends import history, make_run
from support.waiting import PATIENCE_S, wait_until


@pytest.fixture
def run_id(sqlite_uri: str) -> str:
    mlflow.set_tracking_uri(sqlite_uri)
    return make_run(sqlite_uri)


def values(uri: str, run_id: str, key: str) -> list[float]:
    return [metric.value for metric in history(uri, run_id, key)]


def test_what_is_logged_arrives(sqlite_uri: str, run_id: str) -> None:
    """The three calls, with every kind of value, on the active tracking URI."""
    with MetricLogger(run_id) as logger:
        logger.log_metric("a", np.float32(0.5), step=np.int64(3)).wait(PATIENCE_S)
        logger.log_metrics({"a": True, "b": float("nan")}, 4)
        logger.log_series("c", np.arange(3), steps=[5, 6, 7]).wait(PATIENCE_S)
    assert [(m.value, m.step) for m in history(sqlite_uri, run_id, "a")] == [(0.5, 3), (1.0, 4)]
    assert math.isnan(values(sqlite_uri, run_id, "b")[0])
    assert [(m.value, m.step) for m in history(sqlite_uri, run_id, "c")] == [(0, 5), (1, 6), (2, 7)]


def test_the_counts(run_id: str) -> None:
    """flush and stats count what became of every point."""
    logger = MetricLogger(run_id)
    for step in range(100):
        logger.log_metric("k", step, step)
    logger.log_series("s", [1.0] * 50)
    report = logger.flush(PATIENCE_S)
    assert (report.delivered, report.rejected, report.pending) == (150, 0, 0)
    stats = logger.stats()
    assert (stats.delivered, stats.lag_s, stats.last_error) == (150, 0.0, "")
    assert stats.backlog_bytes > 0
    assert logger.close().delivered == 150


def test_an_invalid_point_touches_no_other(sqlite_uri: str, run_id: str) -> None:
    """P5: the bad ones raise, each named, and the good ones of the same call are logged."""
    with MetricLogger(run_id) as logger:
        with pytest.raises(InvalidPoint, match=r"'bad'.*'x y\?'"):
            logger.log_metrics({"good": 1, "bad": "text", "x y?": 2, "fine": 3})
        with pytest.raises(InvalidPoint, match="step"):
            logger.log_metric("good", 1, step=1 << 63)
        with pytest.raises(InvalidPoint, match="dimensions"):
            logger.log_series("good", [[1.0]])
    assert values(sqlite_uri, run_id, "good") == [1.0]
    assert values(sqlite_uri, run_id, "fine") == [3.0]


def test_not_strict_counts_and_goes_on(
    sqlite_uri: str, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """strict=False: invalid points are counted, warned of once per key, and the loop goes on."""
    with MetricLogger(run_id, settings=Settings.from_env(strict=False)) as logger:
        with caplog.at_level(logging.WARNING, "flowbuffer"):
            for _ in range(5):
                handle = logger.log_metric("bad", "text")  # type: ignore[arg-type]
        assert caplog.text.count("'bad'") == 1
        with pytest.raises(DeliveryError, match="text is no number"):
            handle.wait(0)
        mixed = logger.log_metrics({"good": 1, "worse": "text"})  # type: ignore[dict-item]
        assert mixed.exception(PATIENCE_S) is not None
        logger.log_metric("good", 2).wait(PATIENCE_S)
        assert logger.stats().dropped == {"invalid": 6}
    assert values(sqlite_uri, run_id, "good") == [1.0, 2.0]


def test_disabled_is_plain_mlflow(
    sqlite_uri: str, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLOWBUFFER_ENABLED=0: the same calls go straight to MLflow, and are stored when they return,
    whatever MLflow is told of asynchronous logging; no spool is made."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    with MetricLogger(run_id, settings=Settings.from_env(enabled=False)) as logger:
        assert logger.log_metric("k", 1.0, step=2).done()
        assert values(sqlite_uri, run_id, "k") == [1.0]
        logger.log_metrics({"k": 2.0}, 3).wait()
        logger.log_series("s", [1.0, 2.0, 1.0]).wait()
        assert values(sqlite_uri, run_id, "s") == [1.0, 2.0, 1.0]
        with pytest.raises(mlflow.MlflowException):
            logger.log_metric("k?", 1.0)
        assert logger.flush().delivered == 5
    assert not (tmp_path / "spool").exists()


def test_another_file_in_the_place_of_the_database(sqlite_uri: str, run_id: str) -> None:
    """What is logged after a SQLite file was replaced goes to the file that is there; one that was
    deleted is not made anew, and the points wait."""
    database = Path(sqlite_uri.removeprefix("sqlite:///"))
    with MetricLogger(run_id) as logger:
        logger.log_metric("k", 1.0).wait(PATIENCE_S)
        shutil.copyfile(database, "copy.db")
        Path("copy.db").replace(database)
        logger.log_metric("k", 2.0).wait(PATIENCE_S)
        with closing(sqlite3.connect(database)) as connection:
            stored = connection.execute("SELECT value FROM metrics ORDER BY timestamp").fetchall()
        assert stored == [(1.0,), (2.0,)]
        database.unlink()
        logger.log_metric("k", 3.0)
        assert logger.flush(PATIENCE_S).pending == 1
        assert logger.stats().last_error == f"the database {database} does not exist"
        assert not database.exists()


def test_inline_delivers_in_the_call(sqlite_uri: str, run_id: str) -> None:
    """delivery="inline": when the call returns, the point is in the backend."""
    with MetricLogger(run_id, settings=Settings.from_env(delivery="inline")) as logger:
        for value in (1.0, 2.0, 1.0):
            assert logger.log_metric("k", value).done()
            assert values(sqlite_uri, run_id, "k")[-1] == value


def test_durable_against_power_loss(sqlite_uri: str, run_id: str) -> None:
    """durability="power" changes nothing but the cost of a call."""
    with MetricLogger(run_id, settings=Settings.from_env(durability="power")) as logger:
        logger.log_metric("k", 1.0)
        logger.log_metrics({"k": 2.0, "j": 0.0})
        logger.log_series("k", [3.0, 4.0])
    assert values(sqlite_uri, run_id, "k") == [1.0, 2.0, 3.0, 4.0]


def test_a_closed_logger_refuses(run_id: str) -> None:
    """A closed logger says so, and its handles still answer."""
    logger = MetricLogger(run_id)
    handle = logger.log_metric("k", 1.0)
    logger.close()
    handle.wait(0)
    with pytest.raises(FlowbufferError, match="closed"):
        logger.log_metric("k", 2.0)


def test_a_folder_is_deleted_when_close_returns(
    run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever delivers in this process is not stopped by its end in the middle of a deletion."""
    delete = folders._delete

    def slowly(folder: Path) -> None:
        threading.Event().wait(0.2)
        delete(folder)

    monkeypatch.setattr(folders, "_delete", slowly)
    logger = MetricLogger(run_id)
    logger.log_metric("k", 1.0)
    logger.close()
    assert list((tmp_path / "spool").glob("*/*")) == []


def test_nothing_is_left_on_the_disk(run_id: str, tmp_path: Path) -> None:
    """P6: once everything is delivered and the logger is closed, its folder is gone."""
    with MetricLogger(run_id) as logger:
        logger.log_metric("k", 1.0)
        assert len(list((tmp_path / "spool" / run_id).iterdir())) == 1
    assert not (tmp_path / "spool" / run_id).exists()


def test_the_spool_is_private(run_id: str, tmp_path: Path) -> None:
    """P8: folders are 0700, files 0600, and no credential of the tracking URI is in them."""
    uri = "http://me:hunter2@127.0.0.1:1"
    logger = MetricLogger(run_id, tracking_uri=uri)
    logger.log_metric("k", 1.0)
    logger.log_series("k", [1.0])
    # What ends in .new gets its name in a moment, from whoever delivers.
    found = [path for path in (tmp_path / "spool").rglob("*") if path.suffix != ".new"]
    assert len(found) >= 7
    for path in [tmp_path / "spool", *found]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
        assert path.is_dir() or b"hunter2" not in path.read_bytes()
    assert logger.close(0).pending == 2


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_spool_open_to_others_is_refused(run_id: str, tmp_path: Path, mode: int) -> None:
    """P8: a spool that others can enter is refused, with what to do."""
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool").chmod(mode)
    with pytest.raises(SpoolError, match="chmod -R go-rwx"):
        MetricLogger(run_id)


def test_a_spool_behind_a_link_is_refused(run_id: str, tmp_path: Path) -> None:
    """P8: links are not followed."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "spool").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpoolError, match="links are not followed"):
        MetricLogger(run_id)


def test_a_network_file_system_is_refused(run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spool on NFS or FUSE is refused, and the message names the setting that moves it."""
    monkeypatch.setattr("flowbuffer.spool.folders.file_system_of", lambda _: "nfs4")
    with pytest.raises(SpoolError, match="FLOWBUFFER_SPOOL_DIR"):
        MetricLogger(run_id)


def test_the_run_of_a_logger(sqlite_uri: str, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """run_id=None: the active run, else MLFLOW_RUN_ID, else one that close() ends."""
    with mlflow.start_run() as run, MetricLogger() as logger:
        assert logger.run_id == run.info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with MetricLogger() as logger:
        assert logger.run_id == run_id
    assert mlflow.get_run(run_id).info.status == "RUNNING"
    monkeypatch.delenv("MLFLOW_RUN_ID")
    with MetricLogger() as logger:
        assert mlflow.active_run().info.run_id == logger.run_id
    assert mlflow.active_run() is None
    assert mlflow.get_run(logger.run_id).info.status == "FINISHED"
    with MetricLogger(tracking_uri=sqlite_uri) as logger:
        logger.log_metric("k", 1.0)
    assert mlflow.get_run(logger.run_id).info.status == "FINISHED"
    assert values(sqlite_uri, logger.run_id, "k") == [1.0]


@pytest.mark.usefixtures("run_id")
def test_a_failed_block_is_a_failed_run() -> None:
    """A logger that started its run ends it as FAILED when its block raised."""
    with pytest.raises(ZeroDivisionError), MetricLogger() as logger:
        logger.log_metric("k", 1 / 0)
    assert mlflow.get_run(logger.run_id).info.status == "FAILED"


@pytest.mark.usefixtures("run_id")
def test_the_fluent_functions(sqlite_uri: str) -> None:
    """flowbuffer.log_metric and the others log to the active run, whichever it is."""
    for value in (1.0, 2.0):
        with mlflow.start_run() as run:
            flowbuffer.log_metric("k", value)
            flowbuffer.log_metrics({"j": value})
            flowbuffer.log_series("s", [value, value])
            assert flowbuffer.flush(PATIENCE_S).pending == 0
            assert flowbuffer.stats().delivered == 5 * value - 1  # of all runs so far
            flowbuffer.log_metric("k", -value)
        assert values(sqlite_uri, run.info.run_id, "k") == [value, -value]
    flowbuffer.log_metric("k", 3.0).wait(PATIENCE_S)
    assert mlflow.active_run() is not None


@pytest.mark.parametrize(
    ("delivery", "where"),
    [
        ("thread", "logger.metric_logger.Spooling"),
        ("inline", "logger.metric_logger.Spooling"),
        ("thread", "logger.metric_logger.job_end.watch"),
        ("inline", "logger.metric_logger.job_end.watch"),
        ("inline", "spool.reading.reader.is_there"),
        ("inline", "delivery.stream.Reader"),
    ],
)
def test_an_opening_that_is_interrupted_holds_nothing(
    sqlite_uri: str, monkeypatch: pytest.MonkeyPatch, delivery: str, where: str
) -> None:
    """Ctrl-C while a logger is made leaves its folder to others: this process holds no lock of it,
    though somebody may keep the exception, and the next logger works."""
    run_id = make_run(sqlite_uri)
    settings = Settings.from_env(delivery=delivery)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"flowbuffer.{where}", interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:
            MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings)
    locks = list(settings.resolved_spool_dir().glob("**/*.lock"))
    wait_until(lambda: not any(lock.exists() and FileLock.is_held(lock) for lock in locks))
    assert kept.value.__traceback__ is not None
    with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings) as logger:
        logger.log_metric("loss", 1.0)
    assert [metric.value for metric in history(sqlite_uri, run_id, "loss")] == [1.0]
