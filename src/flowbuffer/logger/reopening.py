"""A logger is a producer only while it can be: its next call makes it one anew.

Of a logger that let its producer go others needed the descriptors (see ``open_loggers``). A forked
child, and who logs after the end of the job, is no producer yet. And the folder of a producer may
be wiped, by ``rm -rf`` or a cleaner of ``/tmp``.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from flowbuffer.errors import FlowbufferError
from flowbuffer.logger import open_loggers
from flowbuffer.logger.calls import LoggingCalls
from flowbuffer.logger.recorders import Append, Calls

if TYPE_CHECKING:
    from flowbuffer.logger.spooling import Spooling


class Reopening(LoggingCalls):
    """What makes a logger a producer again."""

    _ended: bool
    _is_open: bool
    _opening: threading.RLock
    _spooling: Spooling | None

    def _open(self) -> None:
        """Make this process a producer of the run."""
        raise NotImplementedError

    def _use(self, recorder: Spooling) -> None:
        """Log by what spools."""
        raise NotImplementedError

    def used(self) -> object:
        """To be compared with an earlier answer: equal if it was not used since then."""
        return None if self._spooling is None else self._spooling.producer.used()

    def let_go(self) -> bool:
        """Be no producer until the next call that logs, which makes it one anew. False: nothing was
        changed, because a call is being made, or because it is none."""
        if not self._opening.acquire(blocking=False):
            return False
        try:
            spooling = self._spooling
            if spooling is None or not self._is_open or open_loggers.is_in_call(spooling.producer):
                return False
            self._is_open = False
            self._log_by(Calls(self._reopening))
            if open_loggers.is_in_call(spooling.producer):  # from now on none can begin
                if not self._is_open:
                    self._is_open = True
                    self._use(spooling)
                return False
            spooling.let_go()
            return True
        finally:
            self._opening.release()

    def _reopening(self, name: str) -> Append:
        def reopen(*args: Any) -> Any:
            with self._opening:
                if self._ended:
                    _refuse()
                if not self._is_open or self._is_wiped():
                    self._is_open = False  # until it is whole: it may be interrupted
                    self._open()
            return getattr(self, f"_{name}")(*args)

        return reopen

    def _refusing(self, _: str) -> Append:
        return _refuse

    def _is_wiped(self) -> bool:
        return self._spooling is not None and self._spooling.is_wiped()


def _refuse(*_: Any) -> Any:
    raise FlowbufferError("this logger is closed; a closed logger takes no more points")
