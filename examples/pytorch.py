"""Train a small network with PyTorch, log every step to MLflow, and check what arrived.

A plain training loop on generated data, with two data loader workers. After every step it logs the
loss and the learning rate through a `flowbuffer.MetricLogger`; the workers log through the same
one how long each batch took them. At the end all of it is read back from MLflow.

    pip install torch
    python examples/pytorch.py
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from itertools import islice

import mlflow
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import flowbuffer

TRACKING_URI = "sqlite:///mlflow.db"
WORKERS = 2
BATCH = 64
FEATURES = 20
CLASSES = 10


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples around a random centre for each class, without end.

    Each worker has a copy of it, and with it of the logger: both log to the same run.
    """

    def __init__(self, logger: flowbuffer.MetricLogger) -> None:
        self.centres = torch.randn(CLASSES, FEATURES, generator=torch.manual_seed(0))
        self.logger = logger

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info().id
        random = torch.Generator().manual_seed(worker)
        batch = 0
        while True:
            start = time.perf_counter()
            y = torch.randint(CLASSES, (BATCH,), generator=random)
            x = self.centres[y] + 1.5 * torch.randn(BATCH, FEATURES, generator=random)
            self.logger.log_metric(f"loading_s/worker{worker}", time.perf_counter() - start, batch)
            yield x, y
            batch += 1


def train(logger: flowbuffer.MetricLogger, steps: int) -> tuple[list[float], list[float]]:
    """Train for so many steps; the losses that were logged, and what each call cost in µs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = DataLoader(Batches(logger), batch_size=None, num_workers=WORKERS)
    losses, costs_us = [], []
    for step, (x, y) in enumerate(islice(loader, steps)):
        loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # This waits for a GPU. Where that matters, keep `loss.detach()` of a few hundred steps, and
        # log them at once: logger.log_series("loss", torch.stack(kept).cpu(), steps).
        losses.append(loss.item())

        start = time.perf_counter()
        logger.log_metrics({"loss": losses[-1], "lr": schedule.get_last_lr()[0]}, step)
        costs_us.append(1e6 * (time.perf_counter() - start))
        schedule.step()
    return losses, costs_us


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="of the training (%(default)s)")
    steps = parser.parse_args().steps

    for chatty in ("mlflow", "alembic"):  # about the tables that they create in a new file
        logging.getLogger(chatty).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(TRACKING_URI)
    torch.set_num_threads(1)  # more threads only slow a network of this size down

    with mlflow.start_run(run_name="pytorch") as run, flowbuffer.MetricLogger() as logger:
        logger.log_params({"steps": steps, "batch_size": BATCH, "workers": WORKERS})
        start = time.perf_counter()
        losses, costs_us = train(logger, steps)
        seconds = time.perf_counter() - start
    # Here the run is ended, and everything is delivered.

    client, run_id = mlflow.MlflowClient(), run.info.run_id
    stored = [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")]
    complete = stored == list(enumerate(losses))
    print(f"{steps:,} steps in {seconds:.1f} s")
    print(f"the loss fell from {losses[0]:.2f} to {losses[-1]:.2f}")
    print(f"a call with two metrics cost {np.median(costs_us):.1f} µs (median)")
    for worker in range(WORKERS):
        loads = client.get_metric_history(run_id, f"loading_s/worker{worker}")
        print(f"worker {worker} logged {len(loads):,} batches")
    print("MLflow has every loss, in order" if complete else "MLflow does NOT have every loss")
    print("\nSee the curves:  mlflow ui --backend-store-uri sqlite:///mlflow.db")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
