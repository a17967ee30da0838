"""CPU time of a point, in the process that logs it and in the collector process.

    python benchmarks/jobs/cost.py [--points N]

The logging process: with process delivery to a local server, from the first call until everything
is delivered, against bare calls in turn with it (``offline``). The collector process: its CPU time
meanwhile, against a loop of ``MlflowClient.log_batch`` with the same batches of 1000 in a process
of its own. Targets: at most 1.5 times the bare calls, and at most 3 us a point beyond
``log_batch``; the exit status is 1 if not.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import fresh_server, run_again

KEYS = [f"metric{number}" for number in range(20)]


def cpu_s(pid: int) -> float:
    """CPU time of a process so far: Linux only, in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def log_points(points: int, uri: str, run_id: str) -> dict[str, float]:
    """Log in tight loops, in turn with process delivery and offline, and wait for delivery; the CPU
    time in s of the bare calls, the calls, the wait and the collector process."""
    from flowbuffer import MetricLogger, Settings
    from support.waiting import wait_until

    logger = MetricLogger(run_id, tracking_uri=uri)
    offline = Settings.from_env(offline=True)
    bare = MetricLogger(run_id, tracking_uri=uri, settings=offline)
    lock = Path(os.environ["FLOWBUFFER_SPOOL_DIR"]) / "collector.lock"
    wait_until(lambda: lock.read_text() != "")
    time.sleep(6)  # until it has imported MLflow
    logger.log_metric("first", 1.0).wait(60)
    collector = int(lock.read_text())
    found = {"bare": 0.0, "calls": 0.0, "collector": -cpu_s(collector)}
    steps = points // len(KEYS)
    for first in range(0, steps, 500):
        for name, log_metric in (("bare", bare.log_metric), ("calls", logger.log_metric)):
            start_s = time.process_time()
            for step in range(first, min(first + 500, steps)):
                for key in KEYS:
                    log_metric(key, 0.5, step)
            found[name] += time.process_time() - start_s
    start_s = time.process_time()
    assert logger.flush().pending == 0
    found["wait"] = time.process_time() - start_s
    found["collector"] += cpu_s(collector)
    return found


def log_batches(points: int, uri: str, run_id: str) -> dict[str, float]:
    """The same points through MLflow's client alone, in batches as flowbuffer makes them."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)
    client.log_batch(run_id, metrics=[Metric("first", 1.0, 1, 0)])
    start_s = time.process_time()
    now_ms, steps = time.time_ns() // 1_000_000, points // len(KEYS)
    for first in range(0, points, 1000):
        metrics = [
            Metric(KEYS[at // steps], 0.5, now_ms, at % steps) for at in range(first, first + 1000)
        ]
        client.log_batch(run_id, metrics=metrics)
    return {"all": time.process_time() - start_s}


def measure(way: str, points: int, uri: str) -> dict[str, float]:
    from support.backends import make_run

    with tempfile.TemporaryDirectory() as spool:
        said = run_again(
            *("--way", way, uri, make_run(uri), f"--points={points}"), spool=Path(spool) / "spool"
        )
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return {name: seconds / points * 1e6 for name, seconds in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        way, uri, run_id = given.way
        if way == "log_batch":
            found = log_batches(given.points, uri, run_id)
        else:
            found = log_points(given.points, uri, run_id)
        print(json.dumps(found))
        return 0
    with fresh_server() as server:
        own = measure("process", given.points, server.uri)
        loop = measure("log_batch", given.points, server.uri)
    ratio = (own["calls"] + own["wait"]) / own["bare"]
    beyond = own["collector"] - loop["all"]
    print(f"bare call               {own['bare']:6.2f} us of CPU")
    print(f"call while it delivers  {own['calls']:6.2f} us")
    print(f"waiting for the end     {own['wait']:6.2f} us; both x{ratio:.2f} (at most x1.5)")
    print(f"MlflowClient.log_batch  {loop['all']:6.2f} us")
    print(f"collector process       {own['collector']:6.2f} us, {beyond:+.2f} (at most +3)")
    return int(ratio > 1.5 or beyond > 3)


if __name__ == "__main__":
    sys.exit(main())
