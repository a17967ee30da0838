"""What delivery takes from the training loop: steps of 10 ms that log 100 metrics each.

    python benchmarks/jobs/interference.py [--steps N] [--rounds N]

Each way to log runs the same pure-Python steps in a process of its own, in turn, to one local
server. With two processors the loop (and whatever runs in its process) is pinned to the first, the
server and the collector process to the second, as they would be on a machine with more; so what is
seen is what shares the loop's interpreter. Times are medians over the rounds; a ratio is the median
of the rounds' ratios, each against the loops that log nothing just before and after, because the
speed of shared machines drifts. Targets: process delivery within 2% at the
median and 5% at p99; the exit status is 1 if not.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import fresh_server, medians, run_again

WAYS = ("nothing", "process", "thread", "mlflow async")
METRICS = 100
STEP_MS = 10.0
TARGETS = {"p50": 1.02, "p99": 1.05}
CAN_PIN = hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1


def work(turns: int) -> float:
    """A step of training, as far as the interpreter is concerned."""
    total = 0.0
    for turn in range(turns):
        total += turn % 7
    return total


def turns_of_a_step() -> int:
    best = min(_timed(100_000) for _ in range(20))
    return round(100_000 * STEP_MS / 1e3 / best)


def _timed(turns: int) -> float:
    start = time.perf_counter()
    work(turns)
    return time.perf_counter() - start


def pin(pid: int, cpus: set[int]) -> None:
    """Pin all threads of a process, and those that it will have."""
    if CAN_PIN:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cpus)


def loop(way: str, uri: str, run_id: str, turns: int, steps: int) -> None:
    """The training process: prints its steps' times in ms."""
    import mlflow

    from flowbuffer import MetricLogger, Settings
    from support.waiting import wait_until

    values = {f"metric{number}": 0.5 for number in range(METRICS)}
    first, second = sorted(os.sched_getaffinity(0))[:2] if CAN_PIN else (0, 0)
    logger = None
    if way in ("process", "thread"):
        settings = Settings.from_env(delivery=way, shutdown_timeout_s=0.0)
        logger = MetricLogger(run_id, tracking_uri=uri, settings=settings)
        logger.log_metrics(values, 0).wait(60)
        if way == "process":
            lock = Path(os.environ["FLOWBUFFER_SPOOL_DIR"]) / "collector.lock"
            wait_until(lambda: lock.read_text() != "")
            pin(int(lock.read_text()), {second})
            time.sleep(
                6
            )  # until it has imported MLflow and this process has handed its folder over
    client = mlflow.MlflowClient(uri)
    pin(os.getpid(), {first})
    taken = []
    for step in range(steps):
        start = time.perf_counter()
        work(turns)
        if logger is not None:
            for key, value in values.items():
                logger.log_metric(key, value, step)
        elif way == "mlflow async":
            for key, value in values.items():
                client.log_metric(run_id, key, value, step=step, synchronous=False)
        taken.append((time.perf_counter() - start) * 1e3)
    print(json.dumps(taken), flush=True)
    os._exit(0)  # what is not delivered is not what is measured


def measure(way: str, uri: str, turns: int, steps: int) -> list[float]:
    from support.backends import make_run
    from support.collectors import end_collector

    with tempfile.TemporaryDirectory() as folder:
        spool = Path(folder) / "spool"
        said = run_again("--loop", way, uri, make_run(uri), turns, steps, spool=spool)
        end_collector(spool)  # its backlog is of no interest
    taken: list[float] = json.loads(said.splitlines()[-1])
    return taken[20:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        way, uri, run_id, turns, steps = given.loop
        loop(way, uri, run_id, int(turns), int(steps))
    import numpy as np

    turns = turns_of_a_step()
    shown: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    against: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
    if CAN_PIN:
        both = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {sorted(both)[1]})  # the server inherits it
    with fresh_server() as server:
        if CAN_PIN:
            os.sched_setaffinity(0, both)

        def figures(way: str) -> tuple[float, float, float]:
            taken = measure(way, server.uri, turns, given.steps)
            p50, p99 = np.percentile(taken, [50, 99])
            shown[way].append((float(p50), float(p99), sum(taken) / len(taken)))
            return shown[way][-1]

        before = figures("nothing")
        for number in range(given.rounds):
            for way in WAYS[1:]:
                own, after = figures(way), figures("nothing")
                bare = [(one + other) / 2 for one, other in zip(before, after, strict=True)]
                before = after
                ratios = tuple(mine / its for mine, its in zip(own, bare, strict=True))
                against[way].append(ratios)
                print(f"round {number + 1} {way}: x{ratios[0]:.3f} x{ratios[1]:.3f}", flush=True)
    print(f"{'':<14}{'p50 ms':>8}{'':>8}{'p99 ms':>8}{'':>8}{'mean ms':>8}")
    missed = False
    for way in WAYS:
        line = f"{way:<14}"
        ratios = medians(against[way]) or [1.0] * 3
        for middle, ratio in zip(medians(shown[way]), ratios, strict=True):
            line += f"{middle:>8.2f}{f'x{ratio:.3f}':>8}"
        print(line)
        if way == "process":
            missed = ratios[0] > TARGETS["p50"] or ratios[1] > TARGETS["p99"]
    print("pinned: loop on one processor, server and collector on another" if CAN_PIN else "")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
