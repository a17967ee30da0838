"""The body of a log-batch request as columns, past protobuf, where that would take it as it is.

Making messages of a body, and MLflow's objects of these, costs more than storing them. What is
plain is what MLflow's clients send: metrics alone, with four fields each of the type that they
have. All else is not judged here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple

#: The most metrics that MLflow takes at once.
_MAX_METRICS: Final = 1000

_PARTS: Final = frozenset(("run_id", "metrics", "params", "tags"))
_FIELDS: Final = ("key", "value", "timestamp", "step")
_columns_of = itemgetter(*_FIELDS)

#: How JSON of protobuf's has what JSON has no numbers for.
_WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Batch(NamedTuple):
    """Metrics of a run; its columns have one length."""

    run_id: str
    names: Sequence[str]
    values: Sequence[float]
    times: Sequence[int]
    steps: Sequence[int]


def batch_of(body: Any) -> Batch | None:
    """The metrics of a body; None if it is not plain.

    Args:
        body: What ``json.loads`` makes of it.
    """
    if type(body) is not dict or not body.keys() <= _PARTS:
        return None
    run_id, metrics = body.get("run_id"), body.get("metrics")
    if type(run_id) is not str or type(metrics) is not list or not 0 < len(metrics) <= _MAX_METRICS:
        return None
    if any(body.get(other, []) != [] for other in ("params", "tags")):
        return None
    if {*map(type, metrics)} != {dict} or {*map(frozenset, metrics)} != {frozenset(_FIELDS)}:
        return None
    names, values, times, steps = zip(*map(_columns_of, metrics), strict=True)
    numbers = _numbers(values)
    if numbers is None or {*map(type, names)} != {str} or {*map(type, times + steps)} != {int}:
        return None
    return Batch(run_id, names, numbers, times, steps)


def _numbers(values: Sequence[Any]) -> Sequence[float] | None:
    """Values as numbers; None if one is neither a finite number nor a word for another one."""
    try:
        if {*map(type, values)} == {float}:
            return values if all(map(math.isfinite, values)) else None
        return [_WORDS[value] if type(value) is str else _finite(value) for value in values]
    except (KeyError, ValueError, OverflowError):
        return None


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)
