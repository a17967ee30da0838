"""Room in the spool, and what happens to a point for which there is none (``when_full``)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Final, TypeVar

from flowbuffer.clock import Clock
from flowbuffer.errors import SpoolFull
from flowbuffer.notices import warn_once
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.folders import Spool

T = TypeVar("T")

#: Drops that are remembered one by one; then they are added up.
_MANY: Final = 10_000


class Room:
    """What one producer may still take of the spool.

    Args:
        spool: The spool, which others fill, too.
        settings: ``max_spool_bytes``, ``when_full`` and ``block_timeout_s``.
        clock: Tells how long a call has waited.
        hurry: Called when there is no room, for delivery to make some.
    """

    def __init__(
        self, spool: Spool, settings: Settings, clock: Clock, hurry: Callable[[], None]
    ) -> None:
        self._spool = spool
        self._settings = settings
        self._clock = clock
        self._hurry = hurry
        self._dropped: list[int] = []  # points; appended to, in one step, by any thread
        self._adding_up = threading.Lock()
        self._full_until_s = float("-inf")
        self._full_because = ""
        self._allowance_bytes = 0

    @property
    def dropped(self) -> Counter[str]:
        """Points for which there was no room, by reason."""
        return +Counter(spool_full=sum(list(self._dropped)))

    def _drop(self, points: int) -> None:
        self._dropped.append(points)
        if len(self._dropped) > _MANY and self._adding_up.acquire(blocking=False):
            try:
                count = len(self._dropped)
                self._dropped[:count] = [sum(self._dropped[:count])]
            finally:
                self._adding_up.release()

    def take(self, size: int) -> None:
        """Refuse what would make the spool larger than it may be; it is measured seldom.

        Raises:
            SpoolFull: There is no room for ``size`` bytes.
        """
        if size > self._allowance_bytes:
            room = self._settings.max_spool_bytes - self._spool.used_bytes()
            if size > room:
                raise SpoolFull(
                    f"the spool {self._spool.root} is full: max_spool_bytes is "
                    f"{self._settings.max_spool_bytes}, and what it holds is not delivered yet; "
                    "see what holds it up with: flowbuffer status, or raise max_spool_bytes "
                    "(FLOWBUFFER_MAX_SPOOL_BYTES)"
                )
            self._allowance_bytes = min(room, max(size, 1 << 20))
        self._allowance_bytes -= size

    def wait_for(self, write: Callable[[], T], points: int) -> T | None:
        """What ``write`` returns, called as ``when_full`` says; None if ``points`` were dropped.

        Raises:
            SpoolFull: ``write`` raised it, and ``when_full`` has it raised.
        """
        settings, clock = self._settings, self._clock
        deadline_s = clock.monotonic_s() + settings.block_timeout_s
        while True:
            try:
                if clock.monotonic_s() < self._full_until_s and settings.when_full != "block":
                    raise SpoolFull(self._full_because)  # a moment ago, and probably still
                return write()
            except SpoolFull as error:
                now_s = clock.monotonic_s()
                self._full_until_s, self._full_because = now_s + 0.02, str(error)
                self._hurry()
                if settings.when_full == "drop_newest":
                    warn_once(f"points are dropped (when_full='drop_newest'): {error}")
                    self._drop(points)
                    return None
                if settings.when_full == "raise":
                    raise
                if now_s >= deadline_s:
                    raise SpoolFull(
                        f"{error} (waited {settings.block_timeout_s:g} s, block_timeout_s)"
                    ) from error
            clock.sleep(0.01)
