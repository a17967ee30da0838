"""What takes the place of MLflow's own functions and methods while the switch is on.

Each replacement is made from the original. It buffers what MLflow would certainly store; with
everything else it waits for what was logged before, and calls the original.

``synchronous`` is ``None`` where the caller did not give it. MLflow's functions make a yes or no of
that before they call a client's method, so :data:`ABSENT` is handed to them in its place.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Any

from flowbuffer.active_run import current_uri
from flowbuffer.delivery_client import is_delivering
from flowbuffer.dropin.runs import (
    BufferedRun,
    NotBuffered,
    buffered_run,
    forget_run,
    known_run,
    models_were_logged,
)
from flowbuffer.handle import Handle
from flowbuffer.run_loggers import flush_all, flush_run, flush_server, run_settings
from flowbuffer.settings import environment_place, says_async_logging
from flowbuffer.spool.points import MetricKey

Original = Callable[..., Any]


class _Absent:
    """As ``synchronous``: the caller did not give it."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()

#: The attribute that tells a replacement from what others put in its place.
OURS = "flowbuffers"


_time = time.time

#: MLflow has a future for each request, which takes 1000 metrics; so has an operation of ours.
_POINTS_IN_FUTURE = 1000


class _Delivery:
    """A handle as the future that MLflow's ``RunOperations`` waits for."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def result(self, timeout: float | None = None) -> None:
        """Wait for delivery; raise what went wrong."""
        self._handle.wait(timeout)

    def done(self) -> bool:
        """Whether nothing is on its way any more."""
        return self._handle.done()

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Wait for delivery; return what went wrong."""
        return self._handle.exception(timeout)


class _Mode(Enum):
    """What a call with some ``synchronous`` does, and gives back."""

    STORES = auto()  # it returns when the value is stored
    OPERATION = auto()  # it returns at once, a RunOperations to wait for
    NOTHING = auto()  # it returns at once what MLflow's own returns when the value is stored


def _mode(synchronous: Any) -> _Mode:
    if synchronous is None or synchronous is ABSENT:
        if not says_async_logging():
            return _Mode.NOTHING
        from mlflow.environment_variables import MLFLOW_ENABLE_ASYNC_LOGGING

        synchronous = not MLFLOW_ENABLE_ASYNC_LOGGING.get()
    return _Mode.STORES if synchronous else _Mode.OPERATION


def _answer(mode: _Mode, handle: Handle, otherwise: Any = None) -> Any:
    if mode is not _Mode.OPERATION:
        return otherwise
    from mlflow.utils.async_logging.run_operations import RunOperations

    parts = range(0, max(len(handle), 1), 2 * _POINTS_IN_FUTURE)
    return RunOperations([_Delivery(Handle(handle[i : i + 2 * _POINTS_IN_FUTURE])) for i in parts])


def _start_sized_queue(store: Any) -> None:
    """MLflow's queue starts with the first asynchronous call. It has nothing to do here, but who
    gave it a size finds it as with MLflow alone."""
    from mlflow.environment_variables import MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE

    if MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE.is_set():
        queue = getattr(store, "_async_logging_queue", None)
        if queue is not None and not queue.is_active():
            queue.activate()


#: What the short way answers where it cannot be taken.
_LONG = object()


class _Calls:
    """What both kinds of replacements know of MLflow.

    Args:
        fluent: ``mlflow.tracking.fluent``.
        client: ``mlflow.MlflowClient``.
        tracking_client: ``TrackingServiceClient``, which a client has.
        queue: ``AsyncLoggingQueue``, which a store has.
    """

    def __init__(self, fluent: Any, client: Any, tracking_client: Any, queue: Any) -> None:
        self._fluent = fluent
        self._client = client
        self._tracking_client = tracking_client
        self._queue = queue
        self._enqueue = queue.log_batch_async
        self._stores = {name: getattr(tracking_client, name) for name in Methods.names}
        self._silent = not run_settings().logs(environment_place().rank)

    def _buffers(self, mode: _Mode) -> bool:
        if time.time is not _time:
            return (
                False  # somebody has put a clock in its place: MLflow goes by it, and ours does not
            )
        if mode is _Mode.OPERATION:
            # Somebody, like a test, who has put something in the place of MLflow's queue is to see
            # what comes to it.
            return bool(self._queue.log_batch_async is self._enqueue)
        return mode is _Mode.NOTHING


