"""Faults of a real server and of the way to it (P2, P4, P5, P7).

Everything arrives once and in order, the loop never notices, and what the server will never take is
all that stays behind.
"""

import functools
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

import flowbuffer.delivery.sender
from flowbuffer import DeliveryError, MetricLogger, Settings
from flowbuffer.commands import cli
from flowbuffer.delivery.retry import RetryPolicy
from support.backends import MlflowServer, client, histories, make_run
from support.faults import (
    Action,
    Exchange,
    FaultProxy,
    commit_then_reset,
    forward,
    hang,
    poison,
    reset,
    status,
)
from support.waiting import PATIENCE_S, slack_s, wait_until

KEYS = ("loss", "accuracy", "rate")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between attempts that suit a test; what the server asks for comes on top."""
    policy = functools.partial(RetryPolicy, first_s=0.02, most_s=0.2, unauthorised_s=0.2)
    monkeypatch.setattr(flowbuffer.delivery.sender, "RetryPolicy", policy)


@pytest.fixture
def proxy(server_sqlite: MlflowServer) -> Iterator[FaultProxy]:
    with FaultProxy(server_sqlite.uri) as proxy:
        yield proxy


@pytest.fixture
def run_id(server_sqlite: MlflowServer) -> str:
    return make_run(server_sqlite.uri)


@pytest.fixture
def open_logger(proxy: FaultProxy, run_id: str) -> Iterator[Callable[..., MetricLogger]]:
    """Makes a logger that sends through the proxy."""
    loggers: list[MetricLogger] = []

    def open_it(**settings: float) -> MetricLogger:
        chosen = Settings.from_env(linger_s=0.02, **settings)
        loggers.append(MetricLogger(run_id, tracking_uri=proxy.uri, settings=chosen))
        return loggers[-1]

    yield open_it
    for logger in loggers:
        logger.close(timeout=5)


class Loop:
    """A training loop, and what the store must hold of it in the end."""

    def __init__(self, logger: MetricLogger) -> None:
        self.logger = logger
        self.steps = 0

    def go_on(self, steps: int = 100) -> None:
        """Log so many steps of every key, as fast as it goes, without a step number."""
        for step in range(self.steps, self.steps + steps):
            for key in KEYS:
                self.logger.log_metric(key, float(step % 7))
        self.steps += steps

    def check(self, server: MlflowServer) -> None:
        """Everything arrived once, in order, and nothing is left."""
        report = self.logger.flush(timeout=PATIENCE_S)
        count = self.steps * len(KEYS)
        assert (report.delivered, report.pending, report.rejected) == (count, 0, 0)
        found = histories(server.uri, self.logger.run_id)
        expected = [float(step % 7) for step in range(self.steps)]
        assert sorted(found) == sorted(KEYS)
        for key, history in found.items():
            assert [m.value for m in history] == expected, key


def wait_for_error(logger: MetricLogger, text: str) -> None:
    wait_until(lambda: text in logger.stats().last_error)


def spool() -> Path:
    return Path(os.environ["FLOWBUFFER_SPOOL_DIR"])


def dead_letters() -> list[dict[str, object]]:
    return [
        json.loads(line)
        for path in spool().glob("*/*/rejected.jsonl")
        for line in path.read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (status(500), "500"),
        (status(503), "503"),
        (status(408), "408"),
        (status(429), "429"),
        (status(401), "401"),
        (status(403), "403"),
        (reset, "Connection"),
    ],
    ids=["500", "503", "408", "429", "401", "403", "reset"],
)
def test_fault_for_a_while(
    server_sqlite, proxy, open_logger, caplog, fault: Action, said: str
) -> None:
    """P2, P4, P5: a fault that lasts a while delays delivery, and neither raises in the loop nor
    loses, doubles or reorders a point; it is said once."""
    logger = open_logger()
    loop = Loop(logger)
    loop.go_on()
    logger.flush(timeout=PATIENCE_S)
    proxy.always(fault)
    loop.go_on()
    wait_for_error(logger, said)
    loop.go_on()
    refused = len(proxy.requests)
    wait_until(lambda: len(proxy.requests) >= refused + 3)
    assert logger.flush(timeout=0).pending == 2 * 100 * len(KEYS)
    proxy.always(forward)
    loop.go_on()
    loop.check(server_sqlite)
    assert logger.stats().retries > 0
    assert logger.stats().last_error == ""
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 2  # and: it goes on


def test_retry_after_is_obeyed(proxy, open_logger) -> None:
    """P5: after a 429 with Retry-After nothing of the run is sent before that time is over, not
    even points of other keys for which someone waits."""
    logger = open_logger()
    proxy.then(status(429, {"Retry-After": "1"}))
    first = logger.log_metric("first", 1.0)
    wait_for_error(logger, "429")
    others = [logger.log_metric(f"other{number}", 2.0) for number in range(5)]
    for handle in [*others, first]:
        handle.wait(timeout=PATIENCE_S)
    refused, *later = proxy.requests
    assert later
    assert min(request.at_s for request in later) - refused.at_s >= 1.0


@pytest.mark.parametrize("name", ["server_sqlite", "server_postgres"])
def test_reset_after_the_commit(request, name: str) -> None:
    """P4: batches whose answer got lost are sent again and are in the store once."""
    server: MlflowServer = request.getfixturevalue(name)
    with FaultProxy(server.uri) as proxy:
        proxy.then(*[commit_then_reset] * 5)
        settings = Settings.from_env(linger_s=0.02, max_batch_size=50)
        with MetricLogger(make_run(server.uri), tracking_uri=proxy.uri, settings=settings) as log:
            loop = Loop(log)
            loop.go_on()
            loop.check(server)
        lost = [r for r in proxy.requests if r.action == "commit_then_reset"]
        assert [(r.stored, r.status) for r in lost] == [(True, None)] * 5
        for request_ in lost:
            sent = [r for r in proxy.requests if r.body == request_.body]
            assert len(sent) >= 2  # the same to the bit


@pytest.mark.parametrize("name", ["server_sqlite", "server_postgres"])
def test_hang(request, name: str) -> None:
    """P4, P5: a request without an answer is given up after `request_timeout_s` and sent again;
    that the server takes it later after all does no harm."""
    server: MlflowServer = request.getfixturevalue(name)
    with FaultProxy(server.uri) as proxy:
        proxy.then(hang, hang)
        settings = Settings.from_env(linger_s=0.02, request_timeout_s=2)
        with MetricLogger(make_run(server.uri), tracking_uri=proxy.uri, settings=settings) as log:
            loop = Loop(log)
            loop.go_on()
            log.flush(timeout=PATIENCE_S)
            held = [r for r in proxy.requests if r.action == "hang"]
            assert len(held) == 2
            assert not any(r.stored for r in held)
            proxy.release()
            wait_until(lambda: all(r.stored for r in held))
            loop.check(server)


def test_down_then_up(server_sqlite, proxy, open_logger) -> None:
    """P2, P4, P5: a server that refuses connections and returns gets everything, in order."""
    logger = open_logger()
    loop = Loop(logger)
    for _ in range(3):
        loop.go_on()
        proxy.down()
        loop.go_on()
        wait_for_error(logger, "refused")
        proxy.up()
    loop.check(server_sqlite)


def test_down_from_the_start(server_sqlite, proxy, open_logger) -> None:
    """P5: a logger opens and logs while the server is not there yet."""
    proxy.down()
    logger = open_logger()
    loop = Loop(logger)
    loop.go_on()
    wait_for_error(logger, "refused")
    proxy.up()
    loop.check(server_sqlite)


def test_server_killed_and_started(server_sqlite, run_id) -> None:
    """P2, P4, P5: a real server is killed in the middle of its work and started again while points
    flow; each of them is there once, in order."""
    settings = Settings.from_env(linger_s=0.02, max_batch_size=50)
    with MetricLogger(run_id, tracking_uri=server_sqlite.uri, settings=settings) as logger:
        loop = Loop(logger)
        stop = threading.Event()
        errors: list[BaseException] = []

        def train() -> None:
            try:
                while not stop.wait(0.01):
                    if loop.steps < 1000:  # a server may take long to start
                        loop.go_on(3)
            except BaseException as error:
                errors.append(error)

        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            wait_until(lambda: logger.stats().delivered > 100)
            server_sqlite.kill()
            wait_for_error(logger, "refused")
        finally:
            server_sqlite.start()
            stop.set()
            trainer.join()
        assert not errors
        loop.check(server_sqlite)


def test_poison_point(server_sqlite, proxy, open_logger, run_id, monkeypatch) -> None:
    """P5: of 1000 points the server refuses one: it alone is a dead letter, with the server's
    reason, and finding it takes at most 25 requests."""
    reads: list[object] = []
    get_run = MlflowClient.get_run

    def counted(self: MlflowClient, run_id: str) -> object:
        reads.append(run_id)
        return get_run(self, run_id)

    monkeypatch.setattr(MlflowClient, "get_run", counted)
    proxy.always(poison(lambda metric: metric["value"] == 637, "not this one"))
    logger = open_logger()

    values = [float(value) for value in range(1000)]
    series = logger.log_series("series", values[:600])  # nothing wrong with it
    series.wait(timeout=PATIENCE_S)
    before = len(proxy.requests)
    handles = [logger.log_metric("loss", value) for value in values]
    report = logger.flush(timeout=PATIENCE_S)
    assert (report.delivered, report.rejected, report.pending) == (1599, 1, 0)
    assert len(proxy.requests) - before + len(reads) <= 25
    [error] = filter(None, [handle.exception(timeout=PATIENCE_S) for handle in handles])
    assert handles[637].exception(timeout=PATIENCE_S) is not None
    assert "not this one" in str(error)
    [letter] = dead_letters()
    assert (letter["key"], letter["value"], letter["run_id"]) == ("loss", 637.0, run_id)
    assert "not this one" in str(letter["reason"])
    found = histories(server_sqlite.uri, run_id)
    assert [m.value for m in found["loss"]] == [v for v in values if v != 637]
    with pytest.raises(DeliveryError, match="not this one"):
        handles[637].wait(timeout=PATIENCE_S)


def test_too_large_is_split(server_sqlite, proxy, open_logger) -> None:
    """P5: a server, or what stands before it, that takes less at once gets less at once."""

    def small_only(exchange: Exchange) -> None:
        (forward if len(exchange.record.metrics) <= 40 else status(413))(exchange)

    proxy.always(small_only)
    loop = Loop(open_logger())
    loop.go_on()
    loop.check(server_sqlite)
    assert any(request.status == 413 for request in proxy.requests)
    assert dead_letters() == []


TRAINER = """
import json, sys, time
import flowbuffer
uri, run_id = sys.argv[1:]
logger = flowbuffer.MetricLogger(run_id, tracking_uri=uri)
for step in range(500):
    handle = logger.log_metric("loss", step % 7)
{waiting}
start = time.monotonic()
report = logger.close(timeout=1)
print(json.dumps([time.monotonic() - start, report.pending, why]))
"""


def train(uri: str, run_id: str, waiting: str) -> tuple[float, int, str, str]:
    """Run a trainer of 500 points to its end. Returns how long its close() took, what was pending
    then, what it found out by `waiting`, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", TRAINER.format(waiting=waiting), uri, run_id],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    seconds, pending, why = json.loads(done.stdout)
    return seconds, pending, why, done.stderr


