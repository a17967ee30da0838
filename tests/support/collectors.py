"""A spool seen from outside: what is left in it, and its collector process, also where what stands
in the place of its files is planted."""

import fcntl
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from support.waiting import wait_until


def is_free(spool: Path) -> bool:
    """Whether no process holds the lock of the collector process."""
    try:
        descriptor = os.open(spool / "collector.lock", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def collector_pid(spool: Path) -> int | None:
    """The pid of the collector process that serves a spool; None while there is none."""
    if is_free(spool):
        return None
    said = (spool / "collector.lock").read_text()
    if not said.isdecimal():
        return None
    ps = ["ps", "-ww", "-o", "command=", "-p", said]
    command = subprocess.run(ps, capture_output=True, text=True, check=False).stdout
    ours = "flowbuffer.collector.process" in command and str(spool) in command
    return int(said) if ours else None  # else the pid is planted


def end_collector(spool: Path) -> None:
    """Kill the collector process of a spool, if there is one, and any that takes its place."""

    def gone() -> bool:
        pid = collector_pid(spool)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return is_free(spool)

    wait_until(gone)


def is_empty(spool: Path) -> bool:
    """Whether no folder of a producer is left."""
    return not any(path.is_dir() for path in spool.glob("*/*"))
