"""Processes that log to one run at once; a count of what came back, see `scripts/distributed`.

`python many_processes.py` is the full-size check, a table per backend; `python many_processes.py
--worker NUMBER POINTS` is one of its processes.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.backends import BACKENDS, backend, histories, make_run, working_directory
from support.collectors import end_collector, is_empty
from support.waiting import wait_until

KEYS = 10
_PROCESS = 1 << 24  # the value of a point tells its process and its index


@dataclass
class Verdict:
    """What a store holds of the points of one process."""

    points: int
    lost: int = 0
    double: int = 0
    disordered: int = 0

    @property
    def good(self) -> bool:
        return not (self.lost or self.double or self.disordered)


def work(number: int, points: int) -> None:
    """Log from this process once a line comes in: all processes share keys, and the step is 0."""
    from flowbuffer import MetricLogger

    with MetricLogger(os.environ["RUN"]) as logger:
        values = [float(number * _PROCESS + index) for index in range(points)]
        print("ready", flush=True)
        sys.stdin.readline()
        for index, value in enumerate(values):
            logger.log_metric(f"key{index % KEYS}", value)


def run(
    uri: str, processes: int, points: int, spool: Path, *, read_uri: str | None = None
) -> tuple[list[Verdict], float]:
    """Have processes log to a new run at `uri`, and read it back; seconds from their common start
    to the delivery of all.

    `read_uri`: where to read; a server's store itself is read ten times faster than the server.
    """
    run_id = make_run(uri)
    settings = {"FLOWBUFFER_DELIVERY": "process", "FLOWBUFFER_SPOOL_DIR": str(spool)}
    environment = {**os.environ, **settings, "MLFLOW_TRACKING_URI": uri, "RUN": run_id}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(number), str(points)],
            env={**environment, "FLOWBUFFER_SHUTDOWN_TIMEOUT_S": "3600"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        for worker in workers:
            assert worker.stdout
            assert worker.stdout.readline() == "ready\n", "a worker has failed, see above"
        start_s = time.monotonic()
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("go\n")
            worker.stdin.flush()
        statuses = [worker.wait() for worker in workers]
        assert not any(statuses), statuses
        wait_until(lambda: is_empty(spool))
        seconds = time.monotonic() - start_s
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.communicate()
        end_collector(spool)
    return check(read_uri or uri, run_id, processes, points), seconds


def check(uri: str, run_id: str, processes: int, points: int) -> list[Verdict]:
    """Compare what came back with what was logged, process by process."""
    verdicts = [Verdict(points) for _ in range(processes)]
    seen = [bytearray(points) for _ in range(processes)]
    for key, history in histories(uri, run_id).items():
        last = [-1] * processes
        for metric in history:
            number, index = divmod(int(metric.value), _PROCESS)
            verdict = verdicts[number]
            verdict.disordered += index < last[number] or key != f"key{index % KEYS}"
            verdict.double += seen[number][index]
            seen[number][index] = 1
            last[number] = index
    for verdict, there in zip(verdicts, seen, strict=True):
        verdict.lost = there.count(0)
    return verdicts


def main() -> int:
    """0 if every point of every process came back once, in order."""
    parser = argparse.ArgumentParser("scripts/distributed", description=__doc__)
    parser.add_argument("--points", type=int, default=50_000, help="of each of the processes")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all three")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        work(*given.worker)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the servers end, too
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    good = True
    print("backend          process   points   lost  double  disordered  seconds", flush=True)
    for name in given.backend or BACKENDS:
        with (
            tempfile.TemporaryDirectory() as folder,
            working_directory(Path(folder)),
            backend(name, Path(folder)) as (uri, store_uri),
        ):
            verdicts, seconds = run(
                uri, given.processes, given.points, Path(folder) / "spool", read_uri=store_uri
            )
        for number, verdict in enumerate(verdicts):
            good &= verdict.good
            print(
                f"{name:15}  {number:7}  {verdict.points:7}  {verdict.lost:5}  "
                f"{verdict.double:6}  {verdict.disordered:10}  {seconds:7.1f}",
                flush=True,
            )
    return not good


if __name__ == "__main__":
    sys.exit(main())
