"""What MLflow's server takes in, as it is and with FLOWBUFFER_SERVER=1.

    python benchmarks/jobs/server_speed.py [--postgres] [--workers N] [--points N] [--rounds N]

Stock clients, one process and four, call `MlflowClient.log_batch` with 1,000 metrics of 20 keys in
a loop, and as `bodies` send requests that were made before, which shows what the server alone can
do: a stock client spends more on a point than such a server. Both servers run beside each other on
databases of their own and take turns; points a second, and the server's CPU per point in us, stock
and bulk (that of PostgreSQL is not in it), the median of the rounds. Target: 4 times the stock
server. The exit status is 1 if `bodies` miss it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

BATCH, KEYS, TARGET = 1000, 20, 4.0
TICKS_S = os.sysconf("SC_CLK_TCK")


def client(uri: str, run_id: str, count: int, kind: str) -> None:
    """A client process: makes its points, waits for a line, sends them, and says when that was."""
    import requests
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    now_ms = time.time_ns() // 1_000_000
    points = [(f"metric{n % KEYS}", n / count, now_ms + n // KEYS, n // KEYS) for n in range(count)]
    batches = [[Metric(*one) for one in points[at : at + BATCH]] for at in range(0, count, BATCH)]
    if kind == "bodies":
        session = requests.Session()
        session.headers["Content-Type"] = "application/json"
        url = f"{uri}/api/2.0/mlflow/runs/log-batch"
        fields = ("key", "value", "timestamp", "step")
        bodies = [
            json.dumps(
                {
                    "run_id": run_id,
                    "metrics": [{name: getattr(one, name) for name in fields} for one in batch],
                }
            ).encode()
            for batch in batches
        ]

        def send(at: int) -> None:
            session.post(url, bodies[at]).raise_for_status()

    else:
        mlflow = MlflowClient(uri)

        def send(at: int) -> None:
            mlflow.log_batch(run_id, batches[at])

    print("ready", flush=True)
    sys.stdin.readline()
    for at in range(len(batches)):
        send(at)
    print(time.monotonic(), flush=True)


def cpu_s(group: int) -> float:
    """CPU of all processes of a group."""
    used = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended
        if int(fields[2]) == group:
            used += int(fields[11]) + int(fields[12])
    return used / TICKS_S


def measured(server: object, clients: int, count: int, kind: str) -> tuple[float, float]:
    """Points/s and the server's CPU per point in us."""
    from support.backends import make_run

    processes = [
        subprocess.Popen(
            [
                *(sys.executable, __file__, "--client", server.uri, make_run(server.uri)),
                *("--points", str(count // clients), "--kind", kind),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(clients)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    before_s, start_s = cpu_s(server.pid), time.monotonic()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    end_s = max(float(process.stdout.readline()) for process in processes)
    used_s = cpu_s(server.pid) - before_s
    for process in processes:
        process.communicate()
    return count / (end_s - start_s), 1e6 * used_s / count


@contextmanager
def servers(postgres: bool, workers: int) -> Iterator[dict[str, object]]:
    """Both, each on a fresh database."""
    from support.backends import MlflowServer, Postgres, copy_sqlite, new_sqlite

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if postgres:
            new = stack.enter_context(Postgres()).new_database
            uris = [new(), new()]
        else:
            new_sqlite(folder / "template.db")
            uris = [copy_sqlite(folder / "template.db", folder / f"{n}.db") for n in range(2)]
        found = {
            "stock": MlflowServer(uris[0], folder / "stock", workers),
            "bulk": MlflowServer(uris[1], folder / "bulk", workers, FLOWBUFFER_SERVER="1"),
        }
        for server in found.values():
            stack.enter_context(server)
        yield found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="client", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    if given.client:
        client(*given.client, given.points, given.kind)
        return 0
    missed = False
    print(f"{'database':<12}{'clients':>10}{'stock/s':>10}{'bulk/s':>10}{'ratio':>7}{'us CPU':>14}")
    with servers(given.postgres, given.workers) as both:
        for clients, kind in ((1, "client"), (4, "client"), (1, "bodies"), (4, "bodies")):
            rounds = []
            for _ in range(given.rounds):
                slow = measured(
                    both["stock"], clients, max(4000, given.points // 3 // 4000 * 4000), kind
                )
                rounds.append((*slow, *measured(both["bulk"], clients, given.points, kind)))
            stock, stock_us, bulk, bulk_us = (
                statistics.median(column) for column in zip(*rounds, strict=True)
            )
            ratio = statistics.median(one[2] / one[0] for one in rounds)
            print(
                f"{'PostgreSQL' if given.postgres else 'SQLite':<12}{clients:>3} {kind:<6}"
                f"{stock:>10,.0f}{bulk:>10,.0f}{ratio:>7.1f}{stock_us:>7.1f}{bulk_us:>7.1f}",
                flush=True,
            )
            missed |= kind == "bodies" and ratio < TARGET
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
