"""The edge to Azure ML, which takes a batch at once and stores it later.

A batch has two ends there: it is *accepted* when its POST is answered, and *ingested* some seconds
later. A lane is free when its batch is accepted, so any number of batches are in ingestion at once;
a point is delivered when it is ingested. One thread asks for all of them.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from flowbuffer.backends.azureml_requests import MAX_METRICS, AzureMLRequests, Ingestion
from flowbuffer.backends.base import Accepted, Done, Request
from flowbuffer.backends.mlflow_transport import MlflowTransport
from flowbuffer.clock import Clock
from flowbuffer.errors import RetriableError, RunGoneError, TransportError
from flowbuffer.metric_key import name_of
from flowbuffer.notices import warn_once
from flowbuffer.settings.settings import Settings

_log = logging.getLogger("flowbuffer")

#: How often it is asked whether a batch is ingested, in s: at first, and at most.
_POLL_S = 0.1
_LONGEST_POLL_S = 5.0
#: A batch of which nothing is heard for so long, in s, is sent again.
_INGESTION_TIMEOUT_S = 3600.0
#: Documented limits of a run (Azure Machine Learning, "Service limits"): metric names, and rows of
#: one name; and of how many rows is warned.
_MAX_NAMES = 50
_MAX_ROWS = 1_000_000
_MANY_ROWS = 900_000


@dataclass
class _Pending:
    ingestion: Ingestion
    since_s: float
    done: Done


class AzureMLTransport(MlflowTransport):
    """Sends to ``azureml://``. See :class:`MlflowTransport`.

    Args:
        tracking_uri: Of the workspace.
        settings: ``max_in_flight``: POSTs at once, each with keys of its own.
        clock: For the pauses between two looks.
    """

    _operations = (Ingestion,)

    def __init__(self, tracking_uri: str, settings: Settings, clock: Clock) -> None:
        self._pending: deque[_Pending] = deque()
        self._changed = threading.Event()
        self._closed = False
        self._poll_s = _POLL_S
        self._names: dict[str, set[str]] = {}
        self._rows: dict[str, Counter[str]] = {}
        self._warnings: dict[str, list[str]] = {}
        super().__init__(tracking_uri, settings, clock)
        self._has_poller = self._start(self._poll, "flowbuffer-ingestion")

    @property
    def max_metrics(self) -> int:
        """The most that the service takes, as far as it has told."""
        requests = _requests_of(self._client)
        return MAX_METRICS if requests is None else requests.max_metrics

    def warnings(self, run_id: str) -> list[str]:
        """Of the documented limits that the run comes near to."""
        return list(self._warnings.get(run_id, ()))  # a copy: whoever keeps it sees what is new

    def close(self) -> None:
        """Let the threads go once their requests, and the ingestion of what they sent, are over."""
        super().close()
        self._closed = True
        self._changed.set()

    def _deliver(self, request: Request, done: Done, accepted: Accepted) -> None:
        taken: list[Any] = []  # an Ingestion, if it is the plugin's store
        self._warn_of_names(request)
        error = self._attempt(request, taken.append)
        if error is None:
            self._warn_of_rows(request)
        self._changed.set()  # there is a client now, with a token to be kept
        if error is not None or not getattr(taken[0], "batch_id", ""):
            done(error)
            return
        accepted()
        self._pending.append(_Pending(taken[0], self._clock.monotonic_s(), done))
        self._changed.set()
        while not self._has_poller and self._pending:
            self._clock.sleep(self._look())

    def _poll(self) -> None:
        while self._pending or not self._closed:
            if self._pending:
                pause_s = self._look()
                if pause_s:
                    self._clock.sleep(pause_s)
            else:
                self._clock.wait(self._changed, self._stay_authorised())
                self._changed.clear()

    def _stay_authorised(self) -> float | None:
        """A quiet job keeps its token; the seconds for which that holds, None for good."""
        requests = _requests_of(self._client)
        try:
            seconds = math.inf if requests is None else requests.stay_authorised()
        except Exception as problem:  # the next request will tell it, too
            _log.debug("the token cannot be renewed: %s", problem)
            seconds = _LONGEST_POLL_S
        return None if seconds == math.inf else min(seconds, threading.TIMEOUT_MAX)

    def _look(self) -> float:
        """Ask for the oldest batch; the seconds to wait before the next look."""
        pending = self._pending[0]
        age_s = self._clock.monotonic_s() - pending.since_s
        error: TransportError | None = None
        try:
            requests = _requests_of(self._delivery_client())
            if requests is not None and not requests.is_complete(pending.ingestion):
                if age_s < _INGESTION_TIMEOUT_S:
                    if age_s > 10 * max(self._poll_s, 1.0):
                        self._pending.rotate(-1)  # the others need not wait for a straggler
                    return self._poll_s
                error = RetriableError(f"a batch is not ingested after {age_s:.0f} s")
        except RunGoneError:
            error = RetriableError("the service does not know a batch that it accepted")
        except Exception as problem:
            # The service has the batch, so asking again is all that there is to do.
            _log.debug("ingestion cannot be asked for: %s", problem)
            return _LONGEST_POLL_S if age_s > _LONGEST_POLL_S else 1.0
        self._pending.popleft()
        if error is None:
            # The next one is asked for at once, and then as often as fits what this one took.
            self._poll_s = min(max(age_s / 8, _POLL_S), _LONGEST_POLL_S)
        pending.done(error)
        return 0.0

    def _warn_of_names(self, request: Request) -> None:
        names = self._names.setdefault(request.run_id, set())
        had_many = len(names) > _MAX_NAMES
        names.update(map(name_of, request.keys))
        if len(names) > _MAX_NAMES and not had_many:
            self._warn(
                request.run_id,
                f"has more than {_MAX_NAMES} names of metrics, Azure ML's documented limit",
            )

    def _warn_of_rows(self, request: Request) -> None:
        rows = self._rows.setdefault(request.run_id, Counter())
        keys = Counter(map(name_of, request.keys))
        for key, count in keys.items():
            before = rows[key]
            rows[key] += count
            if before < _MANY_ROWS <= rows[key]:
                self._warn(
                    request.run_id,
                    f"has {rows[key]:,} values of {key!r}; Azure ML documents {_MAX_ROWS:,} as its "
                    "limit",
                )

    def _warn(self, run_id: str, text: str) -> None:
        self._warnings.setdefault(run_id, []).append(f"run {run_id} {text}")
        warn_once(f"run {run_id} {text}")


def _requests_of(client: Any) -> AzureMLRequests | None:
    """Those of a client; None if there is none, or its store is not the plugin's."""
    if client is None:
        return None
    return getattr(client._tracking_client.store, "flowbuffers_requests", None)
