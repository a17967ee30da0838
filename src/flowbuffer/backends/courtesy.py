"""Turns at a SQLite file, which one writes at a time.

Whoever waits for SQLite's lock tries again now and then, at longer and longer intervals. A writer
that has the next batch ready when one is committed would take the lock again each time before
others try. So while others write, too, it is left free for as long as it was held.
"""

from __future__ import annotations

from typing import Final

from flowbuffer.clock import SYSTEM_CLOCK, Clock

#: For how long others count as writing after they were seen to, in s.
_OTHERS_WRITE_FOR_S: Final = 10.0


class Courtesy:
    """Leaves a lock to others, if there are any.

    Args:
        clock: Decides how long.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._seen: tuple[int, int] | None = None
        self._others_until_s = self._free_until_s = 0.0

    def wait(self, writes: tuple[int, int]) -> None:
        """Before the lock is taken: wait while it is others' turn.

        Args:
            writes: Who writes, and a number that is another one after others have written. It says
                nothing if the last one to write was another connection of our own.
        """
        now_s = self._clock.monotonic_s()
        if self._seen and self._seen[0] == writes[0] and self._seen != writes:
            self._others_until_s = now_s + _OTHERS_WRITE_FOR_S
        self._seen = writes
        if now_s < self._others_until_s and now_s < self._free_until_s:
            self._clock.sleep(self._free_until_s - now_s)

    def held(self, since_s: float) -> None:
        """The lock was held since this moment, in monotonic time, and is free now."""
        now_s = self._clock.monotonic_s()
        self._free_until_s = now_s + (now_s - since_s)
