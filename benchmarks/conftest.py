"""An environment of its own for each benchmark, real backends, and the table of targets at the end.

A target is printed beside what was measured; it never fails a run, because a busy machine would.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shared import load
from support.backends import FOREIGN_SETTINGS, MlflowServer, copy_sqlite, new_sqlite

Report = Callable[..., None]

_lines = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flowbuffer")
    group.addoption(
        "--points", type=int, default=50_000, help="of a delivery benchmark (default: %(default)s)"
    )
    group.addoption(
        "--pairs", type=int, default=3, help="how often both sides are run (default: %(default)s)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_lines] = []


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Report:
    """Adds a line to the table: `report("a / b", 1.5, "at most", 2, "150 ns / 100 ns")`."""

    def add(
        what: str, measured: float, bound: str = "", target: float | None = None, note: str = ""
    ) -> None:
        verdict = ""
        if target is not None:
            met = measured <= target if bound == "at most" else measured >= target
            verdict = "met" if met else "MISSED"
        goal = f"{bound} {target:g}" if target is not None else ""
        line = f"{what:<64} {measured:>8.4g}  {goal:<13} {verdict:<7} {note}"
        pytestconfig.stash[_lines].append(line.rstrip())

    return add


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.stash[_lines]:
        terminalreporter.section("targets")
        terminalreporter.line(
            f"CPython {platform.python_version()}, {os.cpu_count()} CPUs, {load()}"
        )
        terminalreporter.line(f"{'':<64} {'measured':>8}  {'target':<13}")
        for line in config.stash[_lines]:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting, working directory, spool or active run passes between benchmarks."""
    for name in list(os.environ):
        if name.startswith(FOREIGN_SETTINGS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("FLOWBUFFER_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.chdir(tmp_path)
    yield
    if mlflow := sys.modules.get("mlflow"):
        while mlflow.active_run():
            with suppress(mlflow.MlflowException):
                mlflow.end_run()
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh SQLite store to copy."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    new_sqlite(path)
    return path


@pytest.fixture
def sqlite_uri(sqlite_template: Path, tmp_path: Path) -> str:
    """The URI of a fresh SQLite store."""
    return copy_sqlite(sqlite_template, tmp_path / "mlflow.db")


@pytest.fixture(scope="session")
def server_uri(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a real MLflow server with four workers on a SQLite store."""
    directory = tmp_path_factory.mktemp("server")
    uri = copy_sqlite(sqlite_template, directory / "mlflow.db")
    with MlflowServer(uri, directory, workers=4) as server:
        yield server.uri
