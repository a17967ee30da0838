"""What a store holds of runs and models, for comparing what two ways of logging have stored."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from typing import Any

from support.backends import client, histories

#: Tags that say who logged, and when, and from where.
_CONTEXT = ("mlflow.user", "mlflow.source", "mlflow.runName", "mlflow.log-model")


def stored(uri: str, run_id: str, *, without: Iterable[str] = ()) -> dict[str, Any]:
    """A run as MLflow reads it, but for what differs from run to run; of very many metrics the
    histories are left out.

    Args:
        uri: The store.
        run_id: The run.
        without: Keys of metrics to leave out.
    """
    run = client(uri).get_run(run_id)
    inputs, outputs = run.inputs, run.outputs
    return {
        "status": run.info.status,
        "stage": run.info.lifecycle_stage,
        "params": run.data.params,
        "tags": {k: text for k, text in run.data.tags.items() if not k.startswith(_CONTEXT)},
        # As text NaN equals itself.
        "latest": {k: repr(v) for k, v in run.data.metrics.items() if k not in without},
        "histories": {
            key: [(repr(metric.value), metric.step) for metric in found]
            for key, found in (
                histories(uri, run_id) if len(run.data.metrics) < 100 else {}
            ).items()
            if key not in without
        },
        "datasets": sorted(one.dataset.name for one in inputs.dataset_inputs) if inputs else [],
        "models": (
            len(inputs.model_inputs) if inputs else 0,
            len(outputs.model_outputs) if outputs else 0,
        ),
    }


def models(uri: str) -> dict[str, list[tuple[Any, ...]]]:
    """What the logged models of the default experiment have of metrics, by the models' names."""
    return {
        model.name: sorted(
            (m.key, repr(m.value), m.step, m.dataset_name or "", m.dataset_digest or "")
            for m in model.metrics or ()
        )
        for model in client(uri).search_logged_models(["0"])
    }


def rows(uri: str) -> tuple[int, int, int]:
    """How many metrics, parameters and tags (but for MLflow's own) a SQLite store has now."""
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=30)) as connection:
        return tuple(
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("metrics", "params", "tags WHERE key NOT LIKE 'mlflow.%'")
        )
