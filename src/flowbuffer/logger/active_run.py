"""Which run a logger logs to, as MLflow's fluent functions decide it."""

from __future__ import annotations

import os
import sys
import uuid
from typing import Any

from flowbuffer.backends.credentials import without_credentials
from flowbuffer.backends.experiments import find_or_create
from flowbuffer.backends.mlflow_client import delivery_client
from flowbuffer.backends.uris import absolute_uri, is_http, with_path
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.errors import FlowbufferError, InvalidArgument, RetriableError, described
from flowbuffer.settings.environment import (
    environment_experiment,
    environment_job_place,
    environment_run_id,
    environment_tracking_uri,
)
from flowbuffer.settings.settings import Settings

#: How long a server may take to answer before a run is started, in s.
_ANSWER_S = 10.0

_tracking: Any = None  # mlflow.tracking._tracking_service.utils
_default_uris: dict[str, str] = {}  # by working directory
_absolute: set[str] = set()  # URIs that are
_settled: dict[str, tuple[Any, str]] = {}  # by URI: the engine that MLflow made, and its own URI


def current_uri() -> str:
    """``mlflow.get_tracking_uri()`` as :func:`settled_uri` has it, without a look at the disk at
    every call."""
    global _tracking
    if _tracking is None:
        from mlflow.tracking._tracking_service import utils as _tracking
    uri: str | None = _tracking._tracking_uri
    if uri is None:
        uri = environment_tracking_uri()
    if uri is not None:
        return settled_uri(uri)
    here = os.getcwd()
    if here not in _default_uris:
        _default_uris[here] = _tracking.get_tracking_uri()
    return _default_uris[here]


def starts_runs(settings: Settings) -> bool:
    """Whether a logger here starts a run where there is none: not offline, and not on a rank that
    does not log."""
    return not settings.offline and settings.logs(environment_job_place().rank)


def settled_uri(tracking_uri: str) -> str:
    """A tracking URI as MLflow understands it in this process now, in a form that means the same
    from every working directory and in every process.

    MLflow makes one engine for each text of a database's URI, and the engine makes the path of its
    file absolute in the working directory of that moment, for good: a program that changes its
    directory afterwards goes on with that file. A relative folder of MLflow's file store is looked
    for in the working directory of each call.
    """
    if tracking_uri in _absolute:
        return tracking_uri
    engine = _engines().get(tracking_uri)
    made, settled = _settled.get(tracking_uri, (None, ""))
    if engine is not None and made is engine:
        return settled
    settled = absolute_uri(tracking_uri)
    if settled == tracking_uri:
        _absolute.add(tracking_uri)
    elif engine is not None:
        with engine.connect() as connection:
            file = connection.exec_driver_sql("PRAGMA database_list").first()[2]
        settled = with_path(tracking_uri, file)
        _settled[tracking_uri] = engine, settled
    return settled


def _engines() -> Any:
    """The engines that MLflow has made, by URI."""
    module = sys.modules.get("mlflow.store.tracking.sqlalchemy_store")
    store = getattr(module, "SqlAlchemyStore", None)
    for name in ("_engine_map", "_db_uri_sql_alchemy_engine_map"):  # the second of older versions
        engines = getattr(store, name, None)
        if engines is not None:
            return engines
    return {}


def check_server(tracking_uri: str) -> None:
    """Ask a server before a run is started: where it does not answer, MLflow's own client tries for
    minutes without a word.

    Raises:
        FlowbufferError: It did not answer in time.
    """
    if not is_http(tracking_uri):
        return
    client = delivery_client(tracking_uri, _ANSWER_S / 2)
    deadline_s = SYSTEM_CLOCK.monotonic_s() + _ANSWER_S
    while True:
        try:
            client.search_experiments(max_results=1)
            return
        except RetriableError as error:
            if SYSTEM_CLOCK.monotonic_s() >= deadline_s:
                raise FlowbufferError(
                    f"no run can be started: {without_credentials(tracking_uri)} did not answer "
                    f"for {_ANSWER_S:g} s ({error.reason}). Start the server, set "
                    "MLFLOW_TRACKING_URI, or log without one: FLOWBUFFER_OFFLINE=1"
                ) from None
        except Exception:
            return  # MLflow will say what is wrong
        SYSTEM_CLOCK.sleep(0.5)


def run_id_of(run: object) -> str | None:
    """The id of what was given as a run: its id, MLflow's ``Run``, or None.

    Raises:
        InvalidArgument: It is none of these.
    """
    run_id = getattr(getattr(run, "info", None), "run_id", run)
    if run_id is None or isinstance(run_id, str):
        return run_id
    raise InvalidArgument(
        f"the run is {described(run)}; it must be a run's id (a str), or what mlflow.start_run() "
        "and MlflowClient.get_run() return"
    )


def find_run(
    run_id: str | None,
    tracking_uri: str | None,
    *,
    start: bool,
    experiment: str | None = None,
    name: str | None = None,
) -> tuple[str, bool]:
    """The run to log to, and whether it was started here.

    Args:
        run_id: The one that was asked for.
        tracking_uri: Where a run is started.
        start: Start one if there is none; else it gets an id that no server knows.
        experiment: The name of the experiment of a run that is started.
        name: The name of a run that is started.

    Raises:
        FlowbufferError: A run is to be started, and the server does not answer.
    """
    import mlflow

    if run_id is not None:
        return run_id, False
    active = mlflow.active_run()
    if active is not None:
        return active.info.run_id, False
    named = environment_run_id()
    if named is not None:
        return named, False
    if not start:
        return uuid.uuid4().hex, False
    check_server(tracking_uri or mlflow.get_tracking_uri())
    client = mlflow.MlflowClient(tracking_uri)
    experiment_id = None if experiment is None else find_or_create(client, experiment)
    if tracking_uri is None:
        run = mlflow.start_run(experiment_id=experiment_id, run_name=name)
        return run.info.run_id, True
    if experiment_id is None:
        experiment_id, experiment = environment_experiment()
        if experiment_id is None and experiment is not None:
            experiment_id = find_or_create(client, experiment)
    return client.create_run(experiment_id or "0", run_name=name).info.run_id, True


def mark_ended(run_id: str, tracking_uri: str, status: str) -> None:
    """Mark a run ended; if it is the active one, it is that no more."""
    import mlflow

    active = mlflow.active_run()
    if active is not None and active.info.run_id == run_id:
        mlflow.end_run(status)
    else:
        mlflow.MlflowClient(tracking_uri).set_terminated(run_id, status)
