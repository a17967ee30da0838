"""A collector in a thread of the process that logs.

It has all that delivery needs to itself: who logs, waits or closes tells it what is wanted, takes
no lock and waits for none. So a signal handler that interrupts them at any line can do the same.
"""

from __future__ import annotations

import logging
import math
import queue
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.collector.background import Background, Wake
from flowbuffer.collector.descriptors import most_producers
from flowbuffer.forks import whole
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.folders import Spool

if TYPE_CHECKING:
    from flowbuffer.collector.collector import Collector
    from flowbuffer.collector.policies import Policy
    from flowbuffer.delivery.stream import Stream

_log = logging.getLogger("flowbuffer")

#: How long who asked for something waits until it is begun, and who ends until a round is over in
#: which a folder may be deleted, in s. Nothing depends on either but what others see.
_SOON_S = 1.0
#: How long who ends waits until the thread stops, in s: it may be importing, on a busy machine.
_STOPS_S = 5.0
#: How often a thread that is at work is told again that somebody waits, in s.
_AGAIN_S = 0.05
#: How often it is looked whether a folder has to be taken, in s.
_LOOK_EVERY_S = 0.2
#: How often who logs here is called, in s.
TEND_EVERY_S = 2.0


class User(Protocol):
    """Somebody who logs here."""

    def tend(self) -> None:
        """Called every now and then, in the thread."""


class CollectorThread:
    """Delivers for all loggers of this process with one spool and the same settings.

    Args:
        settings: Of the loggers.
        name: Of the thread.
    """

    def __init__(self, settings: Settings, name: str = "flowbuffer-collector") -> None:
        self.spool = Spool(settings.resolved_spool_dir())
        self._settings = settings
        self._wake = Wake()
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._users: dict[Path, tuple[weakref.ref[User], str]] = {}  # with the tracking URI
        self._background = Background(name, self._work, lambda: not self._asked.empty())
        self._inline = settings.delivery == "inline"
        self._in_round = False
        self._hurried_s: dict[Path, float] = {}  # when somebody last said that it waits
        self._look_at_s = self._tend_at_s = -math.inf
        self._made: Collector | None = None

    # For any thread, and for signal handlers.

    def join(self, user: User, folder: Path, tracking_uri: str) -> None:
        """Somebody logs to a folder, until :meth:`leave`."""
        self._ask(lambda: self._join(weakref.ref(user), folder, tracking_uri))

    def leave(self, folder: Path) -> None:
        """Nobody logs to a folder any more. Waits, but not for long, for a round that is being
        done: a folder that it deletes, by which others know that all is delivered, is gone then."""
        self._ask(lambda: self._leave(folder))
        self._wait_until(lambda: self._asked.empty() and not self._in_round)

    def abandon(self, folder: Path) -> None:
        """Nobody ever logged to a folder that was joined, and nobody waits for it: it is left to
        others at once."""
        self._ask(lambda: self._abandon(folder))

    def hurry(self, folder: Path, *, again: bool = False) -> None:
        """Somebody waits for points in a folder; said again and again until they are delivered.

        Args:
            folder: The folder.
            again: It was said before in the same wait. A thread that is at work hears that only now
                and then: each time is a round, which holds up what is being sent.
        """
        now_s = SYSTEM_CLOCK.monotonic_s()
        if (
            again
            and self._background.at_work
            and now_s < self._hurried_s.get(folder, -math.inf) + _AGAIN_S
        ):
            return
        self._hurried_s[folder] = now_s
        self._ask(lambda: self._hurry(folder))

    def stop(self) -> None:
        """No thread works any more; who asks does the work. Waits, but not for long, until it has
        stopped: CPython before 3.14 ends a thread that runs when the interpreter does, and aborts
        the process if that is in C++, as parts of NumPy are."""
        self._background.is_stopping = True
        self._wake.set()
        self._wait_until(lambda: not self._background.at_work, _STOPS_S)

    @property
    def is_interrupted(self) -> bool:
        """Whether who asks has interrupted the round itself; waiting is in vain then."""
        return self._background.is_interrupted

    @property
    def streams(self) -> list[Stream]:
        """What it delivers just now."""
        return [] if self._made is None else list(self._made.streams)

    def _ask(self, what: Callable[[], None]) -> None:
        self._asked.put(what)
        self._wake.set()
        if self._inline or not self._background.begin():
            self._background.stand_in(self._drain)

    def _wait_until(self, over: Callable[[], bool], within_s: float = _SOON_S) -> None:
        SYSTEM_CLOCK.wait_until(over, SYSTEM_CLOCK.monotonic_s() + within_s)

    # In the thread, or where there can be none in whoever asks.

    def _work(self) -> None:
        while not self._background.is_stopping:
            next_s = self._round()
            if self._asked.empty() and self._is_done():
                self._close()
                return
            self._wait(next_s)

    def _drain(self) -> None:
        """Rounds until nothing is due at once."""
        with whole:
            from flowbuffer.collector.collector import POLL_S

        try:
            while (next_s := self._round(hurry=True)) < POLL_S:
                SYSTEM_CLOCK.sleep(next_s)
        except BaseException:  # interrupted between any two lines: begin anew, as a new process
            self._close()
            raise

    def _round(self, *, hurry: bool = False) -> float:
        self._in_round = True
        try:
            while not self._asked.empty():
                self._asked.get()()
            return self._step(hurry)
        except Exception:
            _log.exception("delivery failed; the points stay in the spool")
            return 1.0
        finally:
            self._in_round = False

    def _step(self, hurry: bool) -> float:
        now_s = SYSTEM_CLOCK.monotonic_s()
        self._tend(now_s)
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + _LOOK_EVERY_S
            served = {stream.path for stream in self.streams}
            for folder in list(self._users):
                if folder not in served:  # there were too many
                    self._hurry(folder)
        return self._collector.step(hurry=hurry)

    def _tend(self, now_s: float) -> bool:
        if now_s < self._tend_at_s:
            return False
        self._tend_at_s = now_s + TEND_EVERY_S
        for user in [user() for user, _ in list(self._users.values())]:
            if user is not None:
                user.tend()
        return True

    def _wait(self, next_s: float) -> None:
        self._collector.wait(next_s)

    def _is_done(self) -> bool:
        for folder, (user, _) in list(self._users.items()):
            if user() is None:  # dropped without a word, as an exception in its making does
                self._leave(folder)
        return not self._users and not self.streams

    def _join(self, user: weakref.ref[User], folder: Path, tracking_uri: str) -> None:
        self._users[folder] = user, tracking_uri
        self._hurry(folder)

    def _leave(self, folder: Path) -> None:
        self._users.pop(folder, None)
        self._hurried_s.pop(folder, None)

    def _abandon(self, folder: Path) -> None:
        self._leave(folder)
        for stream in self.streams:
            if stream.path == folder:
                self._collector.hand_on(stream)

    def _hurry(self, folder: Path) -> None:
        if folder in self._users:
            self._collector.add(folder, self._users[folder][1])

    @property
    def _collector(self) -> Collector:
        """It is made in the thread, as its import takes a while (NumPy, MLflow's stores)."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> Collector:
        with whole:
            from flowbuffer.collector.collector import Collector

        return Collector(self.spool, self._settings, SYSTEM_CLOCK, self._policy(), wake=self._wake)

    def _policy(self) -> Policy:
        from flowbuffer.collector.policies import THREAD

        return replace(THREAD, max_folders=most_producers())

    def _close(self) -> None:
        if self._made is not None:
            self._made.close()
