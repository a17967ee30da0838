"""The edge to MLflow: requests go out here, and foreign errors become ours here."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from flowbuffer.backends import idle_clients
from flowbuffer.backends.base import Accepted, Done, Request
from flowbuffer.backends.database import MAX_METRICS
from flowbuffer.backends.metric_columns import MetricColumns
from flowbuffer.backends.mlflow_client import database_of, delivery_client, store_of
from flowbuffer.backends.shipped import shipped
from flowbuffer.backends.stored_nans import StoredNans
from flowbuffer.backends.translation import translated
from flowbuffer.backends.uris import is_file, sqlite_path
from flowbuffer.clock import Clock
from flowbuffer.errors import (
    DoubtfulError,
    RejectedError,
    RetriableError,
    RunGoneError,
    TransportError,
)
from flowbuffer.settings.settings import Settings


class MlflowTransport:
    """Sends through ``MlflowClient.log_batch(..., synchronous=False)``.

    Args:
        tracking_uri: As MLflow takes it, with credentials if it has any.
        settings: ``max_in_flight``, ``request_timeout_s``, and ``delivery``: with ``inline``, the
            calling thread sends.
        clock: For what is remembered of a run's state.
    """

    #: What ``log_batch`` may give besides MLflow's own.
    _operations: tuple[type, ...] = ()

    def __init__(self, tracking_uri: str, settings: Settings, clock: Clock) -> None:
        self.max_in_flight = settings.max_in_flight or (1 if is_file(tracking_uri) else 4)
        self._uri = tracking_uri
        self._settings = settings
        self._clock = clock
        self._client: Any = None
        self._file: tuple[int, int] | None = None
        self._client_lock = threading.Lock()
        self._active_until_s: dict[str, float] = {}
        self._nans = StoredNans()
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
        """The most that MLflow takes; more where a database is written in bulk."""
        client = self._client  # another thread may let it go
        return MAX_METRICS if client is None else database_of(client).max_metrics

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
        request = self._nans.unknown(request)
        error = self._attempt(request) if len(request) else None
        if isinstance(error, DoubtfulError) and self._has_read_nans(request):
            rest = self._nans.unknown(request)
            if len(rest) < len(request):
                request, error = rest, self._attempt(rest) if len(rest) else None
        if error is None:
            self._nans.stored(request)
        done(error)

    def _has_read_nans(self, request: Request) -> bool:
        """Read which NaN of a request that was refused are stored; False if it has none, or the
        store does not say."""
        try:
            return self._nans.read(store_of(self._delivery_client()), request)
        except Exception:
            return False  # the request is tried again, and so is this

    def _attempt(
        self, request: Request, then: Callable[[Any], None] | None = None
    ) -> TransportError | None:
        """Send a request; what went wrong, None if nothing did.

        Args:
            request: To be sent.
            then: What is to be done with the operation; waits for it by default.
        """
        client = None
        try:
            client = self._delivery_client()
            operation = self._log_batch(request)
            if then is not None:
                then(operation)
            elif operation is not None:
                operation.wait()
        except Exception as error:
            found = translated(error, store_of(client))
            if client is not None and isinstance(found, (RejectedError, RunGoneError)):
                return self._unless_gone(client, request.run_id, found)
            return found
        return None

    def _log_batch(self, request: Request) -> Any:
        """Hand a batch over; the operation to wait for, None if it is stored."""
        mlflow = shipped()
        operation = self._delivery_client().log_batch(
            request.run_id,
            metrics=MetricColumns(request),
            params=[mlflow.Param(*param) for param in request.params],
            tags=[mlflow.RunTag(*tag) for tag in request.tags],
            synchronous=False,
        )
        if operation is None or isinstance(operation, (*mlflow.operations, *self._operations)):
            return operation
        raise RetriableError(f"log_batch gave no operation of MLflow's, but {type(operation)}")

    def _unless_gone(
        self, client: Any, run_id: str, error: RejectedError | RunGoneError
    ) -> TransportError:
        """A deleted run rejects what it is sent with the same status as a bad point does, and a
        model that does not exist is not found as a run is not: look at the run."""
        now_s = self._clock.monotonic_s()
        rejected = RejectedError(error.reason, error.retry_after_s)
        if isinstance(error, RejectedError) and now_s < self._active_until_s.get(run_id, 0.0):
            return error
        try:
            run = client.get_run(run_id)
        except Exception as failure:
            found = translated(failure, store_of(client))
            return rejected if isinstance(found, RejectedError) else found
        if run.info.lifecycle_stage == "deleted":
            return RunGoneError(f"run {run_id} is deleted ({error.reason})")
        self._active_until_s[run_id] = now_s + 10.0
        return rejected

    def _delivery_client(self) -> Any:
        with self._client_lock:
            file = self._database_file()
            if self._client is not None and file != self._file:
                # Another file is there now; the connections are to the one that was deleted.
                store_of(self._client).engine.dispose()
                database_of(self._client).forget()
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
        path = sqlite_path(self._uri)
        if path is None:
            return None
        try:
            found = os.stat(path)
        except FileNotFoundError:
            raise RunGoneError(f"the database {path} does not exist") from None
        return found.st_dev, found.st_ino
