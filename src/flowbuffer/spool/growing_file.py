"""A file of the writing side that only grows: the key table, and the journals."""

from __future__ import annotations

import os
from pathlib import Path

from flowbuffer.errors import SpoolFull
from flowbuffer.spool.files import open_file


class GrowingFile:
    """A file that is written at its end, all or nothing at a time.

    Args:
        path: The file; it is made if it is not there.
        durable: Bring what is written to the disk itself before the call returns.

    Attributes:
        size: In bytes.
    """

    def __init__(self, path: Path, *, durable: bool) -> None:
        self._path = path
        self._durable = durable
        self._descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.size = os.fstat(self._descriptor).st_size

    def write(self, content: bytes) -> int:
        """Write at the end; where that was, in bytes from the start.

        Raises:
            SpoolFull: There is no room; nothing was written.
        """
        descriptor, size = self._descriptor, self.size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            if self._durable:
                os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise SpoolFull(
                f"no room for {len(content)} bytes in {self._path.parent}: {error}"
            ) from error
        self.size = size + len(content)
        return size

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)
