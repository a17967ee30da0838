"""Metrics that are about a model or a dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric

import flowbuffer
from flowbuffer.dropin import known_runs
from support.backends import copy_sqlite
from support.stored import models, stored
from support.switch import HELD, T, elsewhere


def about_models(case: Callable[[MlflowClient, str, list[str]], object], uri: str) -> object:
    """What the run and two models have after a case."""
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run() as run:
        run_id = run.info.run_id
        ids = [mlflow.create_external_model(name).model_id for name in ("one", "two")]
        mlflow.log_metric("known", 1.0, run_id=run_id)
        case(MlflowClient(), run_id, ids)
        mlflow.clear_active_model()
    flowbuffer.disable()
    return stored(uri, run_id), models(uri)


def with_active_model(c: MlflowClient, r: str, ids: list[str]) -> None:
    mlflow.log_metric("before", 1.0)
    mlflow.set_active_model(model_id=ids[0])
    mlflow.log_metric("k", 1.0)
    mlflow.log_metric("k", 0.5, run_id=r)
    mlflow.log_metrics({"k": 2.0, "j": 1.0}, step=1)
    c.log_metric(r, "k", 3.0, step=2)
    c.log_batch(r, [Metric("k", 4.0, T, 3)])  # given, and past: what follows has its own time
    mlflow.log_metric("k", 5.0, step=3, model_id=ids[1])
    mlflow.log_param("p", 1)
    mlflow.set_tag("t", 1)
    mlflow.clear_active_model()
    mlflow.log_metric("after", 1.0)


def with_model_id(c: MlflowClient, r: str, ids: list[str]) -> None:
    for value in range(6):
        mlflow.log_metric("k", -value, model_id=ids[value % 2])
        mlflow.log_metric("k", -value - 0.5)
    mlflow.log_metrics({"k": 1.0, "j": 2.0}, step=4, model_id=ids[0])
    mlflow.log_metrics({"k": 1.5}, step=4, model_id=ids[1], run_id=r)
    c.log_metric(r, "m", 1.0, model_id=ids[0])
    c.log_batch(r, [Metric("m", 2.0, T * 2, 1, model_id=ids[1]), Metric("m", 3.0, T * 2, 2)])


def with_dataset(c: MlflowClient, r: str, ids: list[str]) -> None:
    data = mlflow.data.from_numpy(np.arange(3.0), name="data")
    mlflow.log_metric("k", 1.0, dataset=data)
    mlflow.log_metric("k", 2.0, dataset=data, model_id=ids[0])
    mlflow.log_metrics({"k": 3.0, "j": 1.0}, step=1, dataset=data, model_id=ids[1])
    mlflow.log_metrics({"k": 4.0}, dataset=data, run_id=r)
    c.log_metric(r, "k", 5.0, dataset_name="data", dataset_digest=data.digest, model_id=ids[0])


def with_outputs(c: MlflowClient, r: str, ids: list[str]) -> None:
    mlflow.log_metric("k", 1.0, step=3, run_id=r)
    c.log_outputs(r, [LoggedModelOutput(ids[0], step=3), LoggedModelOutput(ids[1], step=4)])
    for step in (3, 4, 5):
        mlflow.log_metric("k", 2.0, step=step, run_id=r)
        mlflow.log_metrics({"j": 3.0}, step=step, run_id=r)
        mlflow.log_metric("l", 4.0, step=step)


def with_an_old_output(c: MlflowClient, r: str, ids: list[str]) -> None:
    c.log_outputs(r, [LoggedModelOutput(ids[0], step=0)])
    mlflow.end_run()
    with mlflow.start_run(run_id=r):
        mlflow.log_metric("k", 1.0)
        mlflow.log_metrics({"j": 1.0, "l": 2.0})
        mlflow.log_metric("k", 1.0, step=1)


def with_outputs_of_another_process(c: MlflowClient, _: str, ids: list[str]) -> None:
    run_id = c.create_run("0").info.run_id
    known_runs._new_runs.clear()  # another process needs some time to hear of the run
    elsewhere(mlflow.get_tracking_uri()).log_outputs(run_id, [LoggedModelOutput(ids[0], step=2)])
    for number in range(3):
        mlflow.log_metric(f"k{number}", 1.0, step=2, run_id=run_id)
        mlflow.log_metrics({f"j{number}": 1.0}, step=2, run_id=run_id)


ABOUT_MODELS = (
    with_active_model,
    with_model_id,
    with_dataset,
    with_outputs,
    with_an_old_output,
    with_outputs_of_another_process,
)


@pytest.mark.parametrize("case", ABOUT_MODELS)
def test_models_have_their_metrics(
    sqlite_template: Path, tmp_path: Path, case: Callable[[MlflowClient, str, list[str]], object]
) -> None:
    """Metrics with model_id, with a dataset, with an active model, or of a run with models reach
    the logged models, and the run, as with MLflow alone."""
    expected = about_models(case, copy_sqlite(sqlite_template, tmp_path / "stock.db"))
    assert any(expected[1].values())
    flowbuffer.enable(linger_s=HELD)
    assert about_models(case, copy_sqlite(sqlite_template, tmp_path / "on.db")) == expected


def test_models_are_read_with_their_metrics(run_id: str) -> None:
    """get_logged_model and search_logged_models find what was logged just before."""
    model = mlflow.create_external_model("one")
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0, model_id=model.model_id)
    assert [m.value for m in mlflow.get_logged_model(model.model_id).metrics] == [1.0]
    mlflow.log_metric("k", 2.0, step=1, model_id=model.model_id)
    (found,) = mlflow.search_logged_models(output_format="list")
    assert sorted(m.value for m in found.metrics) == [1.0, 2.0]
    assert run_id
