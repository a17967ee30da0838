"""What the benchmarks share: processes of their own, stores, and figures.

Importing it costs a process that is measured next to nothing: what is needed of MLflow and of
tests/support is imported by whoever calls.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

if TYPE_CHECKING:
    from support.backends import MlflowServer

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when MLflow is imported

#: How long the collector process may take to deliver everything, in s.
COLLECTOR_S = 120.0


# ---------------------------------------------------------------- processes


def run_again(
    *arguments: object, spool: Path, stderr: int | None = None, **environment: str
) -> str:
    """Run the program that calls once more, in a process of its own on a spool of its own; what it
    printed."""
    done = subprocess.run(
        [sys.executable, sys.argv[0], *map(str, arguments)],
        env=os.environ | {"FLOWBUFFER_SPOOL_DIR": str(spool), **environment},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=True,
    )
    return done.stdout


def environment_of_a_stranger(**more: str) -> dict[str, str]:
    """The environment for a process that knows nothing of this one's settings, and ``more``."""
    from support.backends import FOREIGN_SETTINGS

    own = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_SETTINGS)}
    return {**own, "MLFLOW_DISABLE_TELEMETRY": "true", **more}


def await_collector(spool: Path) -> None:
    """Until the collector process has delivered and ended; one that cannot is killed."""
    from support.collectors import end_collector, is_free
    from support.waiting import wait_until

    try:
        wait_until(lambda: is_free(spool), COLLECTOR_S)
    except TimeoutError:
        print("the collector process had not delivered everything", file=sys.stderr)
        end_collector(spool)


def settle_mlflow(level: int = logging.WARNING) -> None:
    """Import MLflow, so that its size and its logging are settled before, and have it say nothing
    about the tables that it creates in a new file."""
    import mlflow  # noqa: F401

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(level)


# ---------------------------------------------------------------- stores


class Store(NamedTuple):
    """A fresh store: where to log to, and the database that is behind it."""

    name: str
    uri: str
    database: Path


@contextmanager
def fresh_server() -> Iterator["MlflowServer"]:
    """A real MLflow server on a fresh SQLite store."""
    from support.backends import MlflowServer, new_sqlite

    with tempfile.TemporaryDirectory() as folder:
        uri = new_sqlite(Path(folder) / "mlflow.db")
        with MlflowServer(uri, Path(folder)) as server:
            yield server


@contextmanager
def fresh_stores(names: Collection[str] = ("SQLite", "server")) -> Iterator[list[Store]]:
    """A SQLite file, and a real MLflow server on another one."""
    from support.backends import MlflowServer, new_sqlite

    with tempfile.TemporaryDirectory() as folder:
        direct, behind = Path(folder) / "direct.db", Path(folder) / "behind.db"
        found = [Store("SQLite", new_sqlite(direct), direct)] if "SQLite" in names else []
        if "server" not in names:
            yield found
            return
        with MlflowServer(new_sqlite(behind), Path(folder)) as server:
            yield [*found, Store("server", server.uri, behind)]


# ---------------------------------------------------------------- figures


def medians(rows: Iterable[Sequence[float]]) -> list[float]:
    """Of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def load() -> str:
    """How busy the machine is."""
    return f"load {' '.join(f'{one:.1f}' for one in os.getloadavg())}"


def append_json(file: Path | None, objects: Iterable[object]) -> None:
    """For ``--json``: an object a line; nothing without a file."""
    if file:
        with file.open("a") as lines:
            lines.writelines(json.dumps(one) + "\n" for one in objects)
