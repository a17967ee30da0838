"""What counts as an answer of MLflow's: only that delivers a point, and only that rejects one."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import pytest
from mlflow.entities import Metric

from flowbuffer.backends.base import Request
from flowbuffer.backends.mlflow_transport import MlflowTransport
from flowbuffer.backends.rest import is_answer
from flowbuffer.backends.translation import translated
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.errors import (
    DoubtfulError,
    RejectedError,
    RetriableError,
    RunGoneError,
    TooLargeError,
    TransportError,
)
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.layout import PARAM
from flowbuffer.testing import FakeTransport
from support.answer_matrix import Matrix, sample
from support.answering import LOG_BATCH, AnsweringServer, said
from support.backends import history, make_run
from support.small_spool import SmallSpool

RUN = "a" * 32
POINT = Request(RUN, ["loss"], [0.5], [1], [1])
NAN = math.nan


@pytest.fixture
def server() -> Iterator[AnsweringServer]:
    with AnsweringServer() as server:
        yield server


def transport_to(uri: str, **settings: Any) -> MlflowTransport:
    chosen = Settings(delivery="inline", **{"request_timeout_s": 20.0, **settings})
    return MlflowTransport(uri, chosen, SYSTEM_CLOCK)


def outcome(transport: MlflowTransport, request: Request = POINT) -> TransportError | None:
    outcomes: list[TransportError | None] = []
    transport.send(request, outcomes.append, lambda: None)
    return outcomes[0]


def test_a_sample_of_all_answers(tmp_path: Path) -> None:
    """Whatever answers in MLflow's place, and for how long: nothing is rejected that MLflow did not
    reject, nothing is delivered that it did not store, and all is stored soon after."""
    with Matrix() as matrix:
        for number, case in enumerate(sample(60, seed=20)):
            assert (str(case), matrix.run(case, tmp_path / str(number))) == (str(case), "")


@pytest.mark.parametrize(
    ("text", "proves"),
    [
        ("{}", True),
        ('{"login": "required"}', False),
        ('{"error_code": "INTERNAL_ERROR"}', False),
        ("null", False),
        ("[]", False),
        ("[1]", False),
        ('"ok"', False),
    ],
)
def test_what_proves_that_a_batch_is_stored(text: str, proves: bool) -> None:
    """P4: log-batch is answered with an empty object, and with nothing else."""
    assert is_answer(json.loads(text), frozenset(), empty=True) == proves


def test_an_answer_may_have_fields_that_are_not_known_yet() -> None:
    """A newer server says more than an older client knows; an empty run is no run."""
    assert is_answer({"run": {}, "new": 1}, frozenset({"run"}), empty=False)
    assert not is_answer({"new": 1}, frozenset({"run"}), empty=False)
    assert not is_answer({}, frozenset({"run"}), empty=False)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server: AnsweringServer, status: int) -> None:
    """P8: points and credentials go to no other server, and a sign-in page stores nothing."""
    with AnsweringServer() as other:
        server.answer = lambda request: said(status, {}, Location=f"{other.uri}{request.path}")
        assert type(outcome(transport_to(server.uri))) is RetriableError
        assert other.requests == []
    assert server.rows == set()


def test_an_answer_has_its_time_as_a_whole() -> None:
    """P5: a server that sends a byte now and then, be it of the headers or of the body, keeps a
    request no longer than ``request_timeout_s``, and as much to connect."""
    for start in (b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            over = threading.Event()

            def drip(start: bytes = start, over: threading.Event = over) -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(start)
                    piece = b"X-A: b\r\n" if start.endswith(b"OK\r\n") else b" "
                    while not over.wait(0.05):
                        try:
                            connection.sendall(piece)
                        except OSError:
                            return

            thread = threading.Thread(target=drip)
            thread.start()
            port = listener.getsockname()[1]
            before_s = SYSTEM_CLOCK.monotonic_s()
            error = outcome(transport_to(f"http://127.0.0.1:{port}", request_timeout_s=0.5))
            took_s = SYSTEM_CLOCK.monotonic_s() - before_s
            over.set()
            thread.join()
        assert isinstance(error, RetriableError)
        assert took_s < 20.0  # it would be 999 bytes, or headers without end


def test_a_model_that_is_not_found_is_not_the_run(server: AnsweringServer) -> None:
    """404 about something that a point names rejects that point, and parks no run that exists."""
    gone = said(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "No model 'm-1'"})
    server.answer = lambda request: gone if request.path == LOG_BATCH else None
    transport = transport_to(server.uri)
    assert type(outcome(transport)) is RejectedError
    server.deleted.add(RUN)
    assert type(outcome(transport)) is RunGoneError


@pytest.mark.parametrize(
    "uri", ["nosuchplugin://host/path", "postgresql+nosuchdriver://host/db", "mssql://host/db"]
)
def test_what_is_missing_here_rejects_nothing(uri: str) -> None:
    """A plugin or driver that this process lacks, and another has, is no answer of any server."""
    assert type(outcome(transport_to(uri))) is RetriableError


def test_only_the_store_that_was_asked_can_refuse(sqlite_uri: str) -> None:
    """MLflow's exceptions are an answer where there is no server, and only from the call itself."""
    store = mlflow.MlflowClient(sqlite_uri)._tracking_client.store
    refusal = mlflow.MlflowException.invalid_parameter_value("no")
    assert type(translated(refusal, store)) is RejectedError
    assert type(translated(refusal)) is RetriableError
    assert type(translated(OSError(24, "Too many open files"), store)) is RetriableError
    assert type(translated(MemoryError(), store)) is RetriableError


