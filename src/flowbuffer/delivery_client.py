"""An ``MlflowClient`` for delivery alone, apart from the one that the training code uses.

Its store shares no asynchronous queue with the training code's, so that ``end_run`` or
``flush_async_logging`` there can neither stop a batch nor wait for one, and its HTTP requests are
tried once, because trying again is the sender's business. ``docs/design.md`` says what MLflow's
queue does otherwise.
"""

from __future__ import annotations

import json
import math
import os
import threading
from email.utils import parsedate_to_datetime
from typing import Any

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.credentials import hide, redacted
from flowbuffer.errors import (
    DoubtfulError,
    RejectedError,
    RetriableError,
    RunGoneError,
    TooLargeError,
    TransportError,
    UnauthorisedError,
)


class _CallersQueue:
    """In place of a store's asynchronous queue: the batch is stored by the thread that brings it.

    The transport's threads are the asynchrony. MLflow's own queue would store the batches of one
    run in any order, and its executors' threads would be joined at the end of the process however
    long a dead server takes.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def log_batch_async(self, run_id: str, params: Any, tags: Any, metrics: Any) -> Any:
        from mlflow.utils.async_logging.run_operations import RunOperations

        self._store.log_batch(run_id=run_id, metrics=metrics, params=params, tags=tags)
        return RunOperations([])

    def is_active(self) -> bool:
        return True

    def is_idle(self) -> bool:
        return True


# MLflow takes locks, and imports, when it makes a store. A fork in that moment would leave them
# held for ever in the child, so it waits; but not for long.
_making = threading.Lock()
_fork_holds_it = False
_forked = False


def _before_fork() -> None:
    global _fork_holds_it
    _fork_holds_it = _making.acquire(timeout=5.0)


def _after_fork_in_parent() -> None:
    if _fork_holds_it:
        _making.release()


def _after_fork_in_child() -> None:
    global _forked, _making
    _forked = True
    _making = threading.Lock()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


def warm_up(uri: str) -> None:
    """Import what :func:`delivery_client` will need: seconds, the first time."""
    from importlib import import_module

    from mlflow.store.db.db_types import DATABASE_ENGINES

    import_module("mlflow.store.tracking.rest_store")
    if uri.split("+")[0].split(":")[0] in DATABASE_ENGINES:
        import_module("mlflow.store.tracking.sqlalchemy_store")


def delivery_client(uri: str, timeout_s: float) -> Any:
    """An ``MlflowClient`` whose tracking store is its own."""
    hide(uri)
    with _making:
        return _made(uri, timeout_s)


def _made(uri: str, timeout_s: float) -> Any:
    from mlflow.store.tracking.rest_store import RestStore
    from mlflow.tracking import MlflowClient
    from mlflow.tracking._tracking_service.client import TrackingServiceClient
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    store = _tracking_store_registry.get_store_builder(uri)(store_uri=uri, artifact_uri=None)
    if hasattr(store, "_async_logging_queue"):
        store._async_logging_queue = _CallersQueue(store)
    if _forked and hasattr(store, "engine"):
        store.engine.dispose(close=False)  # its connections are the parent's
    if type(store) is RestStore:
        requests = _SingleRequests(store, timeout_s)
        store._call_endpoint = requests.call_endpoint
        store.log_batch = requests.log_batch

    class PrivateTrackingClient(TrackingServiceClient):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tracking_uri = uri

        @property
        def store(self) -> Any:
            return store

    client = MlflowClient(tracking_uri=uri)
    client._tracking_client = PrivateTrackingClient()
    return client


_here = threading.local()


def is_delivering() -> bool:
    """Whether this thread is in a request of delivery's own."""
    return getattr(_here, "delivers", False)


