"""Which databases are known well enough to be written past MLflow's own code.

What is not known for certain is left to MLflow: another database or driver, tables of another
version, columns that somebody added.
"""

from __future__ import annotations

from typing import Any, Final

#: Dialects and drivers of SQLAlchemy's.
_DRIVERS: Final = {
    ("sqlite", "pysqlite"),
    ("postgresql", "psycopg2"),
    ("postgresql", "psycopg"),
}

#: The revisions of MLflow's tables from MLflow 3.1.0 to 3.18.0. None of them changes a column, a
#: key or a constraint of the two tables; ``a5b4c3d2e1f0`` adds an index.
_REVISIONS: Final = frozenset(
    """
    6953534de441 bda7b8c39065 cbc13b556ace 770bee3ae1dd a1b2c3d4e5f6 de4033877273 1a0cddfcaa16
    534353b11cbc 71994744cf8e 3da73c924c2f bf29a5ff90ea 1bd49d398cd23 b7c8d9e0f1a2 5d2d30f0abce
    c9d4e5f6a7b8 2c33131f4dae d3e4f5a6b7c8 d0e1f2a3b4c5 c8d9e0f1a2b3 1b5f0d9ad7c1 e1f2a3b4c5d6
    76601a5f987d c3d6457b6d8a a5b4c3d2e1f0 ae8bbe7743c9 7d34483879f0 da6fb0208061 89d3d66ed43f
    b7e4c1a90f23 a8b9c0d1e2f3 c1d2e3f4a5b6 c3d9e7f1a2b4 6f8d9c3b2a1e 1971f2d9a75b 17e22815139b
    b7e2c1a4d9f3 75868b020152 dc11669786a5 e7d1f4b2a9c6 8b6ad64cb8f5 f4a9b2c7d1e6
    """.split()  # noqa: SIM905 (as a list it is a line for each)
)

_COLUMNS: Final = {"key", "value", "timestamp", "step", "is_nan", "run_uuid"}


def why_not(connection: Any) -> str:
    """Why a database cannot be written in bulk, in words; empty if it can.

    Args:
        connection: Of SQLAlchemy's, to a database with MLflow's tables.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The database cannot be asked.
    """
    dialect = connection.dialect
    if (dialect.name, dialect.driver) not in _DRIVERS:
        return f"{dialect.name} with {dialect.driver} is neither SQLite nor PostgreSQL's psycopg"
    asked = connection.exec_driver_sql("SELECT version_num FROM alembic_version")
    found = sorted(row[0] for row in asked)
    if not _REVISIONS.issuperset(found) or len(found) != 1:
        return f"its tables are of revision {' and '.join(found) or 'none'}, which is not known"
    for table in ("metrics", "latest_metrics"):
        columns = set(connection.exec_driver_sql(f"SELECT * FROM {table} WHERE 1 = 0").keys())
        if columns != _COLUMNS:
            other = ", ".join(sorted(columns ^ _COLUMNS))
            return f"the table {table} has other columns than MLflow's ({other})"
    return ""