# What is put in MLflow's place in the process that delivers.


def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    def log_batch(self: Any, run_id: str, metrics: Any = (), *args: Any, **kwargs: Any) -> Any:
        changed = [Metric(f"pre/{m.key}", m.value, m.timestamp, m.step) for m in metrics]
        return original(self, run_id, changed, *args, **kwargs)

    return log_batch


@pytest.mark.parametrize(
    "target",
    [
        "mlflow.MlflowClient",
        "mlflow.MlflowClient.log_batch",
        "mlflow.tracking.MlflowClient",
        "mlflow.tracking.client.MlflowClient",
        "mlflow.tracking.client.TrackingServiceClient",
        "mlflow.tracking._tracking_service.client.TrackingServiceClient",
        "mlflow.tracking._tracking_service.client.TrackingServiceClient.log_batch",
        "mlflow.entities.Metric",
        "mlflow.entities.metric.Metric",
        "mlflow.utils.rest_utils.http_request",
        "requests.Session",
        "requests.Session.request",
    ],
)
def test_delivery_calls_what_mlflow_shipped(server: AnsweringServer, target: str) -> None:
    """P4: a mock that is there at the moment of the first batch stores nothing, and takes none."""
    transport = transport_to(server.uri)
    with mock.patch(target) as patched:
        assert outcome(transport) is None
    assert server.history(RUN, "loss") == [(1, 1, 0.5)]
    assert not patched.mock_calls