class _SingleRequests:
    """What delivery uses of ``RestStore``, each call one HTTP request.

    MLflow's own would try again for minutes inside one call, multiply our retries, and drop
    ``Retry-After``. And it turns a batch into protocol buffers, JSON, a dict and JSON again; here
    it is a dict and JSON.
    """

    def __init__(self, store: Any, timeout_s: float) -> None:
        from mlflow.protos.service_pb2 import MlflowService
        from mlflow.utils.rest_utils import _REST_API_PATH_PREFIX, extract_api_info_for_service

        self._store = store
        self._endpoints = extract_api_info_for_service(MlflowService, _REST_API_PATH_PREFIX)
        self._timeout_s = (min(timeout_s, 10.0), timeout_s)  # to connect, to read

    def log_batch(self, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        """``POST mlflow/runs/log-batch``, as MLflow's REST API documents it."""
        from mlflow.protos.service_pb2 import LogBatch

        body = {
            "run_id": run_id,
            "metrics": [_metric_fields(metric) for metric in metrics],
            "params": [{"key": param.key, "value": param.value} for param in params],
            "tags": [{"key": tag.key, "value": tag.value} for tag in tags],
        }
        self._request(LogBatch, body)

    def call_endpoint(self, api: Any, json_body: str | None = None, **_: Any) -> Any:
        """``RestStore._call_endpoint``, for whatever else is asked."""
        from mlflow.utils.proto_json_utils import parse_dict

        body = json.loads(json_body) if json_body else None
        answer = api.Response()
        parse_dict(self._request(api, body), answer)
        return answer

    def _request(self, api: Any, body: Any) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.utils.rest_utils import http_request

        endpoint, method = self._endpoints[api]
        _here.delivers = True
        try:
            response = http_request(
                self._store.get_host_creds(),
                endpoint,
                method,
                max_retries=0,
                raise_on_status=False,
                timeout=self._timeout_s,
                **{"params" if method == "GET" else "json": body},
            )
        except MlflowException as error:
            raise RetriableError(first_line(error)) from error
        finally:
            _here.delivers = False
        if response.status_code != 200:
            code, said = _said(response.text)
            raise error_of_status(
                response.status_code,
                f"{response.status_code} {said}",
                retry_after_s(response.headers.get("Retry-After"), SYSTEM_CLOCK.now_ns() / 1e9),
                code=code,
            )
        return response.json()


def _metric_fields(metric: Any) -> dict[str, Any]:
    value = metric.value
    fields = {
        "key": metric.key,
        "value": value if math.isfinite(value) else _NOT_FINITE[repr(value)],
        "timestamp": metric.timestamp,
        "step": metric.step,
    }
    for name in ("model_id", "dataset_name", "dataset_digest"):
        if getattr(metric, name):
            fields[name] = getattr(metric, name)
    return fields


#: As protocol buffers write them in JSON (protobuf.dev, "ProtoJSON Format").
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def error_of_status(
    status: int, reason: str, retry_after: float | None = None, *, code: str = ""
) -> TransportError:
    """The error that an HTTP status, with MLflow's error code, stands for."""
    kind: type[TransportError]
    if status in (408, 429) or status >= 500 or status < 400:
        kind = RetriableError
    elif status in (401, 403):
        kind = UnauthorisedError
    elif status == 404:
        kind = RunGoneError
    elif status == 413:
        kind = TooLargeError
    elif code == "BAD_REQUEST":
        # What MLflow makes of any error of its database but an OperationalError: a value that does
        # not fit its column, and a connection pool that is exhausted (store/db/utils.py).
        kind = DoubtfulError
    else:
        kind = RejectedError
    return kind(reason, retry_after)


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """Seconds from a ``Retry-After`` header (RFC 9110, 10.2.3): a number, or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now_s
        except (TypeError, ValueError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


def first_line(error: Exception) -> str:
    """The first line of what an error says, of bounded length and without credentials."""
    return redacted((str(error) or type(error).__name__).split("\n")[0])[:1000]


def _said(body: str) -> tuple[str, str]:
    """MLflow's error code, empty if there is none, and the message in the body of an error."""
    try:
        said = json.loads(body)
        code, message = str(said.get("error_code", "")), f": {said['message']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message = "", " ".join(body[:100_000].split())
    return code, redacted(code + message)[:1000]
