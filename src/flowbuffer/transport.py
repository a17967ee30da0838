"""The edge to MLflow: requests go out here, and foreign errors become ours here.

Delivery has a client of its own, apart from the one that the training code uses: its store shares
no asynchronous queue with it, so that ``end_run`` or ``flush_async_logging`` of the training code
can neither stop a batch nor wait for one, and its HTTP requests are tried once, because trying
again is the sender's business. See ``docs/design.md`` for what MLflow's queue does otherwise.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol

from flowbuffer.clock import Clock
from flowbuffer.errors import (
    RejectedError,
    RetriableError,
    RunGoneError,
    TooLargeError,
    TransportError,
    UnauthorisedError,
)
from flowbuffer.settings import Settings


@dataclass(frozen=True)
class Request:
    """One batch for one run; columns of one length. ``times`` are ms since the epoch."""

    run_id: str
    keys: Sequence[str]
    values: Sequence[float]
    times: Sequence[int]
    steps: Sequence[int]

    def __len__(self) -> int:
        return len(self.keys)


#: Called once when a request is over: with None when it is stored, else with what went wrong.
Done = Callable[[TransportError | None], None]


class Transport(Protocol):
    """Where batches go. ``flowbuffer.testing`` has one for tests.

    Attributes:
        max_in_flight: How many requests may be on their way at once.
    """

    max_in_flight: int

    def send(self, request: Request, done: Done) -> None:
        """Send a request. ``done`` may be called at once or later, in any thread."""

    def close(self) -> None:
        """Take no more requests."""


class MlflowTransport:
    """Sends through ``MlflowClient.log_batch(..., synchronous=False)``.

    Args:
        tracking_uri: As MLflow takes it, with credentials if it has any.
        settings: ``max_in_flight``, ``request_timeout_s``, and ``delivery``: with ``inline``, the
            calling thread sends.
        clock: For what is remembered of a run's state.
    """

    def __init__(self, tracking_uri: str, settings: Settings, clock: Clock) -> None:
        self.max_in_flight = settings.max_in_flight or (1 if _is_file(tracking_uri) else 4)
        self._uri = tracking_uri
        self._settings = settings
        self._clock = clock
        self._client: Any = None
        self._client_lock = threading.Lock()
        self._active_until_s: dict[str, float] = {}
        self._requests: queue.SimpleQueue[tuple[Request, Done] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        if settings.delivery != "inline":
            for number in range(self.max_in_flight):
                name = f"flowbuffer-send-{number}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def send(self, request: Request, done: Done) -> None:
        """Send a request in a thread of the transport; inline, in this one."""
        if self._threads:
            self._requests.put((request, done))
        else:
            done(self._attempt(request))

    def close(self) -> None:
        """Let the threads go once their requests are over; does not wait for them."""
        for _ in self._threads:
            self._requests.put(None)

    def _work(self) -> None:
        while (work := self._requests.get()) is not None:
            request, done = work
            done(self._attempt(request))

    def _attempt(self, request: Request) -> TransportError | None:
        try:
            self._log_batch(request)
        except RejectedError as error:
            return self._unless_gone(request.run_id, error)
        except TransportError as error:
            return error
        except Exception as error:
            found = _translated(error)
            if isinstance(found, RejectedError):
                return self._unless_gone(request.run_id, found)
            return found
        return None

    def _log_batch(self, request: Request) -> None:
        from mlflow.entities import Metric

        columns = zip(request.keys, request.values, request.times, request.steps, strict=True)
        metrics = [Metric(*point) for point in columns]
        operation = self._delivery_client().log_batch(
            request.run_id, metrics=metrics, synchronous=False
        )
        if operation is not None:
            operation.wait()

    def _unless_gone(self, run_id: str, error: RejectedError) -> TransportError:
        """A deleted run rejects what it is sent with the same status as a bad point; look."""
        now_s = self._clock.monotonic_s()
        if now_s < self._active_until_s.get(run_id, 0.0):
            return error
        try:
            run = self._delivery_client().get_run(run_id)
        except Exception as failure:
            found = failure if isinstance(failure, TransportError) else _translated(failure)
            return error if isinstance(found, RejectedError) else found
        if run.info.lifecycle_stage == "deleted":
            return RunGoneError(f"run {run_id} is deleted ({error.reason})")
        self._active_until_s[run_id] = now_s + 10.0
        return error

    def _delivery_client(self) -> Any:
        with self._client_lock:
            if self._client is None:
                self._client = _delivery_client(self._uri, self._settings.request_timeout_s)
            return self._client


def absolute_uri(tracking_uri: str) -> str:
    """A tracking URI that means the same from every working directory."""
    scheme, separator, rest = tracking_uri.partition(":///")
    if scheme.split("+")[0] == "sqlite" and separator and not rest.startswith(("/", ":memory:")):
        path, mark, query = rest.partition("?")
        return f"{scheme}:///{Path(path).absolute()}{mark}{query}"
    if "://" not in tracking_uri and not tracking_uri.startswith(("file:", "databricks", "uc")):
        return Path(tracking_uri).absolute().as_uri()
    return tracking_uri


_USER_INFO = re.compile(r"(?<=://)[^/?#]*@")
_SECRET_FIELD = re.compile(
    r"(?<=[?&])[^=&]*(?:pass|pwd|token|secret|user|key)[^=&]*=[^&#]*&?", re.I
)


def without_credentials(tracking_uri: str) -> str:
    """A tracking URI as it may be written to the disk: no user, no password, no token."""
    return _SECRET_FIELD.sub("", _USER_INFO.sub("", tracking_uri)).rstrip("?&")


def _is_file(tracking_uri: str) -> bool:
    return tracking_uri.startswith(("sqlite", "file:")) or "://" not in tracking_uri


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


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def _delivery_client(uri: str, timeout_s: float) -> Any:
    """An ``MlflowClient`` whose tracking store is its own."""
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
        store._call_endpoint = _OneRequest(store, timeout_s)

    class PrivateTrackingClient(TrackingServiceClient):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tracking_uri = uri

        @property
        def store(self) -> Any:
            return store

    client = MlflowClient(tracking_uri=uri)
    client._tracking_client = PrivateTrackingClient()
    return client


class _OneRequest:
    """``RestStore._call_endpoint`` with one HTTP request, whose answer becomes one of our errors.

    MLflow's own would retry for minutes inside, multiply our retries, and drop ``Retry-After``.
    """

    def __init__(self, store: Any, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = (min(timeout_s, 10.0), timeout_s)  # to connect, to read

    def __call__(self, api: Any, json_body: str | None = None, **_: Any) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.utils.proto_json_utils import parse_dict
        from mlflow.utils.rest_utils import http_request

        endpoint, method = self._store._METHOD_TO_INFO[api]
        body = json.loads(json_body) if json_body else None
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
            raise RetriableError(_first_line(error)) from error
        if response.status_code != 200:
            raise error_of_status(
                response.status_code,
                f"{response.status_code} {_said(response.text)}",
                retry_after_s(response.headers.get("Retry-After"), self._now_s()),
            )
        answer = api.Response()
        parse_dict(response.json(), answer)
        return answer

    @staticmethod
    def _now_s() -> float:
        return Clock().now_ns() / 1e9


def error_of_status(status: int, reason: str, retry_after: float | None = None) -> TransportError:
    """The error that an HTTP status stands for."""
    kind: type[TransportError]
    if status in (408, 429) or status >= 500 or status < 400:
        kind = RetriableError
    elif status in (401, 403):
        kind = UnauthorisedError
    elif status == 404:
        kind = RunGoneError
    elif status == 413:
        kind = TooLargeError
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


def _translated(error: Exception) -> TransportError:
    """What a store raised, as ours. Whatever is not known to be final may succeed later."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error_of_status(error.get_http_status_code(), _first_line(error))
    return RetriableError(f"{type(error).__name__}: {_first_line(error)}")


def _said(body: str) -> str:
    """The message in the body of an error."""
    try:
        said = json.loads(body)
        return f"{said.get('error_code', '')}: {said['message']}"[:1000]
    except (ValueError, KeyError, TypeError, AttributeError):
        return " ".join(body.split())[:1000]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0][:1000]
