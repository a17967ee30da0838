"""Delivery by the spool's collector process; while that does not deliver a folder for which
somebody waits, by a thread of the process that logs.

A folder of this process is in one of these states:

| state | who delivers it | what comes next |
| --- | --- | --- |
| theirs | the collector process, or nobody yet | somebody waits, and it is free: *here* |
| here | this process | nobody waits: *theirs*; the collector process is ready: *left* |
| left | the collector process, if it takes it in 2 s | *theirs*, or *here* while somebody waits |
| kept | this process, until its logger is closed | it is refused, too: *theirs* |

From *theirs* it comes to *kept* where the credentials of the collector process were refused, and
back for some seconds while those of this process are refused, too.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.collector.handover import wake_collector
from flowbuffer.collector.launcher import Launcher
from flowbuffer.collector.thread import TEND_EVERY_S, CollectorThread, User
from flowbuffer.errors import UnauthorisedError
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.notes import delivery_note

if TYPE_CHECKING:
    from flowbuffer.collector.policies import Policy
    from flowbuffer.delivery.stream import Stream

#: How often it is looked whether the collector process is there, in s; and while somebody waits.
CHECK_EVERY_S = TEND_EVERY_S
_LOOK_EVERY_S = 0.1
#: Who did not say for so long, in s, that it waits, waits no more.
_WAITS_FOR_S = 1.0
#: How long a folder is delivered here before a collector process that is ready gets it, in s.
_HERE_FOR_S = 1.0
#: How long a collector process that is ready may take to claim a folder, in s.
_TAKES_S = 2.0
#: How long credentials that are refused are tried here, and then those of others, in s.
_REFUSED_FOR_S = 5.0


@dataclass(eq=False)
class _Folder:
    """A folder of this process.

    Attributes:
        waits_s: When somebody last said that it waits for points in it.
        stream: Its delivery here.
        since_s: Since when it is delivered here.
        left_until_s: Until then it is left to the collector process.
        insists: It was left, and not taken.
        kept: The collector process was refused.
        refused_since_s: Since when this process is refused, too.
    """

    path: Path
    waits_s: float = -math.inf
    stream: Stream | None = None
    since_s: float = -math.inf
    left_until_s: float = -math.inf
    insists: bool = False
    kept: bool = False
    refused_since_s: float = math.inf


class Stopgap(CollectorThread):
    """Keeps a collector process at work for the loggers of this process, and stands in for it.

    Args:
        settings: Of the loggers.
        tracking_uri: Of the first of them, with credentials if it has any.
        environment: The fingerprint of this process's.
    """

    def __init__(self, settings: Settings, tracking_uri: str, environment: str) -> None:
        super().__init__(settings, "flowbuffer-watch")
        self._environment = environment
        self._launcher = Launcher(self.spool.root, settings, tracking_uri, environment)
        self._folders: dict[Path, _Folder] = {}
        self._launched = False

    def join(self, user: User, folder: Path, tracking_uri: str) -> None:
        """As of :class:`CollectorThread`. Waits until the collector process is started, some ms: a
        program that calls ``os.wait()`` next is not to meet what starts it."""
        super().join(user, folder, tracking_uri)
        self._wait_until(lambda: self._launched)

    def _join(self, user: weakref.ref[User], folder: Path, tracking_uri: str) -> None:
        self._users[folder] = user, tracking_uri
        self._folders[folder] = _Folder(folder)
        self._launcher.ensure()
        self._launched = True

    def _hurry(self, folder: Path) -> None:
        if folder in self._folders:
            now_s = SYSTEM_CLOCK.monotonic_s()
            if self._folders[folder].waits_s < now_s - _LOOK_EVERY_S:
                self._look_at_s = now_s
            self._folders[folder].waits_s = now_s

    def _leave(self, folder: Path) -> None:
        super()._leave(folder)
        left = self._folders.pop(folder, None)
        if left is not None and left.stream is not None:
            left.stream.leaving = True  # the rest is for the collector process

    def _step(self, hurry: bool) -> float:
        now_s = SYSTEM_CLOCK.monotonic_s()
        if self._tend(now_s):
            self._look_at_s = now_s
        if now_s >= self._look_at_s and self._folders:
            self._look(now_s)
            waits = any(self._waits(folder, now_s) for folder in self._folders.values())
            self._look_at_s = now_s + (_LOOK_EVERY_S if waits else CHECK_EVERY_S)
        next_s = self._collector.step(hurry=hurry) if self.streams else math.inf
        return max(min(next_s, self._look_at_s - SYSTEM_CLOCK.monotonic_s()), 0.0)

    def _wait(self, next_s: float) -> None:
        if self.streams:
            self._collector.wait(next_s)
        else:
            SYSTEM_CLOCK.wait(self._wake, next_s)
            self._wake.clear()

    def _look(self, now_s: float) -> None:
        if any(now_s >= folder.left_until_s for folder in self._folders.values()):
            self._launcher.ensure()  # else it is for those to whom the folders are left
        ready = wake_collector(self.spool.root, self._environment)
        for folder in self._folders.values():
            if folder.stream not in self.streams:
                folder.stream = None  # settled, handed on, or given back with another of its run
            waits = self._waits(folder, now_s)
            if delivery_note(folder.path).unauthorised:
                folder.kept = True
            if folder.stream is None:
                # None comes back where the collector process has it, and it is asked again.
                if (folder.kept or waits) and now_s >= folder.left_until_s:
                    folder.stream = self._collector.add(folder.path, self._users[folder.path][1])
                    folder.since_s = now_s
            elif folder.kept:
                folder.stream.leaving = False
                self._leave_if_refused(folder, folder.stream, now_s)
            elif not waits:
                folder.stream.leaving = True
                folder.insists = False
            # One that was left in vain is not left again as long as somebody waits.
            elif ready and not folder.insists and now_s - folder.since_s > _HERE_FOR_S:
                folder.stream.leaving = True
                folder.left_until_s = now_s + _TAKES_S
                folder.insists = True
            else:
                folder.stream.leaving = False

    def _leave_if_refused(self, folder: _Folder, stream: Stream, now_s: float) -> None:
        """Where the credentials of this process are refused as well, others get their turn: a job
        that came later may have better ones, and its collector process with it."""
        if not isinstance(stream.sender.failure, UnauthorisedError):
            folder.refused_since_s = math.inf
        elif folder.refused_since_s == math.inf:
            folder.refused_since_s = now_s
        elif now_s - folder.refused_since_s > _REFUSED_FOR_S:
            folder.refused_since_s = math.inf
            folder.left_until_s = now_s + _REFUSED_FOR_S
            self._collector.hand_on(stream)

    def _waits(self, folder: _Folder, now_s: float) -> bool:
        return now_s - folder.waits_s < _WAITS_FOR_S

    def _policy(self) -> Policy:
        from flowbuffer.collector.policies import STOPGAP

        return STOPGAP
