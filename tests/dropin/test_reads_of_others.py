"""What reads runs finds what other processes with the same spool have logged to them, living or
dead, and waits for nothing that it cannot return."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import mlflow
import pytest
from mlflow import MlflowClient

import flowbuffer
from flowbuffer import MetricLogger, Settings
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.logger import others
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.producer_info import this_producer
from support.backends import MlflowServer, make_run
from support.jobs import StartJob


@pytest.fixture(autouse=True)
def loggers_of_others() -> Iterator[None]:
    """None of :class:`Elsewhere` passes between tests."""
    yield
    for logger in Elsewhere.loggers:
        logger.close(0)
    Elsewhere.loggers.clear()


WORKERS = """
    import signal
    import multiprocessing as mp
    from mlflow import MlflowClient

    def log(run_id):
        client = MlflowClient()
        for n in range(20):
            client.log_metric(run_id, "loss", float(20 - n), step=n)
        client.log_param(run_id, "p", 1)

    def log_and_die(run_id):
        log(run_id)
        os.kill(os.getpid(), signal.SIGKILL)

    def new_runs(count=3):
        return [MlflowClient().create_run("0").info.run_id for _ in range(count)]

    def best():
        found = mlflow.search_runs(["0"], "params.p = '1'", output_format="list")
        return sorted(run.data.metrics["loss"] for run in found)
