"""One producer of a run, as the sender has it: its points as rows, and back to its reader."""

from __future__ import annotations

from math import isfinite
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flowbuffer.delivery.key_numbers import RunKeys
from flowbuffer.delivery.ordering import ROW, Rows, TieRule
from flowbuffer.errors import is_passing
from flowbuffer.metric_key import parsed
from flowbuffer.spool.dead_letters import DeadLetter
from flowbuffer.spool.layout import COMMITTED, PARAM, TAG
from flowbuffer.spool.reading.columns import Block
from flowbuffer.spool.reading.reader import Reader

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
        refused: Points that raised when they were read, to be made dead letters by whoever reads.
    """

    def __init__(self, number: int, reader: Reader, keys: RunKeys) -> None:
        self.number = number
        self.reader = reader
        self.paused = False
        self.refused: list[DeadLetter] = []
        self._block: Block | None = None  # read, and not given out yet
        self._keys = keys
        self._numbers: dict[tuple[int, int], int] = {}  # of the run's keys, by kind and own id
        try:
            self.ties = TieRule(reader.carry)
        except ValueError as error:
            reader.problems.append(f"{reader.folder / 'carry'} is not used: {error}")
            self.ties = TieRule()

    def read(self, limit: int) -> tuple[Rows, NDArray[np.uint8]] | None:
        """About ``limit`` of the next points, without those that are settled, and their kinds; None
        if there are none now. A point that raises when it is numbered or ordered is a dead letter.

        Raises:
            OSError, MemoryError: They cannot be read now; they can be read again.
        """
        if self._block is None and not self.paused:
            self._block = self.reader.read(limit)
        if self._block is None:
            return None
        block = self._block
        found = self._rows(block)
        if block.ends_segment:
            self.reader.keep(block.segment, self.ties.state())
        self._block = None
        return found

    def _rows(self, block: Block) -> tuple[Rows, NDArray[np.uint8]]:
        try:
            return self._as_rows(block)
        except Exception as error:
            if is_passing(error):
                raise
        ties, refused = self.ties.copy(), len(self.refused)
        try:
            return self._in_halves(block)
        except BaseException:
            self.ties = ties
            del self.refused[refused:]
            raise

    def _in_halves(self, block: Block) -> tuple[Rows, NDArray[np.uint8]]:
        """The points of a block of which one is at fault."""
        try:
            return self._as_rows(block)
        except Exception as error:
            if is_passing(error):
                raise
            if len(block.slot) == 1:
                if block.state[0] == COMMITTED:
                    self.refused.append(_letter_of(block, f"it cannot be delivered: {error!r}"))
                return np.zeros(0, ROW), np.zeros(0, np.uint8)
        first = np.arange(len(block.slot)) < len(block.slot) // 2
        halves = [self._in_halves(block.only(points)) for points in (first, ~first)]
        rows, kinds = zip(*halves, strict=True)
        return np.concatenate(rows), np.concatenate(kinds)

    def _as_rows(self, block: Block) -> tuple[Rows, NDArray[np.uint8]]:
        pending = np.flatnonzero(block.state == COMMITTED)
        rows = np.empty(len(pending), ROW)
        rows["source"], rows["segment"], rows["slot"] = (
            self.number,
            block.segment,
            block.slot[pending],
        )
        rows["step"], rows["value"] = block.step[pending], block.value[pending]
        rows["identity"], kinds = block.key[pending], block.kind[pending]
        rows["key"] = self._keys.numbers(kinds, rows["identity"], self._numbers, self.reader.key)
        # Last, as the rule goes on from every point that it was given.
        rows["time"] = self.ties.apply(block, self.reader.tie_keys(block.key))[pending]
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
        try:
            return self._letter(row, reason, run_id)
        except Exception as error:
            if is_passing(error):
                raise
            return DeadLetter(
                run_id=run_id,
                reason=f"{reason} ({error!r})",
                segment=int(row["segment"]),
                slot=int(row["slot"]),
            )

    def _letter(self, row: Any, reason: str, run_id: str) -> DeadLetter:
        number = int(row["key"])
        kind = self._keys.kind(number)
        key, about = parsed(self._keys.key(number))
        value = float(row["value"])
        return DeadLetter(
            run_id=run_id,
            kind=_KINDS[kind],
            key=key,
            value=self._text_or_none(row) if kind else value if isfinite(value) else str(value),
            step=None if kind else int(row["step"]),
            about=about,
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


def _letter_of(block: Block, reason: str) -> DeadLetter:
    """The only point of a block, which could not become a row."""
    value = float(block.value[0])
    return DeadLetter(
        value=value if isfinite(value) else str(value),
        step=int(block.step[0]),
        timestamp=int(block.time[0]),
        reason=reason,
        segment=block.segment,
        slot=int(block.slot[0]),
    )
