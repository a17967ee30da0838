"""What a fork must not cut in two: it waits until that is over, but not for long.

A forked child has only the thread that forked. A module that another thread was importing stays
half imported there for ever, and a lock that another thread held is never given back.
"""

from __future__ import annotations

import os
import threading
from typing import Final

#: The most that a fork waits, in s: imports of NumPy and of MLflow's stores take a few.
_PATIENCE_S: Final = 10.0


class Whole:
    """``with whole: ...``: a fork in another thread comes before this or after it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._has_waited = False
        self.in_child = False
        os.register_at_fork(
            before=self._before, after_in_parent=self._after, after_in_child=self._after_in_child
        )

    def __enter__(self) -> None:
        self._lock.acquire(timeout=_PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # who has it was interrupted in the line before this one

    def _before(self) -> None:
        self._has_waited = self._lock.acquire(timeout=_PATIENCE_S)

    def _after(self) -> None:
        if self._has_waited:
            self.__exit__()

    def _after_in_child(self) -> None:
        self._lock = threading.RLock()
        self.in_child = True


#: Imports, and the making of MLflow's stores. ``in_child``: this process was forked.
whole: Final = Whole()
