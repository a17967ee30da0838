"""The collector process of a spool: whether it runs, and its end."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from flowbuffer.launcher import collector_lock
from flowbuffer.spool.files import FileLock
from support.waiting import wait_until


def collector_pid(root: Path) -> int | None:
    """The pid of the collector process that works a spool; None if none does."""
    path = collector_lock(root)
    lock = FileLock.take(path)
    if lock is not None:
        lock.release()
        return None
    if not path.exists():
        return None
    wait_until(lambda: path.read_text() != "")
    return int(path.read_text())


def end_collector(root: Path) -> None:
    """Kill the collector process of a spool, and any that is started in its place."""
    while (pid := collector_pid(root)) is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: collector_pid(root) is None or collector_pid(root) != pid)