def test_a_wrapper_for_good_sees_no_delivery(
    sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project that renames metrics in ``log_batch`` renames those that it logs, and once."""
    run_id = make_run(sqlite_uri)
    original = mlflow.MlflowClient.log_batch
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", wrapped(original))
    request = Request(run_id, ["loss"], [0.5], [1], [1])
    assert outcome(transport_to(sqlite_uri), request) is None
    monkeypatch.undo()
    assert [m.value for m in history(sqlite_uri, run_id, "loss")] == [0.5]


def test_a_store_that_is_a_mock_delivers_nothing(
    sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4: what ``log_batch`` gives is MLflow's operation, or nothing; else it is no success."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    request = Request(make_run(sqlite_uri), ["loss"], [0.5], [1], [1])
    monkeypatch.setattr(SqlAlchemyStore, "log_batch", mock.MagicMock())
    assert type(outcome(transport_to(sqlite_uri), request)) is RetriableError


# NaN, which MLflow before 3.17 takes once.


def nans(steps: range, ranks: int = 1) -> Request:
    rows = [(step, rank) for step in steps for rank in range(ranks)]
    times = [1_700_000_000_000 + step for step, _ in rows]
    return Request(RUN, ["loss"] * len(rows), [NAN] * len(rows), times, [s for s, _ in rows])


def test_a_nan_is_sent_again_like_any_value() -> None:
    """P4: a batch with NaN whose answer was lost is stored, once, when it is sent again; and so is
    a NaN that another process has logged meanwhile."""
    with AnsweringServer(takes_nan_once=True) as server:
        first = nans(range(100))
        assert outcome(transport_to(server.uri), first) is None
        assert outcome(transport_to(server.uri), first) is None  # by a collector after a restart
        assert outcome(transport_to(server.uri), nans(range(50, 150))) is None
        assert [step for _, step, _ in server.history(RUN, "loss")] == list(range(150))


def test_the_nans_of_many_ranks() -> None:
    """A run that diverged on 8 ranks is some thousand NaN, the same ones of each: they take few
    requests, and each is stored once."""
    with AnsweringServer(takes_nan_once=True) as server:
        transport = transport_to(server.uri)
        for start in range(0, 4000, 125):  # 32 batches of 1000
            assert outcome(transport, nans(range(start, start + 125), ranks=8)) is None
        assert len(server.history(RUN, "loss")) == 4000
        batches = sum(received.path == LOG_BATCH for received in server.requests)
        reads = len(server.requests) - batches
        assert batches <= 32 + 2
        assert reads <= 2


def test_a_nan_that_is_not_there_is_not_called_stored() -> None:
    """P4: what a store refuses, and does not have, is not delivered."""
    with AnsweringServer() as server:
        refusal = said(400, {"error_code": "BAD_REQUEST", "message": "UNIQUE constraint failed"})
        server.answer = lambda request: refusal if request.path == LOG_BATCH else None
        assert type(outcome(transport_to(server.uri), nans(range(3)))) is DoubtfulError
        assert server.rows == set()


@pytest.mark.parametrize("backend", ["sqlite_uri", "postgres_uri"])
def test_nans_on_the_store_that_is_installed(backend: str, request: pytest.FixtureRequest) -> None:
    """P4: the same without a server, with the MLflow that is installed here."""
    backend_uri = request.getfixturevalue(backend)
    run_id = make_run(backend_uri)
    batch = Request(run_id, ["loss"] * 4, [NAN, 1.0, NAN, NAN], [5, 6, 7, 7], [1, 2, 3, 3])
    assert outcome(transport_to(backend_uri), batch) is None
    assert outcome(transport_to(backend_uri), batch) is None
    assert [(m.timestamp, m.step) for m in history(backend_uri, run_id, "loss")] == [
        *((5, 1), (6, 2), (7, 3))
    ]


# Doubt: MLflow fails, of its own or because of the content.


def poisoned(request: Request) -> TransportError | None:
    bad = "bad" in dict(request.params) or any(value == 7.0 for value in request.values)
    return DoubtfulError("500 INTERNAL_ERROR: NUL") if bad else None


def test_a_point_that_breaks_the_store_is_rejected_alone(tmp_path: Path) -> None:
    """P5: what MLflow fails on again and again, while it stores others, is one dead letter, and
    nothing waits behind it for long."""
    spool = SmallSpool(tmp_path, FakeTransport(answer=poisoned))
    for number in range(40):
        spool.producer.append("loss", float(number))
        spool.producer.append_texts(PARAM, {"bad" if number == 3 else f"p{number}": "x"})
    spool.deliver(seconds=300.0)
    assert spool.values("loss") == [float(number) for number in range(40) if number != 7]
    assert len(spool.transport.params) == 39
    assert (spool.stream.reader.delivered, spool.stream.reader.rejected) == (78, 2)


def test_what_breaks_the_store_lets_others_pass_before_it_is_judged(tmp_path: Path) -> None:
    """P5: a single point in doubt takes nobody's place, not even the only one that there is."""
    spool = SmallSpool(tmp_path, FakeTransport(answer=poisoned))
    spool.producer.append("loss", 7.0)
    spool.deliver(seconds=200.0)
    assert spool.stream.reader.rejected == 0  # it may be the store: nothing else was stored
    spool.producer.append("accuracy", 1.0)
    spool.producer.append("loss", 8.0)
    spool.deliver(seconds=200.0)
    assert (spool.values("accuracy"), spool.values("loss")) == ([1.0], [8.0])
    assert spool.stream.reader.rejected == 1


@pytest.mark.parametrize("seconds", [60.0, 3600.0])
def test_a_store_that_fails_for_all_rejects_nothing(tmp_path: Path, seconds: float) -> None:
    """P5: MLflow answers BAD_REQUEST to everything, as with an exhausted pool or a replica that
    takes no writes: however long that lasts, all is stored when it is over."""
    spool = SmallSpool(tmp_path)
    spool.transport.decide = lambda _: (
        DoubtfulError("400 BAD_REQUEST: read-only") if spool.clock.monotonic_s() < seconds else None
    )
    for number in range(100):
        spool.producer.append(f"k{number % 5}", float(number))
        spool.producer.append_texts(PARAM, {"p": str(number // 50)} if number % 50 == 0 else {})
    spool.deliver(seconds=seconds + 300.0)
    assert (spool.stream.reader.delivered, spool.stream.reader.rejected) == (101, 1)
    assert set(spool.transport.params.values()) == {"0"}  # its second value is the one rejected


def test_what_is_too_large_alone_is_no_fault_of_a_point(tmp_path: Path) -> None:
    """A gateway's 413 splits, and rejects nothing, however small the request."""
    spool = SmallSpool(tmp_path)
    spool.transport.decide = lambda _: (
        TooLargeError("413") if spool.clock.monotonic_s() < 60.0 else None
    )
    for number in range(20):
        spool.producer.append("loss", float(number))
    spool.deliver(seconds=300.0)
    assert spool.values("loss") == [float(number) for number in range(20)]
    assert spool.stream.reader.rejected == 0
