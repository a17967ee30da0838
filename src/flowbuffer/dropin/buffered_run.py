"""A run whose MLflow calls are buffered: what is logged to it goes to its logger."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from flowbuffer.errors import FlowbufferError, InvalidPoint
from flowbuffer.logger.handle import Handle
from flowbuffer.logger.metric_logger import MetricLogger
from flowbuffer.originals import is_as_shipped
from flowbuffer.spool.layout import PARAM, TAG


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
        self._over_http = _asks_a_server(store)
        self._params = dict(params)
        self._params_lock = threading.RLock()
        self._keys: set[str] = set()

    def reaches_store(self, method: str) -> bool:
        """Whether a method of the store is the one that MLflow shipped. What somebody else has put
        in its place is to see each call: calls are MLflow's own then."""
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
        """Know what MLflow itself has stored, so that another value is refused at the call.

        Args:
            params: ``Param`` objects.

        Raises:
            NotBuffered: They are of a kind that nobody knows what was stored.
        """
        stored = {exact_text(one.key, over_http=True): str(one.value) for one in params}
        with self._params_lock:
            self._params.update(stored)

    def forget_lock(self) -> None:
        """In a forked child: make the lock anew, which a thread may hold that is not there."""
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


def _asks_a_server(store: Any) -> bool:
    """Whether it is MLflow's for tracking servers."""
    from mlflow.store.tracking.rest_store import RestStore

    return isinstance(store, RestStore)
