"""One producer of a run, as the sender has it: its points as rows, and back to its reader."""

from __future__ import annotations

from math import isfinite
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flowbuffer.errors import is_passing
from flowbuffer.ordering import ROW, Rows, TieRule
from flowbuffer.run_keys import RunKeys
from flowbuffer.spool.columns import Block
from flowbuffer.spool.dead_letters import DeadLetter
from flowbuffer.spool.layout import COMMITTED, KEY_SEPARATOR, PARAM, TAG
from flowbuffer.spool.reader import Reader

_KINDS: Final = {0: "metric", PARAM: "param", TAG: "tag"}


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

    def letter(self, row: Any, reason: str, run_id: str) -> DeadLetter:
        """A point as a dead letter; its value is left out if it cannot be read.

        Raises:
            OSError, MemoryError: It cannot be read now.
        """
        number = int(row["key"])
        kind = self._keys.kind(number)
        key, *about = self._keys.key(number).split(KEY_SEPARATOR)
        value = float(row["value"])
        return DeadLetter(
            run_id=run_id,
            kind=_KINDS[kind],
            key=key,
            value=self._text_or_none(row) if kind else value if isfinite(value) else str(value),
            step=None if kind else int(row["step"]),
            about=tuple(about) or None,
            timestamp=int(row["time"]),
            reason=reason,
            segment=int(row["segment"]),
            slot=int(row["slot"]),
        )

    def _text_or_none(self, row: Any) -> str | None:
        try:
            return self.text(row)
        except Exception as error:
            if is_passing(error):
                raise
            return None

    def mark(self, rows: Rows) -> None:
        """Those of ``rows`` that are its own are delivered."""
        own = rows[rows["source"] == self.number]
        for segment in np.unique(own["segment"]).tolist():
            self.reader.mark(segment, own["slot"][own["segment"] == segment])
