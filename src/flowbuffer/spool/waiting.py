"""How somebody waits for points: a barrier, a look whether all before it is settled, and a word to
whoever delivers them.

A barrier is a place (segment number, offset) that the points in question lie before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from flowbuffer.spool import layout
from flowbuffer.spool.files import opened
from flowbuffer.spool.layout import COMMITTED
from flowbuffer.spool.segment_files import (
    offset_of,
    segment_numbers,
    segment_path,
    slot_at,
    slots_in,
)


class Waiting:
    """Looks whether no point of a folder before a barrier (see ``Producer.barrier``) is pending any
    more; what became of them is for :mod:`flowbuffer.spool.outcomes` to say.

    A look costs microseconds: it goes on from where the last one found a point that was.
    """

    def __init__(self, folder: Path, barrier: tuple[int, int]) -> None:
        self._folder = folder
        self._barrier = barrier
        self._at = (0, offset_of(0))
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
        start = self._at[1] if number == self._at[0] else offset_of(0)
        path = segment_path(self._folder, number)
        found = _first_committed(path, start, end if number == last else None)
        if found is not None:
            self._at = (number, found)
        return found is not None


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
    states = slots_in(segment_path(folder, numbers[-1]))["state"].nonzero()[0]
    used = int(states[-1]) + 1 if len(states) else 0
    return numbers[-1], offset_of(used)


def hurry_to_end(folder: Path) -> tuple[int, int]:
    """Have everything that is in a folder now sent without lingering; a barrier after it."""
    number, end = last_barrier(folder)
    if number >= 0 and end > offset_of(0):
        want(segment_path(folder, number), end - layout.SLOT_SIZE)
    return number, end


def want(path: Path, offset: int) -> None:
    """Say that someone waits for the slot at ``offset`` and those before it."""
    try:
        file = opened(path, os.O_RDWR)
    except OSError:
        return  # delivered already, or nothing that anybody could deliver
    with file:
        descriptor = file.fileno()
        slots = slot_at(offset) + 1
        (wanted,) = layout.WANTED.unpack(os.pread(descriptor, 4, layout.WANTED_OFFSET))
        if slots > wanted:
            os.pwrite(descriptor, layout.WANTED.pack(slots), layout.WANTED_OFFSET)
