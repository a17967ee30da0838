"""The rows that MLflow's database has of a run, to the bit."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine

#: What the tables of metrics have of a run, but for its id.
_TABLES = {
    "metrics": ("key, value, timestamp, step, is_nan", "run_uuid"),
    "latest_metrics": ("key, value, timestamp, step, is_nan", "run_uuid"),
    "logged_model_metrics": (
        "metric_name, metric_value, metric_timestamp_ms, metric_step, model_id, experiment_id,"
        " dataset_uuid, dataset_name, dataset_digest",
        "run_id",
    ),
    "params": ("key, value", "run_uuid"),
}


def tables(engine: Engine, run_id: str) -> dict[str, list[tuple[str, ...]]]:
    """All rows of a run, by table, as texts that tell 0.0 from -0.0, sorted."""
    with engine.connect() as connection:
        return {
            table: sorted(
                tuple(map(_exact, row))
                for row in connection.exec_driver_sql(
                    f"SELECT {columns} FROM {table} WHERE {of} = '{run_id}'"
                )
            )
            for table, (columns, of) in _TABLES.items()
        }


def _exact(value: Any) -> str:
    return value.hex() if isinstance(value, float) else repr(value)
