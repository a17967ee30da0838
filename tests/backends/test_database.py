"""When a database is written in bulk, what that costs, and what goes MLflow's own way, and why."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import sqlalchemy
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from flowbuffer import MetricLogger
from flowbuffer.backends.base import Request
from flowbuffer.backends.courtesy import Courtesy
from flowbuffer.backends.database import Database
from flowbuffer.backends.metric_columns import MetricColumns
from flowbuffer.backends.mlflow_client import database_of, delivery_client, store_of
from flowbuffer.backends.mlflow_transport import MlflowTransport
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.errors import RetriableError, TransportError
from flowbuffer.settings.settings import Settings
from flowbuffer.sql.bulk import write
from flowbuffer.sql.known import why_not
from flowbuffer.sql.rows import Rows
from flowbuffer.sql.sqlite import writes
from flowbuffer.testing import ManualClock
from support.backends import client, make_run
from support.tables import tables
from support.waiting import wait_until


def batch(run_id: str, count: int, keys: int = 3, first: int = 0) -> Request:
    numbers = range(first, first + count)
    return Request(
        run_id, [f"k{n % keys}" for n in numbers], [n / 7 for n in numbers], [*numbers], [*numbers]
    )


def log(ours: Any, one: Request) -> None:
    ours.log_batch(one.run_id, metrics=MetricColumns(one), synchronous=False)


def rows(ours: Any, run_id: str) -> int:
    return len(tables(store_of(ours).engine, run_id)["metrics"])


@contextmanager
def statements(engine: sqlalchemy.Engine) -> Iterator[list[str]]:
    """What the database is told meanwhile."""
    told: list[str] = []

    def note(*event: Any) -> None:
        told.append(event[2])

    sqlalchemy.event.listen(engine, "before_cursor_execute", note)
    yield told
    sqlalchemy.event.remove(engine, "before_cursor_execute", note)


# In bulk.


def test_a_batch_is_one_transaction_and_may_have_ten_thousand_metrics(sqlite_uri: str) -> None:
    """Ten thousand metrics are one batch, one transaction, and no row is read but the run's."""
    ours, run_id = delivery_client(sqlite_uri, 10.0), make_run(sqlite_uri)
    log(ours, batch(run_id, 1, first=1_000_000))
    commits: list[Any] = []
    sqlalchemy.event.listen(store_of(ours).engine, "commit", commits.append)
    with statements(store_of(ours).engine) as told:
        log(ours, batch(run_id, 10_000))
    assert rows(ours, run_id) == 10_001
    assert len(commits) == 1
    read = [one for one in told if "SELECT" in one.upper()]
    assert len(read) == 1
    assert "FROM runs" in read[0]
    assert sum("INTO metrics" in one for one in told) <= 20


def test_a_batch_that_is_sent_again_reads_nothing_more(sqlite_uri: str) -> None:
    """A resend is told to the database as the first time, however long the history is."""
    ours, run_id = delivery_client(sqlite_uri, 10.0), make_run(sqlite_uri)
    one = batch(run_id, 700)
    log(ours, batch(run_id, 5000, first=10_000))
    with statements(store_of(ours).engine) as first:
        log(ours, one)
    with statements(store_of(ours).engine) as again:
        log(ours, one)
    assert again == first
    assert rows(ours, run_id) == 5700


def test_the_transport_takes_larger_batches_once_it_knows(sqlite_uri: str) -> None:
    """A transport takes MLflow's thousand metrics until the database is known, then five
    thousand."""
    run_id = make_run(sqlite_uri)
    transport = MlflowTransport(sqlite_uri, Settings(delivery="inline"), SYSTEM_CLOCK)
    assert transport.max_metrics == 1000
    transport.send(batch(run_id, 1000), lambda _: None, lambda: None)
    assert transport.max_metrics == 5000
    transport.send(batch(run_id, 5000), lambda _: None, lambda: None)
    assert rows(transport._client, run_id) == 5000
    transport.close()


