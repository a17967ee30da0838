"""What logs to MLflow by itself, stock and buffered: is all of it stored, and how long it takes.

    python benchmarks/jobs/autolog.py [--rounds N] [--json FILE] [CASE...]

Each case is a small training of a library, a process of its own that knows nothing of flowbuffer,
on a fresh SQLite file; in turn as it is and with FLOWBUFFER_ENABLED=1. What is stored of its runs
and their models is compared: metrics (key, step and value; of those that measure time key and step;
of what is sampled by the clock whether steps are missing), parameters, tags and status. Wall times
are the medians of whole processes over the rounds. What should be there is what stock MLflow stored
in any of the rounds: it does not store all in each where a library logs asynchronously, as
transformers does. The exit status is 1 if something buffered is missing, twice, or different.

The cases need scikit-learn, xgboost-cpu, keras, torch, lightning, transformers, accelerate and
psutil; one that is not installed is passed over.
"""

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import append_json, await_collector, environment_of_a_stranger, load, settle_mlflow

WAYS = {"stock": {}, "buffered": {"FLOWBUFFER_ENABLED": "1"}}
LONGEST_S = 300.0
NOT_INSTALLED = 77  # the exit status of a case whose library is not there
OWN = {  # of each run by nature: random names, ids, times, and what the working directory says
    "tags": {
        "mlflow.runName",
        "mlflow.parentRunId",
        "mlflow.log-model.history",
        "mlflow.source.git.commit",
    },
    "params": {"logging_dir", "output_dir", "run_name"},
}
TIMES = ("_time", "_runtime", "_per_second")  # how the names of metrics that measure time end


# ---------------------------------------------------------------- the cases: no flowbuffer


def sklearn() -> None:
    import mlflow
    from sklearn.datasets import make_classification
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    mlflow.sklearn.autolog(log_post_training_metrics=True, max_tuning_runs=4)
    x, y = make_classification(400, random_state=0)
    search = GridSearchCV(LogisticRegression(), {"C": [0.01, 0.1, 1.0, 10.0]}, cv=3).fit(x, y)
    search.score(x, y)
    with mlflow.start_run():
        model = LogisticRegression().fit(x, y)
        model.score(x[:200], y[:200])


def xgboost() -> None:
    import mlflow
    import xgboost as xgb
    from sklearn.datasets import make_regression

    mlflow.xgboost.autolog(importance_types=[])
    x, y = make_regression(400, random_state=0)
    data = xgb.DMatrix(x, y)
    xgb.train(
        {"max_depth": 3, "nthread": 1}, data, 200, evals=[(data, "train")], verbose_eval=False
    )


def keras() -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as k
    import mlflow
    import numpy as np

    k.utils.set_random_seed(0)
    mlflow.keras.autolog(log_every_n_steps=1, log_every_epoch=False, log_models=False)
    model = k.Sequential([k.Input((8,)), k.layers.Dense(16, "relu"), k.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    random = np.random.default_rng(0)
    x = random.normal(size=(512, 8))
    model.fit(x, x.sum(axis=1), batch_size=16, epochs=4, verbose=0)


def lightning(processes: int = 1) -> None:
    import lightning as pl
    import torch
    from lightning.pytorch.loggers import MLFlowLogger

    class Line(pl.LightningModule):
        def __init__(self, rate: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.rate = rate
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, _: int) -> Any:
            x, y = batch
            loss = torch.nn.functional.mse_loss(self.layer(x).squeeze(), y)
            self.log_dict({"loss": loss, "weight": self.layer.weight.sum()})
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.rate)

    torch.set_num_threads(1)
    pl.seed_everything(0)
    x = torch.randn(3200 * processes, 8)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, x.sum(dim=1)), batch_size=16
    )
    pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=MLFlowLogger(tracking_uri=os.environ["MLFLOW_TRACKING_URI"], run_name="line"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(Line(), data)


def lightning_ddp() -> None:
    lightning(processes=2)


def transformers() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    set_seed(0)
    torch.set_num_threads(1)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )
    words = torch.randint(0, 50, (64, 16))
    data = [{"input_ids": row, "labels": row} for row in words]
    arguments = TrainingArguments(
        "out",
        max_steps=200,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="mlflow",
        run_name="gpt2",
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=50,
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8]).train()


