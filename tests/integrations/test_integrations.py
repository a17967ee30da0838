"""Lightning, transformers and plain PyTorch, each for real, on a real SQLite store: what a training
logged through flowbuffer is what MLflow has.

Each test skips itself where its framework is not installed.
"""

from __future__ import annotations

import importlib
import json
import logging
import pickle
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest

from flowbuffer import Settings
from flowbuffer.commands import cli
from support.backends import client, histories, history, make_run
from support.jobs import run_to_end
from support.waiting import PATIENCE_S

# Of the frameworks and of what they import; nothing that flowbuffer could do differently.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

#: Why a test is skipped.
NOT_HERE = "it comes with the dependency group 'integrations'"
NOWHERE = "http://127.0.0.1:1"
LIGHTNING = "lightning.pytorch.loggers.logger"
PYTORCH_LIGHTNING = "pytorch_lightning.loggers.logger"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def uri(sqlite_uri: str) -> str:
    """The store, as MLflow's current one."""
    mlflow.set_tracking_uri(sqlite_uri)
    return sqlite_uri


def pairs(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """A history as steps and values, in MLflow's order."""
    return [(point.step, point.value) for point in history(uri, run_id, key)]


def all_pairs(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    return {
        key: [(point.step, point.value) for point in points]
        for key, points in histories(uri, run_id).items()
    }


def run_ids(uri: str) -> list[str]:
    """Of all runs, newest first."""
    mlflow_client = client(uri)
    experiments = [experiment.experiment_id for experiment in mlflow_client.search_experiments()]
    return [run.info.run_id for run in mlflow_client.search_runs(experiments)]


def synced(spool: Path, uri: str) -> str:
    """Deliver an offline job's spool; the id of the run that was created."""
    sync = ["sync", "--spool", str(spool), "--tracking-uri", uri, "--timeout", "150"]
    assert cli.main(sync) == 0
    (run_id,) = run_ids(uri)
    return run_id


@pytest.mark.parametrize(
    ("module", "frameworks"),
    [("lightning", (LIGHTNING, PYTORCH_LIGHTNING)), ("transformers", ("transformers",))],
)
def test_a_missing_framework_is_named(
    module: str, frameworks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a framework is missing, the error says what to install; flowbuffer does without."""
    for framework in frameworks:
        monkeypatch.setitem(sys.modules, framework, None)
    name = f"flowbuffer.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'flowbuffer\[{module}\]'"):
        importlib.import_module(name)


# Lightning.


@dataclass
class Framework:
    """Lightning under one of its two names, and our logger for it."""

    pl: Any
    logger: Any  # FlowbufferLogger

    def module(self, fails_at: int | None = None) -> Any:
        """A model that keeps what it logs, by key."""
        import torch

        class Model(self.pl.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.save_hyperparameters({"lr": 0.01, "layers": {"linear": 1}})
                self.linear = torch.nn.Linear(4, 1)
                self.logged: dict[str, list[tuple[int, float]]] = {}

            def note(self, key: str, step: int, value: float) -> None:
                self.logged.setdefault(key, []).append((step, value))

            def loss(self, batch: Any) -> Any:
                (x,) = batch
                return (self.linear(x) - x.sum(1, keepdim=True)).square().mean()

            def training_step(self, batch: Any) -> Any:
                if self.global_step == fails_at:
                    raise ZeroDivisionError
                loss = self.loss(batch)
                self.log("train/loss", loss)
                self.note("train/loss", self.global_step, loss.item())
                self.log("same", 1.0)
                self.note("same", self.global_step, 1.0)
                return loss

            def validation_step(self, batch: Any) -> None:
                loss = self.loss(batch)
                self.log("val/loss", loss)
                self.note("val/loss", self.global_step - 1, loss.item())

            def test_step(self, batch: Any) -> None:
                loss = self.loss(batch)
                self.log("test/loss", loss)
                self.note("test/loss", self.global_step, loss.item())

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

        return Model()

    def trainer(self, logger: Any, **options: Any) -> Any:
        """One that logs at every step, into the working directory, and says nothing."""
        return self.pl.Trainer(
            logger=logger,
            accelerator="cpu",
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_epochs": 2, **options},
        )

    def data(self, batches: int) -> Any:
        import torch

        x = torch.randn(2 * batches, 4, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)


@pytest.fixture
def lightning() -> Framework:
    pl = pytest.importorskip("lightning.pytorch", reason=NOT_HERE)
    return Framework(pl, importlib.import_module("flowbuffer.integrations.lightning"))


def test_a_lightning_training(lightning: Framework, uri: str, tmp_path: Path) -> None:
    """P2, P7: a fit and a test with one logger are one run, FINISHED, with every value at its
    step, the parameters and tags; the checkpoints' folder bears its name."""
    logger = lightning.logger.FlowbufferLogger("digits", "first", tags={"team": "blue"})
    model = lightning.module()
    trainer = lightning.trainer(logger)
    trainer.fit(model, lightning.data(20), lightning.data(1))
    trainer.test(model, lightning.data(1), verbose=False)
    (run_id,) = run_ids(uri)
    run = client(uri).get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params == {"lr": "0.01", "layers/linear": "1"}
    assert run.data.tags["team"] == "blue"
    assert "mlflow.user" in run.data.tags
    stored = all_pairs(uri, run_id)
    epochs = stored.pop("epoch")
    assert stored == model.logged
    assert len(stored["train/loss"]) == 40
    assert [step for step, _ in epochs if step < 40] == sorted([*range(40), 19, 39])
    assert client(uri).get_experiment_by_name("digits").experiment_id == run.info.experiment_id
    assert (logger.name, logger.version) == (run.info.experiment_id, run_id)
    assert list((tmp_path / run.info.experiment_id / run_id / "checkpoints").glob("*.ckpt"))


def test_a_lightning_training_that_raises(lightning: Framework, uri: str) -> None:
    """P7: its run is FAILED, and has everything that was logged until then; so is its resumption's,
    which is FINISHED then."""
    logger = lightning.logger.FlowbufferLogger()
    model = lightning.module(fails_at=7)
    with pytest.raises(ZeroDivisionError):
        lightning.trainer(logger).fit(model, lightning.data(20))
    (run_id,) = run_ids(uri)
    assert client(uri).get_run(run_id).info.status == "FAILED"
    assert pairs(uri, run_id, "train/loss") == model.logged["train/loss"]

    again = lightning.module()
    resumed = lightning.logger.FlowbufferLogger(run_id=run_id, prefix="resumed", tags={"n": 2})
    lightning.trainer(resumed, max_epochs=1).fit(again, lightning.data(5))
    run = client(uri).get_run(run_id)
    assert (run.info.status, run.data.tags["n"]) == ("FINISHED", "2")
    assert pairs(uri, run_id, "resumed-train/loss") == again.logged["train/loss"]
    assert pairs(uri, run_id, "train/loss") == model.logged["train/loss"]


def test_pytorch_lightning_alone(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only pytorch_lightning is installed, it is that one's logger."""
    pl = pytest.importorskip("pytorch_lightning", reason=NOT_HERE)
    monkeypatch.setitem(sys.modules, LIGHTNING, None)
    monkeypatch.delitem(sys.modules, "flowbuffer.integrations.lightning", raising=False)
    framework = Framework(pl, importlib.import_module("flowbuffer.integrations.lightning"))
    monkeypatch.delitem(sys.modules, "flowbuffer.integrations.lightning")
    logger = framework.logger.FlowbufferLogger()
    assert isinstance(logger, pl.loggers.Logger)
    model = framework.module()
    framework.trainer(logger, max_epochs=1).fit(model, framework.data(5))
    assert pairs(uri, logger.run_id, "train/loss") == model.logged["train/loss"]


DDP = """
import json, os, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
from flowbuffer.integrations.lightning import FlowbufferLogger

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
        self.logged = []

    def training_step(self, batch, _):
        loss = self.linear(batch[0]).square().mean()
        self.log("loss", loss)
        self.log("mean", loss, sync_dist=True)
        self.logged.append((self.global_step, loss.item()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

if __name__ == "__main__":
    model, logger = Model(), FlowbufferLogger()
    x = torch.randn(80, 4)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)
    trainer = pl.Trainer(
        logger=logger, accelerator="cpu", devices=2, strategy=sys.argv[1], max_epochs=1,
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    logger.experiment.log_metric("after", 1.0)  # does nothing on other ranks
    logger.finalize("success")
    Path(f"rank{trainer.global_rank}.json").write_text(json.dumps([logger.run_id, model.logged]))
"""


def test_two_lightning_processes(uri: str, tmp_path: Path) -> None:
    """Of two ddp processes, rank 0 alone logs: one run, with its losses in order and, where
    Lightning reduces, the means."""
    pytest.importorskip("lightning.pytorch", reason=NOT_HERE)
    script = tmp_path / "train.py"
    script.write_text(DDP)
    run_to_end([sys.executable, str(script), "ddp"], uri)
    (run_id, first), (nothing, second) = (
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)
    )
    assert (run_ids(uri), nothing) == ([run_id], None)
    stored = all_pairs(uri, run_id)
    assert stored["loss"] == [tuple(point) for point in first]
    both = zip(first, second, strict=True)
    means = [(step, pytest.approx((a + b) / 2)) for (step, a), (_, b) in both]
    assert stored["mean"] == means
    assert stored["after"] == [(0, 1.0)]
    assert client(uri).get_run(run_id).info.status == "FINISHED"
    assert not list((tmp_path / "spool").glob("*/*/"))


def test_lightning_hyperparameters(lightning: Framework, uri: str) -> None:
    """They have the keys that MLFlowLogger gives them; a value that is too long is cut."""
    from lightning.fabric.utilities.logger import _flatten_dict

    @dataclass
    class Part:
        size: int

    given = {
        "a": {"b": {"c": 1}, "none": None, "empty": {}},
        "parts": [{"x": 1}, {"y": [1, 2]}],
        "list": [1, 2],
        "dataclass": Part(3),
        "namespace": Namespace(n=4),
        5: "number",
    }
    logger = lightning.logger.FlowbufferLogger()
    logger.log_hyperparams(given)
    logger.log_hyperparams(Namespace(long="x" * 7000))
    logger.finalize("success")
    params = client(uri).get_run(logger.run_id).data.params
    assert params.pop("long") == "x" * 6000
    assert params == {key: str(value) for key, value in _flatten_dict(given).items()}


def test_what_cannot_be_logged_ends_no_training(
    lightning: Framework, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    """P5: what MLflow would not take is left out, or its key is changed; each is warned of once."""
    import torch

    logger = lightning.logger.FlowbufferLogger()
    with caplog.at_level(logging.WARNING, "flowbuffer"):
        for step in range(3):
            values = {"text": "0.5", "a(b)": 1, "none": None, "()": 2, "two": torch.zeros(2)}
            logger.log_metrics({**values, "good": torch.tensor(0.5)}, step)
        logger.log_hyperparams({"?": 1, "good": 2})
    logger.finalize("success")
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 6
    assert "'a(b)' is logged as 'ab'" in caplog.text
    assert all_pairs(uri, logger.run_id) == {
        "ab": [(0, 1.0), (1, 1.0), (2, 1.0)],
        "good": [(0, 0.5), (1, 0.5), (2, 0.5)],
    }
    assert client(uri).get_run(logger.run_id).data.params == {"good": "2"}


def test_the_runs_of_a_lightning_logger(
    lightning: Framework, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is created when it is first asked for, goes along with the logger to other processes,
    and is left open where MLFLOW_RUN_ID named it; one that the server does not have is an error."""
    logger = lightning.logger.FlowbufferLogger("e", settings=Settings.from_env(linger_s=0))
    assert run_ids(uri) == []
    logger.finalize("success")
    assert run_ids(uri) == []
    logger.log_metrics({"k": 1.0})
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"k": 2.0})
    copy.finalize("aborted")
    assert run_ids(uri) == [logger.run_id]
    assert client(uri).get_run(logger.run_id).info.status == "KILLED"
    assert pairs(uri, logger.run_id, "k") == [(0, 1.0), (0, 2.0)]

    named = make_run(uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", named)
    job = lightning.logger.FlowbufferLogger()
    job.log_metrics({"k": 1.0})
    job.finalize("success")
    assert pairs(uri, named, "k") == [(0, 1.0)]
    assert client(uri).get_run(named).info.status == "RUNNING"

    with pytest.raises(mlflow.MlflowException, match="0123"):
        lightning.logger.FlowbufferLogger(run_id="0123").log_metrics({"k": 1.0})


def test_lightning_offline(lightning: Framework, uri: str, tmp_path: Path) -> None:
    """Offline no server is asked; the sync creates the run, with its name, tags and status."""
    settings = Settings.from_env(offline=True)
    model = lightning.module(fails_at=5)
    logger = lightning.logger.FlowbufferLogger(
        "e", "offline", tracking_uri=NOWHERE, tags={"t": 1}, settings=settings
    )
    with pytest.raises(ZeroDivisionError):
        lightning.trainer(logger).fit(model, lightning.data(20))
    assert logger.name == "e"
    run_id = synced(tmp_path / "spool", uri)
    run = client(uri).get_run(run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["t"]) == ("FAILED", "offline", "1")
    assert pairs(uri, run_id, "train/loss") == model.logged["train/loss"]
    assert run.data.params["lr"] == "0.01"


def test_a_server_that_is_gone_at_the_end(
    lightning: Framework,
    sqlite_uri: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P5: a training does not end in an error because its run cannot be marked ended."""
    logger = lightning.logger.FlowbufferLogger(tracking_uri=sqlite_uri)
    logger.log_metrics({"k": 1.0})

    def fail(*_: object) -> None:
        raise mlflow.MlflowException("the server is gone")

    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", fail)
    with caplog.at_level(logging.WARNING, "flowbuffer"):
        logger.finalize("success")
    assert "could not be marked FINISHED: the server is gone" in caplog.text


# transformers.


@dataclass
class Transformers:
    """The library, and our callback for it."""

    library: Any
    callback: Any  # FlowbufferCallback

    def trainer(self, callback: Any, steps: int = 20, **arguments: Any) -> Any:
        """A trainer of a tiny language model, made from its configuration, with random weights."""
        import torch

        config = self.library.GPT2Config(
            n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=16, bos_token_id=0
        )
        config.eos_token_id = 0
        tokens = torch.randint(16, (32, 8), generator=torch.Generator().manual_seed(0))
        data = [{"input_ids": row, "labels": row} for row in tokens]
        options = {
            "max_steps": steps,
            "logging_steps": 1,
            "logging_first_step": True,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "per_device_train_batch_size": 4,
        }
        return self.library.Trainer(
            self.library.GPT2LMHeadModel(config),
            self.library.TrainingArguments("out", **{**options, **arguments}),
            train_dataset=data,
            eval_dataset=data[:4],
            callbacks=[callback],
        )


@pytest.fixture
def transformers() -> Transformers:
    library = pytest.importorskip("transformers", reason=NOT_HERE)
    pytest.importorskip("accelerate", reason=NOT_HERE)
    name = "flowbuffer.integrations.transformers"
    return Transformers(library, importlib.import_module(name).FlowbufferCallback)


def logged(trainer: Any) -> dict[str, list[tuple[int, float]]]:
    """What a trainer says that it logged."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if key != "step":
                found.setdefault(key, []).append((entry["step"], value))
    return found


def test_a_transformers_training(transformers: Transformers, uri: str) -> None:
    """P2, P7: each training is a run, FINISHED, with every value at its step, the arguments and
    the model's configuration; what is evaluated afterwards is in it, too."""
    callback = transformers.callback(tags={"team": "blue"})
    trainer = transformers.trainer(callback, run_name="tiny", eval_strategy="steps", eval_steps=5)
    trainer.train()
    run = client(uri).get_run(callback.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert mlflow.active_run() is None
    assert run.data.tags["team"] == "blue"
    params = run.data.params
    assert (params["n_embd"], params["max_steps"], params["report_to"]) == ("8", "20", "[]")
    assert params.keys() == {*trainer.args.to_dict(), *trainer.model.config.to_dict()}
    assert all_pairs(uri, callback.run_id) == logged(trainer)
    assert [step for step, _ in logged(trainer)["eval_loss"]] == [5, 10, 15, 20]

    trainer.evaluate()
    assert callback._logger.flush(PATIENCE_S).pending == 0
    assert all_pairs(uri, run.info.run_id) == logged(trainer)
    assert len(logged(trainer)["eval_loss"]) == 5
    assert run_ids(uri) == [run.info.run_id]

    trainer.train()
    assert len(run_ids(uri)) == 2
    assert callback.run_id != run.info.run_id
    assert all_pairs(uri, callback.run_id) == logged(trainer)


def test_transformers_in_the_programs_run(transformers: Transformers, uri: str) -> None:
    """A run that the program started is logged to, and is the program's to end."""
    callback = transformers.callback()
    with mlflow.start_run() as run:
        trainer = transformers.trainer(callback, steps=3)
        trainer.train()
        assert mlflow.active_run().info.run_id == callback.run_id == run.info.run_id
    assert all_pairs(uri, run.info.run_id) == logged(trainer)
    with mlflow.start_run() as other:
        trainer.evaluate()
    ((_, loss),) = pairs(uri, other.info.run_id, "eval_loss")
    assert loss == logged(trainer)["eval_loss"][0][1]
    assert run_ids(uri) == [other.info.run_id, run.info.run_id]


def test_a_transformers_training_that_raises(transformers: Transformers, uri: str) -> None:
    """Its run becomes FAILED when the next training begins, which has a run of its own."""
    callback = transformers.callback()

    class Fails(transformers.library.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise ZeroDivisionError

    trainer = transformers.trainer(callback)
    trainer.add_callback(Fails())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    failed = callback.run_id
    transformers.trainer(callback, steps=3).train()
    assert run_ids(uri) == [callback.run_id, failed]
    statuses = [client(uri).get_run(run_id).info.status for run_id in (failed, callback.run_id)]
    assert statuses == ["FAILED", "FINISHED"]
    assert [step for step, _ in pairs(uri, failed, "loss")] == [1, 2]


def test_what_cannot_be_logged_by_transformers(
    transformers: Transformers, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    """P5: it is left out, or its key is changed, and warned of once; and so is a run that
    MLflow's own callback logs to as well."""
    import torch

    callback = transformers.callback()
    args = Namespace(run_name=None, report_to=["mlflow"], to_dict=lambda: {"long": "x" * 7000})
    state = Namespace(is_world_process_zero=True, global_step=4)
    with caplog.at_level(logging.WARNING, "flowbuffer"):
        for _ in range(2):
            logs = {"text": "a", "a(b)": torch.tensor([1.5]), "none": None, "list": [1.0]}
            callback.on_log(args, state, None, logs=logs)
        other = Namespace(is_world_process_zero=False, global_step=5)
        callback.on_train_begin(args, other, None)
        callback.on_log(args, other, None, logs={"loss": 1.0})
        callback.on_train_end(args, other, None)
    assert len(caplog.records) == 6
    assert "logged twice" in caplog.text
    mlflow.end_run()
    assert all_pairs(uri, callback.run_id) == {"a_b_": [(4, 1.5), (4, 1.5)]}
    assert client(uri).get_run(callback.run_id).data.params == {"long": "x" * 6000}


def test_transformers_offline(
    transformers: Transformers, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline no server is asked; the sync creates the run."""
    monkeypatch.setenv("FLOWBUFFER_OFFLINE", "1")
    mlflow.set_tracking_uri(NOWHERE)
    trainer = transformers.trainer(transformers.callback(tags={"t": 1}), run_name="offline")
    trainer.train()
    run_id = synced(tmp_path / "spool", uri)
    run = client(uri).get_run(run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["t"]) == ("FINISHED", "offline", "1")
    assert all_pairs(uri, run_id) == logged(trainer)


# Plain PyTorch.


def test_the_pytorch_example(uri: str) -> None:
    """It runs, finds every loss in MLflow, and what the data loader's workers logged."""
    pytest.importorskip("torch", reason=NOT_HERE)
    out = run_to_end([sys.executable, str(EXAMPLES / "pytorch.py"), "--steps", "200"], uri)
    assert "MLflow has every loss, in order" in out
    (run_id,) = run_ids(uri)
    run = client(uri).get_run(run_id)
    assert (run.info.status, run.data.params["steps"]) == ("FINISHED", "200")
    for worker in range(2):
        steps = [step for step, _ in pairs(uri, run_id, f"loading_s/worker{worker}")]
        assert len(steps) >= 100
        assert steps == list(range(len(steps)))
