"""Every line of the calls that log and wait, interrupted in each way: scripts/interruptions."""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from support import forked_logger, interrupted_logger, interrupted_producer
from support.interruptions import Line

#: One run: its name, and what is wrong after it in a spool.
Run = tuple[str, Callable[[Path], list[str]]]


def producer_runs(root: Path) -> Iterator[Run]:
    for line in interrupted_producer.lines(root / "lines"):
        for name in interrupted_producer.HANDLERS:
            yield (
                f"{name} at {line}",
                lambda site, line=line, name=name: interrupted_producer.interrupt(site, line, name),
            )


def logger_runs(root: Path, delivery: str) -> Iterator[Run]:
    interrupted_logger.lines(root / "imports", delivery)
    for line in interrupted_logger.lines(root / "lines", delivery):
        for name in interrupted_logger.HANDLERS:
            yield (
                f"{name} at {line}",
                lambda site, line=line, name=name: interrupted_logger.interrupt(
                    site, delivery, line, name
                ),
            )


def fork_runs(root: Path) -> Iterator[Run]:
    forked_logger.lines(root / "imports")
    lines: list[Line] = forked_logger.lines(root / "lines")
    for line in lines:
        yield f"fork at {line}", lambda site, line=line: forked_logger.fork_at(site, line)


RUNS: dict[str, Callable[[Path], Iterator[Run]]] = {
    "producer": producer_runs,
    "thread": lambda root: logger_runs(root, "thread"),
    "process": lambda root: logger_runs(root, "process"),
    "inline": lambda root: logger_runs(root, "inline"),
    "fork": fork_runs,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=RUNS, action="append", help="default: all")
    parser.add_argument("--part", type=float, default=1.0, help="of the runs, from 0 to 1")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # of forks while threads run
    logging.disable(logging.CRITICAL)
    faults = 0
    for what in given.what or RUNS:
        root = Path(tempfile.mkdtemp(prefix="interruptions-"))
        start_s = time.monotonic()
        runs = list(RUNS[what](root))
        chosen = random.Random(given.seed).sample(runs, round(len(runs) * given.part))
        own_faults = 0
        for number, (name, run) in enumerate(chosen):
            site = root / f"{number}"
            found = run(site)
            own_faults += bool(found)
            for fault in found:
                print(f"{what}: {name}: {fault}", flush=True)
            shutil.rmtree(site, ignore_errors=True)
        shutil.rmtree(root, ignore_errors=True)
        faults += own_faults
        lines = len({name.partition(" at ")[2] for name, _ in runs})
        print(
            f"{what}: {lines} lines, {len(chosen)} of {len(runs)} runs, {own_faults} with faults, "
            f"{time.monotonic() - start_s:.0f} s",
            flush=True,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