def system_metrics() -> None:
    import mlflow
    import psutil  # noqa: F401

    mlflow.set_system_metrics_sampling_interval(0.1)
    mlflow.set_system_metrics_samples_before_logging(2)
    with mlflow.start_run(log_system_metrics=True):
        for step in range(200):
            mlflow.log_metric("loss", 1 / (step + 1), step)
            time.sleep(0.02)


@dataclass
class Case:
    train: Callable[[], None]
    sampled: str = ""  # how keys begin whose number of points is a matter of the clock


CASES = {
    "sklearn": Case(sklearn),
    "xgboost": Case(xgboost),
    "keras": Case(keras),
    "lightning": Case(lightning),
    "lightning, 2 ddp": Case(lightning_ddp),
    "transformers": Case(transformers),
    "system metrics": Case(system_metrics, sampled="system/"),
}


# ---------------------------------------------------------------- what is stored


@dataclass
class Stored:
    """What a store holds of all runs, for comparison."""

    rows: Counter[tuple[object, ...]]  # the points; of times without their values
    sampled: dict[str, list[int]]  # the steps of the keys that are a matter of the clock
    rest: list[dict[str, object]]  # of each run

    def count(self) -> int:
        return self.rows.total() + sum(map(len, self.sampled.values()))

    def missing(self, all_rows: Counter[tuple[object, ...]], keys: set[str]) -> int:
        """How many of these points, of these sampled keys, and of their steps it has not."""
        gaps = sum(max(steps) + 1 - len(set(steps)) for steps in self.sampled.values())
        return (all_rows - self.rows).total() + gaps + len(keys - self.sampled.keys())


def read(database: Path, case: Case) -> Stored:
    def query(sql: str, *parameters: object) -> list[Any]:
        return connection.execute(sql, parameters).fetchall()

    rest, rows, sampled = [], Counter(), {}
    with closing(sqlite3.connect(database)) as connection:
        for run_id, status in query("SELECT run_uuid, status FROM runs"):
            about = {"status": status}
            for table, own in OWN.items():
                pairs = query(f"SELECT key, value FROM {table} WHERE run_uuid = ?", run_id)
                about[table] = sorted(pair for pair in pairs if pair[0] not in own)
            name = json.dumps(about["params"])  # what a run has in common with its counterpart
            rest.append(about)
            points = query("SELECT key, step, value FROM metrics WHERE run_uuid = ?", run_id)
            points += query(
                "SELECT 'model ' || metric_name, metric_step, metric_value "
                "FROM logged_model_metrics WHERE run_id = ?",
                run_id,
            )
            for key, step, value in points:
                if case.sampled and key.startswith(case.sampled):
                    sampled.setdefault(key, []).append(step)
                else:
                    rows[name, key, step, None if key.endswith(TIMES) else value] += 1
    return Stored(rows, sampled, sorted(rest, key=json.dumps))


def show_differences(one: Stored, other: Stored, all_rows: Counter[tuple[object, ...]]) -> None:
    for sign, rows in (("-", all_rows - other.rows), ("+", other.rows - all_rows)):
        for row in list(rows)[:5]:
            print(f"    {sign} {row[1:]}")
    for sign, here, there in (("-", one, other), ("+", other, one)):
        for about in [about for about in here.rest if about not in there.rest][:2]:
            for table in OWN:
                shared = {tuple(pair) for run in there.rest for pair in run[table]}
                print(f"    {sign} {about['status']} {table}: {set(about[table]) - shared}")


# ---------------------------------------------------------------- the measurement


