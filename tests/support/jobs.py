"""Jobs: real processes that log and end, and a look at what their store holds meanwhile."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from support.waiting import PATIENCE_S


@dataclass
class Ended:
    """How a job ended."""

    status: int
    out: str
    err: str
    seconds: float
    """from the moment at which it said "ending" (or was made) to its end"""


class Job:
    """A Python process that logs; its spool is that of the test.

    `code` is the program, kept in `script`. It finds the run in RUN, tells the test a word with
    `say`, and waits for one with `hear`.
    """

    BEGIN = """
    import os, sys, threading, time
    import flowbuffer, mlflow
    from flowbuffer import MetricLogger, Settings

    RUN = os.environ["RUN"]

    def say(word):
        print(word, flush=True)

    def hear():
        return sys.stdin.readline().strip()
    """

    def __init__(self, script: Path, uri: str, run_id: str, code: str, **environment: str) -> None:
        script.write_text(textwrap.dedent(self.BEGIN) + textwrap.dedent(code))
        fresh = {"MLFLOW_TRACKING_URI": uri, "RUN": run_id, **environment}
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **fresh},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said = ""

    def expect(self, word: str) -> None:
        """Wait until it says `word`."""
        assert self.process.stdout
        while True:
            line = self.process.stdout.readline()
            self.said += line
            if line.strip() == word:
                return
            if not line:
                raise AssertionError(f"it ended without saying {word!r}: {self.end().err}")

    def tell(self, word: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def end(self, timeout_s: float = PATIENCE_S) -> Ended:
        """Wait for its end."""
        start_s = time.monotonic()
        out, err = self.process.communicate(timeout=timeout_s)
        seconds = time.monotonic() - start_s
        return Ended(self.process.returncode, self.said + out, err, seconds)

    def kill(self) -> None:
        """End it, and its children with it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.communicate()


#: Starts a job: its code, then the tracking URI and variables if need be.
StartJob = Callable[..., Job]


def run_to_end(command: list[str], uri: str, **environment: str) -> str:
    """Run a program that logs to `uri` to its good end, and whatever it started; what it said."""
    process = subprocess.Popen(
        command,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # of its own session: what it started
        process.communicate()
    assert process.returncode == 0, err
    return out


@dataclass
class Store:
    """What is in the SQLite store, seen from outside."""

    connection: sqlite3.Connection

    def values(self, key: str = "loss") -> list[float]:
        """A history in MLflow's order."""
        order = "SELECT value FROM metrics WHERE key = ? ORDER BY timestamp, step, value"
        return [value for (value,) in self.connection.execute(order, (key,))]

    def statuses(self) -> list[str]:
        """Of all runs, oldest first."""
        order = "SELECT status FROM runs ORDER BY start_time"
        return [status for (status,) in self.connection.execute(order)]

    def note_points_at_end(self) -> None:
        """From now on the store itself counts the points that are there when a run ends."""
        self.connection.executescript(
            """
            CREATE TABLE points_at_end (status TEXT, points INTEGER);
            CREATE TRIGGER run_ends AFTER UPDATE OF status ON runs
            WHEN NEW.status IN ('FINISHED', 'FAILED', 'KILLED')
            BEGIN
                INSERT INTO points_at_end
                SELECT NEW.status, count(*) FROM metrics WHERE run_uuid = NEW.run_uuid;
            END;
            """
        )

    def points_at_end(self) -> list[tuple[str, int]]:
        return list(self.connection.execute("SELECT status, points FROM points_at_end"))

    def run_id(self) -> str:
        """The only run's id."""
        ((run_id,),) = self.connection.execute("SELECT run_uuid FROM runs")
        return str(run_id)
