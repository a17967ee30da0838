"""What became of points, seen from outside: by whoever waits, in any process.

Only looks, but for :func:`want`, which tells the reader that someone waits, and :func:`park`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flowbuffer.errors import SpoolError, SpoolFormatError
from flowbuffer.spool import layout
from flowbuffer.spool.carry import Carry, read_carry
from flowbuffer.spool.files import open_file, read_file, write_file
from flowbuffer.spool.layout import COMMITTED, DELIVERED, EXPLICIT, REJECTED, SERIES

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: As much of ``rejected.jsonl`` is read; what is beyond it is kept, and not counted.
_MAX_LETTERS_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Tally:
    """What became of a producer's points. ``oldest_ms``: the time of one that is pending, of the
    first that was logged, in ms since the epoch; None if none is."""

    delivered: int = 0
    rejected: int = 0
    pending: int = 0
    oldest_ms: int | None = None


def tally(folder: Path) -> Tally | None:
    """Count a producer's points; None if the folder is gone, because all of them are delivered."""
    while True:
        carried = _carried(folder)
        first, settled = carried.first, carried.delivered + carried.rejected
        pending, oldest_ms = 0, None
        for number in segment_numbers(folder):
            if number >= first:
                rows = _slots(folder / f"{number:08d}.slots")
                waiting = points_in(rows)
                settled += points_in(rows, DELIVERED) + points_in(rows, REJECTED)
                pending += waiting
                if waiting and oldest_ms is None:
                    oldest_ms = _time_ms(rows[rows["state"] == COMMITTED][0])
        if not folder.exists():
            return None
        if _carried(folder) == carried:  # no segment was deleted meanwhile
            rejected = min(_rejected_points(folder), settled)
            return Tally(settled - rejected, rejected, pending, oldest_ms)


def _carried(folder: Path) -> Carry:
    try:
        return read_carry(folder)
    except (OSError, SpoolFormatError):
        return Carry()


def _time_ms(row: Any) -> int:
    return int(row["time"]) // (1 if row["flags"] & EXPLICIT else 1_000_000)


