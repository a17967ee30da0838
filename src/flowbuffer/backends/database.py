"""Delivery's store of a database: metrics are written in bulk, where all is as MLflow shipped it.

MLflow's own code checks the batch and the run; only the writing is ours. What is not known for
certain goes MLflow's own way as a whole, which is a tenth as fast.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

from flowbuffer.backends.courtesy import Courtesy
from flowbuffer.backends.metric_columns import MetricColumns
from flowbuffer.backends.originals import is_as_shipped
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.sql.bulk import max_rows, write
from flowbuffer.sql.known import why_not
from flowbuffer.sql.rows import Rows
from flowbuffer.sql.sqlite import writes

#: The most that MLflow takes.
MAX_METRICS: Final = 1000

#: What MLflow's store does with metrics, step by step.
_STEPS: Final = (
    *("log_batch", "log_batch_async", "_log_metrics", "_log_metrics_once", "_log_model_metrics"),
    *("_update_latest_metrics_if_necessary", "sanitize_metric_value"),
    *("_get_run", "_get_query", "_check_run_is_active"),
)


class Database:
    """What delivery does with the metrics for one store of MLflow's.

    Args:
        store: Of any kind.

    Attributes:
        max_metrics: The most metrics in one batch; MLflow's limit until the first one was stored.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._courtesy = Courtesy()
        self.forget()

    def forget(self) -> None:
        """Decide anew: there is another database now."""
        self.max_metrics = MAX_METRICS
        self._reason: str | None = None

    def why_not(self) -> str:
        """Why metrics go MLflow's own way, in words; empty if they are written in bulk. Decided
        once.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: The database cannot be asked now.
        """
        if self._reason is None:
            self._reason = _why_not(self._store)
            if not self._reason:
                self.max_metrics = max_rows(self._store.engine.dialect.name)
        return self._reason

    def log(self, run_id: str, metrics: MetricColumns) -> bool:
        """Write metrics in bulk; False if they have to go MLflow's own way, and nothing was done.

        Raises:
            MlflowException: What MLflow would raise.
            sqlalchemy.exc.SQLAlchemyError: The database cannot be asked now.
        """
        import mlflow

        if self.why_not() or metrics.are_about_models or mlflow.get_active_model_id() is not None:
            return False
        rows = _checked(run_id, metrics)
        if rows is None:
            return False
        store = self._store
        with store.ManagedSessionMaker(**_to_write(store.ManagedSessionMaker)) as session:
            store._check_run_is_active(store._get_run(run_uuid=run_id, session=session))
            connection = session.connection()
            if connection.dialect.name == "sqlite":
                self._courtesy.wait(writes(connection))
            since_s = SYSTEM_CLOCK.monotonic_s()
            write(connection, run_id, rows)
        self._courtesy.held(since_s)
        return True


def _why_not(store: Any) -> str:
    if not hasattr(store, "engine"):
        return "it is no database"
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if type(store) is not SqlAlchemyStore:
        return f"its store is {type(store).__name__}, and not MLflow's SqlAlchemyStore"
    for step in _STEPS:
        is_there = hasattr(SqlAlchemyStore, step)  # one of them came with MLflow 3.17
        if step in vars(store) or (is_there and not is_as_shipped(SqlAlchemyStore, step)):
            return f"somebody replaced SqlAlchemyStore.{step}"
    with store.engine.connect() as connection:
        return why_not(connection)


def _checked(run_id: str, metrics: MetricColumns) -> Rows | None:
    """The rows of metrics that MLflow would take; None if it would refuse any of them, or may."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_metric, _validate_run_id

    try:
        _validate_run_id(run_id)
        for name in set(metrics.names):
            _validate_metric(name, 0.0, 0, 0)
        rows = Rows(metrics.names, metrics.values, metrics.times, metrics.steps)
    except (MlflowException, TypeError, ValueError, OverflowError):
        return None
    return rows if min(metrics.times, default=0) >= 0 else None


def _to_write(session_maker: Any) -> dict[str, bool]:
    """MLflow 3.15 has sessions for reading alone, and 3.1 has not."""
    known = inspect.signature(session_maker).parameters
    return {"read_only": False} if "read_only" in known else {}
