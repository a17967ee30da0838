"""Marks in the environment of processes, by which all that a test has started is found and ended.

Whatever a process starts inherits its environment, a collector process too, which is nobody's
child. So a process that carries the mark of a test is that test's. A mark is a path: those of the
tests lie below that of their pytest process, and that of a pytest which a test runs below the
test's.

`python marks.py MARK` is a watchdog: once its standard input ends, as it does when the process that
started it has ended in whatever way, it ends what carries the mark or one below it.

What is forked carries the mark that its parent was started with: see `support.processes.forked`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MARK = "TESTS_OF_FLOWBUFFER"
"""The environment variable that holds the mark."""


def processes(mark: str) -> list[int]:
    """The processes that carry a mark, or one below it; not this one, and none that is dead."""
    return [pid for pid, carried in _marks() if f"{carried}/".startswith(f"{mark}/")]


def end(mark: str) -> None:
    """Kill these processes, and those that they start meanwhile.

    Raises:
        TimeoutError: One of them has not ended a minute later.
    """
    until_s = time.monotonic() + 60
    while found := processes(mark):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until_s:
            raise TimeoutError(f"SIGKILL does not end the processes {found}")
        time.sleep(0.002)


@contextmanager
def carried_on(mark: str) -> Iterator[None]:
    """What is started within the block carries the mark."""
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before


def start_watchdog(mark: str) -> "subprocess.Popen[bytes]":
    """A watchdog for this process. Closing its standard input has it do its work, and end."""
    watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, mark],
        env={},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert watchdog.stdin
    pipe = watchdog.stdin.fileno()

    def let_go() -> None:
        with suppress(OSError):
            os.close(pipe)

    os.register_at_fork(after_in_child=let_go)  # a child may outlive this process
    return watchdog


def _marks() -> Iterator[tuple[int, str]]:
    """The other processes that carry a mark, and their marks."""
    if not os.path.isdir("/proc/self"):
        yield from _marks_of_ps()
        return
    name = b"\0" + MARK.encode() + b"="
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                environment = b"\0" + file.read()
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
        _, found, rest = environment.partition(name)
        if found:
            yield int(entry), rest.partition(b"\0")[0].decode()


def _marks_of_ps() -> Iterator[tuple[int, str]]:
    """The same where there is no /proc, as on macOS, whose ps shows the environment."""
    ps = ["ps", "-A", "-E", "-ww", "-o", "pid=,command="]
    for line in subprocess.run(ps, capture_output=True, text=True, check=False).stdout.splitlines():
        pid, _, command = line.strip().partition(" ")
        _, found, rest = command.rpartition(f" {MARK}=")
        if found and int(pid) != os.getpid():
            yield int(pid), rest.partition(" ")[0]


if __name__ == "__main__":
    sys.stdin.read()
    end(sys.argv[1])