class Functions(_Calls):
    """Replacements of the functions in ``mlflow.tracking.fluent``.

    They take the short way to a run that was logged to before: no client is built, and nobody is
    asked. The long way is the original, which comes to the methods of :class:`Methods`.
    """

    names = ("log_metric", "log_metrics", "log_param", "log_params", "set_tag", "set_tags")

    def _run(self, run_id: str | None) -> BufferedRun | None:
        """The run, if it is known and the metric is about no model."""
        fluent = self._fluent
        if fluent.get_active_model_id() is not None:
            return None
        if run_id is None:
            active = fluent.active_run()
            if active is None:
                return None
            run_id = active.info.run_id
        run = known_run(current_uri(), run_id)
        return None if run is None or run.has_models else run

    def _short_way(
        self,
        method: str,
        synchronous: Any,
        run_id: str | None,
        log: Callable[[BufferedRun], Handle],
        otherwise: Any = None,
    ) -> Any:
        mode = _mode(synchronous)
        if self._silent:
            return _answer(mode, Handle(), otherwise)
        if self._buffers(mode) and self._is_ours(method):
            run = self._run(run_id)
            if run is not None:
                try:
                    return _answer(mode, log(run), otherwise)
                except NotBuffered:
                    pass
        return _LONG

    def _is_ours(self, method: str) -> bool:
        """Whether nobody has put something else, like a test's mock, in the place of our method,
        which is to be called then."""
        client = self._client
        return (
            self._fluent.MlflowClient is client
            and getattr(getattr(client, method), OURS, None) is True
            and getattr(self._tracking_client, method) is self._stores[method]
        )

    def _handed_on(self, method: str, synchronous: Any) -> Any:
        return ABSENT if synchronous is None and self._is_ours(method) else synchronous

    def log_metric(self, original: Original) -> Original:
        """``mlflow.log_metric``."""

        def log_metric(
            key: str,
            value: Any,
            step: int | None = None,
            synchronous: bool | None = None,
            timestamp: int | None = None,
            run_id: str | None = None,
            model_id: str | None = None,
            dataset: Any = None,
        ) -> Any:
            answer = _LONG
            if model_id is None and dataset is None:
                answer = self._short_way(
                    "log_metric",
                    synchronous,
                    run_id,
                    lambda run: run.log_metric(key, value, step or 0, timestamp or None),
                )
            if answer is not _LONG:
                return answer
            synchronous = self._handed_on("log_metric", synchronous)
            return original(key, value, step, synchronous, timestamp, run_id, model_id, dataset)

        return log_metric

    def log_metrics(self, original: Original) -> Original:
        """``mlflow.log_metrics``."""

        def log_metrics(
            metrics: Mapping[str, Any],
            step: int | None = None,
            synchronous: bool | None = None,
            run_id: str | None = None,
            timestamp: int | None = None,
            model_id: str | None = None,
            dataset: Any = None,
        ) -> Any:
            answer = _LONG
            if model_id is None and dataset is None:
                answer = self._short_way(
                    "log_batch",
                    synchronous,
                    run_id,
                    lambda run: run.log_metrics(metrics, step or 0, timestamp or None),
                )
            if answer is not _LONG:
                return answer
            synchronous = self._handed_on("log_batch", synchronous)
            return original(metrics, step, synchronous, run_id, timestamp, model_id, dataset)

        return log_metrics

    def log_param(self, original: Original) -> Original:
        """``mlflow.log_param``."""

        def log_param(key: str, value: Any, synchronous: bool | None = None) -> Any:
            answer = self._short_way(
                "log_param", synchronous, None, lambda run: run.log_params({key: value}), value
            )
            if answer is not _LONG:
                return answer
            return original(key, value, self._handed_on("log_param", synchronous))

        return log_param

    def log_params(self, original: Original) -> Original:
        """``mlflow.log_params``."""

        def log_params(
            params: Mapping[str, Any], synchronous: bool | None = None, run_id: str | None = None
        ) -> Any:
            answer = self._short_way(
                "log_batch", synchronous, run_id, lambda run: run.log_params(params)
            )
            if answer is not _LONG:
                return answer
            return original(params, self._handed_on("log_batch", synchronous), run_id)

        return log_params

    def set_tag(self, original: Original) -> Original:
        """``mlflow.set_tag``."""

        def set_tag(key: str, value: Any, synchronous: bool | None = None) -> Any:
            answer = self._short_way(
                "set_tag", synchronous, None, lambda run: run.set_tags({key: value})
            )
            if answer is not _LONG:
                return answer
            return original(key, value, self._handed_on("set_tag", synchronous))

        return set_tag

    def set_tags(self, original: Original) -> Original:
        """``mlflow.set_tags``."""

        def set_tags(tags: Mapping[str, Any], synchronous: bool | None = None) -> Any:
            answer = self._short_way("log_batch", synchronous, None, lambda run: run.set_tags(tags))
            if answer is not _LONG:
                return answer
            return original(tags, self._handed_on("log_batch", synchronous))

        return set_tags


