"""How many loggers of this process are producers at once.

A producer takes descriptors and a mapping for as long as it lives, and a process may log to any
number of runs that it never ends. So the loggers share a part of the descriptors that the process
may have. Beyond that the one that was least recently used lets its producer go, and becomes one
anew with its next call.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

from flowbuffer.collector.descriptors import most_producers
from flowbuffer.forks import in_child
from flowbuffer.logger import recorders
from flowbuffer.spool.writing.producer import Producer


class OpenLogger(Protocol):
    """A logger that is a producer."""

    def used(self) -> object:
        """To be compared with an earlier answer: equal if the logger was not used since then."""

    def let_go(self) -> bool:
        """Be no producer until the next call that logs. False: nothing was changed, because a call
        is being made, or because it is none."""


#: In the order in which they were last seen to be used, with what ``used`` said then. Weakly: one
#: of which the making was interrupted is held by nobody.
_open: weakref.WeakKeyDictionary[OpenLogger, object] = weakref.WeakKeyDictionary()


def add(logger: OpenLogger) -> None:
    """A logger is a producer now; others let theirs go if there are too many."""
    _open.pop(logger, None)
    _open[logger] = None
    if len(_open) > most_producers():
        _let_go(lambda one: one is not logger and _open.get(one) == one.used())
        _let_go(lambda one: one is not logger)


def remove(logger: OpenLogger) -> None:
    """A logger is no producer any more."""
    _open.pop(logger, None)


def _let_go(may_go: Callable[[OpenLogger], bool]) -> None:
    for logger in list(_open):
        if len(_open) <= most_producers():
            return
        if may_go(logger):
            if logger.let_go():
                _open.pop(logger, None)
        elif logger in _open:  # it was used since it was last seen: behind the others with it
            _open.pop(logger, None)
            _open[logger] = logger.used()


#: What is run in a call that logs, from before anything is stored until all is.
_CALLS: Final = {
    getattr(Producer, name).__code__
    for name in ("append", "append_many", "append_series", "append_texts")
}


def is_in_call(producer: Producer) -> bool:
    """Whether any thread is in one of the producer's calls that log, be it a thread that a signal
    handler interrupted there. Costs the calls nothing: the threads are looked at."""
    for frame in sys._current_frames().values():
        at: Any = frame
        while at is not None:
            if at.f_code in _CALLS and at.f_locals.get("self") is producer:
                return True
            if at.f_code in recorders.WRAPPERS:  # about to call one, of whichever producer
                return True
            at = at.f_back
    return False


in_child("logger.open_loggers", _open.clear)
