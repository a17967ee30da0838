"""Counts of the points in a producer's folder, by what became of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbuffer.errors import SpoolError
from flowbuffer.spool import dead_letters, layout
from flowbuffer.spool.carry import Carry, read_carry
from flowbuffer.spool.layout import COMMITTED, DELIVERED, EXPLICIT, REJECTED, SERIES
from flowbuffer.spool.outcomes import Outcome, folder_outcome, is_there, segment_outcome
from flowbuffer.spool.segment_files import Ending, names_in, segment_numbers, segment_path, slots_in

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Tally:
    """What became of a producer's points.

    ``oldest_ms``: the time of one that is pending, of the first that was logged, in ms since the
    epoch; None if none is. ``unknown``: points of which nobody knows what became. ``last``: the
    number of the newest segment that was seen. ``is_whole``: no segment is missing without a record
    of why, so that no point is. ``retried``: rejected ones that were put into the spool again.
    """

    delivered: int = 0
    rejected: int = 0
    pending: int = 0
    oldest_ms: int | None = None
    unknown: int = 0
    last: int = -1
    is_whole: bool = True
    retried: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.delivered + self.rejected + self.pending + self.unknown + self.retried


def tally(folder: Path, last: int = -1) -> Tally | None:
    """Count a producer's points; None if the folder is gone (see :func:`tally_since`).

    Args:
        folder: Of the producer.
        last: The number of a segment that it is known to have had.

    Raises:
        OSError: They cannot be counted now.
    """
    while True:
        carried = _carried(folder)
        first, settled = carried.first, carried.delivered + carried.rejected
        refused = unknown = pending = 0
        oldest_ms = None
        numbers = segment_numbers(folder)
        for number in numbers:
            if number >= first:
                rows = slots_in(segment_path(folder, number))
                waiting = points_in(rows)
                settled += points_in(rows, DELIVERED) + points_in(rows, REJECTED)
                refused += int((rows["state"] == REJECTED).sum())  # a point of each at least
                pending += waiting
                if waiting and oldest_ms is None:
                    oldest_ms = _time_ms(rows[rows["state"] == COMMITTED][0])
        last = max(last, *numbers) if numbers else last
        absent = set(range(first, last + 1)) - {*numbers}
        why = {segment_outcome(segment_path(folder, number)) for number in absent}
        is_whole = Outcome.UNKNOWN not in why and not names_in(folder, Ending.LOST)
        for name in names_in(folder, Ending.DAMAGED):
            unknown += points_in(slots_in(folder / name))
        letters, retried = dead_letters.count(folder)
        if not is_there(folder):
            return None
        if _carried(folder) == carried:  # no segment was deleted meanwhile
            # A letter that is gone makes no point delivered.
            refused = max(letters + retried or carried.rejected + refused, refused)
            refused = min(refused, settled)
            return Tally(
                settled - refused,
                max(refused - retried, 0),
                pending,
                oldest_ms,
                unknown,
                last,
                is_whole,
                retried=min(retried, refused),
            )


def tally_since(folder: Path, before: Tally) -> Tally:
    """Count a producer's points again. What was counted before, and is nowhere now without a record
    of why, is unknown.

    Raises:
        OSError: They cannot be counted now.
    """
    found = tally(folder, before.last)
    if found is not None:
        missing = 0 if found.is_whole else max(before.total - found.total, 0)
        return replace(found, unknown=found.unknown + missing)
    outcome = folder_outcome(folder, max(before.last, 0))
    if outcome is Outcome.PENDING:
        return before
    gone = replace(before, pending=0, oldest_ms=None)
    if outcome is Outcome.DELIVERED:
        return replace(gone, delivered=before.delivered + before.pending)
    return replace(gone, unknown=before.unknown + before.pending)


def _carried(folder: Path) -> Carry:
    try:
        return read_carry(folder)
    except SpoolError:
        return Carry()


def _time_ms(row: Any) -> int:
    return int(row["time"]) // (1 if row["flags"] & EXPLICIT else 1_000_000)


def points_in(rows: NDArray[Any], state: int = COMMITTED) -> int:
    """The points in these slots whose state is ``state``; a series counts as all of its points."""
    counted = rows["state"] == state
    series = rows["value"][counted & ((rows["flags"] & SERIES) != 0)]
    sizes = series[(series >= 1) & (series <= layout.MAX_SERIES_POINTS)]
    return int(counted.sum()) - len(series) + int(sizes.sum())