class Methods(_Calls):
    """Replacements of the methods of ``mlflow.MlflowClient`` that log."""

    names = ("log_metric", "log_param", "set_tag", "log_batch")

    def _call(
        self,
        client: Any,
        method: str,
        run_id: Any,
        synchronous: Any,
        log: Callable[[BufferedRun], Handle],
        store: Callable[[Any], Any],
        otherwise: Any = None,
        params: Iterable[tuple[str, Any]] = (),
    ) -> Any:
        """Buffer with ``log``; what cannot be is stored with ``store(synchronous)``."""
        if type(client._tracking_client) is not self._tracking_client:
            return store(synchronous)  # delivery's own client
        mode = _mode(synchronous)
        if self._silent:
            return _answer(mode, Handle(), otherwise)
        is_ours = getattr(self._tracking_client, method) is self._stores[method]
        if is_ours and self._buffers(mode):
            if mode is _Mode.OPERATION:
                _start_sized_queue(client._tracking_client.store)
            try:
                handle = log(buffered_run(client._tracking_client, run_id))
                return _answer(mode, handle, otherwise)
            except NotBuffered:
                pass
        flush_run(run_id)
        stored = store(None if synchronous is ABSENT else synchronous)
        known = known_run(client._tracking_client.tracking_uri, run_id)
        if mode is _Mode.STORES and known is not None:
            known.remember_params({key: str(value) for key, value in params})
        return stored

    def _key(self, key: Any, model_id: Any, name: Any, digest: Any) -> Any:
        """What a metric is logged under; it is about the active model if about no other one."""
        about = (model_id or self._fluent.get_active_model_id(), name, digest)
        return MetricKey(key, *(text or "" for text in about)) if any(about) else key

    def log_metric(self, original: Original) -> Original:
        """``MlflowClient.log_metric``."""

        def log_metric(
            client: Any,
            run_id: str,
            key: str,
            value: Any,
            timestamp: int | None = None,
            step: int | None = None,
            synchronous: bool | None = None,
            dataset_name: str | None = None,
            dataset_digest: str | None = None,
            model_id: str | None = None,
        ) -> Any:
            about = (model_id, dataset_name, dataset_digest)
            return self._call(
                client,
                "log_metric",
                run_id,
                synchronous,
                lambda run: run.log_metric(
                    self._key(key, *about), value, 0 if step is None else step, timestamp
                ),
                lambda synchronous: original(
                    client,
                    run_id,
                    key,
                    value,
                    timestamp,
                    step,
                    synchronous,
                    dataset_name=dataset_name,
                    dataset_digest=dataset_digest,
                    model_id=model_id,
                ),
            )

        return log_metric

    def log_param(self, original: Original) -> Original:
        """``MlflowClient.log_param``."""

        def log_param(
            client: Any, run_id: str, key: str, value: Any, synchronous: bool | None = None
        ) -> Any:
            return self._call(
                client,
                "log_param",
                run_id,
                synchronous,
                lambda run: run.log_params({key: value}),
                lambda synchronous: original(client, run_id, key, value, synchronous),
                value,
                [(key, value)],
            )

        return log_param

    def set_tag(self, original: Original) -> Original:
        """``MlflowClient.set_tag``."""

        def set_tag(
            client: Any, run_id: str, key: str, value: Any, synchronous: bool | None = None
        ) -> Any:
            return self._call(
                client,
                "set_tag",
                run_id,
                synchronous,
                lambda run: run.set_tags({key: value}),
                lambda synchronous: original(client, run_id, key, value, synchronous),
            )

        return set_tag

    def log_batch(self, original: Original) -> Original:
        """``MlflowClient.log_batch``."""

        def log_batch(
            client: Any,
            run_id: str,
            metrics: Sequence[Any] = (),
            params: Sequence[Any] = (),
            tags: Sequence[Any] = (),
            synchronous: bool | None = None,
        ) -> Any:
            if not (metrics or params or tags):
                return None

            def store(synchronous: Any) -> Any:
                return original(client, run_id, metrics, params, tags, synchronous)

            return self._call(
                client,
                "log_batch",
                run_id,
                synchronous,
                lambda run: run.log_batch(map(self._point, metrics), params, tags),
                store,
                params=[(param.key, param.value) for param in params],
            )

        return log_batch

    def _point(self, metric: Any) -> tuple[Any, Any, Any, Any]:
        if metric.timestamp is None:
            raise NotBuffered  # MLflow refuses that
        about = (metric.model_id, metric.dataset_name, metric.dataset_digest)
        return self._key(metric.key, *about), metric.value, metric.step, metric.timestamp