"""


@pytest.mark.parametrize("delivery", ["thread", "process"])
def test_workers_of_a_pool_that_live(start_job: StartJob, delivery: str) -> None:
    """The parent made the runs, workers of a pool log to them and live on: the parent's search
    finds all of it, and so do get_run and get_metric_history."""
    job = start_job(
        WORKERS
        + """
    if __name__ == "__main__":
        with mp.get_context("fork").Pool(2) as pool:
            first = new_runs()
            pool.map(log, first)
            assert best() == [1.0] * 3, best()
            second = new_runs()
            pool.map(log, second)
            assert len(MlflowClient().get_metric_history(second[0], "loss")) == 20
            assert mlflow.get_run(second[1]).data.metrics == {"loss": 1.0}
            assert best() == [1.0] * 6
            pool.close()
            pool.join()
    """,
        FLOWBUFFER_ENABLED="1",
        FLOWBUFFER_DELIVERY=delivery,
        FLOWBUFFER_LINGER_S="3600",
    )
    ended = job.end(100)
    assert ended.status == 0, ended.err


@pytest.mark.parametrize("delivery", ["thread", "process"])
def test_killed_children(start_job: StartJob, delivery: str) -> None:
    """What a killed child left is delivered by whoever reads, who has logged nothing itself."""
    job = start_job(
        WORKERS
        + """
    if __name__ == "__main__":
        children = [mp.get_context("fork").Process(target=log_and_die, args=(run_id,))
                    for run_id in new_runs(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert best() == [1.0] * 2, best()
    """,
        FLOWBUFFER_ENABLED="1",
        FLOWBUFFER_DELIVERY=delivery,
        FLOWBUFFER_LINGER_S="3600",
    )
    ended = job.end(100)
    assert ended.status == 0, ended.err


def test_a_job_that_was_started_apart(start_job: StartJob, sqlite_uri: str) -> None:
    """A process of its own, with an environment of its own, that is still logging."""
    mlflow.set_tracking_uri(sqlite_uri)
    job = start_job(
        """
        logger = MetricLogger(RUN, settings=Settings(linger_s=3600.0))
        logger.log_metric("k", 1.0)
        say("logged")
        hear()
        """,
        SOMETHING="else",
    )
    job.expect("logged")
    flowbuffer.enable()
    assert list(mlflow.search_runs(["0"])["metrics.k"]) == [1.0]


# What is not waited for.


class Elsewhere:
    """Another process's folder, in which a point waits for ever."""

    loggers: ClassVar[list[MetricLogger]] = []

    def __init__(self, spool: Path, uri: str, run_id: str) -> None:
        self.settings = Settings(spool_dir=spool, offline=True)
        self.logger = MetricLogger(run_id, tracking_uri=uri, settings=self.settings)
        self.loggers.append(self.logger)
        self.logger.log_metric("k", 1.0)
        folder = self.logger.folder
        assert folder is not None
        (folder / "parked.json").unlink()
        info = this_producer(run_id, uri, 0, delivery="thread")
        (folder / "producer.json").write_bytes(info.to_json())
        self.folder = folder

    def fail(self, words: str) -> None:
        """Delivery is held up."""
        (self.folder / "delivery.json").write_text(f'{{"last_error": "{words}"}}')


def seconds(read: Any) -> float:
    start_s = SYSTEM_CLOCK.monotonic_s()
    read()
    return SYSTEM_CLOCK.monotonic_s() - start_s


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each wait was allowed to last, in s; none lasts in fact."""
    found: list[float] = []

    def wait_until(over: Any, deadline_s: float, *_: Any) -> bool:
        if not over():
            found.append(round(deadline_s - SYSTEM_CLOCK.monotonic_s(), 0))
        return bool(over())

    monkeypatch.setattr(SYSTEM_CLOCK, "wait_until", wait_until)
    return found


def test_a_server_that_is_gone(sqlite_uri: str, tmp_path: Path, waits: list[float]) -> None:
    """Folders of another server's runs hold up no read."""
    mlflow.set_tracking_uri(sqlite_uri)
    make_run(sqlite_uri)
    Elsewhere(tmp_path / "spool", "http://127.0.0.1:1", "r")
    flowbuffer.enable()
    mlflow.search_runs(["0"])
    MlflowClient().search_logged_models(["0"])
    assert waits == []


def test_another_experiment(sqlite_uri: str, tmp_path: Path, waits: list[float]) -> None:
    """A search waits for the runs of its experiments; for others no longer than a moment."""
    mlflow.set_tracking_uri(sqlite_uri)
    own = MlflowClient()
    experiment_id = own.create_experiment("another")
    Elsewhere(tmp_path / "spool", sqlite_uri, own.create_run(experiment_id).info.run_id)
    flowbuffer.enable(read_timeout_s=20.0)
    mlflow.search_runs(["0"])
    assert waits == [0.0]  # 0.5 s
    mlflow.search_runs(["0", experiment_id])
    assert waits == [0.0, 0.0, 20.0]


def test_what_was_waited_for_in_vain(
    sqlite_uri: str, tmp_path: Path, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """What is known to be held up is waited for once, and again as soon as that has changed."""
    mlflow.set_tracking_uri(sqlite_uri)
    stuck = Elsewhere(tmp_path / "spool", sqlite_uri, make_run(sqlite_uri))
    stuck.fail("the server is down")
    flowbuffer.enable(read_timeout_s=20.0)
    with caplog.at_level(logging.WARNING, "flowbuffer"):
        for _ in range(3):
            mlflow.search_runs(["0"])
    assert waits == [0.0, 20.0]
    assert caplog.text.count("not all that was logged") == 1
    stuck.fail("something else")
    mlflow.search_runs(["0"])
    assert waits == [0.0, 20.0] * 2


def test_a_spool_of_many_folders_is_looked_at_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that comes again reads nothing of the folders that were there before."""
    spool = Spool(tmp_path / "spool")
    for number in range(50):
        info = this_producer(f"run{number}", "http://one/" if number % 2 else "http://two", 0)
        folder = spool.add_producer(info).path
        os.utime(folder.parent, ns=(1, 1))
    assert len(others.folders_of_server(spool.root, "http://one")) == 25
    monkeypatch.setattr(others, "read_info", None)
    assert len(others.folders_of_server(spool.root, "http://one")) == 25
    assert len(others.folders_under_url(spool.root, "http://two/api/2.0/mlflow/runs/search")) == 25
    monkeypatch.undo()
    spool.add_producer(this_producer("run1", "http://one", 0))
    assert len(others.folders_of_server(spool.root, "http://one")) == 26


def test_a_read_over_http(server_sqlite: MlflowServer, tmp_path: Path, waits: list[float]) -> None:
    """MLflow's own request for one run waits for nothing but that run; a plain request, of which
    nothing is known, for all runs of the server."""
    import requests

    mlflow.set_tracking_uri(server_sqlite.uri)
    run_id = make_run(server_sqlite.uri)
    Elsewhere(tmp_path / "spool", server_sqlite.uri, make_run(server_sqlite.uri))
    flowbuffer.enable(read_timeout_s=20.0)
    MlflowClient().get_run(run_id)
    assert waits == []
    requests.get(f"{server_sqlite.uri}/api/2.0/mlflow/runs/get", {"run_id": run_id}, timeout=30)
    assert waits == [20.0]
