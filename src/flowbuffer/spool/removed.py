"""The file ``removed`` of a spool: which folders were removed whole, by whoever delivered them.

So that a folder that is gone is not taken for a delivered one: it may have been wiped. A record is
16 bytes, little-endian: a hash of the folder's run and name (8), how many segments it had, of which
all points are delivered (u32; all ones if some were rejected), CRC-32 of the 12 bytes before (u32).
Records are only ever appended; a long file becomes ``removed.old``, in place of the one before.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Final

from flowbuffer.spool.files import FileLock, opened, read_file

_RECORD: Final = struct.Struct("<8sII")
_SETTLED: Final = 0xFFFFFFFF

#: The most bytes in a file: 65,536 folders, and as many in the old one.
MAX_BYTES: Final = 1 << 20


def write(folder: Path, delivered: int | None) -> None:
    """Record that a producer's folder is about to be removed.

    Args:
        folder: The folder.
        delivered: How many segments it had, if all points in them are delivered; None if each is
            delivered or rejected, and the record of which goes with the folder.

    Raises:
        OSError: The record cannot be written now.
    """
    path = folder.parent.parent / "removed"
    start = _hash(folder) + struct.pack("<I", _SETTLED if delivered is None else delivered)
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        torn = -size % _RECORD.size  # a record was cut short: what is left of its room is filled
        record = bytes(torn) + start + struct.pack("<I", zlib.crc32(start))
        if os.write(descriptor, record) < len(record):
            raise OSError(f"no room in {path}")
    if size >= MAX_BYTES:
        _begin_another(path)


def find(folder: Path) -> int | None:
    """What is recorded of a producer's folder that was removed: how many segments it had, of which
    all points are delivered; -1 if some were rejected. None if there is no record.

    Raises:
        OSError: That is not known now.
    """
    key = _hash(folder)
    for name in ("removed", "removed.old"):
        try:
            content = read_file(folder.parent.parent / name, limit=2 * MAX_BYTES)
        except FileNotFoundError:
            continue
        at = content.find(key)
        while at >= 0:
            record = content[at : at + _RECORD.size]
            if len(record) == _RECORD.size and not at % _RECORD.size:
                _, delivered, checksum = _RECORD.unpack(record)
                if checksum == zlib.crc32(record[:12]):
                    return -1 if delivered == _SETTLED else int(delivered)
            at = content.find(key, at + 1)
    return None


def _hash(folder: Path) -> bytes:
    from hashlib import blake2b  # seldom needed, and costly to import

    return blake2b(f"{folder.parent.name}/{folder.name}".encode(), digest_size=8).digest()


def _begin_another(path: Path) -> None:
    lock = FileLock.take(path)
    if lock is None:
        return  # another process does it
    try:
        if os.stat(path).st_ino == os.fstat(lock.descriptor).st_ino:
            path.replace(path.with_name("removed.old"))
    except FileNotFoundError:
        pass
    finally:
        lock.release()
