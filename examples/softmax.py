"""Train eight small models side by side, log every step to MLflow, and check what arrived.

Eight threads train a softmax classifier each, with a learning rate each, on generated data. After
every step they log three metrics through one `flowbuffer.MetricLogger`: 200,000 points of 24
metrics. What they were trained with is logged as parameters and tags. For comparison one thread
does the same for fewer steps with MLflow's own calls. At the end all of it is read back from MLflow
and compared with what was logged.
"""

import argparse
import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import mlflow
import numpy as np

import flowbuffer

TRACKING_URI = "sqlite:///mlflow.db"
WORKERS = 8
METRICS = ("loss", "accuracy", "gradient_norm")
BATCH = 32

LogMetric = Callable[[str, float, int], object]
Data = tuple[np.ndarray, np.ndarray]  # a row of features for each sample, and its class


# ---------------------------------------------------------------- the training


class Softmax:
    """A softmax classifier, trained by gradient descent on small batches."""

    def __init__(self, features: int, classes: int, learning_rate: float) -> None:
        self.weights = np.zeros((features, classes))
        self.learning_rate = learning_rate

    def step(self, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        """Learn from one batch: `x` has a row for each sample, `y` its class."""
        rows = np.arange(len(y))
        scores = x @ self.weights
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        p = scores / scores.sum(axis=1, keepdims=True)
        loss = -np.log(p[rows, y] + 1e-12).mean()
        accuracy = (p.argmax(axis=1) == y).mean()
        p[rows, y] -= 1  # the gradient of the loss with respect to the scores
        gradient = x.T @ p / len(y)
        self.weights -= self.learning_rate * gradient
        return {"loss": loss, "accuracy": accuracy, "gradient_norm": np.linalg.norm(gradient)}


def generate(samples: int = 4000, features: int = 20, classes: int = 10) -> Data:
    """Samples around a random centre for each class."""
    random = np.random.default_rng(0)
    y = random.integers(classes, size=samples)
    centres = random.normal(size=(classes, features))
    return centres[y] + random.normal(scale=1.5, size=(samples, features)), y


def train(worker: int, steps: int, data: Data, log_metric: LogMetric) -> None:
    """One worker: its own model, learning rate, order of the samples, and keys.

    No other thread logs to "worker3/loss", and its steps rise: so its history must come back in
    exactly the order in which this thread logged it.
    """
    x, y = data
    random = np.random.default_rng(worker)
    model = Softmax(x.shape[1], int(y.max()) + 1, learning_rate_of(worker))
    for step in range(steps):
        batch = random.integers(len(y), size=BATCH)
        for name, value in model.step(x[batch], y[batch]).items():
            log_metric(f"worker{worker}/{name}", float(value), step)


def learning_rate_of(worker: int) -> float:
    return 0.3 / 2**worker


def params_and_tags(steps: int, data: Data) -> tuple[dict[str, object], dict[str, object]]:
    """What the page of the run in MLflow shows beside its metrics."""
    rates = {f"worker{worker}/learning_rate": learning_rate_of(worker) for worker in range(WORKERS)}
    params = {"workers": WORKERS, "steps": steps, "batch_size": BATCH, "samples": len(data[1])}
    return {**params, **rates}, {"model": "softmax", "data": "generated", "example": "flowbuffer"}


# ---------------------------------------------------------------- the record of the calls


@dataclass
class Record:
    """Every call that logged: what it logged, between which times, and how long it took."""

    log_metric: LogMetric
    calls: dict[str, list[tuple[int, float, int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    costs_ns: list[int] = field(default_factory=list)
    seconds: float = 0.0  # from the first call until all was delivered

    def __call__(self, key: str, value: float, step: int) -> None:
        before_ms = time.time_ns() // 1_000_000
        start_ns = time.perf_counter_ns()
        self.log_metric(key, value, step)
        self.costs_ns.append(time.perf_counter_ns() - start_ns)
        after_ms = time.time_ns() // 1_000_000
        self.calls[key].append((step, value, before_ms, after_ms))


@dataclass
class Outcome:
    """What MLflow holds of what was logged."""

    lost: int = 0
    reordered: int = 0
    mistimed: int = 0  # the time is not that of the call
    different: int = 0  # parameters and tags


def check(record: Record, run_id: str, moved_ms: int = 0) -> Outcome:
    """Compare the record with the histories. A point may have moved by `moved_ms` to keep order."""
    outcome = Outcome()
    client = mlflow.MlflowClient()
    for key, calls in record.calls.items():
        history = client.get_metric_history(run_id, key)
        stored = {point.step: point for point in history}
        for step, value, before_ms, after_ms in calls:
            point = stored.get(step)
            if point is None or point.value != value:
                outcome.lost += 1
            elif not before_ms <= point.timestamp <= after_ms + moved_ms:
                outcome.mistimed += 1
        outcome.reordered += sum(b.step <= a.step for a, b in pairwise(history))
    return outcome


# ---------------------------------------------------------------- three ways to log


def with_flowbuffer(points: int, data: Data) -> tuple[Record, Outcome]:
    """Eight threads, one logger."""
    steps = max(points // (WORKERS * len(METRICS)), 1)
    params, tags = params_and_tags(steps, data)
    with mlflow.start_run(run_name="flowbuffer") as run, flowbuffer.MetricLogger() as logger:
        record = Record(logger.log_metric)
        logger.log_params(params)
        logger.set_tags(tags)
        threads = [
            threading.Thread(target=train, args=(worker, steps, data, record))
            for worker in range(WORKERS)
        ]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        logger.flush()
        record.seconds = time.perf_counter() - start
        moved_ms = logger.stats().ties_moved_most_ms
    outcome = check(record, run.info.run_id, moved_ms)
    stored = mlflow.get_run(run.info.run_id).data
    for wanted, found in ((params, stored.params), (tags, stored.tags)):
        outcome.different += sum(found.get(key) != str(value) for key, value in wanted.items())
    return record, outcome


def with_mlflow(points: int, data: Data, *, synchronous: bool) -> tuple[Record, Outcome]:
    """One thread: MLflow's active run belongs to the thread that started it."""

    def log_metric(key: str, value: float, step: int) -> None:
        mlflow.log_metric(key, value, step, synchronous=synchronous)

    record = Record(log_metric)
    name = "mlflow synchronous" if synchronous else "mlflow asynchronous"
    with mlflow.start_run(run_name=name) as run:
        start = time.perf_counter()
        train(0, max(points // len(METRICS), 1), data, record)
        mlflow.flush_async_logging()
        record.seconds = time.perf_counter() - start
    return record, check(record, run.info.run_id)


# ---------------------------------------------------------------- the table


def row(name: str, threads: int, record: Record, outcome: Outcome) -> str:
    points = len(record.costs_ns)
    median_us, p99_us = np.percentile(record.costs_ns, [50, 99]) / 1000
    return (
        f"{name:<20} {threads:>7} {points:>8,} {median_us:>10,.1f} {p99_us:>10,.1f} "
        f"{points / record.seconds:>12,.0f} "
        f"{outcome.lost:>6,} {outcome.reordered:>9,} {outcome.mistimed:>8,}"
    )


HEADER = (
    f"{'':<20} {'':>7} {'':>8} {'µs per call':>21} {'delivered':>12}\n"
    f"{'':<20} {'threads':>7} {'points':>8} {'median':>10} {'p99':>10} "
    f"{'points/s':>12} {'lost':>6} {'reordered':>9} {'mistimed':>8}"
)


def seen(record: Record, outcome: Outcome) -> str:
    """What came back from MLflow of the run that flowbuffer logged, in words."""
    points = f"{len(record.costs_ns):,} points of {len(record.calls)} metrics"
    if outcome == Outcome():
        return (
            f"MLflow has all {points}, in the order and with the times of the calls, and every "
            "parameter and tag."
        )
    return (
        f"MLflow does NOT have all {points} as they were logged: {outcome.lost:,} are lost, "
        f"{outcome.reordered:,} out of order, {outcome.mistimed:,} have another time; "
        f"{outcome.different:,} parameters and tags differ."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=200_000, help="for flowbuffer (%(default)s)")
    points = parser.parse_args().points

    for chatty in ("mlflow", "alembic"):  # about the tables that they create in a new file
        logging.getLogger(chatty).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(TRACKING_URI)
    data = generate()

    print(f"training, and logging to {TRACKING_URI}; this takes about a minute", flush=True)
    rows = []
    for synchronous, few in ((True, 300), (False, 1_500)):
        few = min(few, points)
        record, outcome = with_mlflow(few, data, synchronous=synchronous)
        name = "mlflow synchronous" if synchronous else "mlflow asynchronous"
        rows.append(row(name, 1, record, outcome))
    record, outcome = with_flowbuffer(points, data)
    rows.append(row("flowbuffer", WORKERS, record, outcome))

    print(f"\n{HEADER}\n" + "\n".join(rows))
    print(f"\n{seen(record, outcome)}")
    print("\nSee the curves:  .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db")
    return 0 if outcome == Outcome() else 1


if __name__ == "__main__":
    sys.exit(main())
