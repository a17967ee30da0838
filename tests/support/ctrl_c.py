"""Ctrl-C while a job waits at its end: how long it takes to leave, its exit status, what it says
last, and the status of its run. `scripts/ctrl_c [--way WAY] [--server SERVER] ...` prints a table,
and fails where a promise is broken.

Each job is a real process that logs to a real MLflow server through a gate. When it has logged, the
gate changes: nothing listens any more (down), every answer is 503, every answer takes 2 s (slow),
or none comes at all (hang).
"""

import argparse
import http.client
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

from support.backends import FOREIGN_SETTINGS, MlflowServer, client, free_port, new_sqlite
from support.collectors import end_collector
from support.processes import pass_time

POINTS = 30_000
_BEGIN = """
import os, sys, signal
import flowbuffer, mlflow
def log(log_metric):
    for step in range({points}):
        log_metric("loss", 1.0, step=step)
def ending(run_id):
    print("ENDING", run_id, flush=True)
    sys.stdin.readline()
"""
#: Ways of a job to end: the program.
WAYS = {
    "with MetricLogger()": """
        with flowbuffer.MetricLogger() as logger:
            log(logger.log_metric)
            ending(logger.run_id)
    """,
    "close()": """
        logger = flowbuffer.MetricLogger()
        log(logger.log_metric)
        ending(logger.run_id)
        logger.close()
    """,
    "start_run, fluent": """
        with mlflow.start_run() as run:
            log(flowbuffer.log_metric)
            ending(run.info.run_id)
    """,
    "drop-in": """
        flowbuffer.enable()
        with mlflow.start_run() as run:
            log(mlflow.log_metric)
            ending(run.info.run_id)
    """,
    "drop-in, plain exit": """
        flowbuffer.enable()
        run = mlflow.start_run()
        log(mlflow.log_metric)
        ending(run.info.run_id)
    """,
    "flush()": """
        logger = flowbuffer.MetricLogger()
        log(logger.log_metric)
        ending(logger.run_id)
        logger.flush()
    """,
    "plain exit": """
        logger = flowbuffer.MetricLogger()
        log(logger.log_metric)
        ending(logger.run_id)
    """,
    "sys.exit": """
        logger = flowbuffer.MetricLogger()
        log(logger.log_metric)
        ending(logger.run_id)
        sys.exit(3)
    """,
}
SERVERS = ("down", "503", "slow", "hang")
#: How long a job may take to leave after the first Ctrl-C, in s; a busy machine takes longer.
PROMISED_S = 1.0
_BETWEEN_S = 0.3


