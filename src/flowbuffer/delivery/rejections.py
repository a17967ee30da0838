"""Points that were refused for good, until each is a dead letter."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable

from flowbuffer.clock import Clock
from flowbuffer.delivery.stream import Stream
from flowbuffer.spool.dead_letters import DeadLetter
from flowbuffer.spool.outcomes import is_there

_log = logging.getLogger("flowbuffer")

#: How soon a letter that could not be written is tried again, in s.
AGAIN_S = 1.0


class Rejections:
    """Writes dead letters, and marks their slots. What cannot be written now, on a full disk, say,
    is tried again: until then the point is pending, and in nobody's way.

    Args:
        clock: Decides when it is tried again.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._letters: deque[tuple[Stream, Callable[[], DeadLetter]]] = deque()
        self._not_before_s = -math.inf
        self._told = False

    def __len__(self) -> int:
        return len(self._letters)

    def add(self, stream: Stream, letter: Callable[[], DeadLetter]) -> None:
        """A point of a stream is refused, of which this gives the letter, or raises as
        :meth:`Stream.letter` does."""
        self._letters.append((stream, letter))

    def due_s(self) -> float:
        """The seconds until something is to be written; infinity if nothing is."""
        left_s = self._not_before_s - self._clock.monotonic_s()
        return max(left_s, 0.0) if self._letters else math.inf

    def write(self) -> None:
        """Write what is to be written now."""
        while self.due_s() <= 0:
            stream, letter = self._letters[0]
            try:
                self._bury(stream, letter())
            except (OSError, MemoryError) as problem:
                if not self._told:
                    self._told = True
                    _log.warning(
                        "run %s: a rejected point cannot be kept, and is tried again: %s",
                        stream.sender.run_id, problem,
                    )  # fmt: skip
                self._not_before_s = self._clock.monotonic_s() + AGAIN_S
            else:
                self._told = False
                self._letters.popleft()

    def _bury(self, stream: Stream, letter: DeadLetter) -> None:
        what = f"the {letter.kind} {letter.key!r}" if letter.key else "a point"
        try:
            stream.reader.bury(letter)
        except OSError:
            if is_there(stream.path):
                raise
            what = f"{stream.path} was wiped, so there is no dead letter of {what}, which"
            stream.reader.forget(letter)
        _log.warning("run %s: %s was rejected: %s", stream.sender.run_id, what, letter.reason)
