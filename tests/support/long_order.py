"""The full-size check of order, see `scripts/order`: a line per backend and workload."""

import argparse
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flowbuffer import Settings
from support.backends import BACKENDS, backend, working_directory
from support.workload import Workload, run

WORKLOADS = (
    Workload(keys=1, steps="none"),
    Workload(keys=20, steps="repeated"),
    Workload(keys=1000, steps="rising"),
    Workload(keys=20, steps="rising", own_keys=True),
)


def main() -> int:
    """0 if every point came back, in order, with the time of its call."""
    parser = argparse.ArgumentParser("scripts/order", description=__doc__)
    parser.add_argument("--points", type=int, default=50_000, help="of each of the threads")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all three")
    parser.add_argument("--workload", type=int, choices=range(len(WORKLOADS)), action="append")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the servers end, too
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    good = True
    for name in given.backend or BACKENDS:
        with (
            tempfile.TemporaryDirectory() as folder,
            working_directory(Path(folder)),
            backend(name, Path(folder)) as (uri, store_uri),
        ):
            settings = Settings(spool_dir=Path(folder) / "spool")
            for number in given.workload or range(len(WORKLOADS)):
                work = replace(WORKLOADS[number], threads=given.threads, points=given.points)
                read_uri = store_uri if work.keys > 20 else uri
                verdict, stats, seconds = run(uri, work, settings, read_uri=read_uri)
                good &= verdict.good
                print(
                    f"{name}, {work}: {verdict.points} points, {seconds:.1f} s, "
                    f"lost {verdict.lost}, twice {verdict.surplus}, "
                    f"reordered {verdict.reordered}, out of interval {verdict.out_of_interval} "
                    f"(ties moved: {stats.ties_moved}, {stats.ties_moved_most_ms} ms at most)",
                    flush=True,
                )
    return not good


if __name__ == "__main__":
    sys.exit(main())
