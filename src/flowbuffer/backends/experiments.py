"""The experiment of a name, found or created; the one place that knows how."""

from __future__ import annotations

from typing import Any

from flowbuffer.errors import RejectedError, RunGoneError


def find_or_create(client: Any, name: str) -> str:
    """The id of the experiment with this name, which is created if there is none.

    Args:
        client: An ``MlflowClient``, of the caller's or of delivery's.
        name: Of the experiment.

    Raises:
        RejectedError: It is deleted. MLflow keeps its name, and takes no runs for it.
    """
    found = _find(client, name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except Exception:
            found = _find(client, name)  # another process may have been faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise RejectedError(
            f"the experiment {name!r} is deleted: restore it (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}), or name another"
        )
    return str(found.experiment_id)


def _find(client: Any, name: str) -> Any:
    try:
        return client.get_experiment_by_name(name)
    except RunGoneError:  # how delivery's client says 404
        return None
