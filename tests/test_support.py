"""The test equipment does what it says, against a real server."""

import os
import threading
import time

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from support.backends import MlflowServer, histories, history, make_run
from support.faults import (
    Exchange,
    FaultProxy,
    commit_then_reset,
    delay,
    forward,
    hang,
    poison,
    reset,
    status,
)
from support.waiting import PATIENCE_S, slack_s, wait_until


def metrics(*values: float) -> list[Metric]:
    return [Metric("loss", value, 1000 + step, step) for step, value in enumerate(values)]


def values(uri: str, run_id: str) -> list[float]:
    return [metric.value for metric in history(uri, run_id, "loss")]


@pytest.fixture
def run_id(server_sqlite: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run on the server, for a client that tries once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return make_run(server_sqlite.uri)


def test_isolation(tmp_path):
    """A test has its own directory and spool, and no setting of the developer's shell."""
    assert os.getcwd() == str(tmp_path)
    assert os.environ["FLOWBUFFER_SPOOL_DIR"] == str(tmp_path / "spool")
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert mlflow.active_run() is None


def test_sqlite_holds_every_point(sqlite_uri):
    """A history is complete beyond the 25,000 points of one page, and all keys are read."""
    run_id = make_run(sqlite_uri)
    client = MlflowClient(sqlite_uri)
    for start in range(0, 26_000, 1000):
        points = [Metric("loss", i, i, i) for i in range(start, start + 1000)]
        client.log_batch(run_id, metrics=points)
    client.log_metric(run_id, "accuracy", 0.5)
    assert [metric.step for metric in history(sqlite_uri, run_id, "loss")] == list(range(26_000))
    assert {key: len(h) for key, h in histories(sqlite_uri, run_id).items()} == {
        "accuracy": 1,
        "loss": 26_000,
    }


def test_server_returns_on_its_port(server_sqlite):
    """A server that is killed or stopped comes back on the same port with what it had."""
    run_id = make_run(server_sqlite.uri)
    server_sqlite.kill()
    assert server_sqlite.pid is None
    server_sqlite.restart()
    assert MlflowClient(server_sqlite.uri).get_run(run_id).info.run_id == run_id


def test_postgres_stores_points(server_postgres):
    """A server on PostgreSQL stores points like one on SQLite."""
    run_id = make_run(server_postgres.uri)
    MlflowClient(server_postgres.uri).log_batch(run_id, metrics=metrics(1, 2))
    assert values(server_postgres.uri, run_id) == [1, 2]


def test_proxy_is_transparent(server_sqlite, run_id):
    """Whatever is no log-batch passes unseen, and a log-batch is forwarded and recorded."""
    with FaultProxy(server_sqlite.uri) as proxy:
        client = MlflowClient(proxy.uri)
        client.log_metric(run_id, "loss", 7, timestamp=1, step=0)
        client.log_batch(run_id, metrics=metrics(1, 2))
        assert values(proxy.uri, run_id) == [7, 1, 2]
    [request] = proxy.requests
    assert (request.action, request.status, request.stored) == ("forward", 200, True)
    assert [metric["value"] for metric in request.metrics] == [1, 2]


def test_proxy_keeps_connections(server_sqlite, run_id):
    """A client uses one connection for many requests."""
    with FaultProxy(server_sqlite.uri) as proxy:
        client = MlflowClient(proxy.uri)
        client.get_run(run_id)
        threads = set(threading.enumerate())  # the proxy has one per connection
        for _ in range(5):
            client.get_run(run_id)
        assert set(threading.enumerate()) == threads


@pytest.mark.parametrize(
    ("action", "name", "code", "stored"),
    [
        (status(503, {"Retry-After": "7"}), "status 503", 503, False),
        (reset, "reset", None, False),
        (commit_then_reset, "commit_then_reset", None, True),
    ],
)
def test_fault_meets_one_batch(server_sqlite, run_id, action, name, code, stored):
    """A queued action meets exactly one batch, and only a batch that was forwarded is stored."""
    with FaultProxy(server_sqlite.uri) as proxy:
        proxy.then(action)
        client = MlflowClient(proxy.uri)
        with pytest.raises(mlflow.MlflowException):
            client.log_batch(run_id, metrics=metrics(1))
        assert values(server_sqlite.uri, run_id) == ([1] if stored else [])
        client.log_batch(run_id, metrics=metrics(1))
    first, second = proxy.requests
    assert (first.action, first.status, first.stored) == (name, code, stored)
    assert (second.action, second.status) == ("forward", 200)
    assert first.at_s < second.at_s
    assert values(server_sqlite.uri, run_id) == [1]


def test_poison_refuses_matching_batches(server_sqlite, run_id):
    """A batch with a poisoned metric is refused with MLflow's own error, any other is stored."""
    with FaultProxy(server_sqlite.uri, poison(lambda m: m["value"] > 5, "too large")) as proxy:
        client = MlflowClient(proxy.uri)
        with pytest.raises(mlflow.MlflowException, match="too large") as error:
            client.log_batch(run_id, metrics=metrics(1, 9))
        client.log_batch(run_id, metrics=metrics(1, 2))
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"
    assert values(server_sqlite.uri, run_id) == [1, 2]


def test_own_action_may_choose(server_sqlite, run_id):
    """An action of the test's own may look at the request and hand it to another action."""

    def refuse_second(exchange: Exchange) -> None:
        (status(429) if len(exchange.proxy.requests) == 2 else forward)(exchange)

    with FaultProxy(server_sqlite.uri, refuse_second) as proxy:
        client = MlflowClient(proxy.uri)
        client.log_batch(run_id, metrics=metrics(1))
        with pytest.raises(mlflow.MlflowException):
            client.log_batch(run_id, metrics=metrics(1))
    assert [(r.action, r.status) for r in proxy.requests] == [
        ("refuse_second", 200),
        ("refuse_second", 429),
    ]


def test_hang_lasts_until_release(server_sqlite, run_id):
    """A hanging request is held until it is released, and is stored then."""
    with FaultProxy(server_sqlite.uri, hang) as proxy:
        operation = MlflowClient(proxy.uri).log_batch(run_id, metrics=metrics(1), synchronous=False)
        wait_until(lambda: proxy.requests)
        assert values(server_sqlite.uri, run_id) == []
        proxy.release()
        operation.wait()
    assert values(server_sqlite.uri, run_id) == [1]


def test_delay_comes_before_the_server(server_sqlite, run_id):
    """A delayed request is answered no sooner than it should be."""
    with FaultProxy(server_sqlite.uri, delay(0.2)) as proxy:
        MlflowClient(proxy.uri).log_batch(run_id, metrics=metrics(1))
        assert time.monotonic() - proxy.requests[0].at_s >= 0.2
    assert proxy.requests[0].stored


@pytest.mark.parametrize("action", [hang, delay(60)], ids=["hang", "delay"])
def test_closing_is_quick_and_leaves_no_thread(server_sqlite, run_id, action):
    """Closing the proxy resets what it holds, at once, and ends its threads."""
    before = threading.active_count()
    with FaultProxy(server_sqlite.uri, action) as proxy:
        client = MlflowClient(proxy.uri)

        def send() -> None:
            with pytest.raises(mlflow.MlflowException):
                client.log_batch(run_id, metrics=metrics(1))

        sender = threading.Thread(target=send)
        sender.start()
        wait_until(lambda: proxy.requests)
        started = time.monotonic()
    assert time.monotonic() - started < 1 + slack_s()
    sender.join(PATIENCE_S)
    assert threading.active_count() == before
    assert values(server_sqlite.uri, run_id) == []


def test_down_refuses_and_up_returns(server_sqlite, run_id):
    """A proxy that is down refuses connections, kept ones included, and returns on its port."""
    with FaultProxy(server_sqlite.uri) as proxy:
        client = MlflowClient(proxy.uri)
        client.log_batch(run_id, metrics=metrics(1))
        proxy.down()
        with pytest.raises(mlflow.MlflowException, match="refused"):
            client.log_batch(run_id, metrics=metrics(1, 2))
        proxy.up()
        client.log_batch(run_id, metrics=metrics(1, 2, 3))
    assert values(server_sqlite.uri, run_id) == [1, 2, 3]
