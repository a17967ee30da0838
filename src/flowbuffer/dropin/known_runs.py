"""What this process knows of a run whose MLflow calls are buffered, and whether they can be."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowbuffer.backends.credentials import vouch_for, without_credentials
from flowbuffer.backends.mlflow_client import delivery_client
from flowbuffer.backends.originals import is_as_shipped
from flowbuffer.backends.translation import may_pass
from flowbuffer.backends.uris import is_file_store, is_one_place
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.dropin.arguments import (
    NotBuffered,
    Point,
    are_certain,
    exact_integer,
    exact_key,
    exact_text,
    exact_texts,
    exact_time,
    exact_value,
    key_about,
    looks,
    metric_fields,
)
from flowbuffer.dropin.calls import METHODS
from flowbuffer.errors import FlowbufferError, InvalidPoint, SpoolError
from flowbuffer.forks import in_child
from flowbuffer.logger.active_run import settled_uri
from flowbuffer.logger.by_run import logger_of
from flowbuffer.logger.handle import Handle
from flowbuffer.logger.metric_logger import MetricLogger
from flowbuffer.notices import tell
from flowbuffer.spool.layout import PARAM, TAG

_log = logging.getLogger("flowbuffer")

#: How long the one look at a run on a tracking server may take, in s.
_LOOK_TIMEOUT_S = 5.0


class BufferedRun:
    """A run that exists, as far as this process knows, and its logger.

    A call is taken only if MLflow would certainly store it. Everything else is MLflow's to store,
    or to refuse with its own error.

    Args:
        logger: Of the run.
        store: MLflow's own, in which the run is.
        params: The parameters that the run is known to have.
        has_models: Whether models were logged to the run, to which a metric may belong, too.
    """

    def __init__(
        self, logger: MetricLogger, store: Any, params: Mapping[str, str], has_models: bool
    ) -> None:
        self.logger = logger
        self.has_models = has_models
        self._store = store
        self._functions = {
            name: _function(store, name) for name in METHODS if is_as_shipped(type(store), name)
        }
        self._over_http = store_asks_a_server(store)
        self._params = dict(params)
        self._params_lock = threading.RLock()
        self._keys: set[str] = set()

    def reaches_store(self, method: str) -> bool:
        """Whether nobody has put something else in the place of a method of the store, which is to
        see each call then."""
        function = self._functions.get(method)
        return function is not None and _function(self._store, method) is function

    def log_metric(self, key: Any, value: Any, step: Any, timestamp: Any) -> Handle:
        """One metric.

        Raises:
            NotBuffered: MLflow may refuse it.
        """
        if not (
            type(key) is str
            and key in self._keys
            and type(value) is float
            and type(step) is int
            and timestamp is None
        ):
            key, value, step, timestamp = self._point(key, value, step, timestamp)
        try:
            return Handle(self.logger._append(key, value, step, timestamp))
        except InvalidPoint as error:
            raise NotBuffered from error
        except FlowbufferError as error:
            if self.logger.closed:  # another thread has ended the run meanwhile
                raise NotBuffered from error
            raise

    def log_metrics(self, metrics: Mapping[Any, Any], step: Any, timestamp: Any) -> Handle:
        """Metrics with one step and one time.

        Raises:
            NotBuffered: MLflow may refuse one of them; none was logged.
        """
        values, step, timestamp = self._values(metrics, step, timestamp)
        return self._log(lambda: self.logger._append_many(values, step, timestamp))

    def log_params(self, params: Mapping[Any, Any]) -> Handle:
        """Parameters; those that the run has already with the same values are passed over.

        Raises:
            NotBuffered: MLflow may refuse one of them; none was logged.
        """
        return self._log_texts(looks(exact_texts)(PARAM, params, over_http=self._over_http))

    def set_tags(self, tags: Mapping[Any, Any]) -> Handle:
        """Tags.

        Raises:
            NotBuffered: MLflow may refuse one of them; none was set.
        """
        texts = looks(exact_texts)(TAG, tags, over_http=self._over_http)
        return self._log(lambda: self.logger._append_texts(TAG, texts))

    def log_batch(self, metrics: Any, params: Any, tags: Any, active_model_id: Any) -> Handle:
        """MLflow's ``Metric``, ``Param`` and ``RunTag`` objects.

        Raises:
            NotBuffered: MLflow may refuse one of them; none was logged.
        """
        points, new_params, new_tags = self._entities(metrics, params, tags, active_model_id)

        def append() -> list[Any]:
            logger = self.logger
            places = [*logger._append_texts(TAG, new_tags)] if new_tags else []
            for point in points:
                places += logger._append(*point)
            return places

        return self._log_texts(new_params, append)

    @looks
    def remember_params(self, params: Any) -> None:
        """MLflow itself has stored these ``Param`` objects.

        Raises:
            NotBuffered: They are of a kind that nobody knows what was stored.
        """
        stored = {exact_text(one.key, over_http=True): str(one.value) for one in params}
        with self._params_lock:
            self._params.update(stored)

    def forget_lock(self) -> None:
        """In a forked child: it may be held by a thread that is not there."""
        self._params_lock = threading.RLock()

    def _log(self, append: Callable[[], Sequence[Any]]) -> Handle:
        try:
            return Handle(append())
        except FlowbufferError as error:
            if self.logger.closed:
                raise NotBuffered from error
            raise

    def _log_texts(
        self, params: Mapping[str, str], append_more: Callable[[], Sequence[Any]] = tuple
    ) -> Handle:
        """Parameters, and more.

        Of two threads with two values for one key, one logs it and the other one is refused. A
        parameter is known only once it is logged: a call that is interrupted leaves none that is
        passed over for ever after.
        """
        with self._params_lock:
            known = self._params
            if any(known.get(key, text) != text for key, text in params.items()):
                raise NotBuffered
            new = {key: text for key, text in params.items() if key not in known}

            def append() -> list[Any]:
                places = [*self.logger._append_texts(PARAM, new)] if new else []
                known.update(new)
                return [*places, *append_more()]

            return self._log(append)

    @looks
    def _point(self, key: Any, value: Any, step: Any, timestamp: Any) -> Point:
        return self._key(key), exact_value(value), exact_integer(step), exact_time(timestamp)

    @looks
    def _values(
        self, metrics: Mapping[Any, Any], step: Any, timestamp: Any
    ) -> tuple[dict[Any, float], int, int | None]:
        if not isinstance(metrics, Mapping):
            raise NotBuffered  # it may give its items once only
        values = {self._key(key): exact_value(value) for key, value in metrics.items()}
        return values, exact_integer(step), exact_time(timestamp)

    @looks
    def _entities(
        self, metrics: Any, params: Any, tags: Any, active_model_id: Any
    ) -> tuple[list[Point], dict[str, str], dict[str, str]]:
        if not are_certain(metrics, params, tags):
            raise NotBuffered
        points: list[Point] = []
        for key, value, step, timestamp, model_id, *dataset in map(metric_fields, metrics):
            if timestamp is None:
                raise NotBuffered  # MLflow refuses that
            about = key_about(key, model_id or active_model_id, *dataset)
            points.append(self._point(about, value, step, timestamp))
        new_params = {param.key: param.value for param in params}
        new_tags = {tag.key: exact_text(tag.value, over_http=True) for tag in tags}
        if len(new_tags) < len(tags) or len(new_params) < len(params):
            raise NotBuffered
        return (
            points,
            exact_texts(PARAM, new_params, over_http=self._over_http),
            exact_texts(TAG, new_tags, over_http=self._over_http),
        )

    def _key(self, key: Any) -> Any:
        if type(key) is not str or key not in self._keys:
            key = exact_key(key, over_http=self._over_http)
            if type(key) is str:
                self._keys.add(key)
        return key


def _function(store: Any, method: str) -> Any:
    return getattr(getattr(store, method, None), "__func__", None)


def store_asks_a_server(store: Any) -> bool:
    """Whether it is MLflow's for tracking servers."""
    from mlflow.store.tracking.rest_store import RestStore

    return isinstance(store, RestStore)


_runs: dict[tuple[str, str], BufferedRun] = {}
_lock = threading.RLock()
_experiments: dict[str, str] = {}  # by run; it never changes
_MOST_EXPERIMENTS = 10_000
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


_started: list[bool] = []


def remember_new(run: Any) -> None:
    """MLflow has just made this run: what is logged at once need not look for it on the server."""
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


#: Runs that MLflow made in this process, and when.
_new_runs: dict[str, tuple[Any, float]] = {}
#: For so long, in s, nobody else can have heard of a run that was made here, and logged to it.
_NEW_FOR_S = 0.1


def forget_run(run_id: str) -> None:
    """Look for the run again at its next call."""
    _new_runs.pop(run_id, None)
    for key in [key for key in _runs if key[1] == run_id]:
        del _runs[key]


def models_were_logged(run_id: str) -> None:
    """From now on a metric of the run may belong to a model, too."""
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
    """Whether calls go to a workspace of the server's, which no collector process knows of."""
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
