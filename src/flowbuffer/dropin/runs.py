"""What this process knows of a run whose MLflow calls are buffered, and whether they can be."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flowbuffer.active_run import settled_uri
from flowbuffer.credentials import vouch_for, without_credentials
from flowbuffer.delivery_client import delivery_client
from flowbuffer.errors import FlowbufferError, InvalidPoint, SpoolError
from flowbuffer.handle import Handle
from flowbuffer.logger import MetricLogger
from flowbuffer.notices import tell
from flowbuffer.run_loggers import logger_of
from flowbuffer.spool.layout import PARAM, TAG
from flowbuffer.spool.points import (
    MetricKey,
    checked_key,
    checked_step,
    checked_text,
    checked_timestamp,
)
from flowbuffer.translation import may_pass

_log = logging.getLogger("flowbuffer")

#: How long the one look at a run on a tracking server may take, in s.
_LOOK_TIMEOUT_S = 5.0

#: A metric as it is logged: key, value, step, timestamp.
Point = tuple[Any, float, int, int | None]


class NotBuffered(Exception):
    """MLflow itself has to take the call: it may refuse it, or flowbuffer cannot keep it."""


class BufferedRun:
    """A run that exists, as far as this process knows, and its logger.

    A call is taken only if MLflow would certainly store it. Everything else is MLflow's to store,
    or to refuse with its own error.

    Args:
        logger: Of the run.
        params: The parameters that the run is known to have.
        has_models: Whether models were logged to the run, to which a metric may belong, too.
    """

    def __init__(self, logger: MetricLogger, params: Mapping[str, str], has_models: bool) -> None:
        self.logger = logger
        self.has_models = has_models
        self._params = dict(params)
        self._keys: set[Any] = set()

    def log_metric(self, key: Any, value: Any, step: Any, timestamp: Any) -> Handle:
        """One metric.

        Raises:
            NotBuffered: MLflow may refuse it.
        """
        try:
            plain = key in self._keys
        except TypeError as error:
            raise NotBuffered from error
        if not (plain and type(value) is float and type(step) is int and timestamp is None):
            key, value, step, timestamp = self._checked((key, value, step, timestamp))
        try:
            return Handle(self.logger._append(key, value, step, timestamp))
        except FlowbufferError as error:
            if self.logger.closed:  # another thread has ended the run meanwhile
                raise NotBuffered from error
            raise

    def log_metrics(self, metrics: Mapping[Any, Any], step: Any, timestamp: Any) -> Handle:
        """Metrics with one step and one time.

        Raises:
            NotBuffered: MLflow may refuse one of them; none was logged.
        """
        step, timestamp = _checked_when(step, timestamp)
        values = {self._checked_key(key): _as_float(value) for key, value in metrics.items()}
        return self._log(lambda: self.logger._append_many(values, step, timestamp))

    def log_params(self, params: Mapping[Any, Any]) -> Handle:
        """Parameters; those that the run has already with the same values are passed over.

        Raises:
            NotBuffered: MLflow may refuse one of them; none was logged.
        """
        new_params = self._new_params(params)
        return self._log(lambda: self.logger._append_texts(PARAM, new_params))

    def set_tags(self, tags: Mapping[Any, Any]) -> Handle:
        """Tags.

        Raises:
            NotBuffered: MLflow may refuse one of them; none was set.
        """
        texts = _texts(TAG, tags)
        return self._log(lambda: self.logger._append_texts(TAG, texts))

    def log_batch(
        self, metrics: Iterable[tuple[Any, Any, Any, Any]], params: Any, tags: Any
    ) -> Handle:
        """Metrics (key, value, step, timestamp), and MLflow's ``Param`` and ``RunTag`` objects.

        Raises:
            NotBuffered: MLflow may refuse one of them; none was logged.
        """
        points = [self._checked(metric) for metric in metrics]
        new_tags = {tag.key: tag.value for tag in tags}
        new_params = {param.key: param.value for param in params}
        if len(new_tags) < len(tags) or len(new_params) < len(params):
            raise NotBuffered
        if not all(isinstance(text, str) for text in new_tags.values()):
            raise NotBuffered
        new_tags = _texts(TAG, new_tags)
        known_params = self._new_params(new_params)

        def append() -> list[Any]:
            logger = self.logger
            places = [*logger._append_texts(PARAM, known_params)]
            places += logger._append_texts(TAG, new_tags)
            for point in points:
                places += logger._append(*point)
            return places

        return self._log(append)

    def _log(self, append: Callable[[], Sequence[Any]]) -> Handle:
        try:
            return Handle(append())
        except FlowbufferError as error:
            if self.logger.closed:
                raise NotBuffered from error
            raise

    def remember_params(self, params: Mapping[str, str]) -> None:
        """MLflow itself has stored these."""
        self._params.update(params)

    def _checked(self, metric: tuple[Any, Any, Any, Any]) -> Point:
        key, value, step, timestamp = metric
        return self._checked_key(key), _as_float(value), *_checked_when(step, timestamp)

    def _checked_key(self, key: Any) -> Any:
        try:
            if key not in self._keys:
                if isinstance(key, MetricKey):
                    key.stored(checked_key(key.key))
                else:
                    checked_key(key)
                self._keys.add(key)
        except (InvalidPoint, TypeError) as error:
            raise NotBuffered from error
        return key

    def _new_params(self, params: Mapping[Any, Any]) -> dict[str, str]:
        """Those that the run is not known to have."""
        texts = _texts(PARAM, params)
        known = self._params
        if any(known.get(key, text) != text for key, text in texts.items()):
            raise NotBuffered
        new = {key: text for key, text in texts.items() if key not in known}
        # Of two threads with two values for one key, one logs it and the other one is refused.
        if any(known.setdefault(key, text) != text for key, text in new.items()):
            raise NotBuffered
        return new


def _texts(kind: int, given: Mapping[Any, Any]) -> dict[str, str]:
    try:
        if kind == TAG and any(str(key).startswith("mlflow.") for key in given):
            raise NotBuffered  # MLflow's own: it also reads them where nobody can wait for ours
        return {checked_key(key): checked_text(kind, key, value) for key, value in given.items()}
    except InvalidPoint as error:
        raise NotBuffered from error


_runs: dict[tuple[str, str], BufferedRun] = {}
_lock = threading.Lock()
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
    uri = settled_uri(tracking_client.tracking_uri)
    known = known_run(uri, run_id)
    if known is not None:
        return known
    if _has_workspace() or not _is_one_place(uri):
        raise NotBuffered
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
        return _runs.setdefault((uri, run_id), BufferedRun(logger, params, has_models))


def _say_start(logger: MetricLogger, uri: str) -> None:
    """Tell once in this process that something is buffered at all, and where."""
    if _started or logger.folder is None or not logger.shows_progress:
        return
    _started.append(True)
    spool = logger.folder.parent.parent
    server = without_credentials(uri)
    tell(f"MLflow's calls are buffered: run {logger.run_id} at {server}, spool {spool}")


_started: list[bool] = []


def forget_run(run_id: str) -> None:
    """Look for the run again at its next call."""
    for key in [key for key in _runs if key[1] == run_id]:
        del _runs[key]


def models_were_logged(run_id: str) -> None:
    """From now on a metric of the run may belong to a model, too."""
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
        run = _ask(tracking_client, run_id)
    except Exception as error:
        if may_pass(error, tracking_client.store) and not uri.startswith("file:"):
            return {}, False  # whoever delivers will find out
        raise NotBuffered from error
    if not isinstance(run, Run) or run.info.lifecycle_stage != "active":
        raise NotBuffered
    params = {} if run.data is None else run.data.params
    return params, bool(run.outputs and run.outputs.model_outputs)


def _is_one_place(uri: str) -> bool:
    """Whether a URI leads every process to the same store: none in memory, and none whose path only
    MLflow or SQLite resolves, when it opens it."""
    scheme, _, path = uri.partition(":///")
    if scheme.startswith("sqlite"):
        return bool(path) and not path.startswith("file:") and ":memory:" not in path
    return uri != ""


def _has_workspace() -> bool:
    """Whether calls go to a workspace of the server's, which no collector process knows of."""
    try:
        from mlflow.utils.workspace_context import get_request_workspace
    except ImportError:
        return False
    return get_request_workspace() is not None


def _checked_when(step: Any, timestamp: Any) -> tuple[int, int | None]:
    try:
        return checked_step(step), None if timestamp is None else checked_timestamp(timestamp)
    except InvalidPoint as error:
        raise NotBuffered from error


def _as_float(value: Any) -> float:
    if type(value) is float:
        return value
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.metric_value_conversion_utils import (
        convert_metric_value_to_float_if_possible,
    )

    try:
        number = convert_metric_value_to_float_if_possible(value)
    except (MlflowException, TypeError, OverflowError) as error:
        raise NotBuffered from error
    if type(number) is not float:
        raise NotBuffered
    return number


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)