def run(name: str, way: str, folder: Path) -> tuple[int, float]:
    """One case, one way; its exit status and the seconds that it took."""
    env = environment_of_a_stranger(
        FLOWBUFFER_SPOOL_DIR=str(folder / "spool"),
        MLFLOW_TRACKING_URI=f"sqlite:///{folder / 'mlflow.db'}",
        **WAYS[way],
    )
    start_s = time.monotonic()
    with (folder / "output").open("w") as output:
        status = subprocess.run(
            [sys.executable, __file__, "--case", name],
            env=env,
            cwd=folder,
            stdout=output,
            stderr=output,
            timeout=LONGEST_S,
            check=False,
        ).returncode
    seconds = time.monotonic() - start_s
    await_collector(folder / "spool")
    return status, seconds


def compare(name: str, rounds: int, template: Path, scratch: Path) -> dict[str, object]:
    """A case both ways in turn, each time on a fresh store; the worst that was found.

    The points that there should be are those that stock MLflow has stored in any round: it loses
    some itself where a library logs asynchronously.
    """
    from support.backends import copy_sqlite

    found: dict[str, Any] = {"case": name, "same": False}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    stored: dict[str, list[Stored]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in sorted(WAYS, reverse=number % 2 == 0):  # who is second finds warm caches
            folder = scratch / f"{name}, {way}, {number}"
            copy_sqlite(template, folder / "mlflow.db")
            status, taken_s = run(name, way, folder)
            if status:
                why = (folder / "output").read_text().strip()
                if status == NOT_INSTALLED:
                    return found | {"same": True, "why": f"not there: {why.splitlines()[-1]}"}
                return found | {"why": f"{way} ended with {status}:\n{why[-2000:]}"}
            if (folder / "spool").exists() != (way == "buffered"):
                return found | {"why": f"{way} was not {way}: is flowbuffer installed?"}
            seconds[way].append(taken_s)
            stored[way].append(read(folder / "mlflow.db", CASES[name]))
    all_rows: Counter[tuple[object, ...]] = Counter()
    for one in stored["stock"]:
        all_rows |= one.rows
    keys = {key for one in stored["stock"] for key in one.sampled}
    for way in WAYS:
        found[f"rows {way}"] = min(one.count() for one in stored[way])
        found[f"missing {way}"] = max(one.missing(all_rows, keys) for one in stored[way])
        found[f"s {way}"] = statistics.median(seconds[way])
    found["more"] = max((one.rows - all_rows).total() for one in stored["buffered"])
    found["same"] = True
    for stock, buffered in zip(stored["stock"], stored["buffered"], strict=True):
        more = buffered.rows - all_rows
        if buffered.missing(all_rows, keys) or more or stock.rest != buffered.rest:
            found["same"] = False
            show_differences(stock, buffered, all_rows)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append what was measured, an object a line")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        try:
            CASES[given.case].train()
        except ModuleNotFoundError as error:
            print(error)
            return NOT_INSTALLED
        return 0
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(unknown)}")

    from support.backends import new_sqlite

    settle_mlflow()
    different = False
    print(f"{'':<18}{'rows, at least':>20}{'missing, at most':>20}{'':>8}{'':>11}{'s':>20}")
    print(f"{'':<18}" + f"{'stock':>10}{'buffered':>10}" * 2 + f"{'more':>8}{'':>11}", end="")
    print(f"{'stock':>10}{'buffered':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch) / "template.db"
        new_sqlite(template)
        for name in given.cases or CASES:
            found = compare(name, given.rounds, template, Path(scratch))
            different |= not found["same"]
            if why := found.get("why"):
                print(f"{name:<18}{why}", flush=True)
            else:
                print(
                    f"{name:<18}{found['rows stock']:>10,}{found['rows buffered']:>10,}"
                    f"{found['missing stock']:>10}{found['missing buffered']:>10}"
                    f"{found['more']:>8}{'the same' if found['same'] else 'DIFFERENT':>11}"
                    f"{found['s stock']:>10.1f}{found['s buffered']:>10.1f}",
                    flush=True,
                )
            append_json(given.json, [found])
    print(f"medians of {given.rounds}; {load()}")
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
