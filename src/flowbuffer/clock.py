"""Time, as an object: tests pass one that they turn themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    """What a clock can wait on; :class:`threading.Event` is one."""

    def set(self) -> None: ...

    def clear(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class Clock:
    """The machine's time."""

    #: Wall time in ns since the epoch. The built-in itself: this is on the path of every point.
    now_ns: Callable[[], int] = staticmethod(time.time_ns)

    #: Seconds from some fixed moment; never runs backwards.
    monotonic_s: Callable[[], float] = staticmethod(time.monotonic)

    def sleep(self, seconds: float) -> None:
        """Do nothing for ``seconds``."""
        time.sleep(seconds)

    def wait(self, event: Event, seconds: float | None) -> bool:
        """Wait until ``event`` is set (True) or ``seconds`` have passed (False)."""
        return event.wait(seconds)


SYSTEM_CLOCK = Clock()
