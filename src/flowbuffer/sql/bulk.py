"""A batch of metrics in MLflow's tables, as MLflow's store would have left them.

MLflow makes an object of each metric, reads which of their keys have a row in ``latest_metrics``,
and after a violated primary key reads what is there. Here the database does that by itself: a row
that is there stays (``ON CONFLICT DO NOTHING``), and ``latest_metrics`` is overwritten only by what
is greater. So a batch that is sent again costs what the first one cost, and two that write at once
leave the same rows as one after the other.
"""

from __future__ import annotations

from typing import Any, Final

from flowbuffer.sql import postgresql, sqlite
from flowbuffer.sql.rows import Rows

#: By dialects of SQLAlchemy's.
_WRITERS: Final[dict[str, Any]] = {"sqlite": sqlite, "postgresql": postgresql}


def max_rows(dialect: str) -> int:
    """The most rows that are worth one transaction, for one of SQLAlchemy's dialects."""
    return int(_WRITERS[dialect].MAX_ROWS)


def write(connection: Any, run_id: str, rows: Rows) -> None:
    """Write metrics, and the latest of each key, in the transaction of a connection.

    Args:
        connection: Of SQLAlchemy's, to a database of which ``known.why_not`` says nothing. Its
            errors, its pool, TLS and credentials are those of its engine.
        run_id: A run that exists.
        rows: Metrics that MLflow would take.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The database's error.
    """
    _WRITERS[connection.dialect.name].write(connection, run_id, rows)
