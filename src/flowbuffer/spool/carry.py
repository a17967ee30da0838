"""The file ``carry``: what outlives the segments of a producer that are settled and deleted."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Final, NamedTuple

from flowbuffer.errors import SpoolFormatError
from flowbuffer.spool import layout
from flowbuffer.spool.files import opened, read_file, write_file

_HEAD: Final = struct.Struct("<IQQ")


class Carry(NamedTuple):
    """The payload of the file's one frame.

    ``first``: the number of the oldest segment that may exist. ``delivered``, ``rejected``: points
    of deleted segments. ``derived``: what the reading side derived from all points up to there.
    """

    first: int = 0
    delivered: int = 0
    rejected: int = 0
    derived: bytes = b""


def read_carry(folder: Path) -> Carry:
    """What a producer's folder carries; all zero if no segment was deleted yet.

    Raises:
        SpoolFormatError: The file is damaged, or of another version.
        SpoolError: It is a link, or not a regular file of this user.
        OSError: It cannot be read.
    """
    try:
        content = read_file(folder / "carry", limit=layout.MAX_FRAME_PAYLOAD + 64)
    except FileNotFoundError:
        return Carry()
    version, payload = layout.parse_frame(content)
    if version != layout.FORMAT_VERSION:
        raise SpoolFormatError(f"it has format version {version}")
    try:
        first, delivered, rejected = _HEAD.unpack_from(payload)
    except struct.error as error:
        raise SpoolFormatError(str(error)) from error
    return Carry(first, delivered, rejected, payload[_HEAD.size :])


def write_carry(folder: Path, carry: Carry, segment: Path) -> None:
    """Replace what the folder carries, also on a full disk.

    Args:
        folder: The producer's folder.
        carry: What it carries from now on.
        segment: The file of the segment that is to be deleted; its room is taken if there is no
            other, and then it is gone.
    """
    write_in_room_of(segment, folder / "carry", carry_frame(carry))


def carry_frame(carry: Carry) -> bytes:
    """The content of the file."""
    *head, derived = carry
    return layout.frame(layout.FORMAT_VERSION, _HEAD.pack(*head) + derived)


def write_in_room_of(doomed: Path, path: Path, content: bytes) -> None:
    """Replace a file whole. If the disk is full the room of a doomed file is taken, and then that
    is gone.

    Raises:
        OSError: It cannot be written now.
    """
    try:
        write_file(path, content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reused = path.with_name(f".{path.name}.reused")
        doomed.replace(reused)
        with opened(reused, os.O_WRONLY) as file:
            descriptor = file.fileno()
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
        reused.replace(path)
