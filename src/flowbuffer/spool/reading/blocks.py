"""From the slots of a segment to the columns of points; what is damaged is buried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowbuffer.errors import is_passing
from flowbuffer.spool.layout import COMMITTED, EMPTY, EXPLICIT, SERIES, TEXT, VOID
from flowbuffer.spool.reading.columns import SLOT_DTYPE, series_columns, sound_slots, text_at
from flowbuffer.spool.reading.key_table import KeyTable
from flowbuffer.spool.reading.open_segment import OpenSegment
from flowbuffer.spool.segment_files import Ending, segment_path

#: Of points, as :class:`~flowbuffer.spool.reading.columns.Block` has them.
Columns = Sequence[NDArray[Any]]


class Blocks:
    """Makes the points of one producer from its slots.

    Args:
        folder: Of the producer.
        keys: Its keys.
        bury: Keeps a slot, whose number in its segment it is given, as a dead letter for a reason,
            unless it is settled.
    """

    def __init__(
        self, folder: Path, keys: KeyTable, bury: Callable[[OpenSegment, int, str], None]
    ) -> None:
        self._folder = folder
        self._keys = keys
        self._bury = bury

    def columns(
        self, segment: OpenSegment, slots: NDArray[np.int32], end: int, limit: int
    ) -> tuple[Columns, int, NDArray[np.int32]]:
        """The points in these slots of a segment.

        Returns:
            Their columns; how far the segment is read then, which is ``end``, or less far if that
            is more than ``limit`` points; and which slots before there are buried.

        Raises:
            OSError, MemoryError: They cannot be read now.
            Exception: One of them is at fault, in a way that was not foreseen.
        """
        rows = segment.columns[slots]
        present = (rows["state"] != VOID) & (rows["state"] != EMPTY)
        slots, rows = slots[present], rows[present]
        sound = sound_slots(slots, rows, self._keys.known(rows["key"]))
        for slot in slots[~sound].tolist():
            self._bury(segment, slot, "the slot is damaged")
        for at in np.flatnonzero(sound & ((rows["flags"] & TEXT) != 0)).tolist():
            sound[at] = self._has_text(segment, int(slots[at]), rows[at])
        buried = [slots[~sound]]
        slots, rows = slots[sound], rows[sound]
        columns = _columns(slots, rows)
        parts: list[Columns] = []
        count = first = 0
        for at in np.flatnonzero(rows["flags"] & SERIES).tolist():
            parts.append([column[first:at] for column in columns])
            count += at - first
            first = at + 1
            points = self._series(segment, [column[at] for column in columns])
            if points is None:
                buried.append(slots[at : at + 1])
            else:
                parts.append(points)
                count += len(points[0])
            if count >= limit and first < len(slots):
                end = int(slots[at]) + 1
                break
        else:
            if not parts:
                return columns, end, buried[0]
            parts.append([column[first:] for column in columns])
        all_buried = np.concatenate(buried)
        whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return whole, end, all_buried[all_buried < end]

    def _series(self, segment: OpenSegment, slot: Sequence[Any]) -> Columns | None:
        """The points of a series slot as columns; None if its frame is damaged."""
        try:
            return series_columns(self._journal(segment), slot)
        except Exception as error:
            if is_passing(error):
                raise
            reason = f"a series of {slot[4]:g} points is damaged: {error}"
            self._bury(segment, int(slot[0]), reason)
            return None

    def _has_text(self, segment: OpenSegment, slot: int, row: Any) -> bool:
        """Whether the frame of a parameter or tag is whole; if not, it is a dead letter."""
        if row["state"] == COMMITTED:
            try:
                text_at(self._journal(segment), int(row["step"]), int(row["key"]))
            except Exception as error:
                if is_passing(error):
                    raise
                self._bury(segment, slot, f"a parameter or tag is damaged: {error}")
                return False
        return True

    def _journal(self, segment: OpenSegment) -> Path:
        return segment_path(self._folder, segment.number, Ending.JOURNAL)


def _columns(slots: NDArray[np.int32], rows: NDArray[Any]) -> Columns:
    """Slots as columns, a series as one point."""
    explicit = (rows["flags"] & EXPLICIT) != 0
    time = np.where(explicit, rows["time"], rows["time"] // 1_000_000)
    kind = (rows["flags"] & TEXT).astype(np.uint8)
    names = ("value", "step", "state")
    return [slots, rows["key"], time, explicit, *(rows[name] for name in names), kind]


def no_columns() -> Columns:
    """Those of no point."""
    return _columns(np.zeros(0, np.int32), np.zeros(0, SLOT_DTYPE))
