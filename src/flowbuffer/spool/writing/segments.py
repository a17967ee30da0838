"""Segments as they are written: whole, with all their blocks, so that no store can fail later."""

from __future__ import annotations

import itertools
import mmap
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

from flowbuffer.errors import SpoolError, SpoolFull, SpoolGone
from flowbuffer.spool import layout
from flowbuffer.spool.files import OwnedFile, opened
from flowbuffer.spool.segment_files import bytes_at, offset_of

#: ``MADV_POPULATE_WRITE`` (Linux 5.14): take the page faults of a segment at once.
_POPULATE_WRITE = 23

#: A mapping keeps no descriptor of its own, where Python lets us say so (3.13).
_UNTRACKED: Final[dict[str, Any]] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


#: Tells apart the unfinished segments of threads that make the same one.
_serials = itertools.count()


def segment(path: Path, number: int, slots: int, *, durable: bool) -> mmap.mmap:
    """Map the segment ``number``, which is made if it is not there.

    Any number of threads may make one and the same, and an interrupted call may have made it
    before: the first one stays, and all map that.

    Args:
        path: Where it appears, once it is whole.
        number: Its place among the producer's segments, from 0.
        slots: How many points it holds if it is made.
        durable: Bring it to the disk itself.

    Raises:
        SpoolFull: The disk has no room for it.
        SpoolGone: Its folder is not there any more.
        SpoolFormatError: What is at ``path`` is no segment of this format.
    """
    try:
        made = None if path.exists() else _make(path, number, slots)
        with made or opened(path, os.O_RDWR) as file:
            header = os.pread(file.fileno(), layout.SEGMENT_HEADER_SIZE, 0)
            size = layout.segment_size(layout.parse_segment_header(header, number))
            buffer = mmap.mmap(file.fileno(), size, **_UNTRACKED)
        if durable:
            buffer.flush()
            sync_directory(path.parent)
    except SpoolError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SpoolGone(f"{path.parent} was wiped while points were logged to it") from error
    except OSError as error:
        size = layout.segment_size(slots)
        raise SpoolFull(f"no room for a segment of {size} bytes at {path}: {error}") from error
    try:
        buffer.madvise(_POPULATE_WRITE)
    except (AttributeError, OSError, ValueError):
        pass  # another system; the first store to each page takes its fault
    return buffer


def points_in(buffer: Any) -> Counter[int]:
    """The points in a mapped segment, by the state of their slots; a series counts as all of its
    points. Takes a tenth of a millisecond, and no NumPy, which a training loop may never need."""
    states = bytes_at(buffer, layout.STATE_OFFSET)
    flags = bytes_at(buffer, layout.FLAGS_OFFSET)
    found = Counter({state: states.count(state) for state in layout.STATES})
    slot = flags.find(layout.SERIES)
    while slot >= 0:
        fields = layout.SLOT.unpack_from(buffer, offset_of(slot))
        found[states[slot]] += int(fields[1]) - 1
        slot = flags.find(layout.SERIES, slot + 1)
    return found


def _make(path: Path, number: int, slots: int) -> OwnedFile | None:
    """A new segment; None if there is one by now."""
    unborn = path.with_name(f"{path.stem}.{next(_serials)}.new")
    try:
        file = opened(unborn, os.O_RDWR | os.O_CREAT)
        _reserve_blocks(file.fileno(), layout.segment_size(slots))
        os.pwrite(file.fileno(), layout.segment_header(number, slots), 0)
        # Unlike a rename, a link never takes the place of a segment that is there. So the reader
        # finds it whole, or not at all, and nobody's points are in a file that has lost its name.
        os.link(unborn, path)
    except FileExistsError:
        return None
    finally:
        unborn.unlink(missing_ok=True)
    return file


def _reserve_blocks(descriptor: int, size: int) -> None:
    """Give the file its blocks now, so that a full disk is an error here and never a SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        for start in range(0, size, 1 << 16):
            os.pwrite(descriptor, bytes(min(1 << 16, size - start)), start)


def sync_directory(path: Path) -> None:
    """Bring the names in a folder to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