class Waits:
    """Methods of ``TrackingServiceClient`` that wait for what was logged before they go on.

    Args:
        tracking_client: ``TrackingServiceClient``.
    """

    names = (
        "get_run",
        "get_metric_history",
        "delete_tag",
        "delete_run",
        "restore_run",
        "log_outputs",
        "search_runs",
        "get_logged_model",
        "search_logged_models",
    )

    def __init__(self, tracking_client: Any) -> None:
        self._tracking_client = tracking_client

    def _after(self, original: Original, wait: Callable[..., None]) -> Original:
        def method(client: Any, *args: Any, **kwargs: Any) -> Any:
            if type(client) is self._tracking_client:  # else it is delivery's own
                wait(*args, **kwargs)
            return original(client, *args, **kwargs)

        return method

    def _of_run(self, original: Original) -> Original:
        return self._after(original, lambda run_id, *_, **__: flush_run(run_id))

    def _of_all(self, original: Original) -> Original:
        return self._after(original, lambda *_, **__: flush_all(current_uri()))

    get_run = get_metric_history = delete_tag = _of_run
    search_runs = get_logged_model = search_logged_models = _of_all

    def delete_run(self, original: Original) -> Original:
        """A deleted run, or a restored one, is looked for again."""

        def wait(run_id: str) -> None:
            flush_run(run_id)
            forget_run(run_id)

        return self._after(original, wait)

    restore_run = delete_run

    def log_outputs(self, original: Original) -> Original:
        """From then on MLflow finds out for each metric whether it belongs to the model."""
        return self._after(original, lambda run_id, *_, **__: models_were_logged(run_id))


def request(original: Original) -> Original:
    """``requests.Session.request``: who asks a tracking server past MLflow's client reads what this
    process logged, too."""

    def request(session: Any, method: str, url: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(url, str) and _READS.search(url) and not is_delivering():
            flush_server(url)
        return original(session, method, url, *args, **kwargs)

    return request


#: The paths of MLflow's REST API, and its GraphQL, under which runs are read.
_READS = re.compile(r"/mlflow/(runs/(get|search)|metrics/|logged-models/)|/graphql$")


def flush_async_logging(original: Original) -> Original:
    """``AbstractStore.flush_async_logging``: everything that was logged, however it was."""

    def flush_async_logging(store: Any) -> Any:
        flush_all(current_uri())
        return original(store)

    return flush_async_logging
