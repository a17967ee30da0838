"""The edge to MLflow: requests go out here, and foreign errors become ours here."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from flowbuffer import idle_clients
from flowbuffer.clock import Clock
from flowbuffer.delivery_client import delivery_client
from flowbuffer.errors import (
    RejectedError,
    RetriableError,
    RunGoneError,
    TransportError,
    UnauthorisedError,
)
from flowbuffer.settings import Settings
from flowbuffer.single_requests import error_of_status, first_line
from flowbuffer.spool.layout import KEY_SEPARATOR


@dataclass(frozen=True)
class Request:
    """One batch for one run.

    Attributes:
        run_id: The run.
        keys, values, times, steps: Of the metrics, columns of one length. A key is as the key table
            of a spool has it (see ``spool.layout``). ``times`` are ms since the epoch.
        params, tags: Keys and values; no key twice.
    """

    run_id: str
    keys: Sequence[str] = ()
    values: Sequence[float] = ()
    times: Sequence[int] = ()
    steps: Sequence[int] = ()
    params: Sequence[tuple[str, str]] = ()
    tags: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.keys) + len(self.params) + len(self.tags)


#: Called once when a request is over: with None when it is stored, else with what went wrong.
Done = Callable[[TransportError | None], None]

#: Called before ``Done``, and at most once, by a service that takes a batch now and stores it
#: later: the next request with the same keys may be sent.
Accepted = Callable[[], None]


class Transport(Protocol):
    """Where batches go. ``flowbuffer.testing`` has one for tests.

    Attributes:
        max_in_flight: How many requests may be on their way at once.
        max_metrics: The most metrics in one request.
    """

    max_in_flight: int

    @property
    def max_metrics(self) -> int: ...

    def send(self, request: Request, done: Done, accepted: Accepted) -> None:
        """Send a request. Both may be called at once or later, in any thread."""

    def warnings(self, run_id: str) -> list[str]:
        """What whoever logs to a run should know, although all is well so far."""

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
        self._file: tuple[int, int] | None = None
        self._client_lock = threading.Lock()
        self._active_until_s: dict[str, float] = {}
        self._requests: queue.SimpleQueue[tuple[Request, Done, Accepted] | None]
        self._requests = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        for number in range(self.max_in_flight):
            if not self._start(self._work, f"flowbuffer-send-{number}"):
                break  # the calling thread sends

    def _start(self, target: Callable[[], None], name: str) -> bool:
        """Start a thread; False if there is to be none, or the interpreter is ending."""
        if self._settings.delivery == "inline":
            return False
        thread = threading.Thread(target=target, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._threads.append(thread)
        return True

    @property
    def max_metrics(self) -> int:
        """The most that MLflow takes."""
        return 1000

    def send(self, request: Request, done: Done, accepted: Accepted) -> None:
        """Send a request in a thread of the transport, if it has one; else in this one."""
        if self._threads:
            self._requests.put((request, done, accepted))
        else:
            self._deliver(request, done, accepted)

    def warnings(self, run_id: str) -> list[str]:  # noqa: ARG002
        """None."""
        return []

    def close(self) -> None:
        """Let the threads go once their requests are over; does not wait for them. Connections
        that are not in use are closed."""
        for _ in self._threads:
            self._requests.put(None)
        client, self._client = self._client, None
        if client is not None:
            idle_clients.keep(self._which(), client)

    def _work(self) -> None:
        while (work := self._requests.get()) is not None:
            self._deliver(*work)

    def _deliver(self, request: Request, done: Done, accepted: Accepted) -> None:  # noqa: ARG002
        done(self._attempt(lambda: self._wait_for(self._log_batch(request)), request.run_id))

    def _wait_for(self, operation: Any) -> None:
        if operation is not None:
            operation.wait()

    def _attempt(self, send: Callable[[], None], run_id: str) -> TransportError | None:
        """What went wrong; None if nothing did."""
        try:
            send()
        except RejectedError as error:
            return self._unless_gone(run_id, error)
        except TransportError as error:
            return error
        except Exception as error:
            found = translated(error)
            if isinstance(found, RejectedError):
                return self._unless_gone(run_id, found)
            return found
        return None

    def _log_batch(self, request: Request) -> Any:
        """Hand a batch over; the operation to wait for."""
        from mlflow.entities import Metric, Param, RunTag

        columns = zip(request.keys, request.values, request.times, request.steps, strict=True)
        metrics = [
            _metric(*point) if KEY_SEPARATOR in point[0] else Metric(*point) for point in columns
        ]
        return self._delivery_client().log_batch(
            request.run_id,
            metrics=metrics,
            params=[Param(*param) for param in request.params],
            tags=[RunTag(*tag) for tag in request.tags],
            synchronous=False,
        )

    def _unless_gone(self, run_id: str, error: RejectedError) -> TransportError:
        """A deleted run rejects what it is sent with the same status as a bad point; look."""
        now_s = self._clock.monotonic_s()
        if now_s < self._active_until_s.get(run_id, 0.0):
            return error
        try:
            run = self._delivery_client().get_run(run_id)
        except Exception as failure:
            found = failure if isinstance(failure, TransportError) else translated(failure)
            return error if isinstance(found, RejectedError) else found
        if run.info.lifecycle_stage == "deleted":
            return RunGoneError(f"run {run_id} is deleted ({error.reason})")
        self._active_until_s[run_id] = now_s + 10.0
        return error

    def _delivery_client(self) -> Any:
        with self._client_lock:
            file = self._database_file()
            if self._client is not None and file != self._file:
                # Another file is there now; the connections are to the one that was deleted.
                self._client._tracking_client.store.engine.dispose()
            self._file = file
            if self._client is None:
                self._client = idle_clients.take(self._which()) or delivery_client(
                    self._uri, self._settings.request_timeout_s
                )
            return self._client

    def _which(self) -> idle_clients.Which:
        return self._uri, self._settings.request_timeout_s, self._file

    def _database_file(self) -> tuple[int, int] | None:
        """Which file a SQLite database is in; None for everything else.

        Raises:
            RunGoneError: There is none. MLflow would make a new, empty one.
        """
        scheme, _, path = self._uri.partition(":///")
        path = path.partition("?")[0]
        if scheme.split("+")[0] != "sqlite" or not path or ":memory:" in path:
            return None
        try:
            found = os.stat(path)
        except FileNotFoundError:
            raise RunGoneError(f"the database {path} does not exist") from None
        return found.st_dev, found.st_ino


def _metric(stored_key: str, *point: Any) -> Any:
    """A metric that is about a model or a dataset."""
    from mlflow.entities import Metric

    key, *about = stored_key.split(KEY_SEPARATOR)
    names = ("model_id", "dataset_name", "dataset_digest")
    fields = {name: text or None for name, text in zip(names, about, strict=True)}
    return Metric(key, *point, **fields)


def absolute_uri(tracking_uri: str) -> str:
    """A tracking URI that means the same from every working directory."""
    scheme, separator, rest = tracking_uri.partition(":///")
    if scheme.split("+")[0] == "sqlite":
        if not separator or rest.startswith(("/", ":memory:", "file:")):
            return tracking_uri
        path, mark, query = rest.partition("?")
        return f"{scheme}:///{os.path.abspath(path)}{mark}{query}"
    if tracking_uri.startswith("file:") and not tracking_uri.startswith("file:/"):
        return Path(unquote(tracking_uri[5:])).absolute().as_uri()
    if "://" not in tracking_uri and not tracking_uri.startswith(("file:", "databricks", "uc")):
        return Path(tracking_uri).absolute().as_uri()
    return tracking_uri


def _is_file(tracking_uri: str) -> bool:
    return tracking_uri.startswith(("sqlite", "file:")) or "://" not in tracking_uri


def may_pass(error: Exception) -> bool:
    """Whether what a store raised says nothing but that it cannot be asked now."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        error = translated(error)
    return isinstance(error, RetriableError)


def translated(error: Exception) -> TransportError:
    """What a store raised, as ours. Whatever is not known to be final may succeed later."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error_of_status(
            error.get_http_status_code(), first_line(error), code=error.error_code
        )
    kind = type(error).__name__
    if kind in ("ClientAuthenticationError", "CredentialUnavailableError"):  # of azure-core
        return UnauthorisedError(f"{kind}: {first_line(error)}")
    return RetriableError(f"{kind}: {first_line(error)}")
