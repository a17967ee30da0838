"""What became of points, seen from outside: by whoever waits, in any process.

Only looks, but for :func:`want`, which tells the reader that someone waits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbuffer.spool import layout
from flowbuffer.spool.directory import open_file, read_file
from flowbuffer.spool.layout import COMMITTED, DELIVERED, SERIES

if TYPE_CHECKING:
    from numpy.typing import NDArray


def segment_numbers(folder: Path) -> list[int]:
    """The numbers of the segments in a producer's folder, rising."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(n[:-6]) for n in names if n.endswith(".slots") and n[:-6].isdecimal())


def committed_points(path: Path, end: int | None = None) -> int:
    """How many points in the slots of a segment before byte ``end`` wait for delivery."""
    try:
        data = read_file(path, limit=layout.segment_size(layout.MAX_SEGMENT_SLOTS))
    except FileNotFoundError:
        return 0
    import numpy

    body = data[layout.SEGMENT_HEADER_SIZE : end]
    columns = numpy.dtype(layout.SLOT_COLUMNS)  # type: ignore[call-overload]
    return points_in(numpy.frombuffer(body, columns, len(body) // layout.SLOT_SIZE))


def segments_before(folder: Path, barrier: tuple[int, int]) -> Iterator[tuple[Path, int | None]]:
    """The segments up to a barrier (see ``Producer.barrier``), each with the byte where it ends."""
    for number in segment_numbers(folder):
        if number <= barrier[0]:
            yield folder / f"{number:08d}.slots", barrier[1] if number == barrier[0] else None


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
    except FileNotFoundError:
        return
    try:
        slots = (offset - layout.SEGMENT_HEADER_SIZE) // layout.SLOT_SIZE + 1
        (wanted,) = layout.WANTED.unpack(os.pread(descriptor, 4, layout.WANTED_OFFSET))
        if slots > wanted:
            os.pwrite(descriptor, layout.WANTED.pack(slots), layout.WANTED_OFFSET)
    finally:
        os.close(descriptor)


def dead_letters(folder: Path) -> Iterator[dict[str, Any]]:
    """The dead letters of a producer, oldest first; lines that are no JSON are passed over."""
    try:
        data = read_file(folder / "rejected.jsonl", limit=1 << 30)
    except FileNotFoundError:
        return
    for line in data.splitlines():
        try:
            letter = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(letter, dict):
            yield letter


def has_dead_letters(folder: Path) -> bool:
    """Whether there are any, readable or not."""
    try:
        return (folder / "rejected.jsonl").stat().st_size > 0
    except FileNotFoundError:
        return False


def parked_reason(folder: Path) -> str | None:
    """Why the run of this producer takes no points; None if nothing is known against it."""
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