@pytest.mark.parametrize("store", ["sqlite_uri", "postgres_uri"])
def test_a_logger_writes_in_bulk(store: str, request: pytest.FixtureRequest) -> None:
    """What a MetricLogger logs to a database is written in bulk, every point of it."""
    uri = request.getfixturevalue(store)
    run_id = make_run(uri)
    with MetricLogger(run_id, tracking_uri=uri) as logger:
        for step in range(3000):
            logger.log_metric("loss", step / 7, step)
        logger.log_metric("loss", float("nan"), 3000)
    ours = delivery_client(uri, 10.0)
    assert rows(ours, run_id) == 3001
    assert database_of(ours).why_not() == ""


# Two at once.


def test_others_that_write_get_their_turn() -> None:
    """A lock that others want is left free for as long as it was held, and else is taken at
    once."""
    clock = ManualClock()
    slept: list[float] = []
    clock.sleep = slept.append  # type: ignore[method-assign]
    courtesy = Courtesy(clock)

    def hold(writes: int, connection: int = 1) -> None:
        courtesy.wait((connection, writes))
        since_s = clock.monotonic_s()
        clock.turn(0.25)
        courtesy.held(since_s)

    hold(1)
    hold(1)
    hold(7, connection=2)  # which has seen what the first one wrote
    hold(1)
    assert slept == []
    hold(2)
    hold(2)
    assert slept == [0.25, 0.25]
    clock.turn(0.125)
    hold(2)
    assert slept[2:] == [0.125]
    clock.turn(10.0)
    hold(2)
    hold(2)
    assert slept[3:] == []


def test_who_writes_beside_is_noticed(sqlite_uri: str) -> None:
    """What another connection writes to a SQLite file is seen, and what the own one writes is
    not."""
    engine = sqlalchemy.create_engine(sqlite_uri)
    with engine.connect() as own, engine.connect() as other:
        before = writes(own)
        own.exec_driver_sql("UPDATE experiments SET name = name || '2'")
        own.commit()
        assert writes(own) == before
        other.exec_driver_sql("UPDATE experiments SET name = name || '3'")
        other.commit()
        assert writes(own) != before
    engine.dispose()


def at_once(uri: str, orders: list[Callable[[Request], Request]]) -> tuple[str, Any]:
    """Writers that send the same rows at the same time, each in its order; their run, a client."""
    run_id = make_run(uri)
    start = threading.Barrier(len(orders))
    failures: list[Exception] = []

    def write(order: Callable[[Request], Request]) -> None:
        ours = delivery_client(uri, 10.0)
        try:
            for round_ in range(8):
                start.wait(60)
                log(ours, order(batch(run_id, 600, keys=40, first=round_ * 300)))
        except Exception as error:
            failures.append(error)
            start.abort()

    writers = [threading.Thread(target=write, args=(order,)) for order in orders]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    return run_id, delivery_client(uri, 10.0)


def backwards(one: Request) -> Request:
    return Request(one.run_id, *(column[::-1] for column in (one.keys, *_numbers(one))))


def _numbers(one: Request) -> tuple[Any, Any, Any]:
    return one.values, one.times, one.steps


@pytest.mark.parametrize("store", ["sqlite_uri", "postgres_uri"])
def test_two_writers_leave_what_one_leaves(store: str, request: pytest.FixtureRequest) -> None:
    """Two that write the same rows at once, in opposite orders, do not wait for each other for
    ever, and leave each row once and the latest of each key."""
    uri = request.getfixturevalue(store)
    run_id, ours = at_once(uri, [lambda one: one, backwards])
    alone = make_run(uri)
    for round_ in range(8):
        log(ours, batch(alone, 600, keys=40, first=round_ * 300))
    engine = store_of(ours).engine
    assert tables(engine, run_id) == tables(engine, alone)


# MLflow's own way.


class Derived(SqlAlchemyStore):
    pass


def unknown_revision(store: Any, _: pytest.MonkeyPatch) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'f00f00f00f00'")


def another_column(store: Any, _: pytest.MonkeyPatch) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE metrics ADD COLUMN unit VARCHAR(9)")


