"""The collector as a process: arguments SPOOL, DESCRIPTOR and ENVIRONMENT.

Started by a :class:`~flowbuffer.collector.launcher.Launcher`, it serves every producer of a spool
whose setting is ``delivery="process"``, adopts what dead ones left, and ends when nothing is left
to do.
"""

from __future__ import annotations

import io
import logging
import os
import resource
import select
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from flowbuffer.backends.credentials import redacted
from flowbuffer.backends.mlflow_client import warm_up
from flowbuffer.clock import SYSTEM_CLOCK, Clock
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.handover import WAKE_SIGNAL, same_environment, take_collector_lock
from flowbuffer.collector.policies import PROCESS
from flowbuffer.errors import FlowbufferError, SpoolError
from flowbuffer.settings.environment import handed_on_ms, handed_on_uri
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.files import FileLock, OwnedFile
from flowbuffer.spool.folders import Spool, has_producer
from flowbuffer.spool.notes import parked_reason
from flowbuffer.spool.producer_info import read_info
from flowbuffer.spool.segment_files import closed_outcome

_log = logging.getLogger("flowbuffer")

#: The most descriptors that it wants; what a folder needs of them (its lock, and two segments as a
#: rule), and what everything else does (connections, files that are open for a moment).
_MOST_DESCRIPTORS = 65536
_DESCRIPTORS_OF_A_FOLDER = 3
_OTHER_DESCRIPTORS = 100


def is_served(folder: Path, environment: str = "", after_ms: int = -1) -> bool:
    """Whether a folder is of a living producer that relies on the collector process with this
    environment, and began after ``after_ms`` (in ms since the epoch). One that is closed, and whose
    run is gone, has nothing more to get from it."""
    try:
        info = read_info(folder)
        if info.start_ms <= after_ms:
            return False
        relies = info.delivery == "process" and same_environment(info.environment, environment)
        relies = relies and has_producer(folder)
        return relies and not (closed_outcome(folder) and parked_reason(folder))
    except SpoolError:
        return False


class Shift:
    """How long a collector process has to stay.

    Args:
        collector: What it does.
        clock: Tells how long it has been alone.
        drain_timeout_s: How long it goes on once no producer lives.
        since_ms: Since when the process that started it logs, in ms since the epoch: its
            credentials are as old.

    Attributes:
        superseded: It is over because a newer collector has to take its place.
    """

    def __init__(
        self, collector: Collector, clock: Clock, drain_timeout_s: float, since_ms: int
    ) -> None:
        self.superseded = False
        self._collector = collector
        self._environment = collector.policy.environment
        self._clock = clock
        self._drain_timeout_s = drain_timeout_s
        self._since_ms = since_ms
        self._alone_since_s: float | None = None

    @property
    def over(self) -> bool:
        """Nothing is left, the time for what is left is up, or a newer one has to take over."""
        if self._is_superseded():
            self.superseded = True
            return True
        streams = self._collector.streams
        served = any(not stream.reader.finished for stream in streams)
        folders = self._collector.not_served()
        if served or any(is_served(folder, self._environment) for folder in folders):
            self._alone_since_s = None
            return False
        now_s = self._clock.monotonic_s()
        if self._alone_since_s is None:
            self._alone_since_s = now_s
        waiting = any(not stream.sender.gone for stream in streams)
        return not waiting or now_s - self._alone_since_s >= self._drain_timeout_s

    def _is_superseded(self) -> bool:
        """The credentials of this process are refused, and a producer that came later may have
        others, though it delivers by itself for now: the collector that it starts takes them from
        its environment."""
        return self._collector.refused and any(
            is_served(folder, self._environment, after_ms=self._since_ms)
            for folder in self._collector.spool.folders()
        )


class WakeUp:
    """An event that a signal sets, too, without a lock that its handler could find taken."""

    def __init__(self, number: signal.Signals) -> None:
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._reads, False)
        os.set_blocking(self._writes, False)
        signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        signal.signal(number, lambda *_: None)

    def set(self) -> None:
        """End the wait, or the next one."""
        try:
            os.write(self._writes, b".")
        except BlockingIOError:
            pass  # it is set, many times over

    def clear(self) -> None:
        """Wait again."""
        try:
            while os.read(self._reads, 4096):
                pass
        except BlockingIOError:
            pass

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set (True), or for ``timeout`` seconds (False)."""
        return bool(select.select([self._reads], [], [], timeout)[0])


class RedactedStream(io.TextIOBase):
    """Writes to another stream what is no credential, whoever wrote it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text that is whole as far as credentials are concerned."""
        self._stream.write(redacted(text))
        self._stream.flush()
        return len(text)

    def fileno(self) -> int:
        """Of the other stream."""
        return self._stream.fileno()


def main() -> None:
    """What the process does, from its start to its end."""
    if len(sys.argv) != 4:
        print("this is started by flowbuffer; to deliver a spool: flowbuffer sync", file=sys.stderr)
        sys.exit(2)
    root, descriptor, environment = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    lock: FileLock | None = FileLock(OwnedFile(descriptor))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, maybe, by the program that started it
    descriptors = _raise_descriptor_limit()
    os.umask(0o077)
    sys.stdout = sys.stderr = RedactedStream(sys.stderr)  # they are collector.log
    logging.basicConfig(format=f"%(asctime)s [{os.getpid()}] %(message)s", level=logging.WARNING)
    wake = WakeUp(WAKE_SIGNAL)
    settings = Settings.from_env()
    spool = Spool(root)
    while lock is not None:
        _import_stores(spool)
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, str(os.getpid()).encode(), 0)
        superseded = _serve(spool, settings, wake, descriptors, environment)
        lock.release()
        # Whoever came while the lock was held relied on this process.
        newcomer = any(is_served(folder, environment) for folder in spool.folders())
        goes_on = newcomer and not superseded
        lock = take_collector_lock(root, environment) if goes_on else None


def _raise_descriptor_limit() -> int:
    """How many descriptors this process may have, from now on as many as it is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (ValueError, OSError):
            return soft  # macOS has a limit below the one that it tells
    return most


def _serve(
    spool: Spool, settings: Settings, wake: WakeUp, descriptors: int, environment: str
) -> bool:
    """Deliver until the shift is over; whether another process has to go on."""
    max_folders = max((descriptors - _OTHER_DESCRIPTORS) // _DESCRIPTORS_OF_A_FOLDER, 1)
    policy = replace(PROCESS, environment=environment, max_folders=max_folders)
    collector = Collector(spool, settings, SYSTEM_CLOCK, policy, wake=wake)
    uri = handed_on_uri()
    if uri is not None:
        collector.know(uri)
    shift = Shift(collector, SYSTEM_CLOCK, settings.drain_timeout_s, handed_on_ms())
    while True:
        next_s = collector.step()
        if shift.over:
            collector.leave()
            return shift.superseded
        collector.wait(next_s)


def _import_stores(spool: Spool) -> None:
    """Import what delivery needs before any folder is claimed, and before the lock tells the pid:
    until then whoever waits delivers its points by itself, and not for seconds of imports here."""
    for folder in spool.folders():
        try:
            warm_up(read_info(folder).tracking_uri)
        except (FlowbufferError, ImportError):
            continue  # told when it is delivered


if __name__ == "__main__":
    main()
