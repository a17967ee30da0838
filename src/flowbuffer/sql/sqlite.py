"""SQLite: a statement for each 500 rows, all of them in one transaction.

One statement for each row, as ``executemany`` has it, takes half as long again. It lets the
interpreter's lock go for each row, too, and waits for the thread that took it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, Final

from flowbuffer.sql.rows import Columns, Rows

#: How many rows a statement has: SQLite takes 32,766 parameters, before 3.32 it took 999.
_ROWS: Final = 500 if sqlite3.sqlite_version_info >= (3, 32) else 160

_COLUMNS: Final = "(key, value, timestamp, step, is_nan, run_uuid)"
_NOTHING: Final = "ON CONFLICT DO NOTHING"
_IF_GREATER: Final = (
    "ON CONFLICT (key, run_uuid) DO UPDATE SET value = excluded.value,"
    " timestamp = excluded.timestamp, step = excluded.step, is_nan = excluded.is_nan"
    " WHERE (excluded.step, excluded.timestamp, excluded.value)"
    " > (latest_metrics.step, latest_metrics.timestamp, latest_metrics.value)"
)


#: The most rows in one transaction: nobody else writes meanwhile. More are hardly faster.
MAX_ROWS: Final = 5000


def writes(connection: Any) -> tuple[int, int]:
    """Which connection of the pool it is, and a number that is another one after some other
    connection has written.

    Args:
        connection: Of SQLAlchemy's.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The database's error.
    """
    number = connection.exec_driver_sql("PRAGMA data_version").scalar()
    return id(connection.connection.dbapi_connection), int(number)


def write(connection: Any, run_id: str, rows: Rows) -> None:
    """Write metrics in the transaction of a connection.

    Args:
        connection: Of SQLAlchemy's.
        run_id: Their run.
        rows: What is to be written.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The database's error.
    """
    statements = [  # made before the first of them takes the lock of all who write
        *_statements("metrics", run_id, rows.metrics(), _NOTHING),
        *_statements("latest_metrics", run_id, rows.latest(), _IF_GREATER),
    ]
    for statement, values in statements:
        connection.exec_driver_sql(statement, values)


def _statements(
    table: str, run_id: str, columns: Columns, conflict: str
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    rows = [*zip(*columns, repeat(run_id))]
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        places = ",".join(["(?,?,?,?,?,?)"] * len(some))
        statement = f"INSERT INTO {table} {_COLUMNS} VALUES {places} {conflict}"
        yield statement, tuple(chain.from_iterable(some))
