"""From rows to requests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flowbuffer.backends.base import Request
from flowbuffer.delivery.batches import Part
from flowbuffer.delivery.key_numbers import RunKeys
from flowbuffer.delivery.ordering import Rows, one_each
from flowbuffer.delivery.stream import Stream
from flowbuffer.spool.layout import PARAM, TAG


class Encoder:
    """Makes the requests of one run.

    Args:
        run_id: The run.
        keys: Its keys, by the rows' numbers.
        streams: Those of the run, by the rows' numbers.
    """

    def __init__(self, run_id: str, keys: RunKeys, streams: Mapping[int, Stream]) -> None:
        self._run_id = run_id
        self._keys = keys
        self._streams = streams

    def parts(self, rows: Rows) -> list[Part]:
        """Rows, which are all metrics, or all parameters and tags, as parts that can each be a
        request."""
        if self._keys.kind(rows["key"][0]) == 0:
            return [Part(rows)]
        # The first value of a parameter is the one that counts, and one request has it once.
        params = np.array([self._keys.kind(n) == PARAM for n in rows["key"].tolist()])
        return [Part(some) for some in one_each(rows, params)]

    def request(self, rows: Rows) -> Request:
        """The rows of a part as a request.

        Raises:
            OSError, MemoryError: They cannot be read now.
            Exception: One of them is at fault.
        """
        numbers = rows["key"].tolist()
        keys = [self._keys.key(number) for number in numbers]
        if self._keys.kind(numbers[0]) == 0:
            columns = (rows[name].tolist() for name in ("value", "time", "step"))
            return Request(self._run_id, keys, *columns)
        texts: dict[int, dict[str, str]] = {PARAM: {}, TAG: {}}  # of a tag's values the last one
        for number, key, row in zip(numbers, keys, rows, strict=True):
            texts[self._keys.kind(number)][key] = self._streams[int(row["stream"])].text(row)
        return Request(self._run_id, params=[*texts[PARAM].items()], tags=[*texts[TAG].items()])
