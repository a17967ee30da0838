"""A long outage: millions of points are logged while the server is down; then it comes up.

    python benchmarks/jobs/outage.py [--points 10000000]

First into a spool with room for all of them: memory must not grow, and delivery must go on when the
server is there. Then into a small spool that drops what it has no room for: every point must be
delivered or counted. Ends with status 1 if a count or a bound is wrong.
"""

import argparse
import logging
import multiprocessing
import os
import resource
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flowbuffer import MetricLogger, Report, Settings
from shared import settle_mlflow
from support.backends import MlflowServer, make_run, new_sqlite
from support.waiting import wait_until

MIB = 1 << 20
MEMORY_TARGET_BYTES = 64 * MIB


def resident_bytes() -> int:
    """What this process has in memory; where the system does not say, the most it ever had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def stored_points(database: Path, run_id: str) -> int:
    with sqlite3.connect(database) as connection:
        query = "SELECT COUNT(*) FROM metrics WHERE run_uuid = ?"
        return connection.execute(query, (run_id,)).fetchone()[0]


def show(name: str, value: float, note: str = "") -> None:
    print(f"  {name:<40} {value:>12,}  {note}".rstrip(), flush=True)


def log(logger: MetricLogger, points: int) -> int:
    """Log points of 20 keys; by how many bytes memory grew at most."""
    keys = [f"metric{number}" for number in range(20)]
    most = before = resident_bytes()
    start = time.perf_counter()
    for n in range(points):
        logger.log_metric(keys[n % 20], n / points, n // 20)
        if n % 50_000 == 0:
            most = max(most, resident_bytes())
    seconds = time.perf_counter() - start
    show("points logged with the server down", points, f"{seconds * 1e6 / points:.2f} µs each")
    return max(most, resident_bytes()) - before


def check(report: Report, points: int, database: Path, run_id: str) -> bool:
    """Print what became of the points; whether every one is accounted for."""
    stored = stored_points(database, run_id)
    dropped = sum(report.dropped.values())
    show("delivered", report.delivered, f"in {report.seconds:.0f} s")
    show("pending, in the spool", report.pending)
    show("rejected", report.rejected)
    show("dropped", dropped, ", ".join(report.dropped))
    counted = report.delivered + report.pending + report.rejected + dropped
    show("together", counted)
    # The server may have stored a batch and ended before it said so: it is pending.
    show("rows in the store", stored)
    return counted == points and 0 <= stored - report.delivered <= report.pending


def outage(
    title: str, points: int, settings: Settings, wait_s: float | None, directory: Path
) -> None:
    """Log while the server is down, start it, deliver for `wait_s` (None: all); then exit."""
    settle_mlflow(logging.ERROR)
    logging.getLogger("flowbuffer").setLevel(logging.ERROR)
    print(title, flush=True)
    directory.mkdir()
    database = directory / "mlflow.db"
    uri = new_sqlite(database)
    run_id = make_run(uri)
    server = MlflowServer(uri, directory / "server")
    settings = settings.with_changes(spool_dir=directory / "spool")
    logger = MetricLogger(run_id, tracking_uri=server.uri, settings=settings)
    logger.log_metric("before", 0.0)
    wait_until(lambda: logger.stats().last_error)  # everything is imported and has been used
    grown = log(logger, points - 1)
    spooled = disk_bytes(directory / "spool")
    show(
        "memory grew by, MiB",
        round(grown / MIB, 1),
        f"target: at most {MEMORY_TARGET_BYTES // MIB}",
    )
    show("the spool, MiB", round(spooled / MIB, 1), f"at most {settings.max_spool_bytes // MIB}")
    with server:
        seconds = logger.flush(wait_s).seconds
        report = logger.close(timeout=0 if wait_s else None)
    report = Report(**{**vars(report), "seconds": seconds})
    right = check(report, points, database, run_id)
    right = right and grown <= MEMORY_TARGET_BYTES and spooled <= settings.max_spool_bytes
    print("  every point is accounted for\n" if right else "  NOT AS IT SHOULD BE\n", flush=True)
    sys.exit(not right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=10_000_000, help="default: %(default)s")
    parser.add_argument(
        "--wait", type=float, default=30.0, metavar="S", help="for the first; default: %(default)s"
    )
    given = parser.parse_args()
    small = Settings(when_full="drop_newest", max_spool_bytes=4 * MIB)
    scenarios = [
        ("A spool with room for all; delivery is cut short", Settings(), given.wait),
        ("A spool of 4 MiB that drops what it has no room for", small, None),
    ]
    wrong = False
    with tempfile.TemporaryDirectory() as scratch:
        for number, (title, settings, wait_s) in enumerate(scenarios):
            # A process of its own: the memory of one is not the other's.
            process = multiprocessing.get_context("spawn").Process(
                target=outage,
                args=(title, given.points, settings, wait_s, Path(scratch) / str(number)),
            )
            process.start()
            process.join()
            wrong |= process.exitcode != 0
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
