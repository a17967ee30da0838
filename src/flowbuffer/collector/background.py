"""Work in a thread that is there only while there is some, and that anybody may ask for.

Who asks may be a signal handler, or ``__del__``, that interrupted somebody who was just asking. So
asking takes no lock: it leaves a word in a queue whose ``put`` is one call into C.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Wake:
    """What a thread waits on. Unlike :class:`threading.Event` it may be set by a signal handler
    that interrupted ``set``; one thread at a time may wait."""

    def __init__(self) -> None:
        self._sets: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        """End the wait, or the next one."""
        if self._sets.empty():
            self._sets.put(None)

    def clear(self) -> None:
        """Wait again."""
        try:
            while True:
                self._sets.get_nowait()
        except queue.Empty:
            pass

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set (True), or for ``timeout`` seconds (False)."""
        try:
            self._sets.get(timeout=timeout)
        except queue.Empty:
            return False
        self._sets.put(None)
        return True


class Background:
    """A daemon thread, started when it is needed and gone when it is not.

    Args:
        name: Of the thread.
        work: Called in the thread; returns when nothing is left to do.
        has_work: Whether something was asked for meanwhile: it is looked at after ``work`` said
            that nothing is left, so that who asked while it ended is not forgotten.

    Attributes:
        is_stopping: Set it, and ``work`` returns as soon as it looks; no thread is started then.
    """

    def __init__(self, name: str, work: Callable[[], None], has_work: Callable[[], bool]) -> None:
        self._name = name
        self._work = work
        self._has_work = has_work
        # Of whoever works. Who asks only looks at it, and never waits for it.
        self._turn = threading.Lock()
        self._standing_in = 0  # the thread that does, in another one's place
        self.is_stopping = False  # no thread is to work any more

    @property
    def at_work(self) -> bool:
        """Whether there is a thread, or somebody in its place, that works."""
        return self._turn.locked()

    def begin(self) -> bool:
        """See to it that a thread works; False if none can, at the interpreter's end."""
        if self.is_stopping:
            return False
        if not self.at_work:
            try:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            except RuntimeError:
                return False
        return True

    def stand_in(self, work: Callable[[], None]) -> None:
        """Do a piece of the work in this thread, where none can be started. Nothing is done if
        somebody is at it: a thread, or the frame that this call interrupted."""
        if self._turn.acquire(blocking=False):
            try:
                self._standing_in = threading.get_ident()
                work()
            finally:
                self._standing_in = 0
                self._turn.release()

    @property
    def is_interrupted(self) -> bool:
        """Whether this very thread was standing in when a signal handler, or ``__del__``, asked:
        nothing more is done before that returns."""
        return self._standing_in == threading.get_ident()

    def _run(self) -> None:
        # Not twice at once: who saw no thread may have looked just before another one began.
        while self._turn.acquire(blocking=False):
            try:
                self._work()
            finally:
                self._turn.release()
            if self.is_stopping or not self._has_work():
                return
