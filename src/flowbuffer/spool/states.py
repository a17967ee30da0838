"""What became of points, seen from outside: by whoever waits, in any process.

Only looks, but for :func:`want`, which tells the reader that someone waits, and :func:`park`.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flowbuffer.errors import SpoolError
from flowbuffer.spool import dead_letters, layout
from flowbuffer.spool.carry import Carry, read_carry
from flowbuffer.spool.files import opened, read_file, write_file
from flowbuffer.spool.layout import COMMITTED, DELIVERED, EXPLICIT, REJECTED, SERIES
from flowbuffer.spool.outcomes import Outcome, folder_outcome, is_there, segment_outcome

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
                rows = _slots(_segment(folder, number))
                waiting = points_in(rows)
                settled += points_in(rows, DELIVERED) + points_in(rows, REJECTED)
                refused += int((rows["state"] == REJECTED).sum())  # a point of each at least
                pending += waiting
                if waiting and oldest_ms is None:
                    oldest_ms = _time_ms(rows[rows["state"] == COMMITTED][0])
        last = max(last, *numbers) if numbers else last
        absent = set(range(first, last + 1)) - {*numbers}
        why = {segment_outcome(_segment(folder, number)) for number in absent}
        is_whole = Outcome.UNKNOWN not in why and not names_in(folder, ".lost")
        for name in names_in(folder, ".damaged"):
            unknown += points_in(_slots(folder / name))
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


def _segment(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.slots"


def segment_numbers(folder: Path) -> list[int]:
    """The numbers of the segments in a producer's folder, rising.

    Raises:
        OSError: They cannot be listed now.
    """
    return sorted(int(n[:-6]) for n in names_in(folder, ".slots") if n[:-6].isdecimal())


def names_in(folder: Path, end: str | tuple[str, ...]) -> list[str]:
    """The names in a folder that end so; none if it is gone.

    Raises:
        OSError: They cannot be listed now.
    """
    try:
        return [name for name in os.listdir(folder) if name.endswith(end)]
    except FileNotFoundError:
        return []


def _slots(path: Path) -> NDArray[Any]:
    """The slots of a segment; none if it is gone, or no file of a spool."""
    import numpy

    try:
        data = read_file(path, limit=layout.segment_size(layout.MAX_SEGMENT_SLOTS))
    except (FileNotFoundError, SpoolError):
        data = b""
    body = data[layout.SEGMENT_HEADER_SIZE :]
    columns = numpy.dtype(layout.SLOT_COLUMNS)  # type: ignore[call-overload]
    return numpy.frombuffer(body, columns, len(body) // layout.SLOT_SIZE)


class Waiting:
    """Looks whether no point of a folder before a barrier (see ``Producer.barrier``) is pending any
    more; what became of them is for :mod:`flowbuffer.spool.outcomes` to say.

    A look costs microseconds: it goes on from where the last one found a point that was.
    """

    def __init__(self, folder: Path, barrier: tuple[int, int]) -> None:
        self._folder = folder
        self._barrier = barrier
        self._at = (0, layout.SEGMENT_HEADER_SIZE)
        self._looked = False

    def is_over(self) -> bool:
        """Look. What cannot be looked at now is pending."""
        try:
            if self._looked and self._is_pending(self._at[0]):
                return False
            self._looked = True
            return not any(map(self._is_pending, segment_numbers(self._folder)))
        except OSError:
            return False

    def _is_pending(self, number: int) -> bool:
        last, end = self._barrier
        if not self._at[0] <= number <= last:
            return False
        start = self._at[1] if number == self._at[0] else layout.SEGMENT_HEADER_SIZE
        path = _segment(self._folder, number)
        found = _first_committed(path, start, end if number == last else None)
        if found is not None:
            self._at = (number, found)
        return found is not None


def is_settled(folder: Path, barrier: tuple[int, int]) -> bool:
    """Whether no point before a barrier waits for delivery."""
    return Waiting(folder, barrier).is_over()


#: Slots that are looked at together.
_PIECE: Final = 1024 * layout.SLOT_SIZE


def _first_committed(path: Path, start: int, end: int | None) -> int | None:
    """The offset of the first pending slot of a segment from byte ``start`` to ``end``.

    Raises:
        OSError: It cannot be looked at now.
    """
    try:
        file = opened(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with file:
        while end is None or start < end:
            size = _PIECE if end is None else min(_PIECE, end - start)
            piece = os.pread(file.fileno(), size, start)
            slot = piece[layout.STATE_OFFSET :: layout.SLOT_SIZE].find(COMMITTED)
            if slot >= 0:
                return start + slot * layout.SLOT_SIZE
            if len(piece) < size:
                return None
            start += size
        return None


def last_barrier(folder: Path) -> tuple[int, int]:
    """A barrier after every point that is in a folder now."""
    numbers = segment_numbers(folder)
    if not numbers:
        return -1, 0
    states = _slots(_segment(folder, numbers[-1]))["state"].nonzero()[0]
    used = int(states[-1]) + 1 if len(states) else 0
    return numbers[-1], layout.segment_size(used)


def hurry_to_end(folder: Path) -> tuple[int, int]:
    """Have everything that is in a folder now sent without lingering; a barrier after it."""
    number, end = last_barrier(folder)
    if number >= 0 and end > layout.SEGMENT_HEADER_SIZE:
        want(_segment(folder, number), end - layout.SLOT_SIZE)
    return number, end


def closed_outcome(folder: Path) -> int:
    """The field ``outcome`` of a closed producer (see ``layout``); 0 if it was never closed."""
    for number in segment_numbers(folder)[-1:]:
        try:
            head = read_file(_segment(folder, number), limit=layout.SEGMENT_HEADER_SIZE)
            closed, outcome = layout.parse_closed(head[layout.CLOSED_OFFSET :])
        except (OSError, struct.error):
            continue
        return int(outcome) if closed else 0
    return 0


def delivery_note(folder: Path) -> dict[str, Any]:
    """What ``delivery.json`` tells (see ``Sender``); empty if there is nothing, or no sense."""
    try:
        said = json.loads(read_file(folder / "delivery.json", limit=1 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def want(path: Path, offset: int) -> None:
    """Say that someone waits for the slot at ``offset`` and those before it."""
    try:
        file = opened(path, os.O_RDWR)
    except OSError:
        return  # delivered already, or nothing that anybody could deliver
    with file:
        descriptor = file.fileno()
        slots = (offset - layout.SEGMENT_HEADER_SIZE) // layout.SLOT_SIZE + 1
        (wanted,) = layout.WANTED.unpack(os.pread(descriptor, 4, layout.WANTED_OFFSET))
        if slots > wanted:
            os.pwrite(descriptor, layout.WANTED.pack(slots), layout.WANTED_OFFSET)


def park(folder: Path, reason: str | None) -> None:
    """Write down why nobody delivers this producer's points (``parked.json``); None takes it
    back, if that can be done: no point depends on it.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / "parked.json"
    if reason is not None:
        write_file(path, json.dumps({"reason": reason}).encode())
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def is_parked(folder: Path) -> bool:
    """Whether something is known against delivering this producer's points."""
    return os.path.lexists(folder / "parked.json")


def parked_reason(folder: Path) -> str | None:
    """Why the run of this producer takes no points; None if nothing is known against it."""
    if not is_parked(folder):
        return None
    try:
        said = json.loads(read_file(folder / "parked.json", limit=1 << 20))
        return str(said["reason"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "parked.json is damaged"


def points_in(rows: NDArray[Any], state: int = COMMITTED) -> int:
    """The points in these slots whose state is ``state``; a series counts as all of its points."""
    counted = rows["state"] == state
    series = rows["value"][counted & ((rows["flags"] & SERIES) != 0)]
    sizes = series[(series >= 1) & (series <= layout.MAX_SERIES_POINTS)]
    return int(counted.sum()) - len(series) + int(sizes.sum())
