# ruff: noqa: ARG005  the lambdas of a table have the same arguments
"""What this process reads finds what it has logged before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import pytest
import requests
from mlflow import MlflowClient

import flowbuffer
from flowbuffer.backends.mlflow_transport import MlflowTransport
from flowbuffer.clock import SYSTEM_CLOCK
from support.backends import MlflowServer, make_run
from support.stored import rows
from support.switch import HELD, values
from support.waiting import PATIENCE_S, slack_s


def parent_of_new_run(run_id: str) -> Any:
    with mlflow.start_run(nested=True, parent_run_id=run_id) as child:
        return mlflow.get_parent_run(child.info.run_id)


READS: dict[str, Callable[[str], object]] = {
    "mlflow.get_run": lambda run: mlflow.get_run(run).data.metrics["k"],
    "client.get_run": lambda run: MlflowClient().get_run(run).data.params["p"],
    "get_metric_history": lambda run: MlflowClient().get_metric_history(run, "k")[0].value,
    "client.search_runs": lambda run: next(
        one.data.metrics["k"] for one in MlflowClient().search_runs(["0"], "metrics.k = 1")
    ),
    "mlflow.search_runs": lambda run: mlflow.search_runs(["0"], "params.p = '1'")["metrics.k"][0],
    "a list of runs": lambda run: mlflow.search_runs(["0"], "tags.t = '1'", output_format="list")[
        0
    ].data.metrics["k"],
    "parent run": lambda run: parent_of_new_run(run).data.metrics["k"],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_find_what_was_logged(
    run_id: str, sqlite_uri: str, read: Callable[[str], object]
) -> None:
    """What reads a run finds everything that this process has logged to it before."""
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0)
    mlflow.log_param("p", 1)
    mlflow.set_tag("t", 1)
    assert rows(sqlite_uri) == (0, 0, 0)
    assert read(run_id) in (1.0, "1")
    assert rows(sqlite_uri) == (1, 1, 1)


def test_plain_http_reads_find_what_was_logged(server_sqlite: MlflowServer) -> None:
    """A plain request for metrics finds everything that this process has logged to that server; one
    to another server waits for nothing."""
    mlflow.set_tracking_uri(server_sqlite.uri)
    run_id = mlflow.start_run().info.run_id
    asked = {"run_id": run_id, "metric_key": "k"}
    flowbuffer.enable(linger_s=HELD)

    def read(uri: str) -> list[float]:
        answer = requests.get(f"{uri}/api/2.0/mlflow/metrics/get-history", asked, timeout=30)
        return [metric["value"] for metric in answer.json().get("metrics", ())]

    mlflow.log_metric("k", 2.0)
    mlflow.log_metric("k", 1.0)
    assert read(server_sqlite.uri.replace("127.0.0.1", "localhost")) == []
    assert read(server_sqlite.uri) == [2.0, 1.0]


def test_reads_of_another_run_wait_for_nothing(run_id: str, sqlite_uri: str) -> None:
    """get_run waits for the run that it reads, not for others."""
    other = make_run(sqlite_uri)
    flowbuffer.enable(linger_s=HELD)
    mlflow.log_metric("k", 1.0)
    mlflow.get_run(other)
    assert rows(sqlite_uri) == (0, 0, 0)
    mlflow.get_run(run_id)
    assert rows(sqlite_uri) == (1, 0, 0)


def test_reads_in_a_loop(run_id: str) -> None:
    """Each read finds the point logged just before it, also on an old client."""
    own = MlflowClient()
    flowbuffer.enable(linger_s=HELD)
    for value in range(20):
        mlflow.log_metric("k", float(-value))
        assert own.get_run(run_id).data.metrics["k"] == -value
        assert len(own.get_metric_history(run_id, "k")) == value + 1


def test_a_read_without_a_wait(run_id: str, sqlite_uri: str) -> None:
    """read_timeout_s=0 reads at once; what was logged arrives later."""
    flowbuffer.enable(linger_s=HELD, read_timeout_s=0)
    mlflow.log_metric("k", 1.0)
    assert mlflow.get_run(run_id).data.metrics == {}
    assert len(mlflow.search_runs(["0"])) == 1
    flowbuffer.disable()
    assert values(sqlite_uri, run_id, "k") == [1.0]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is delivered until it is set."""
    opened = threading.Event()
    original = MlflowTransport._log_batch

    def log_batch(self: Any, request: Any) -> None:
        opened.wait(PATIENCE_S)
        original(self, request)

    monkeypatch.setattr(MlflowTransport, "_log_batch", log_batch)
    yield opened
    opened.set()


def test_a_read_waits_for_a_bounded_time(
    run_id: str, sqlite_uri: str, gate: threading.Event
) -> None:
    """A read waits for read_timeout_s at most, and then reads what is there."""
    flowbuffer.enable(read_timeout_s=0.3)
    mlflow.log_metric("k", 1.0)
    for read in (mlflow.get_run, lambda _: mlflow.search_runs(["0"])):
        start_s = SYSTEM_CLOCK.monotonic_s()
        read(run_id)
        assert 0.3 <= SYSTEM_CLOCK.monotonic_s() - start_s < 2 + slack_s()
    assert rows(sqlite_uri) == (0, 0, 0)
    gate.set()
    flowbuffer.enable(read_timeout_s=PATIENCE_S)
    assert mlflow.get_run(run_id).data.metrics == {"k": 1.0}
