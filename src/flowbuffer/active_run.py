"""Which run a logger logs to, as MLflow's fluent functions decide it."""

from __future__ import annotations

import os
import uuid
from typing import Any

from flowbuffer.settings import (
    environment_experiment,
    environment_run_id,
    environment_tracking_uri,
)

_tracking: Any = None  # mlflow.tracking._tracking_service.utils
_default_uris: dict[str, str] = {}  # by working directory


def current_uri() -> str:
    """``mlflow.get_tracking_uri()``, without a look at the disk at every call."""
    global _tracking
    if _tracking is None:
        from mlflow.tracking._tracking_service import utils as _tracking
    uri: str | None = _tracking._tracking_uri
    if uri is not None:
        return uri
    named = environment_tracking_uri()
    if named is not None:
        return named
    here = os.getcwd()
    if here not in _default_uris:
        _default_uris[here] = _tracking.get_tracking_uri()
    return _default_uris[here]


def find_run(run_id: str | None, tracking_uri: str | None, *, start: bool) -> tuple[str, bool]:
    """The run to log to, and whether it was started here.

    Args:
        run_id: The one that was asked for.
        tracking_uri: Where a run is started.
        start: Start one if there is none; else it gets an id that no server knows.
    """
    import mlflow

    if run_id is not None:
        return run_id, False
    active = mlflow.active_run()
    if active is not None:
        return active.info.run_id, False
    named = environment_run_id()
    if named is not None:
        return named, False
    if not start:
        return uuid.uuid4().hex, False
    if tracking_uri is None:
        return mlflow.start_run().info.run_id, True
    client = mlflow.MlflowClient(tracking_uri)
    experiment_id, name = environment_experiment()
    if experiment_id is None and name is not None:
        found = client.get_experiment_by_name(name)
        experiment_id = client.create_experiment(name) if found is None else found.experiment_id
    return client.create_run(experiment_id or "0").info.run_id, True


def end_run(run_id: str, tracking_uri: str, status: str) -> None:
    """Mark a run ended; if it is the active one, it is that no more."""
    import mlflow

    active = mlflow.active_run()
    if active is not None and active.info.run_id == run_id:
        mlflow.end_run(status)
    else:
        mlflow.MlflowClient(tracking_uri).set_terminated(run_id, status)