class Gate:
    """Between a job and a server; `mode` is what becomes of a request."""

    def __init__(self, server: MlflowServer) -> None:
        self.mode = "open"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._target = ("127.0.0.1", server.port)
        self._closing = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    def up(self) -> None:
        """Let requests through."""
        self.mode = "open"
        if self._server is None:
            self._closing.clear()
            gate = self

            class Handler(_Handler):
                def answer(self, raw: bytes) -> tuple[int, bytes]:
                    return gate._answer(self, raw)

            self._server = _Server(("127.0.0.1", self.port), Handler)
            self._server.daemon_threads = True
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Let nobody connect."""
        self._closing.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def change(self, mode: str) -> None:
        """Let the server be "down", "503", "slow" or "hang"."""
        self.mode = mode
        if mode == "down":
            self.down()

    def _answer(self, handler: "_Handler", raw: bytes) -> tuple[int, bytes]:
        if self.mode == "slow":
            self._closing.wait(2.0)
        if self.mode == "hang":
            self._closing.wait()
        if self.mode in ("down", "hang"):
            raise ConnectionResetError
        if self.mode == "503":
            return 503, b"no server is there"
        with closing(http.client.HTTPConnection(*self._target, timeout=60)) as server:
            kept = ("Content-Type", "Authorization")
            headers = {name: handler.headers[name] for name in kept if handler.headers[name]}
            server.request(handler.command, handler.path, raw or None, headers)
            answer = server.getresponse()
            return answer.status, answer.read()

    def __enter__(self) -> "Gate":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A job that left is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self, raw: bytes) -> tuple[int, bytes]:
        raise NotImplementedError

    def do_any(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, body = self.answer(raw)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = do_any

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Left:
    """How a job left."""

    seconds: float
    """from the first Ctrl-C on"""
    status: int
    err: str
    run_status: str

    @property
    def last_line(self) -> str:
        """That which says what is left."""
        found = re.findall(r"flowbuffer: .*not delivered yet.*", self.err)
        return str(found[-1]).strip() if found else ""

    def broken(self, presses: int, promised_s: float) -> list[str]:
        """The promises that it breaks."""
        problems = []
        if self.seconds > promised_s:
            problems.append(f"took {self.seconds:.1f} s")
        if self.status != -signal.SIGINT:
            problems.append(f"status {self.status}")
        if presses == 1:  # who presses again leaves at once, whatever there is to be said
            if not self.last_line:
                problems.append("no last line")
            told = "could not be marked" in self.err
            if self.run_status not in ("KILLED", "FAILED") and not told:
                problems.append(f"run {self.run_status}, and nothing is said")
        if self.run_status == "FINISHED":
            problems.append("run FINISHED")
        if "Exception ignored" in self.err or self.err.count("Traceback") > 1:
            problems.append("traceback")
        return problems


class Site:
    """A server, a gate and a spool for job after job."""

    def __init__(self, server: MlflowServer, gate: Gate, folder: Path) -> None:
        self._server = server
        self._gate = gate
        self._folder = folder
        self._count = 0

    def leave(
        self,
        way: str,
        server: str,
        *,
        at_s: float,
        presses: int = 1,
        terminal: bool = False,
        delivery: str = "thread",
        python: str = sys.executable,
    ) -> Left:
        """Run a job, and press Ctrl-C so many seconds after it began to wait at its end."""
        self._gate.up()
        self._count += 1
        folder = self._folder / f"job{self._count}"
        folder.mkdir()
        script = folder / "job.py"
        script.write_text(_BEGIN.format(points=POINTS) + textwrap.dedent(WAYS[way]))
        own = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_SETTINGS)}
        own |= {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": self._gate.uri,
            "FLOWBUFFER_SPOOL_DIR": str(folder / "spool"),
            "FLOWBUFFER_DELIVERY": delivery,
        }
        with _standard_error(terminal) as (writing, read):
            process = subprocess.Popen(
                [python, str(script)],
                cwd=folder,
                env=own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=writing,
                start_new_session=True,
            )
            try:
                assert process.stdin
                assert process.stdout
                said = process.stdout.readline().split()
                if len(said) != 2:
                    raise RuntimeError(f"the job ended early: {read()}")
                self._gate.change(server)
                process.stdin.write(b"go\n")
                process.stdin.flush()
                pass_time(at_s)
                start_s = time.monotonic()
                for _ in range(presses):
                    process.send_signal(signal.SIGINT)  # nothing happens if it has ended
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_BETWEEN_S)
                status = process.wait(60)
                seconds = time.monotonic() - start_s
                err = read()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdin.close()
                process.stdout.close()
        end_collector(folder / "spool")
        run_status = client(self._server.uri).get_run(said[1].decode()).info.status
        return Left(seconds, status, err, run_status)


@contextmanager
def _standard_error(terminal: bool) -> Iterator[tuple[int, Any]]:
    reading, writing = pty.openpty() if terminal else os.pipe()
    pieces: list[bytes] = []

    def collect() -> None:
        with suppress(OSError):  # of a terminal that nobody has open any more
            while piece := os.read(reading, 65536):
                pieces.append(piece)

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    is_open = [True]

    def read() -> str:
        if is_open.pop():
            os.close(writing)
        thread.join(5)
        return b"".join(pieces).decode(errors="replace")

    try:
        yield writing, read
    finally:
        if is_open:
            os.close(writing)
        os.close(reading)


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A site with a server of its own."""
    with (
        MlflowServer(new_sqlite(folder / "mlflow.db"), folder) as server,
        Gate(server) as gate,
    ):
        yield Site(server, gate, folder)


def main() -> int:
    """Print the table; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=list(WAYS), nargs="*", default=list(WAYS))
    parser.add_argument("--server", choices=SERVERS, nargs="*", default=list(SERVERS))
    parser.add_argument("--at", type=float, nargs="*", default=[1.0, 3.0, 5.0])
    parser.add_argument("--presses", type=int, nargs="*", default=[1, 2, 5])
    parser.add_argument("--delivery", nargs="*", default=["thread", "process"])
    parser.add_argument("--promised-s", type=float, default=PROMISED_S)
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    broken = 0
    columns = f"{'way':20} {'server':6} {'delivery':8} {'at':>3} {'x':>1} {'err':8}"
    print(f"{columns} {'s':>5} {'exit':>4} {'run':8} last line", flush=True)
    with tempfile.TemporaryDirectory(dir="/tmp") as name, site(Path(name)) as place:
        cases = product(given.way, given.server, given.delivery, given.at, given.presses)
        for number, (way, server, delivery, at_s, presses) in enumerate(cases):
            terminal = number % 2 == 0
            left = place.leave(
                way, server, at_s=at_s, presses=presses, terminal=terminal, delivery=delivery,
                python=given.python,
            )  # fmt: skip
            problems = left.broken(presses, given.promised_s)
            broken += bool(problems)
            print(
                f"{way:20} {server:6} {delivery:8} {at_s:3g} {presses} "
                f"{'terminal' if terminal else 'pipe':8} {left.seconds:5.2f} {left.status:4} "
                f"{left.run_status:8} {'yes' if left.last_line else 'no':3} {'; '.join(problems)}",
                flush=True,
            )
            if problems:
                print(textwrap.indent(left.err, "    | "), flush=True)
    print(f"{broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
