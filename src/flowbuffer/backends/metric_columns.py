"""The metrics of a request: columns for a store that takes columns, MLflow's objects for others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flowbuffer.backends.base import Request
from flowbuffer.backends.shipped import shipped
from flowbuffer.metric_key import About, parsed


class MetricColumns(Sequence[Any]):
    """The metrics of a request, which are made one by one when somebody asks for them.

    Args:
        request: Its columns.

    Attributes:
        names: Of the metrics.
        values, times, steps: As of the request.
        are_about_models: Whether any of them is about a model.
    """

    def __init__(self, request: Request) -> None:
        parts = {key: parsed(key) for key in set(request.keys)}
        self.names = [parts[key][0] for key in request.keys]
        self.values, self.times, self.steps = request.values, request.times, request.steps
        self.are_about_models = any(about and about.model_id for _, about in parts.values())
        self._about = [parts[key][1] for key in request.keys]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, at: Any) -> Any:
        columns = (self.names, self.values, self.times, self.steps, self._about)
        if isinstance(at, slice):
            return [_metric(*point) for point in zip(*(one[at] for one in columns), strict=True)]
        return _metric(*(column[at] for column in columns))

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])


def _metric(name: str, value: float, time: int, step: int, about: About | None) -> Any:
    """A metric, which may be about a model or a dataset."""
    kind = shipped().Metric
    if about is None:
        return kind(name, value, time, step)
    fields = {field: text or None for field, text in about._asdict().items()}
    return kind(name, value, time, step, **fields)
