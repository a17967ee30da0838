"""Which NaN a run has already: MLflow before 3.17 refuses a NaN that it has, in place of passing it
over as it does with any other value.

Its SQL stores have the primary key (run, key, timestamp, step, value, is_nan), and look for the
rows that are there by comparing values, of which NaN equals none. So a batch whose answer was lost,
and a NaN that two ranks log after an all-reduce, are 400 for ever. The rows are looked up here, in
the run's history: what is in there is stored, whoever stored it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from flowbuffer.backends.base import Request
from flowbuffer.metric_key import About, parsed

#: How many rows of a history are read at once.
_PAGE_ROWS = 5000
#: How many NaN are remembered; with more, all are forgotten, and read again if need be.
_MOST_REMEMBERED = 200_000

_Row = tuple[int, int]  # timestamp and step


@dataclass
class _History:
    """What was read of one key's: its NaN, and the page where reading goes on. A history grows at
    its end, so the pages before are seldom worth a second look."""

    rows: set[_Row] = field(default_factory=set)
    page: str | None = None


class StoredNans:
    """The NaN that runs of one server have, as far as it was necessary to know. Thread-safe."""

    def __init__(self) -> None:
        self._histories: dict[tuple[str, str], _History] = {}  # by run and stored key
        self._lock = threading.Lock()

    def unknown(self, request: Request) -> Request:
        """The request without the NaN that are known to be stored, and each of the others once.
        It is the request itself as long as its keys were never in doubt."""
        seen: dict[str, set[_Row]] = {}
        with self._lock:
            for key in set(request.keys):
                found = self._histories.get((request.run_id, key))
                if found is not None:
                    seen[key] = set(found.rows)
        if not seen:
            return request
        keep = []
        for index in range(len(request.keys)):
            key, row = request.keys[index], (request.times[index], request.steps[index])
            if key in seen and math.isnan(request.values[index]):
                if row in seen[key]:
                    continue
                seen[key].add(row)
            keep.append(index)
        if len(keep) == len(request.keys):
            return request
        return replace(
            request,
            keys=[request.keys[i] for i in keep],
            values=[request.values[i] for i in keep],
            times=[request.times[i] for i in keep],
            steps=[request.steps[i] for i in keep],
        )

    def read(self, store: Any, request: Request) -> bool:
        """Read which of the NaN in a request are stored; whether there are any NaN in it.

        Args:
            store: Of MLflow's.
            request: That was refused.

        Raises:
            Exception: What the store raises.
        """
        wanted: dict[str, set[_Row]] = {}
        for key, value, *row in zip(
            request.keys, request.values, request.times, request.steps, strict=True
        ):
            if math.isnan(value):
                wanted.setdefault(key, set()).add((row[0], row[1]))
        for key, rows in wanted.items():
            with self._lock:
                known = self._histories.get((request.run_id, key), _History())
            found = self._read(store, request.run_id, key, _History(set(known.rows), known.page))
            if known.page is not None and not rows <= found.rows:
                found = self._read(store, request.run_id, key, _History())  # sorted in before
            with self._lock:
                self._histories[request.run_id, key] = found
        return bool(wanted)

    def stored(self, request: Request) -> None:
        """A request was stored: its NaN need not be read, where others of the key were."""
        if not self._histories:
            return
        with self._lock:
            for key, value, *row in zip(
                request.keys, request.values, request.times, request.steps, strict=True
            ):
                history = self._histories.get((request.run_id, key))
                if history is not None and math.isnan(value):
                    history.rows.add((row[0], row[1]))
            if sum(len(history.rows) for history in self._histories.values()) > _MOST_REMEMBERED:
                self._histories.clear()

    def _read(self, store: Any, run_id: str, stored_key: str, history: _History) -> _History:
        """Read on, from the last page that was read to the end."""
        key, about = parsed(stored_key)
        while True:
            page = store.get_metric_history(
                run_id, key, max_results=_PAGE_ROWS, page_token=history.page
            )
            history.rows.update(_nans(page))
            if not page.token:
                break
            history.page = page.token
        if about is not None and about.model_id:
            # The model has rows of its own, which are written after those of the run.
            history.rows &= set(_nans_of_model(store, key, about))
        return history


def _nans(metrics: Any) -> Iterator[_Row]:
    return ((m.timestamp, m.step) for m in metrics if math.isnan(m.value))


def _nans_of_model(store: Any, key: str, about: About) -> Iterator[_Row]:
    """MLflow stores a model's NaN as 0 (``_log_model_metrics``)."""
    for metric in store.get_logged_model(about.model_id).metrics or ():
        dataset = (metric.dataset_name or "", metric.dataset_digest or "")
        if (metric.key, *dataset) == (key, *about[1:]) and (
            metric.value == 0.0 or math.isnan(metric.value)
        ):
            yield metric.timestamp, metric.step
