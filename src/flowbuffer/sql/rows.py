"""The rows that MLflow makes of metrics, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Columns(NamedTuple):
    """Rows of ``metrics`` or ``latest_metrics`` of one run."""

    keys: list[str]
    values: list[float]
    times: list[int]
    steps: list[int]
    nans: list[bool]


class Rows:
    """The rows of a batch.

    A NaN is stored as 0 with a mark, an infinity as the largest number there is: what else SQL
    could not hold.

    Args:
        keys, values, times, steps: Of the metrics, columns of one length. ``times`` are ms since
            the epoch.

    Raises:
        OverflowError: A time or a step has more than 64 bits.
    """

    def __init__(
        self,
        keys: Sequence[str],
        values: Sequence[float],
        times: Sequence[int],
        steps: Sequence[int],
    ) -> None:
        self._names = sorted(set(keys))
        numbers = {name: number for number, name in enumerate(self._names)}
        given = np.asarray(values, np.float64)
        self._key = np.fromiter(map(numbers.__getitem__, keys), np.int64, len(keys))
        self._nan = np.isnan(given)
        self._value = np.nan_to_num(given, nan=0.0)
        self._time = np.asarray(times, np.int64)
        self._step = np.asarray(steps, np.int64)

    def metrics(self) -> Columns:
        """All, in one order, whoever writes them: two that write the same rows cannot wait for each
        other. It is that of the table's key, too, so what is near there is written together."""
        return self._taken(np.lexsort((self._value, self._step, self._time, self._key)))

    def latest(self) -> Columns:
        """Of each key the row with the greatest step, time and value, and of several such the first
        one; in the order of the keys."""
        first = -np.arange(len(self._key))
        order = np.lexsort((first, self._value, self._time, self._step, self._key))
        key = self._key[order]
        return self._taken(order[np.flatnonzero(np.r_[key[1:] != key[:-1], True])])

    def _taken(self, order: npt.NDArray[Any]) -> Columns:
        columns = (self._value, self._time, self._step, self._nan)
        return Columns(
            [self._names[number] for number in self._key[order].tolist()],
            *(column[order].tolist() for column in columns),
        )
