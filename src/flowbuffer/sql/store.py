"""MLflow's store of a database, where all is as MLflow shipped it: then only the writing is ours.

MLflow's own code checks the names and the run. What is not known for certain goes MLflow's own way
as a whole, which is a tenth as fast.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from flowbuffer.originals import is_as_shipped
from flowbuffer.sql import known
from flowbuffer.sql.rows import Rows

#: How MLflow's store looks for a run. Its store for workspaces does that in its own way, and the
#: next steps in that of all stores.
_LOOK: Final = "_get_query"

#: What MLflow's store does with metrics, step by step.
_STEPS: Final = (
    *("log_batch", "log_batch_async", "_log_metrics", "_log_metrics_once", "_log_model_metrics"),
    *("_update_latest_metrics_if_necessary", "sanitize_metric_value"),
    *("_get_run", "_check_run_is_active"),
)


def why_not(store: Any) -> str:
    """Why metrics go MLflow's own way, in words; empty if they can be written in bulk.

    Args:
        store: Of any kind.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The database cannot be asked now.
    """
    if not hasattr(store, "engine"):
        return "it is no database"
    kind = type(store)
    if not _is_mlflows(kind):
        return f"its store is {kind.__name__}, and not MLflow's SqlAlchemyStore"
    for step in (*_STEPS, _LOOK):
        is_there = hasattr(kind, step)  # one of them came with MLflow 3.17
        if step in vars(store) or (is_there and not is_as_shipped(kind, step)):
            return f"somebody replaced SqlAlchemyStore.{step}"
    with store.engine.connect() as connection:
        return known.why_not(connection)


def _is_mlflows(kind: type) -> bool:
    """Whether a store does the steps as ``SqlAlchemyStore`` does them."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if kind is SqlAlchemyStore:
        return True
    try:
        from mlflow.store.tracking.sqlalchemy_workspace_store import WorkspaceAwareSqlAlchemyStore
    except ImportError:  # an older MLflow
        return False
    return kind is WorkspaceAwareSqlAlchemyStore and all(
        getattr(kind, step, None) is getattr(SqlAlchemyStore, step, None) for step in _STEPS
    )


def checked(
    run_id: str,
    names: Sequence[str],
    values: Sequence[float],
    times: Sequence[int],
    steps: Sequence[int],
) -> Rows | None:
    """The rows of metrics that MLflow would take; None if it would refuse any of them, or may.

    Args:
        run_id: Their run.
        names, values, times, steps: Of the metrics, columns of one length. ``times`` are ms since
            the epoch.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_metric, _validate_run_id

    try:
        _validate_run_id(run_id)
        for name in set(names):
            _validate_metric(name, 0.0, 0, 0)
        rows = Rows(names, values, times, steps)
    except (MlflowException, TypeError, ValueError, OverflowError):
        return None
    return rows if min(times, default=0) >= 0 else None


@contextmanager
def transaction(store: Any, run_id: str) -> Iterator[Any]:
    """The connection, in a transaction, of a store of which :func:`why_not` says nothing.

    Args:
        store: It.
        run_id: A run, for whose metrics it is.

    Raises:
        MlflowException: The run takes no metrics; or what MLflow makes of an error of the
            database's.
    """
    with store.ManagedSessionMaker(**_to_write(store.ManagedSessionMaker)) as session:
        store._check_run_is_active(store._get_run(run_uuid=run_id, session=session))
        yield session.connection()


def _to_write(session_maker: Any) -> dict[str, bool]:
    """MLflow 3.15 has sessions for reading alone, and 3.1 has not."""
    parameters = inspect.signature(session_maker).parameters
    return {"read_only": False} if "read_only" in parameters else {}
