"""The files of segments: their names and numbers, and where a slot is in one.

A segment is known by the path of the file with its slots, which need not be there any more; what
else there is of it has the same name with another ending. The calls that log, in which each call
would cost, compute offsets themselves.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flowbuffer.errors import SpoolError
from flowbuffer.spool import layout
from flowbuffer.spool.files import read_file

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Ending:
    """How the names of a segment's files end; what is in them is told in ``layout``."""

    SLOTS: Final = ".slots"
    JOURNAL: Final = ".journal"
    STATES: Final = ".states"
    DAMAGED: Final = ".damaged"
    LOST: Final = ".lost"


def segment_path(folder: Path, number: int, ending: str = Ending.SLOTS) -> Path:
    """A file of a segment in a producer's folder."""
    return folder / f"{number:08d}{ending}"


def number_of(segment: Path) -> int:
    """The number of a segment, from the path of one of its files."""
    return int(segment.stem)


def segment_numbers(folder: Path) -> list[int]:
    """The numbers of the segments in a producer's folder, rising.

    Raises:
        OSError: They cannot be listed now.
    """
    stems = (name.removesuffix(Ending.SLOTS) for name in names_in(folder, Ending.SLOTS))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def names_in(folder: Path, end: str | tuple[str, ...]) -> list[str]:
    """The names in a folder that end so; none if it is gone.

    Raises:
        OSError: They cannot be listed now.
    """
    try:
        return [name for name in os.listdir(folder) if name.endswith(end)]
    except FileNotFoundError:
        return []


def offset_of(slot: int) -> int:
    """Where a slot is in its file, in bytes from the start; of the one after the last, the end."""
    return layout.segment_size(slot)


def slot_at(offset: int) -> int:
    """The slot at an offset."""
    return (offset - layout.SEGMENT_HEADER_SIZE) // layout.SLOT_SIZE


def bytes_at(content: Any, position: int) -> bytes:
    """Of each slot the byte at a position, from what is in a file of slots."""
    return bytes(content[offset_of(0) + position :: layout.SLOT_SIZE])


def slots_in(path: Path) -> NDArray[Any]:
    """The slots of a segment; none if it is gone, or no file of a spool."""
    import numpy

    try:
        data = read_file(path, limit=layout.segment_size(layout.MAX_SEGMENT_SLOTS))
    except (FileNotFoundError, SpoolError):
        data = b""
    body = data[offset_of(0) :]
    columns = numpy.dtype(layout.SLOT_COLUMNS)  # type: ignore[call-overload]
    return numpy.frombuffer(body, columns, len(body) // layout.SLOT_SIZE)


def closed_outcome(folder: Path) -> int:
    """The field ``outcome`` of a closed producer (see ``layout``); 0 if it was never closed."""
    for number in segment_numbers(folder)[-1:]:
        try:
            head = read_file(segment_path(folder, number), limit=layout.SEGMENT_HEADER_SIZE)
            closed, outcome = layout.parse_closed(head[layout.CLOSED_OFFSET :])
        except (OSError, struct.error):
            continue
        return int(outcome) if closed else 0
    return 0
