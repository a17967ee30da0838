"""One producer of a run, as the sender has it: its points as rows, and back to its reader."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowbuffer.ordering import ROW, Rows, TieRule
from flowbuffer.run_keys import RunKeys
from flowbuffer.spool.columns import Block
from flowbuffer.spool.layout import COMMITTED
from flowbuffer.spool.reader import Reader


class Source:
    """One producer of a run.

    Args:
        number: What its rows have as ``source``.
        reader: Of its folder.
        keys: Of the run.

    Attributes:
        ties: Its rule for ties.
        paused: Nothing more is to be read of it; what was read goes on its way.
    """

    def __init__(self, number: int, reader: Reader, keys: RunKeys) -> None:
        self.number = number
        self.reader = reader
        self.paused = False
        self._keys = keys
        self._numbers: dict[tuple[int, int], int] = {}  # of the run's keys, by kind and own id
        try:
            self.ties = TieRule(reader.carry)
        except ValueError as error:
            reader.problems.append(f"{reader.folder / 'carry'} is not used: {error}")
            self.ties = TieRule()

    def read(self, limit: int) -> tuple[Rows, NDArray[np.uint8]] | None:
        """About ``limit`` of the next points, without those that are settled, and their kinds; None
        if there are none now."""
        block = None if self.paused else self.reader.read(limit)
        return None if block is None else self._rows(block)

    def _rows(self, block: Block) -> tuple[Rows, NDArray[np.uint8]]:
        time = self.ties.apply(block, self.reader.tie_keys(block.key))
        if block.ends_segment:
            self.reader.keep(block.segment, self.ties.state())
        pending = np.flatnonzero(block.state == COMMITTED)
        rows = np.empty(len(pending), ROW)
        rows["source"], rows["segment"] = self.number, block.segment
        rows["slot"], rows["time"] = block.slot[pending], time[pending]
        rows["step"], rows["value"] = block.step[pending], block.value[pending]
        rows["identity"], kinds = block.key[pending], block.kind[pending]
        rows["key"] = self._keys.numbers(kinds, rows["identity"], self._numbers, self.reader.key)
        return rows, kinds

    def text(self, row: Any) -> str:
        """The value of a parameter or tag.

        Raises:
            OSError: It cannot be read any more.
        """
        return self.reader.text(int(row["segment"]), int(row["step"]), int(row["identity"]))

    def mark(self, rows: Rows, *, rejected: bool) -> None:
        """Those of ``rows`` that are its own are delivered, or rejected."""
        own = rows[rows["source"] == self.number]
        for segment in np.unique(own["segment"]).tolist():
            slots = own["slot"][own["segment"] == segment]
            self.reader.mark(segment, slots, rejected=rejected)
