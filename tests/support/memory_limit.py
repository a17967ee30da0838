"""A memory limit for processes, whose OOM killer ends one of them: a cgroup (v1), made as root."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from support.waiting import wait_until

ROOT = Path("/sys/fs/cgroup/memory")


class MemoryLimit:
    """A cgroup below the root of the hierarchy.

    Raises:
        OSError: There can be none here.
    """

    def __init__(self) -> None:
        self._folder = ROOT / f"flowbuffer-{os.getpid()}"
        self._folder.mkdir()
        self.set(1 << 30)

    def set(self, size: int) -> None:
        """The most bytes that all of its processes take."""
        limit = self._folder / "memory.limit_in_bytes"
        _until_free(lambda: limit.write_text(str(size)))

    def enter(self) -> None:
        """This process, and those that it starts, are under the limit."""
        (self._folder / "cgroup.procs").write_text("0")

    def holds(self, pid: int) -> bool:
        return str(pid) in (self._folder / "cgroup.procs").read_text().split()

    def remove(self) -> None:
        """Its processes have ended, or are about to."""
        _until_free(self._folder.rmdir)


def _until_free(change: Callable[[], object]) -> None:
    """Make a change that the kernel refuses while it is busy with the processes."""

    def made() -> bool:
        try:
            change()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    wait_until(made)
