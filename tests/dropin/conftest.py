"""Fixtures of all tests of the switch."""

from collections.abc import Iterator

import mlflow
import pytest

import flowbuffer
from flowbuffer.dropin import known_runs
from flowbuffer.logger import by_run, others


@pytest.fixture(autouse=True)
def switched_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No switch, logger, known run, active model or asynchronous logging passes between tests."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "false")  # so that it is taken back
    monkeypatch.delenv("MLFLOW_ENABLE_ASYNC_LOGGING")
    yield
    flowbuffer.disable()
    mlflow.clear_active_model()
    for logger in by_run.all_loggers():
        logger.close(0)
    for known in (
        *(by_run._loggers, others._known, others._in_vain),
        *(known_runs._runs, known_runs._new_runs, known_runs._told),
    ):
        known.clear()


@pytest.fixture
def run_id(sqlite_uri: str) -> str:
    """The active run."""
    mlflow.set_tracking_uri(sqlite_uri)
    return mlflow.start_run().info.run_id
