"""Real servers with FLOWBUFFER_SERVER=1 beside stock ones: what a client sees of the switch is its
speed alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest
import requests
import sqlalchemy
from mlflow.entities import Metric, Param
from mlflow.tracking._tracking_service.utils import _get_store
from packaging.version import Version

from support.backends import MlflowServer, client, copy_sqlite, make_run
from support.tables import tables

TOLD = "flowbuffer: batches of metrics are stored in bulk"
GOOD = {"key": "a", "value": 0.5, "timestamp": 1, "step": 2}
ADMIN = ("admin", "a long password 1")


class Served(NamedTuple):
    """A server, and the database behind it."""

    server: MlflowServer
    engine: sqlalchemy.Engine

    @property
    def uri(self) -> str:
        return self.server.uri

    def post(self, path: str, body: Any, auth: Any = None, **more: Any) -> requests.Response:
        url = f"{self.uri}/api/2.0/mlflow/{path}"
        return requests.post(url, **({"json": body} | more), auth=auth, timeout=60)


@pytest.fixture(scope="module")
def bulk(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server on SQLite with the switch on."""
    folder = tmp_path_factory.mktemp("bulk")
    uri = copy_sqlite(sqlite_template, folder / "mlflow.db")
    with MlflowServer(uri, folder, FLOWBUFFER_SERVER="1") as server:
        yield Served(server, engine := sqlalchemy.create_engine(uri))
        server.kill()  # it would take seconds to end by itself
    engine.dispose()


@pytest.fixture
def stock(server_sqlite: MlflowServer) -> Iterator[Served]:
    """A stock server on SQLite."""
    uri = server_sqlite._command[server_sqlite._command.index("--backend-store-uri") + 1]
    yield Served(server_sqlite, engine := sqlalchemy.create_engine(uri))
    engine.dispose()


