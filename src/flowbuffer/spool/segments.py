"""New segments, whole and with all their blocks, so that storing a point cannot fail later."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from flowbuffer.errors import SpoolFull
from flowbuffer.spool import layout
from flowbuffer.spool.files import open_file

#: ``MADV_POPULATE_WRITE`` (Linux 5.14): take the page faults of a segment at once.
_POPULATE_WRITE = 23


def new_segment(path: Path, number: int, slots: int, *, durable: bool) -> mmap.mmap:
    """Make the segment ``number`` and map it.

    Args:
        path: Where it appears, by a rename, once it is whole.
        number: Its place among the producer's segments, from 0.
        slots: How many points it holds.
        durable: Bring it to the disk itself.

    Raises:
        SpoolFull: The disk has no room for it.
    """
    size = layout.segment_size(slots)
    unborn = path.with_suffix(".new")
    try:
        descriptor = open_file(unborn, os.O_RDWR | os.O_CREAT)
        try:
            _reserve_blocks(descriptor, size)
            os.pwrite(descriptor, layout.segment_header(number, slots), 0)
            buffer = mmap.mmap(descriptor, size)
            unborn.rename(path)  # the reader finds it whole, or not at all
        finally:
            os.close(descriptor)
    except OSError as error:
        unborn.unlink(missing_ok=True)
        raise SpoolFull(f"no room for a segment of {size} bytes at {path}: {error}") from error
    try:
        buffer.madvise(_POPULATE_WRITE)
    except (AttributeError, OSError, ValueError):
        pass  # another system; the first store to each page takes its fault
    if durable:
        buffer.flush()
        sync_directory(path.parent)
    return buffer


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
