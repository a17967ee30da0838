"""A run that is gone from the server may be restored, and is then delivered to soon (P5, P7)."""

from __future__ import annotations

import threading
from pathlib import Path

import mlflow
import pytest

from flowbuffer import MetricLogger, Settings
from flowbuffer.backends.mlflow_transport import Request
from flowbuffer.errors import RejectedError, RunGoneError, TransportError
from flowbuffer.logger.active_run import find_run
from flowbuffer.spool.notes import park, parked_reason
from flowbuffer.testing import FakeTransport
from support.backends import client, history
from support.small_spool import SmallSpool


def test_who_waits_has_a_gone_run_tried_again_soon(tmp_path: Path) -> None:
    """However long a run has been gone, it is tried a second after the last try when someone asks,
    and once for each time that someone asks."""
    gone: list[TransportError] = [RunGoneError("404 no such run")]
    transport = FakeTransport(answer=lambda _: gone[0] if gone else None)
    spool = SmallSpool(tmp_path, transport)
    spool.producer.append("loss", 1.0)
    spool.deliver(seconds=400.0)  # tried after 0, 5, 15, 35, 75, 155 and 315 s
    assert len(transport.requests) == 7
    spool.clock.turn(2.0)
    park(spool.directory.path, None)  # as `flush` does
    spool.sender.step()  # asks
    spool.sender.step()  # has the answer
    assert len(transport.requests) == 8
    assert parked_reason(spool.directory.path) == "404 no such run"  # who waits stops waiting
    spool.deliver(seconds=60.0)
    assert len(transport.requests) == 8
    gone.clear()
    park(spool.directory.path, None)
    spool.deliver(seconds=2.0)
    assert spool.values("loss") == [1.0]
    assert parked_reason(spool.directory.path) is None


def test_the_tries_of_who_waits_are_a_second_apart(tmp_path: Path) -> None:
    """Many that wait for a gone run do not make it one request after another."""

    def answer(_: Request) -> TransportError:
        return RunGoneError("404 no such run")

    transport = FakeTransport(answer=answer)
    spool = SmallSpool(tmp_path, transport)
    spool.producer.append("loss", 1.0)
    for _ in range(40):
        park(spool.directory.path, None)
        spool.sender.step(hurry=True)
        spool.clock.turn(0.1)
    assert 4 <= len(transport.requests) <= 5


def test_a_restored_experiment(sqlite_uri: str) -> None:
    """P7: what was logged while the experiment was deleted is delivered by the first flush after it
    is restored."""
    store = client(sqlite_uri)
    experiment_id = store.create_experiment("restored")
    run_id = store.create_run(experiment_id).info.run_id
    settings = Settings.from_env(delivery="thread", linger_s=0.01)
    with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings) as logger:
        store.delete_experiment(experiment_id)
        logger.log_metric("loss", 1.0)
        assert logger.flush(timeout=30).pending == 1
        assert logger.flush(timeout=30).pending == 1
        store.restore_experiment(experiment_id)
        report = logger.flush(timeout=30)
        assert (report.delivered, report.pending, report.rejected) == (1, 0, 0)
    assert [m.value for m in history(sqlite_uri, run_id, "loss")] == [1.0]


def test_a_new_experiment_is_found_by_all_who_create_it(
    sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loggers that start at once in an experiment that none of them finds are all in the same."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "brand new")
    go, runs, errors = threading.Barrier(4), [], []

    def start() -> None:
        go.wait()
        try:
            runs.append(find_run(None, sqlite_uri, start=True)[0])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = {client(sqlite_uri).get_run(run).info.experiment_id for run in runs}
    assert len(runs) == 4
    assert len(found) == 1


def test_a_deleted_experiment_is_said(sqlite_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that MLflow keeps for a deleted experiment is told from one that is free."""
    store = mlflow.MlflowClient(sqlite_uri)
    store.delete_experiment(store.create_experiment("old"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "old")
    with pytest.raises(RejectedError, match="'old' is deleted: restore it"):
        find_run(None, sqlite_uri, start=True)
