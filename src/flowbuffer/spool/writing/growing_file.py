"""The files of the writing side that only grow: the key table, and the journals."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from flowbuffer.errors import SpoolFull, SpoolGone
from flowbuffer.spool.files import OwnedFile, opened

#: Of smaller frames so little is lost when they are torn that nobody asks for room first.
_LARGE: Final = 1 << 16


def append_frame(path: Path, frame: bytes, *, durable: bool) -> int:
    """Write a frame at the end of a file, which is made if it is not there.

    Nothing is remembered between two calls, neither a descriptor nor a size, so nothing can be left
    half done by a call that is interrupted, and any thread may write at any time. A frame that is
    torn because the disk is full stays where it is: nobody refers to it.

    Args:
        path: The file.
        frame: See ``layout``.
        durable: Bring it to the disk itself before the call returns.

    Returns:
        Where the frame begins, in bytes from the start of the file.

    Raises:
        SpoolFull: There is no room.
        SpoolGone: Its folder is not there any more.
    """
    try:
        with opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
            if len(frame) > _LARGE:
                _check_room(file, len(frame))
            written = os.write(file.fileno(), frame)
            if written < len(frame):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(file.fileno())
            # The end of what this descriptor wrote, whatever others have written meanwhile.
            return os.lseek(file.fileno(), 0, os.SEEK_CUR) - len(frame)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SpoolGone(f"{path.parent} was wiped while points were logged to it") from error
    except OSError as error:
        raise SpoolFull(f"no room for {len(frame)} bytes in {path.parent}: {error}") from error


def _check_room(file: OwnedFile, size: int) -> None:
    """Refuse what would be torn, as far as that can be known."""
    disk = os.fstatvfs(file.fileno())
    if disk.f_bavail * disk.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
