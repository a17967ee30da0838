"""A relative tracking URI means what MLflow's own store of it means, wherever the program goes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

import flowbuffer
from flowbuffer import MetricLogger
from support.backends import copy_sqlite
from support.jobs import StartJob


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracking URI passes between tests, and stores of files are allowed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that it is taken back
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


class Site:
    """Two folders, each with a database of one name, which no other test's database has: MLflow's
    engine of a URI lives as long as the process."""

    def __init__(self, template: Path, root: Path) -> None:
        self.name = f"{root.parent.name}-{root.name}.db"
        self.uri = f"sqlite:///{self.name}"
        self.here, self.there = root / "here", root / "there"
        for folder in (self.here, self.there):
            copy_sqlite(template, folder / self.name)
        os.chdir(self.here)

    def stored(self) -> list[int]:
        """The metrics in each database."""
        counts = []
        for folder in (self.here, self.there):
            with closing(sqlite3.connect(folder / self.name, timeout=30)) as connection:
                counts += connection.execute("SELECT count(*) FROM metrics").fetchone()
        return counts


def log_three() -> None:
    mlflow.log_metric("k", 1.0)
    mlflow.log_metrics({"k": 2.0}, step=1)
    run = mlflow.active_run()
    MlflowClient().log_metric(run.info.run_id, "k", 3.0, step=2)


def go_after_start(site: Site) -> None:
    mlflow.set_tracking_uri(site.uri)
    mlflow.start_run()
    os.chdir(site.there)
    log_three()


def go_after_first_call(site: Site) -> None:
    mlflow.set_tracking_uri(site.uri)
    mlflow.start_run()
    mlflow.log_metric("first", 1.0)
    os.chdir(site.there)
    log_three()


def go_before_start(site: Site) -> None:
    mlflow.set_tracking_uri(site.uri)
    os.chdir(site.there)
    mlflow.start_run()
    log_three()


def go_before_start_after_a_look(site: Site) -> None:
    mlflow.set_tracking_uri(site.uri)
    mlflow.get_experiment("0")
    os.chdir(site.there)
    mlflow.start_run()
    log_three()


def go_with_a_uri_in_the_environment(site: Site) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = site.uri
    mlflow.start_run()
    os.chdir(site.there)
    log_three()


def go_with_a_path_that_goes_up(site: Site) -> None:
    mlflow.set_tracking_uri(f"sqlite:///../here/{site.name}")
    mlflow.start_run()
    os.chdir(site.there.parent)
    log_three()


def go_with_new_connections(site: Site) -> None:
    go_after_first_call(site)
    MlflowClient()._tracking_client.store.engine.dispose()
    log_three()


def go_with_a_path_that_sqlite_resolves(site: Site) -> None:
    mlflow.set_tracking_uri(f"sqlite:///file:{site.name}?uri=true")
    mlflow.start_run()
    os.chdir(site.there)
    log_three()


def go_with_no_uri(site: Site) -> None:
    for folder in (site.here, site.there):
        Path(folder / site.name).rename(folder / "mlflow.db")  # MLflow's default
        (folder / site.name).symlink_to("mlflow.db")
    mlflow.start_run()
    mlflow.log_metric("k", 1.0)
    os.chdir(site.there)
    log_three()


def go_with_a_folder(site: Site) -> None:
    mlflow.set_tracking_uri(f"./{site.name} runs")
    mlflow.start_run()
    mlflow.log_metric("k", 1.0)
    os.chdir(site.there)
    log_three()


def go_with_a_folder_uri(site: Site) -> None:
    mlflow.set_tracking_uri(f"file:{site.name}%20of%20a%20URI")
    run = mlflow.start_run()
    log_three()
    os.chdir(site.there)
    with suppress(Exception):
        mlflow.log_metric("k", 1.0)
    os.chdir(site.here)
    log_three()
    assert len(MlflowClient().get_metric_history(run.info.run_id, "k")) == 6


GOES: dict[str, Callable[[Site], None]] = {
    name.removeprefix("go_").replace("_", " "): go
    for name, go in list(globals().items())
    if name.startswith("go_")
}


def outcome(go: Callable[[Site], None], site: Site) -> object:
    """What the program raises, and what is in each database when its run has ended."""
    raised: object = None
    try:
        go(site)
    except Exception as error:
        raised = type(error), str(error).split("=")[0].replace(site.name, "NAME")
    try:
        mlflow.end_run()
    except Exception as error:
        raised = raised, type(error)
    flowbuffer.disable()
    mlflow.set_tracking_uri(None)
    return raised, site.stored()


@pytest.mark.parametrize("go", GOES.values(), ids=GOES)
def test_a_program_that_changes_its_directory(
    go: Callable[[Site], None], sqlite_template: Path, tmp_path: Path
) -> None:
    """Points land where MLflow's own calls would store them, whenever the program changes its
    working directory; where those raise, the same is raised."""
    stock = outcome(go, Site(sqlite_template, tmp_path / "stock"))
    flowbuffer.enable()
    assert outcome(go, Site(sqlite_template, tmp_path / "on")) == stock


def test_a_logger_keeps_its_database(sqlite_template: Path, tmp_path: Path) -> None:
    """A MetricLogger with a relative URI delivers to the database in which its run is, from every
    directory, also unpickled."""
    site = Site(sqlite_template, tmp_path / "on")
    with MetricLogger(tracking_uri=site.uri) as logger:
        os.chdir(site.there)
        logger.log_metric("k", 1.0)
        with pickle.loads(pickle.dumps(logger)) as copy:
            copy.log_metric("k", 2.0)
        assert MlflowClient(site.uri).get_run(logger.run_id).data.metrics == {"k": 2.0}
    assert site.stored() == [2, 0]


def test_an_offline_logger_names_the_database_of_its_directory(
    sqlite_template: Path, tmp_path: Path
) -> None:
    """A logger whose store MLflow has not made means the database in its own directory."""
    site = Site(sqlite_template, tmp_path / "on")
    settings = flowbuffer.Settings(spool_dir=tmp_path / "spool", offline=True)
    with MetricLogger("r", tracking_uri=site.uri, settings=settings) as logger:
        os.chdir(site.there)
        assert logger._uri == f"sqlite:///{site.here / site.name}"


def log_in_child(there: Path) -> None:
    os.chdir(there)
    log_three()


def test_a_forked_child_that_changes_its_directory(sqlite_template: Path, tmp_path: Path) -> None:
    """A forked child logs to the database of its parent's run."""
    site = Site(sqlite_template, tmp_path / "on")
    flowbuffer.enable()
    mlflow.set_tracking_uri(site.uri)
    with mlflow.start_run():
        mlflow.log_metric("first", 1.0)
        child = multiprocessing.get_context("fork").Process(target=log_in_child, args=(site.there,))
        child.start()
        child.join()
        assert child.exitcode == 0
        log_in_child(site.there)
    assert site.stored() == [7, 0]


def test_the_collector_process_agrees(start_job: StartJob, tmp_path: Path) -> None:
    """The collector process, whose directory is its own, delivers to the job's database."""
    (tmp_path / "work").mkdir()
    job = start_job(
        """
        import os, mlflow
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        with mlflow.start_run() as run:
            os.chdir("work")
            for n in range(5):
                mlflow.log_metric("k", n, step=n)
        assert mlflow.get_run(run.info.run_id).data.metrics == {"k": 4.0}
        """,
        FLOWBUFFER_ENABLED="1",
        FLOWBUFFER_DELIVERY="process",
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    assert not (tmp_path / "work" / "mlflow.db").exists()