def replaced_in_the_class(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SqlAlchemyStore._log_metrics
    monkeypatch.setattr(SqlAlchemyStore, "_log_metrics", lambda self, *rest: original(self, *rest))


def replaced_in_the_store(store: Any, _: pytest.MonkeyPatch) -> None:
    store.sanitize_metric_value = lambda value: (False, value)


def derived(store: Any, _: pytest.MonkeyPatch) -> None:
    store.__class__ = Derived


REASONS = {
    "unknown revision": (unknown_revision, "revision f00f00f00f00, which is not known"),
    "another column": (another_column, "the table metrics has other columns than MLflow's (unit)"),
    "a method": (replaced_in_the_class, "somebody replaced SqlAlchemyStore._log_metrics"),
    "an attribute": (
        replaced_in_the_store,
        "somebody replaced SqlAlchemyStore.sanitize_metric_value",
    ),
    "a subclass": (derived, "its store is Derived, and not MLflow's SqlAlchemyStore"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_known_goes_mlflows_own_way(
    name: str, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where anything is not as MLflow shipped it, MLflow stores the metrics, and the reason is
    said."""
    change, reason = REASONS[name]
    ours, run_id = delivery_client(sqlite_uri, 10.0), make_run(sqlite_uri)
    change(store_of(ours), monkeypatch)
    log(ours, batch(run_id, 1500))  # more than MLflow takes at once
    assert reason in database_of(ours).why_not()
    assert database_of(ours).max_metrics == 1000
    assert rows(ours, run_id) == 1500


def test_another_file_is_another_database(sqlite_uri: str, tmp_path: Path) -> None:
    """Where the file was replaced by one that is not known, MLflow writes to it."""
    run_id = make_run(sqlite_uri)
    file = Path(sqlite_uri.removeprefix("sqlite:///"))
    transport = MlflowTransport(sqlite_uri, Settings(delivery="inline"), SYSTEM_CLOCK)
    transport.send(batch(run_id, 10), lambda _: None, lambda: None)
    assert database_of(transport._client).why_not() == ""
    shutil.copy(file, tmp_path / "other.db")
    with closing(sqlite3.connect(tmp_path / "other.db")) as other, other:
        other.execute("UPDATE alembic_version SET version_num = 'f00f00f00f00'")
    (tmp_path / "other.db").replace(file)
    transport.send(batch(run_id, 10, first=10), lambda _: None, lambda: None)
    assert "is not known" in database_of(transport._client).why_not()
    assert rows(transport._client, run_id) == 20
    transport.close()


@pytest.mark.parametrize(
    ("dialect", "driver"), [("mysql", "pymysql"), ("mssql", "pyodbc"), ("sqlite", "pysqlcipher")]
)
def test_other_databases_are_mlflows(dialect: str, driver: str) -> None:
    """MySQL, SQL Server and unknown drivers are not asked for anything."""
    connection = SimpleNamespace(dialect=SimpleNamespace(name=dialect, driver=driver))
    assert why_not(connection) == (
        f"{dialect} with {driver} is neither SQLite nor PostgreSQL's psycopg"
    )


def test_a_server_is_no_database() -> None:
    """A store without an engine goes MLflow's own way."""
    assert Database(SimpleNamespace()).why_not() == "it is no database"


def test_a_model_that_is_active_is_noted(sqlite_uri: str) -> None:
    """Metrics that MLflow's client takes for an active model's are that model's."""
    ours, run_id = delivery_client(sqlite_uri, 10.0), make_run(sqlite_uri)
    model_id = client(sqlite_uri).create_logged_model("0").model_id
    with mlflow.set_active_model(model_id=model_id):
        log(ours, batch(run_id, 3))
    assert len(tables(store_of(ours).engine, run_id)["logged_model_metrics"]) == 3


def test_columns_are_mlflows_metrics_to_others() -> None:
    """Whoever does not take columns finds a sequence of MLflow's metrics."""
    columns = MetricColumns(
        Request("r", ["a", "b\0model\0data\0digest"], [1.0, 2.0], [3, 4], [5, 6])
    )
    found = [(m.key, m.value, m.timestamp, m.step, m.model_id, m.dataset_name) for m in columns]
    assert found == [("a", 1.0, 3, 5, None, None), ("b", 2.0, 4, 6, "model", "data")]
    assert [m.key for m in columns[1:]] == ["b"]
    assert columns[0].key == "a"
    assert len(columns) == 2
    assert columns.are_about_models


# Faults.


def sent(uri: str, one: Request, prepare: Callable[[Any], None]) -> TransportError | None:
    """What became of a request of a transport, whose client was prepared."""
    transport = MlflowTransport(uri, Settings(delivery="inline"), SYSTEM_CLOCK)
    prepare(store_of(transport._delivery_client()))
    outcomes: list[TransportError | None] = []
    transport.send(one, outcomes.append, lambda: None)
    transport.close()
    return outcomes[0]


def impatient(store: Any) -> None:
    """MLflow waits 20 s for SQLite's lock."""

    def hurried(*event: Any) -> tuple[str, Any]:
        return event[2].replace("busy_timeout = 20000", "busy_timeout = 1"), event[3]

    sqlalchemy.event.listen(store.engine, "before_cursor_execute", hurried, retval=True)


def test_a_lock_of_somebody_elses_passes(sqlite_uri: str) -> None:
    """SQLite's "database is locked" is tried again."""
    run_id = make_run(sqlite_uri)
    with closing(sqlite3.connect(sqlite_uri[len("sqlite:///") :])) as other:
        other.execute("BEGIN IMMEDIATE")
        failed = sent(sqlite_uri, batch(run_id, 10), impatient)
        other.rollback()
    assert type(failed) is RetriableError
    assert "database is locked" in failed.reason
    assert sent(sqlite_uri, batch(run_id, 10), lambda _: None) is None


def _waits(engine: sqlalchemy.Engine) -> bool:
    """Whether somebody waits for a lock of PostgreSQL's."""
    with engine.connect() as connection:
        return bool(
            connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar()
        )


def test_the_victim_of_a_deadlock_is_tried_again(postgres_uri: str) -> None:
    """PostgreSQL's 40P01 is tried again, as it is when MLflow writes."""
    run_id = make_run(postgres_uri)
    assert sent(postgres_uri, batch(run_id, 2, keys=2), lambda _: None) is None
    engine = sqlalchemy.create_engine(postgres_uri)
    lock = f"SELECT 1 FROM latest_metrics WHERE run_uuid = '{run_id}' AND key = '%s' FOR UPDATE"
    with engine.connect() as other:
        other.exec_driver_sql("SET deadlock_timeout = '60s'")  # so that ours is found out
        other.exec_driver_sql(lock.replace("%s", "k1"))
        outcomes: list[TransportError | None] = []
        later = batch(run_id, 2, keys=2, first=2)
        writer = threading.Thread(
            target=lambda: outcomes.append(sent(postgres_uri, later, lambda _: None))
        )
        writer.start()
        wait_until(lambda: _waits(engine))
        other.exec_driver_sql(lock.replace("%s", "k0"))  # waits for ours, which waits for this one
        writer.join(60)
        other.rollback()
    engine.dispose()
    assert type(outcomes[0]) is RetriableError
    assert "deadlock detected" in outcomes[0].reason
    assert sent(postgres_uri, later, lambda _: None) is None


def test_a_key_cannot_leave_its_place_in_an_array(postgres_uri: str) -> None:
    """Whatever a key is, PostgreSQL gets it as one key: MLflow refuses the odd ones before."""
    run_id = make_run(postgres_uri)
    engine = sqlalchemy.create_engine(postgres_uri)
    keys = ['a"b', "a\\b", "a,b", "{a}", "NULL", "", " a ", "%s", "a'b"]
    with engine.begin() as connection:
        write(connection, run_id, Rows(keys, [0.5] * 9, [1] * 9, [2] * 9))
    assert sorted(row[0] for row in tables(engine, run_id)["metrics"]) == sorted(map(repr, keys))
    engine.dispose()
