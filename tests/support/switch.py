"""What a call does with MLflow alone, and what it does with the switch on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.tracking import fluent

import flowbuffer
from flowbuffer.backends.mlflow_client import delivery_client
from support.stored import stored

#: What is logged stays in the spool until somebody waits for it.
HELD = 3600.0
#: A time, in ms, for calls that have to be given one.
T = 1_700_000_000_000
#: A call, given a client and a run.
Call = Callable[[MlflowClient, str], object]


def values(uri: str, run_id: str, key: str) -> list[float]:
    """A history, past this process's switch."""
    return [m.value for m in elsewhere(uri).get_metric_history(run_id, key)]


def elsewhere(uri: str) -> Any:
    """A client as in another process."""
    return delivery_client(uri, 10.0)


def outcome(call: Call, run_id: str) -> object:
    """What a call returns, or raises."""
    try:
        return call(MlflowClient(), run_id)
    except Exception as error:
        words = re.sub(r"0x[0-9a-f]+|\b\d{13}\b", "N", str(error).replace(run_id, "RUN"))
        return type(error), getattr(error, "error_code", None), words


def outcomes(
    calls: dict[str, Call], uri: str, *, known: bool | None
) -> dict[str, tuple[object, str, object]]:
    """What each call does on a run of its own, the run's name, and what it has afterwards.

    Args:
        calls: The calls, by their names.
        uri: The store.
        known: With the switch on: whether the run was logged to before. None: with MLflow alone.
    """
    mlflow.set_tracking_uri(uri)
    own = MlflowClient()
    ids = {name: own.create_run("0", run_name="old name").info.run_id for name in calls}
    if known is not None:
        flowbuffer.enable(linger_s=HELD)
    answers = {}
    for name, run_id in ids.items():
        mlflow.start_run(run_id=run_id)
        if known:
            mlflow.log_metric("known", 1.0)
        answers[name] = outcome(calls[name], run_id)
        fluent._active_run_stack.get().pop()  # it has not ended
    flowbuffer.disable()
    return {
        name: (
            answers[name],
            own.get_run(run_id).info.run_name,
            stored(uri, run_id, without=["known"]),
        )
        for name, run_id in ids.items()
    }


def assert_as_by_mlflow(calls: dict[str, Call], uri: str, *, known_only: bool = False) -> None:
    """With the switch on each call does what it does with MLflow alone, on a run that this process
    has not logged to before, and on one that it has (``known_only``: on this alone)."""
    expected = outcomes(calls, uri, known=None)
    for known in (True,) if known_only else (False, True):
        found = outcomes(calls, uri, known=known)
        different = {n: (found[n], expected[n]) for n in calls if found[n] != expected[n]}
        assert different == {}, f"known run: {known}"
