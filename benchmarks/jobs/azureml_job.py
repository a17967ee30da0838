"""The documented asynchronous script on Azure ML: the stock plugin against flowbuffer.

    python benchmarks/jobs/azureml_job.py [--values 20000] [--stock 400 | --full] [--json FILE]

The same script, unmodified, in a process of its own against the loopback endpoint, with 50 ms of
latency per request and 2 s of ingestion, without and with FLOWBUFFER_ENABLED=1: a loop of
``mlflow.log_metric(..., synchronous=False)`` and the wait for its operations; and ``log_batch`` of
200 values each, which the stock plugin needs to stay below the service's 250. The run's status is
MLflow's to report (AZUREML_RUN_ID is not set), so that what can be read at FINISHED is counted.

The stock loop is measured with 400 values and extrapolated in proportion, as its time is a round
trip per value. Targets: 1000 times less time at the call, 20 times less in all, nothing missing
at FINISHED. Ends with status 1 if one is missed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flowbuffer.testing.azureml import AzureMLEndpoint
from shared import environment_of_a_stranger
from support.collectors import end_collector

LATENCY_S = 0.05
INGESTION_S = 2.0
BATCH = 200
POSTS, POLLS = "runs/log-batch-async", "runs/get-run-data-status"

#: Measured around the calls; between them nothing is changed.
_MEASURE = """
import json, os, threading, time
import mlflow
from mlflow.entities import Metric

N = int(os.environ["VALUES"])
times = []

def timed(call, *args, **kwargs):
    begin = time.perf_counter()
    operation = call(*args, **kwargs)
    times.append(time.perf_counter() - begin)
    return operation
"""
_LOOP = """
with mlflow.start_run():
    begin = time.perf_counter()
    run_operations = []
    for step in range(N):
        run_operations.append(
            timed(mlflow.log_metric, "loss", step / 7, step=step, synchronous=False)
        )
    loop_s = time.perf_counter() - begin
    threads = threading.active_count()
    for run_operation in run_operations:
        run_operation.wait()
total_s = time.perf_counter() - begin
"""
_BATCHES = """
with mlflow.start_run() as run:
    client = mlflow.MlflowClient()
    begin = time.perf_counter()
    run_operations = []
    for first in range(0, N, {batch}):
        metrics = [
            Metric("loss", step / 7, int(time.time() * 1000), step)
            for step in range(first, min(first + {batch}, N))
        ]
        run_operations.append(
            timed(client.log_batch, run.info.run_id, metrics=metrics, synchronous=False)
        )
    loop_s = time.perf_counter() - begin
    threads = threading.active_count()
    for run_operation in run_operations:
        run_operation.wait()
total_s = time.perf_counter() - begin
""".replace("{batch}", str(BATCH))
_SAY = """
times.sort()
at = lambda part: 1e6 * times[min(int(part * len(times)), len(times) - 1)]
print(json.dumps({"p50_us": at(0.5), "p999_us": at(0.999), "loop_s": loop_s, "total_s": total_s,
                  "threads": threads}))
"""
SCRIPTS = {"log_metric": _LOOP, "log_batch": _BATCHES}


@dataclass
class Measured:
    """One run of a script. ``total_s``: until it is FINISHED; ``visible``: at that moment.

    ``threads``: of the process that logs, at the end of the loop.
    """

    script: str
    by: str
    values: int
    p50_us: float
    p999_us: float
    loop_s: float
    total_s: float
    visible: int
    posts: int
    polls: int
    threads: int
    connections: int

    def scaled_s(self, values: int) -> float:
        """``total_s`` for another number of values, in proportion."""
        return self.loop_s * values / self.values + self.total_s - self.loop_s


def measure(script: str, by: str, values: int, spool: Path) -> Measured:
    """Run a script to its end."""
    with AzureMLEndpoint(latency_s=LATENCY_S, ingestion_delay_s=INGESTION_S) as service:
        environment = environment_of_a_stranger(**service.job_environment(), VALUES=str(values))
        del environment["AZUREML_RUN_ID"]
        if by == "flowbuffer":
            environment |= {"FLOWBUFFER_ENABLED": "1", "FLOWBUFFER_SPOOL_DIR": str(spool)}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _MEASURE + SCRIPTS[script] + _SAY],
                env=environment,
                cwd=spool.parent,  # not beside this file, which is named like the plugin
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        finally:
            end_collector(spool)
        found = json.loads(done.stdout.splitlines()[-1])
        return Measured(
            script=script,
            by=by,
            values=values,
            visible=service.run(service.run_id).visible_at_end or 0,
            posts=service.count(POSTS),
            polls=service.count(POLLS),
            connections=len({request.connection for request in service.requests}),
            **found,
        )


def show(results: list[Measured]) -> None:
    """A table."""
    print(
        f"{'script':<12}{'by':<12}{'values':>8}{'p50 µs':>10}{'p99.9 µs':>10}{'loop s':>9}"
        f"{'FINISHED s':>12}{'visible then':>14}{'posts':>7}{'polls':>7}{'threads':>9}"
        f"{'connections':>13}"
    )
    for row in results:
        print(
            f"{row.script:<12}{row.by:<12}{row.values:>8,}{row.p50_us:>10,.1f}{row.p999_us:>10,.0f}"
            f"{row.loop_s:>9.2f}{row.total_s:>12.1f}{row.visible:>14,}{row.posts:>7}{row.polls:>7}"
            f"{row.threads:>9}{row.connections:>13}"
        )


def compare(results: list[Measured]) -> dict[str, dict[str, float]]:
    """For each script: stock against flowbuffer, the stock one for as many values."""
    found = {}
    for script in SCRIPTS:
        stock, ours = (row for row in results if row.script == script)
        found[script] = {
            "caller": stock.p50_us / ours.p50_us,
            "total": stock.scaled_s(ours.values) / ours.total_s,
            "stock_total_s": stock.scaled_s(ours.values),
            "missing": ours.values - ours.visible,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=20_000, help="of flowbuffer")
    parser.add_argument("--stock", type=int, default=400, help="values of the stock log_metric")
    parser.add_argument("--full", action="store_true", help="as many of the stock plugin: 20 min")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    chosen = parser.parse_args()
    # A batch is 200 values, so the stock plugin does all of them in seconds.
    stock = {
        "log_metric": chosen.values if chosen.full else chosen.stock,
        "log_batch": chosen.values,
    }
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for script in SCRIPTS:
            results.append(measure(script, "stock", stock[script], Path(folder) / "none"))
            spool = Path(folder) / f"spool-{script}"
            results.append(measure(script, "flowbuffer", chosen.values, spool))
    show(results)
    ratios = compare(results)
    for script, ratio in ratios.items():
        print(
            f"{script}: {ratio['caller']:,.0f} times less at the call, {ratio['total']:,.0f} times "
            f"less until FINISHED (stock: {ratio['stock_total_s']:,.0f} s for {chosen.values:,}), "
            f"{ratio['missing']:.0f} missing then"
        )
    if chosen.json:
        said = {"results": [asdict(row) for row in results], "ratios": ratios}
        chosen.json.write_text(json.dumps(said, indent=2) + "\n")
    loop = ratios["log_metric"]
    complete = not any(ratio["missing"] for ratio in ratios.values())
    return 0 if loop["caller"] >= 1000 and loop["total"] >= 20 and complete else 1


if __name__ == "__main__":
    sys.exit(main())