def sync(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The status of `flowbuffer sync`, and what it printed."""
    capsys.readouterr()
    code = cli.main(["sync", "--spool", str(spool()), "--timeout", "150"])
    return code, capsys.readouterr().out.strip()


def check_synced(server: MlflowServer, run_id: str) -> None:
    found = histories(server.uri, run_id)
    assert [m.value for m in found["loss"]] == [step % 7 for step in range(500)]


def test_server_never_comes_up(server_sqlite, proxy, run_id, capsys) -> None:
    """P7: close() gives up in time and says what is left and which command delivers it; that
    command then delivers all of it, and a second time nothing."""
    proxy.down()
    seconds, pending, _, stderr = train(proxy.uri, run_id, "why = ''")
    assert pending == 500
    assert 0.9 <= seconds < 2 + slack_s()
    assert f"flowbuffer sync --spool {spool()}" in stderr.splitlines()[-1]
    proxy.up()
    assert sync(capsys) == (0, "delivered 500, rejected 0, pending 0")
    check_synced(server_sqlite, run_id)
    assert sync(capsys) == (0, "delivered 0, rejected 0, pending 0")
    check_synced(server_sqlite, run_id)


def test_sync_says_that_the_server_is_still_down(proxy, run_id, capsys) -> None:
    """P7: a sync that cannot deliver says so with its status, and keeps everything."""
    proxy.down()
    train(proxy.uri, run_id, "why = ''")
    code = cli.main(["sync", "--spool", str(spool()), "--timeout", "0.5"])
    printed = capsys.readouterr()
    assert (code, printed.out.strip()) == (1, "delivered 0, rejected 0, pending 500")
    assert run_id in printed.err
    assert "refused" in printed.err


def test_deleted_run_is_parked(server_sqlite, run_id, capsys) -> None:
    """P5, P7: the points of a deleted run are kept, waiting for them ends with the reason, and once
    the run is restored they are delivered."""
    mlflow_client = client(server_sqlite.uri)
    mlflow_client.delete_run(run_id)
    waiting = "why = str(handle.exception(timeout=150)); logger.flush()"
    _, pending, why, stderr = train(server_sqlite.uri, run_id, waiting)
    assert pending == 500
    assert "deleted" in why
    assert "flowbuffer sync" in stderr
    mlflow_client.restore_run(run_id)
    assert sync(capsys) == (0, "delivered 500, rejected 0, pending 0")
    check_synced(server_sqlite, run_id)


def test_unknown_run_is_parked(server_sqlite) -> None:
    """P5: a run that the server does not know ends the waiting, with the reason, and keeps all."""
    with MetricLogger("0" * 32, tracking_uri=server_sqlite.uri) as logger:
        handle = logger.log_metric("loss", 1.0)
        error = handle.exception(timeout=PATIENCE_S)
        assert "not found" in str(error)
        assert logger.flush().pending == 1
