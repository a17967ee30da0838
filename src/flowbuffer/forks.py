"""What a fork must not cut in two, and what a forked child does first of all.

A forked child has only the thread that forked. A module that another thread was importing stays
half imported there for ever, and a lock that another thread held is never given back. So a fork
waits until an import is over, but not for long; and the child makes its locks anew and forgets what
is its parent's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
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


#: The modules that have something to do in a child, in the order in which they do it, whatever was
#: imported first: the locks of files, which are the parent's, go before loggers become producers.
_IN_CHILD: Final = (
    "spool.files",
    "backends.idle_clients",
    "collector.deliverers",
    "logger.job_end",
    "logger.open_loggers",
    "logger.metric_logger",
    "logger.by_run",
    "dropin.known_runs",
    "dropin.switch",
)
_hooks: dict[str, Callable[[], object]] = {}


def in_child(module: str, hook: Callable[[], object]) -> None:
    """Have ``hook`` called in each forked child.

    Args:
        module: One of those in the table.
        hook: What raises there keeps none of the others from being called.
    """
    _hooks[_IN_CHILD[_IN_CHILD.index(module)]] = hook


def _after_in_child() -> None:
    found: Exception | None = None
    for module in _IN_CHILD:
        try:
            _hooks.get(module, _nothing)()
        except Exception as error:
            found = error
    if found is not None:
        raise found  # the interpreter says it, and goes on


def _nothing() -> None: ...


os.register_at_fork(after_in_child=_after_in_child)

#: Imports, and the making of MLflow's stores. ``in_child``: this process was forked.
whole: Final = Whole()
