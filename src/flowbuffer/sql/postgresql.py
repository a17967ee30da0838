"""PostgreSQL: one statement for each table, its columns as arrays.

An array is passed as a text, which is how the server reads it at once; the drivers would turn each
item into SQL of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from flowbuffer.sql.rows import Columns, Rows

_NEW: Final = (
    "(key, value, timestamp, step, is_nan, run_uuid)"
    " SELECT key, value, timestamp, step, is_nan, %s FROM unnest(%s::text[], %s::float8[],"
    " %s::bigint[], %s::bigint[], %s::bool[]) AS new (key, value, timestamp, step, is_nan)"
)
_METRICS: Final = f"INSERT INTO metrics {_NEW} ON CONFLICT DO NOTHING"
#: In the database's order of the keys, in which MLflow locks these rows, too.
_LATEST: Final = (
    f"INSERT INTO latest_metrics AS latest {_NEW} ORDER BY key"
    " ON CONFLICT (key, run_uuid) DO UPDATE SET value = excluded.value,"
    " timestamp = excluded.timestamp, step = excluded.step, is_nan = excluded.is_nan"
    " WHERE (excluded.step, excluded.timestamp, excluded.value)"
    " > (latest.step, latest.timestamp, latest.value)"
)


#: The most rows in one transaction: more are hardly faster.
MAX_ROWS: Final = 10_000


def write(connection: Any, run_id: str, rows: Rows) -> None:
    """Write metrics in the transaction of a connection.

    Args:
        connection: Of SQLAlchemy's, by psycopg2 or psycopg.
        run_id: Their run.
        rows: What is to be written.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The database's error.
    """
    # psycopg2 puts numbers into the text of a statement, where -0.0 is 0.0: so MLflow stores it.
    signs = connection.dialect.driver != "psycopg2"
    metrics = (run_id, *_arrays(rows.metrics(), signs))
    latest = (run_id, *_arrays(rows.latest(), signs))
    connection.exec_driver_sql(_METRICS, metrics)
    connection.exec_driver_sql(_LATEST, latest)


def _arrays(columns: Columns, signs: bool) -> list[str]:
    quoted = {key: _quoted(key) for key in set(columns.keys)}
    values = columns.values if signs else [value + 0.0 for value in columns.values]
    numbers = (values, columns.times, columns.steps, columns.nans)
    return [
        _array(quoted[key] for key in columns.keys),
        *(_array(map(repr, column)) for column in numbers),
    ]


def _array(items: Iterable[str]) -> str:
    return f"{{{','.join(items)}}}"


def _quoted(key: str) -> str:
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
