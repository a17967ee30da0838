"""Delivery's store of a database: metrics are written in bulk, where ``sql.store`` knows it."""

from __future__ import annotations

from typing import Any, Final

from flowbuffer.backends.courtesy import Courtesy
from flowbuffer.backends.metric_columns import MetricColumns
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.sql.bulk import max_rows, write
from flowbuffer.sql.sqlite import writes
from flowbuffer.sql.store import checked, transaction, why_not

#: The most that MLflow takes.
MAX_METRICS: Final = 1000


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
            self._reason = why_not(self._store)
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
        rows = checked(run_id, metrics.names, metrics.values, metrics.times, metrics.steps)
        if rows is None:
            return False
        with transaction(self._store, run_id) as connection:
            if connection.dialect.name == "sqlite":
                self._courtesy.wait(writes(connection))
            since_s = SYSTEM_CLOCK.monotonic_s()
            write(connection, run_id, rows)
        self._courtesy.held(since_s)
        return True
