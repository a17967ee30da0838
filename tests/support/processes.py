"""Processes of this one: forked, waited for, killed, and found again when their parents die."""

import ctypes
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from support.waiting import wait_until

LONGEST_S = 150.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child, which does not outlive this process; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def finished(pid: int, timeout_s: float = LONGEST_S) -> None:
    """Wait for a child, which must end well and in time."""
    ended: list[int] = []

    def is_over() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        ended.extend([status] if found else [])
        return bool(found)

    try:
        wait_until(is_over, timeout_s, every_s=0.005)
    except BaseException:
        killed(pid)
        raise
    if ended[0]:
        raise RuntimeError(f"a child ended with wait status {ended[0]}")


def killed(pid: int) -> bool:
    """SIGKILL a child; False if it had ended by itself."""
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def answer_of(work: Callable[[], object]) -> object:
    """What `work` returns in a child, as JSON carries it."""
    reading, writing = os.pipe()

    def answer() -> None:
        with os.fdopen(writing, "w") as out:
            json.dump(work(), out)

    pid = forked(answer)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    finished(pid)
    return json.loads(text)


def pass_time(seconds: float, until_readable: int | None = None) -> bool:
    """Wait, at most until there is something to read from a descriptor; whether there is."""
    reading = [] if until_readable is None else [until_readable]
    return bool(select.select(reading, [], [], seconds)[0])


# Grandchildren. Linux only.


def adopt_orphans() -> None:
    """From now on a process whose parent dies becomes a child of this one, not of init."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise RuntimeError("this system has no subreapers")


def children() -> dict[int, str]:
    """The living children of this process, with their command lines."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                command = (status.parent / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(status.parent.name)] = command.decode().strip()
    return found


def reap(known: Collection[int] = ()) -> None:
    """Forget the children that have ended, but for those whose end somebody waits for."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid = int(status.parent.name)
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state == "Z" and pid not in known:
                os.waitpid(pid, os.WNOHANG)
