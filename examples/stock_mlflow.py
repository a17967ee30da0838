"""Train a line on noisy points, and log it with MLflow alone.

An ordinary training script: every step logs its loss, every epoch what was learned so far, and the
test has a run of its own below. It logs to wherever MLflow is told to (MLFLOW_TRACKING_URI).
"""

import argparse

import mlflow
import numpy as np

BATCH = 32
LEARNING_RATE = 0.1
STEPS_PER_EPOCH = 100


def samples(random: np.random.Generator, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = random.normal(size=(BATCH, len(slope)))
    return x, x @ slope + random.normal(scale=0.1, size=BATCH)


def train(steps: int) -> None:
    random = np.random.default_rng(0)
    slope = random.normal(size=5)
    weights = np.zeros(5)
    with mlflow.start_run(run_name="line"):
        mlflow.log_params({"steps": steps, "batch": BATCH, "learning_rate": LEARNING_RATE})
        mlflow.set_tag("model", "linear")
        for step in range(steps):
            x, y = samples(random, slope)
            error = x @ weights - y
            weights -= LEARNING_RATE * x.T @ error / BATCH
            mlflow.log_metric("loss", float(error @ error) / BATCH, step=step)
            if (step + 1) % STEPS_PER_EPOCH == 0:
                learned = {f"weight{n}": weight for n, weight in enumerate(weights)}
                mlflow.log_metrics(learned, step=step // STEPS_PER_EPOCH)
        with mlflow.start_run(run_name="test", nested=True):
            x, y = samples(random, slope)
            mlflow.log_metrics({"mse": np.square(x @ weights - y).mean()})
            mlflow.set_tags({"model": "linear", "data": "new samples"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training (%(default)s)")
    train(parser.parse_args().steps)
