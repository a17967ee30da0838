"""One thread at a time, without a lock that could be held for ever."""

from __future__ import annotations

import threading
from typing import Final

#: How long a thread waits for its turn, in s.
PATIENCE_S: Final = 1.0


class Turn:
    """Lets one thread at a time do something, as a courtesy: ``with turn: ...``.

    A lock is held for ever where a signal interrupts the thread that holds it in the one line
    before it is given back, and in a forked child where another thread of the parent held it. So
    whoever has waited for :data:`PATIENCE_S` goes on, with a fresh lock. **What is done in a turn
    must be right without it**, also if a signal handler does the same in the middle of it: a turn
    saves work, it guards nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=PATIENCE_S):
            self._lock = threading.RLock()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # somebody lost patience with this thread
