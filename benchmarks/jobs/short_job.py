"""What delivery adds to the end of a short job, and to a session that has been idle.

    python benchmarks/jobs/short_job.py [--rounds N]

Jobs that log a point a millisecond for 1 s and for 10 s, and a session that logs 100 points, waits
20 s and is closed, each in a process of its own, with thread and with process delivery, to a SQLite
file and to a local server. "end" is from the last point until the process has ended. Target: with
process delivery a 1 s job takes at most 1 s longer; the exit status is 1 if not.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import await_collector, fresh_stores, medians, run_again

JOBS = {"1 s": (1000, 0.0), "10 s": (10_000, 0.0), "idle session": (100, 20.0)}


def job(uri: str, run_id: str, points: int, idle_s: float) -> None:
    """The job: prints when it logged its last point."""
    from flowbuffer import MetricLogger

    logger = MetricLogger(run_id, tracking_uri=uri)
    start_s = time.monotonic()
    for step in range(points):
        logger.log_metric("loss", 0.5, step)
        time.sleep(max(start_s + step / 1000 - time.monotonic(), 0))
    time.sleep(idle_s)
    print(time.monotonic(), flush=True)


def measure(delivery: str, uri: str, run_id: str, name: str) -> tuple[float, float]:
    """Seconds of the whole job, and of its end."""
    with tempfile.TemporaryDirectory() as spool:
        start_s = time.monotonic()
        said = run_again(
            *("--job", uri, run_id, *JOBS[name]),
            spool=Path(spool) / "spool",
            FLOWBUFFER_DELIVERY=delivery,
        )
        end_s = time.monotonic()
        await_collector(Path(spool) / "spool")
    return end_s - start_s, end_s - float(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        uri, run_id, points, idle_s = given.job
        job(uri, run_id, int(points), float(idle_s))
        return 0
    from support.backends import make_run

    missed = False
    print(f"{'job':<14}{'backend':<10}{'thread s':>10}{'end s':>8}{'process s':>11}{'end s':>8}")
    with fresh_stores() as stores:
        for name in JOBS:
            for backend, uri, _ in stores:
                (thread, thread_end), (process, process_end) = (
                    medians(measure(way, uri, make_run(uri), name) for _ in range(given.rounds))
                    for way in ("thread", "process")
                )
                print(
                    f"{name:<14}{backend:<10}{thread:>10.2f}{thread_end:>8.2f}"
                    f"{process:>11.2f}{process_end:>8.2f}",
                    flush=True,
                )
                missed |= name == "1 s" and process - thread > 1.0
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