@pytest.fixture(scope="module")
def guarded(
    sqlite_template: Path, postgres_uri: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Served]]:
    """Two servers with basic-auth: a stock one on SQLite, and two workers on PostgreSQL with the
    switch on."""
    pytest.importorskip("flask_wtf", reason="MLflow's basic-auth wants it")
    folder = tmp_path_factory.mktemp("guarded")
    uris = [copy_sqlite(sqlite_template, folder / "mlflow.db"), postgres_uri]
    found = []
    for number, uri in enumerate(uris):
        place = folder / str(number)
        place.mkdir()
        (place / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{place}/auth.db\n"
            f"admin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 300\n"  # a password takes 0.2 s
        )
        environment = {
            "MLFLOW_AUTH_CONFIG_PATH": str(place / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "not a secret",
            **({"FLOWBUFFER_SERVER": "yes"} if number else {}),
        }
        options = ("--app-name", "basic-auth")
        server = MlflowServer(uri, place, 1 + number, options=options, **environment)
        found.append(Served(server, sqlalchemy.create_engine(uri)))
    starts = [threading.Thread(target=one.server.start) for one in found]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    yield found
    for one in found:
        one.server.kill()
        one.engine.dispose()


def answer(response: requests.Response, run_id: str) -> tuple[Any, ...]:
    """What a client sees of it, whatever the run is called."""
    kind = response.headers["Content-Type"], response.headers.get("WWW-Authenticate")
    return response.status_code, *kind, response.text.replace(run_id, "the run")


# Answers.

#: Requests for log-batch, each in its order, by what happens.
REQUESTS: dict[str, Any] = {
    "metrics": {"metrics": [GOOD, {**GOOD, "key": "b", "value": "NaN"}]},
    "the same again": {"metrics": [GOOD, {**GOOD, "key": "b", "value": "NaN"}]},
    "a thousand": {"metrics": [{**GOOD, "step": n, "value": n / 7} for n in range(1000)]},
    "one too many": {"metrics": [GOOD] * 1001},
    "a bad key": {"metrics": [GOOD, {**GOOD, "key": "a\nb"}]},
    "no key": {"metrics": [{**GOOD, "key": ""}]},
    "a long key": {"metrics": [{**GOOD, "key": "x" * 251}]},
    "a value in words": {"metrics": [{**GOOD, "value": "much"}]},
    "a number as a text": {"metrics": [{**GOOD, "value": "1.25"}]},
    "no value": {"metrics": [{"key": "a", "timestamp": 1}]},
    "no step": {"metrics": [{"key": "a", "value": 2.0, "timestamp": 1}]},
    "no time": {"metrics": [{"key": "a", "value": 2.0, "step": 1}]},
    "before 1970": {"metrics": [{**GOOD, "timestamp": -1}]},
    "too many bits": {"metrics": [{**GOOD, "step": 2**63}]},
    "none": {"metrics": []},
    "no list": {"metrics": GOOD},
    "no model": {"metrics": [{**GOOD, "model_id": "nowhere"}]},
    "a parameter": {"params": [{"key": "p", "value": "1"}], "metrics": [{**GOOD, "step": 9}]},
    "another value": {"params": [{"key": "p", "value": "2"}], "metrics": [{**GOOD, "step": 10}]},
    "a tag": {"tags": [{"key": "t", "value": "1"}]},
    "another run": {"run_id": "0" * 32, "metrics": [GOOD]},
    "no run": {"run_id": "", "metrics": [GOOD]},
    "a run that is none": {"run_id": "a/b", "metrics": [GOOD]},
}


def test_every_answer_is_the_stock_servers(stock: Served, bulk: Served) -> None:
    """REST: whatever is sent, status, error code and message are those of the stock server, and so
    is every row afterwards."""
    said, rows = [], []
    for one in (stock, bulk):
        run_id = make_run(one.uri)

        def send(of: str = run_id, one: Served = one, body: Any = None, **more: Any) -> Any:
            body = None if body is None else {"run_id": of} | body
            return answer(one.post("runs/log-batch", body, **more), of)

        found = {name: send(body=body) for name, body in REQUESTS.items()}
        text = json.dumps({"run_id": run_id, "metrics": [{**GOOD, "step": 11}]})
        kind = {"Content-Type": "application/json"}
        found["twice encoded"] = send(json=text)
        found["NaN as a number"] = send(data=text.replace("0.5", "NaN"), headers=kind)
        found["no JSON"] = send(data="{", headers=kind)
        found["another kind"] = send(data=text, headers={"Content-Type": "text/plain"})
        client(one.uri).set_terminated(run_id)
        found["a run that is over"] = send(body={"metrics": [{**GOOD, "step": 12}]})
        client(one.uri).delete_run(run_id)
        found["a run that is deleted"] = send(body={"metrics": [{**GOOD, "step": 13}]})
        said.append(found)
        rows.append(tables(one.engine, run_id))
    assert said[1] == said[0]
    assert said[0]["metrics"][0] == 200
    assert [said[0][name][0] for name in ("a bad key", "another run")] == [400, 404]
    assert rows[1] == rows[0]
    assert len(rows[0]["metrics"]) > 1000


def order_of_rows(engine: sqlalchemy.Engine, run_id: str) -> list[str]:
    """The keys of a run's metrics, in the order in which they were written."""
    query = f"SELECT key FROM metrics WHERE run_uuid = '{run_id}' ORDER BY rowid"
    with engine.connect() as connection:
        return [row[0] for row in connection.exec_driver_sql(query)]


def test_the_switch_is_on(stock: Served, bulk: Served) -> None:
    """A stock client's batch is stored in bulk, which leaves its rows in the order of their keys,
    and the server has said so once."""
    orders = []
    for one in (stock, bulk):
        run_id = make_run(one.uri)
        client(one.uri).log_batch(run_id, [Metric(key, 1.0, 1, 1) for key in "cab"])
        orders.append(order_of_rows(one.engine, run_id))
    assert orders == [["c", "a", "b"], ["a", "b", "c"]]
    assert bulk.server.log.read_text().count(TOLD) == 1
    assert "flowbuffer" not in stock.server.log.read_text()


def test_a_clients_calls_read_back_the_same(stock: Served, bulk: Served) -> None:
    """Fluent calls and client calls: histories, the latest values, parameters and a search are what
    they are with the stock server."""
    found = []
    for one in (stock, bulk):
        mlflow.set_tracking_uri(one.uri)
        with mlflow.start_run() as run:
            for step in range(3):
                mlflow.log_metric("loss", 1 / (step + 1), step, timestamp=step + 1)
                mlflow.log_metrics({"acc": step, "bad": math.nan}, step, timestamp=step + 1)
            metrics = [Metric("batch", value, 5, 1) for value in (1.0, -0.0, math.inf, 5e-324)]
            mlflow.MlflowClient().log_batch(run.info.run_id, metrics, [Param("p", "1")])
        run_id = run.info.run_id
        [run] = mlflow.search_runs(filter_string=f"run_id = '{run_id}'", output_format="list")
        history = client(one.uri).get_metric_history(run_id, "batch")
        found.append(
            (
                sorted(map(str, run.data.metrics.items())),
                run.data.params,
                [(m.value, m.timestamp, m.step) for m in history],
                tables(one.engine, run_id),
            )
        )
    assert found[1] == found[0]
    assert len(found[0][3]["metrics"]) == 13


def test_batches_of_several_clients_at_once(guarded: list[Served]) -> None:
    """Two workers on PostgreSQL: clients that write the same keys at once, forwards and backwards,
    leave what MLflow's store leaves when it writes that alone."""
    bulk = guarded[1]
    store = _get_store(str(bulk.engine.url.render_as_string(hide_password=False)))
    run_id, alone = (store.create_run("0", "u", 1, [], "run").info.run_id for _ in range(2))
    fields = ("key", "value", "timestamp", "step")
    batches = [
        [dict(zip(fields, (f"k{n % 40}", n / 7, n, at + n // 40), strict=True)) for n in range(400)]
        for at in range(0, 20, 5)
    ]
    said: list[int] = []

    def send(order: Callable[[Any], Any]) -> None:
        for batch in batches:
            body = {"run_id": run_id, "metrics": [*order(batch)]}
            said.append(bulk.post("runs/log-batch", body, ADMIN).status_code)

    clients = [threading.Thread(target=send, args=(order,)) for order in (iter, reversed) * 2]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert said == [200] * 16
    for batch in batches:
        store.log_batch(alone, [Metric(*one.values()) for one in batch], [], [])
    assert tables(bulk.engine, run_id) == tables(bulk.engine, alone)


# Who may.


def allow(one: Served, user: str, permission: str) -> None:
    """Make a user with a permission for the default experiment; without one if it is empty."""
    body: Any = {"username": user, "password": "a long password 2"}
    one.post("users/create", body, ADMIN).raise_for_status()
    if permission:
        body = {"username": user, "permission": permission}
        of = {"resource_type": "experiment", "resource_id": "0"}
        granted = one.post("../../3.0/mlflow/users/permissions/grant", body | of, ADMIN)
        if granted.status_code != 200:  # an older MLflow
            of["experiment_id"] = "0"
            granted = one.post("experiments/permissions/create", body | of, ADMIN)
        assert granted.status_code == 200, granted.text


def test_who_may_not_is_told_what_the_stock_server_tells(guarded: list[Served]) -> None:
    """Basic-auth: for every role, a stranger and a wrong password, each request is answered as by
    the stock server, and who may not stores nothing."""
    users = {"reads": "READ", "edits": "EDIT", "manages": "MANAGE", "default": ""}
    users |= {"none": "DENY" if Version(mlflow.__version__) > Version("3.16") else "NO_PERMISSIONS"}
    names = [*users, "nobody"]
    who = {name: (name, "a long password 2") for name in names}
    who |= {"admin": ADMIN, "wrong": ("edits", "a wrong password 3")}
    said: list[Any] = []
    for one in guarded:
        for user, permission in users.items():
            allow(one, user, permission)
        body = {"experiment_id": "0", "start_time": 1}
        run_id = one.post("runs/create", body, ADMIN).json()["run"]["info"]["run_id"]
        found = {}
        for name, auth in (*who.items(), ("unnamed", None)):
            for what in ("metrics", "a bad key", "a parameter", "another run"):
                body = {"run_id": run_id} | REQUESTS[what]
                found[name, what] = answer(one.post("runs/log-batch", body, auth), run_id)
            # Only those who may have left a row of their own.
            body = {"run_id": run_id, "metrics": [{**GOOD, "key": name}]}
            one.post("runs/log-batch", body, auth)
        stored = {row[0] for row in tables(one.engine, run_id)["latest_metrics"]}
        said.append((found, stored))
    assert said[1] == said[0]
    found, stored = said[1]
    statuses = {name: found[name, "metrics"][0] for name in (*who, "unnamed")}
    assert statuses == {
        **dict.fromkeys(("reads", "default", "none"), 403),
        **dict.fromkeys(("edits", "manages", "admin"), 200),
        **dict.fromkeys(("nobody", "wrong", "unnamed"), 401),
    }
    assert stored == {*map(repr, ("a", "b", "edits", "manages", "admin"))}
    assert guarded[1].server.log.read_text().count(TOLD) == 1


# Where the switch is off.

IMPORTED = """
import json, sys
import mlflow.server.handlers as handlers
rooms = {".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("flowbuffer.")}
view = handlers.HANDLERS[handlers.LogBatch]
print(json.dumps([sorted(rooms), view is handlers._log_batch, view.__name__]))
"""


def test_nothing_is_imported_without_the_switch() -> None:
    """Where the variable says no, a server imports nothing of flowbuffer's but what asks for
    the variable, and has MLflow's view; with it nothing of what logs, spools or delivers."""
    import os

    found = {}
    started = {
        text: subprocess.Popen(
            [sys.executable, "-c", IMPORTED],
            env={**os.environ, "FLOWBUFFER_SERVER": text},
            stdout=subprocess.PIPE,
        )
        for text in ("off", "1")
    }
    for text, process in started.items():
        found[text] = json.loads(process.communicate(timeout=120)[0].splitlines()[-1])
    assert found["off"] == [["flowbuffer.dropin"], True, "_log_batch"]
    rooms, is_stock, name = found["1"]
    assert (is_stock, name) == (False, "_log_batch")
    assert set(rooms) & {f"flowbuffer.{room}" for room in ("logger", "spool", "delivery")} == set()
    assert set(rooms) <= {
        *("flowbuffer.dropin", "flowbuffer.server", "flowbuffer.sql", "flowbuffer.notices"),
        *("flowbuffer.originals", "flowbuffer.turn", "flowbuffer.words", "flowbuffer.errors"),
    }
