"""Time, as an object: tests pass one that they turn themselves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from flowbuffer.errors import InvalidArgument, described


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

    def wait_until(
        self,
        over: Callable[[], bool],
        deadline_s: float | None,
        meanwhile: Callable[[float], None] = lambda _: None,
    ) -> bool:
        """Look again and again whether a wait is over. A look costs CPU time, so a long wait looks
        seldom: every 1 ms at first, every 0.5 s in the end.

        Args:
            over: Whether it is.
            deadline_s: When to give up, as :attr:`monotonic_s` tells; None is never.
            meanwhile: Called after each look with the seconds that were waited until then.

        Returns:
            Whether it was over in time.
        """
        start_s = self.monotonic_s()
        while not over():
            now_s = self.monotonic_s()
            left_s = math.inf if deadline_s is None else deadline_s - now_s
            if left_s <= 0:
                return False
            meanwhile(now_s - start_s)
            self.sleep(min(max(0.001, 0.1 * (now_s - start_s)), 0.5, left_s))
        return True


def checked_timeout(timeout: Any) -> float | None:
    """How long somebody wants to wait, in s; None for as long as it takes.

    Raises:
        InvalidArgument: It is no number from 0.
    """
    if timeout is None:
        return None
    try:
        seconds = math.nan if isinstance(timeout, (str, bytes)) else float(timeout)
    except Exception:
        seconds = math.nan
    if seconds >= 0:
        return seconds
    raise InvalidArgument(
        f"the timeout is {described(timeout)}; it must be seconds, from 0, or None to wait for as "
        "long as it takes"
    )


SYSTEM_CLOCK = Clock()
