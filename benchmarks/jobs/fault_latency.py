"""What a server at fault costs the training loop: call times under each fault, against a quiet one.

    python benchmarks/jobs/fault_latency.py [--calls N] [--rounds N] [--work-us US]

A real server and a proxy with the fault run in this process and below it; each loop is a process of
its own that does some work between its calls, as training does, and measures every call. The p99
under each fault is to stay within twice its quiet value (P5); the exit status is 1 if not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import fresh_server, run_again

FAULTS = ("quiet", "503", "429", "hang", "reset", "down")
ALLOWED = 2.0
SHOWN = ("p50", "p99", "p99.9", "max", "retries")


def loop(uri: str, run_id: str, calls: int, work_us: float) -> None:
    """The training process: prints what its calls took, in us."""
    import numpy as np

    from flowbuffer import MetricLogger, Settings

    settings = Settings.from_env(request_timeout_s=1.0, shutdown_timeout_s=0.0)
    logger = MetricLogger(run_id, tracking_uri=uri, settings=settings)
    taken_ns = np.zeros(calls, np.int64)
    log_metric, now_ns, work_ns = logger.log_metric, time.perf_counter_ns, int(work_us * 1000)
    start_s = time.monotonic()
    for call in range(calls):
        before = now_ns()
        log_metric("loss", 0.5, call)
        after = now_ns()
        taken_ns[call] = after - before
        while now_ns() - after < work_ns:
            pass
    seconds = time.monotonic() - start_s
    stats = logger.stats()
    p50, p99, p999 = np.percentile(taken_ns, [50, 99, 99.9]) / 1000
    said = {"p50": p50, "p99": p99, "p99.9": p999, "max": taken_ns.max() / 1000}
    said |= {"seconds": seconds, "delivered": stats.delivered, "retries": stats.retries}
    print(json.dumps(said | {"error": stats.last_error[:40]}))


def measure(proxy_uri: str, run_id: str, given: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as spool:
        said = run_again(
            *("--loop", proxy_uri, run_id, f"--calls={given.calls}", f"--work-us={given.work_us}"),
            spool=Path(spool) / "spool",
            stderr=subprocess.DEVNULL,  # the points that it leaves are meant to be left
        )
    return json.loads(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-us", type=float, default=20.0, help="work between two calls")
    parser.add_argument("--loop", nargs=2, metavar=("URI", "RUN"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        loop(*given.loop, given.calls, given.work_us)
        return 0

    from support.backends import make_run
    from support.faults import FaultProxy, forward, hang, reset, status

    actions = {"503": status(503), "429": status(429, {"Retry-After": "1"})}
    actions |= {"hang": hang, "reset": reset}
    found: dict[str, list[dict[str, float]]] = {fault: [] for fault in FAULTS}
    with fresh_server() as server, FaultProxy(server.uri) as proxy:
        for _ in range(given.rounds):
            for fault in FAULTS:  # in turn, so that a slow moment of the machine hits all
                proxy.up()
                proxy.always(actions.get(fault, forward))
                if fault == "down":
                    proxy.down()
                found[fault].append(measure(proxy.uri, make_run(server.uri), given))
                proxy.release()
    print(f"{given.calls} calls, {given.work_us:g} us between two, median of {given.rounds}; us")
    print(f"{'fault':8}{'p50':>8}{'p99':>8}{'p99.9':>9}{'max':>9}{'retries':>9}{'p99 / quiet':>13}")
    good = True
    quiet = statistics.median(one["p99"] for one in found["quiet"])
    for fault, rounds in found.items():
        mid = {name: statistics.median(one[name] for one in rounds) for name in SHOWN}
        good &= mid["p99"] <= ALLOWED * quiet
        print(
            f"{fault:8}{mid['p50']:8.2f}{mid['p99']:8.2f}{mid['p99.9']:9.1f}{mid['max']:9.0f}"
            f"{mid['retries']:9.0f}{mid['p99'] / quiet:13.2f}"
        )
    return not good


if __name__ == "__main__":
    sys.exit(main())
