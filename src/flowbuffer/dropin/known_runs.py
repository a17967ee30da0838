"""The runs whose MLflow calls are buffered in this process, and what it knows of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from flowbuffer.backends.credentials import vouch_for, without_credentials
from flowbuffer.backends.mlflow_client import delivery_client
from flowbuffer.backends.translation import may_pass
from flowbuffer.backends.uris import is_file_store, is_one_place
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.dropin.arguments import NotBuffered
from flowbuffer.dropin.buffered_run import BufferedRun
from flowbuffer.errors import SpoolError
from flowbuffer.forks import in_child
from flowbuffer.logger.active_run import settled_uri
from flowbuffer.logger.by_run import logger_of
from flowbuffer.logger.metric_logger import MetricLogger
from flowbuffer.notices import tell

_log = logging.getLogger("flowbuffer")

#: How long the one look at a run on a tracking server may take, in s.
_LOOK_TIMEOUT_S = 5.0
#: For so long, in s, nobody else can have heard of a run that was made here, and logged to it.
_NEW_FOR_S = 0.1
_MOST_EXPERIMENTS = 10_000

_runs: dict[tuple[str, str], BufferedRun] = {}
_lock = threading.RLock()
_new_runs: dict[str, tuple[Any, float]] = {}  # that MLflow made in this process, and when
_experiments: dict[str, str] = {}  # by run; it never changes
_started: list[bool] = []  # whether it was told that something is buffered
_told: set[str] = set()  # why nothing can be spooled


def known_run(tracking_uri: str, run_id: str) -> BufferedRun | None:
    """A run that calls of this process were buffered for, if its logger is open."""
    run = _runs.get((tracking_uri, run_id))
    return None if run is None or run.logger.closed else run


def buffered_run(tracking_client: Any, run_id: Any) -> BufferedRun:
    """The run as one to be buffered.

    It is looked for once per process, on the server, so that a call for a run that does not exist
    raises what MLflow raises.

    Args:
        tracking_client: The ``TrackingServiceClient`` of whoever calls.
        run_id: As the caller gave it.

    Raises:
        NotBuffered: The run is unknown, deleted, in a workspace, or in the memory of this process,
            or there is no spool for it.
    """
    if not isinstance(run_id, str):
        raise NotBuffered
    run_id = str.__str__(run_id)
    uri = settled_uri(tracking_client.tracking_uri)
    known = known_run(uri, run_id)
    if known is not None:
        return known
    if _has_workspace() or not is_one_place(uri):
        raise NotBuffered
    store = tracking_client.store
    params, has_models = _look(tracking_client, uri, run_id)
    try:
        logger = logger_of(uri, run_id)
    except SpoolError as error:
        if str(error) not in _told:
            _told.add(str(error))
            _log.warning("MLflow's calls are not buffered: %s", error)
        raise NotBuffered from error
    _say_start(logger, uri)
    with _lock:
        for key in [key for key, run in _runs.items() if run.logger.closed]:
            del _runs[key]
        return _runs.setdefault((uri, run_id), BufferedRun(logger, store, params, has_models))


def _say_start(logger: MetricLogger, uri: str) -> None:
    """Tell once in this process that something is buffered at all, and where."""
    if _started or logger.folder is None or not logger.shows_progress:
        return
    _started.append(True)
    spool = logger.folder.parent.parent
    server = without_credentials(uri)
    tell(f"MLflow's calls are buffered: run {logger.run_id} at {server}, spool {spool}")


def remember_new(run: Any) -> None:
    """Keep a run that MLflow has just made: who logs to it at once need not look for it on the
    server."""
    from mlflow.entities import Run

    now_s = SYSTEM_CLOCK.monotonic_s()
    for run_id, (_, made_s) in list(_new_runs.items()):
        if now_s - made_s > _NEW_FOR_S:
            _new_runs.pop(run_id, None)
    if type(run) is Run:
        _new_runs[run.info.run_id] = run, now_s


def _new_run(run_id: str) -> Any:
    run, made_s = _new_runs.pop(run_id, (None, 0.0))
    return run if SYSTEM_CLOCK.monotonic_s() - made_s <= _NEW_FOR_S else None


def forget_run(run_id: str) -> None:
    """Look for the run again at its next call."""
    _new_runs.pop(run_id, None)
    for key in [key for key in _runs if key[1] == run_id]:
        del _runs[key]


def models_were_logged(run_id: str) -> None:
    """From now on a metric of the run may belong to a model, too: it takes the long way, on which
    MLflow finds that out."""
    _new_runs.pop(run_id, None)
    for (_, own_id), run in list(_runs.items()):
        if own_id == run_id:
            run.has_models = True


def experiment_of(tracking_client: Any, run_id: str) -> str | None:
    """The experiment of a run; None if it is not to be found there now."""
    known = _experiments.get(run_id)
    if known is None:
        try:
            known = _ask(tracking_client, run_id).info.experiment_id
        except Exception:
            return None
        if len(_experiments) >= _MOST_EXPERIMENTS:
            _experiments.clear()
        _experiments[run_id] = known
    return known


def _ask(tracking_client: Any, run_id: str) -> Any:
    """MLflow's run, by one request."""
    from mlflow.store.tracking.rest_store import RestStore

    store = tracking_client.store
    if type(store) is RestStore:
        # MLflow's own would try for minutes where the server is down.
        vouch_for(tracking_client.tracking_uri)
        store = delivery_client(tracking_client.tracking_uri, _LOOK_TIMEOUT_S)
    return store.get_run(run_id)


def _look(tracking_client: Any, uri: str, run_id: str) -> tuple[Mapping[str, str], bool]:
    """The parameters that a run has, and whether models were logged to it.

    Raises:
        NotBuffered: It takes no calls.
    """
    from mlflow.entities import Run

    try:
        run = _new_run(run_id) or _ask(tracking_client, run_id)
    except Exception as error:
        if may_pass(error, tracking_client.store) and not is_file_store(uri):
            return {}, False  # whoever delivers will find out
        raise NotBuffered from error
    if not isinstance(run, Run) or run.info.lifecycle_stage != "active":
        raise NotBuffered
    params = {} if run.data is None else run.data.params
    return params, bool(run.outputs and run.outputs.model_outputs)


def _has_workspace() -> bool:
    """Whether calls go to a workspace of the server's: they are MLflow's own, because no collector
    process knows of it."""
    try:
        from mlflow.utils.workspace_context import get_request_workspace
    except ImportError:
        return False
    return get_request_workspace() is not None


def _new_locks() -> None:
    global _lock
    _lock = threading.RLock()
    for run in _runs.values():
        run.forget_lock()


in_child("dropin.known_runs", _new_locks)