def segment_numbers(folder: Path) -> list[int]:
    """The numbers of the segments in a producer's folder, rising."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(n[:-6]) for n in names if n.endswith(".slots") and n[:-6].isdecimal())


def _slots(path: Path) -> NDArray[Any]:
    """The slots of a segment; none if it is gone, or cannot be read."""
    import numpy

    try:
        data = read_file(path, limit=layout.segment_size(layout.MAX_SEGMENT_SLOTS))
    except (FileNotFoundError, SpoolError):
        data = b""
    body = data[layout.SEGMENT_HEADER_SIZE :]
    columns = numpy.dtype(layout.SLOT_COLUMNS)  # type: ignore[call-overload]
    return numpy.frombuffer(body, columns, len(body) // layout.SLOT_SIZE)


class Waiting:
    """Looks whether every point of a folder before a barrier (see ``Producer.barrier``) is settled.

    A look costs microseconds: it goes on from where the last one found a point that was not.
    """

    def __init__(self, folder: Path, barrier: tuple[int, int]) -> None:
        self._folder = folder
        self._barrier = barrier
        self._at = (0, layout.SEGMENT_HEADER_SIZE)
        self._looked = False

    def is_over(self) -> bool:
        """Look."""
        if self._looked and self._is_pending(self._at[0]):
            return False
        self._looked = True
        return not any(map(self._is_pending, segment_numbers(self._folder)))

    def _is_pending(self, number: int) -> bool:
        last, end = self._barrier
        if not self._at[0] <= number <= last:
            return False
        start = self._at[1] if number == self._at[0] else layout.SEGMENT_HEADER_SIZE
        path = self._folder / f"{number:08d}.slots"
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
    """The offset of the first pending slot of a segment from byte ``start`` to ``end``."""
    try:
        descriptor = open_file(path, os.O_RDONLY)
    except OSError:
        return None  # it is deleted, or cannot be read
    try:
        while end is None or start < end:
            size = _PIECE if end is None else min(_PIECE, end - start)
            piece = os.pread(descriptor, size, start)
            slot = piece[layout.STATE_OFFSET :: layout.SLOT_SIZE].find(COMMITTED)
            if slot >= 0:
                return start + slot * layout.SLOT_SIZE
            if len(piece) < size:
                return None
            start += size
        return None
    finally:
        os.close(descriptor)


def last_barrier(folder: Path) -> tuple[int, int]:
    """A barrier after every point that is in a folder now."""
    numbers = segment_numbers(folder)
    if not numbers:
        return -1, 0
    states = _slots(folder / f"{numbers[-1]:08d}.slots")["state"].nonzero()[0]
    used = int(states[-1]) + 1 if len(states) else 0
    return numbers[-1], layout.segment_size(used)


def hurry_to_end(folder: Path) -> tuple[int, int]:
    """Have everything that is in a folder now sent without lingering; a barrier after it."""
    number, end = last_barrier(folder)
    if number >= 0 and end > layout.SEGMENT_HEADER_SIZE:
        want(folder / f"{number:08d}.slots", end - layout.SLOT_SIZE)
    return number, end


def closed_outcome(folder: Path) -> int:
    """The field ``outcome`` of a closed producer (see ``layout``); 0 if it was never closed."""
    for number in segment_numbers(folder)[-1:]:
        try:
            head = read_file(folder / f"{number:08d}.slots", limit=layout.SEGMENT_HEADER_SIZE)
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


def slot_states(path: Path, offsets: Sequence[int]) -> list[int]:
    """The states of the slots at these offsets; DELIVERED where the segment is deleted."""
    try:
        descriptor = open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return [DELIVERED] * len(offsets)
    try:
        return [os.pread(descriptor, 1, at + layout.STATE_OFFSET)[0] for at in offsets]
    finally:
        os.close(descriptor)


def want(path: Path, offset: int) -> None:
    """Say that someone waits for the slot at ``offset`` and those before it."""
    try:
        descriptor = open_file(path, os.O_RDWR)
    except OSError:
        return  # delivered already, or nothing that anybody could deliver
    try:
        slots = (offset - layout.SEGMENT_HEADER_SIZE) // layout.SLOT_SIZE + 1
        (wanted,) = layout.WANTED.unpack(os.pread(descriptor, 4, layout.WANTED_OFFSET))
        if slots > wanted:
            os.pwrite(descriptor, layout.WANTED.pack(slots), layout.WANTED_OFFSET)
    finally:
        os.close(descriptor)


def dead_letters(folder: Path) -> Iterator[dict[str, Any]]:
    """The dead letters of a producer, oldest first; lines that are no JSON are passed over."""
    for line in dict.fromkeys(_letters(folder)):  # one letter may have been written twice
        try:
            letter = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(letter, dict):
            yield letter


def _letters(folder: Path) -> list[bytes]:
    try:
        return read_file(folder / "rejected.jsonl", limit=_MAX_LETTERS_BYTES).splitlines()
    except OSError:
        return []


def _rejected_points(folder: Path) -> int:
    letters = {letter for letter in _letters(folder) if letter.endswith(b"}")}
    return len(letters) + sum(_points(letter) - 1 for letter in letters if b'"points"' in letter)


def _points(letter: bytes) -> int:
    try:
        return int(json.loads(letter).get("points", 1))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return 1


def has_dead_letters(folder: Path) -> bool:
    """Whether there are any, readable or not."""
    try:
        return (folder / "rejected.jsonl").stat().st_size > 0
    except FileNotFoundError:
        return False


def park(folder: Path, reason: str | None) -> None:
    """Write down why nobody delivers this producer's points (``parked.json``); None takes it
    back."""
    path = folder / "parked.json"
    if reason is None:
        path.unlink(missing_ok=True)
    else:
        write_file(path, json.dumps({"reason": reason}).encode())


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
