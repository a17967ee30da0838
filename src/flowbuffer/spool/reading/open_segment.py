"""One segment while it is read: how far, what of it is on its way, and what is missing in it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flowbuffer.spool.layout import COMMITTED, DELIVERED, EMPTY, REJECTED, VOID
from flowbuffer.spool.tally import points_in

#: A slot that stays empty this long between others, in s, is passed over: its call was interrupted
#: between the reservation and the store. If it is stored later it is delivered then, out of order.
HOLE_TIMEOUT_S: Final = 5.0
#: How long a segment with slots that were passed over is kept for that, in s.
LATE_TIMEOUT_S: Final = 60.0


class OpenSegment:
    """A segment that is being read, mapped until all of it is settled.

    Args:
        number: Its place among the producer's segments.
        columns: Its slots, over the mapped file.
        fields: Those of its header, from ``wanted`` on, over the mapped file.
        is_whole: Its file was not cut off.

    Attributes:
        slots: How many it has.
        next_slot: The first one not read yet.
        seen: The first one that was empty at the last look.
        unsettled: Slots on their way.
        carry: What was derived from the points up to its end; None until it is read to its end.
    """

    def __init__(
        self,
        number: int,
        columns: NDArray[Any],
        fields: NDArray[np.uint32],
        *,
        is_whole: bool = True,
    ) -> None:
        self.number = number
        self.columns = columns
        self.fields = fields
        self.slots = len(columns)
        self.next_slot = 0
        self.seen = 0
        self.unsettled = 0
        self.carry: bytes | None = None
        self._is_whole = is_whole
        self._states: NDArray[np.uint8] = columns["state"]
        self._left = np.zeros(self.slots, np.int32)  # points on their way, by slot
        self._has_rejected = np.zeros(self.slots, np.bool_)
        self._holes: dict[int, float] = {}  # passed over, and until when the segment is kept
        self._hole_since_s: tuple[int, float] | None = None

    def look(self, last: int, now_s: float, *, ended: bool) -> int:
        """See which slots up to ``last`` are stored; where those end that earlier looks saw, too.

        Args:
            last: The end of the slots that may be stored.
            now_s: The present monotonic time.
            ended: The producer goes on in another segment, or is closed, so that a slot that is
                empty now is one whose call was interrupted.
        """
        end = self.seen = max(self.seen, self.next_slot)
        while self.seen < last:
            part = self._states[self.seen : min(self.seen + 1024, last)]
            empty = np.flatnonzero(part == EMPTY)
            self.seen += int(empty[0]) if len(empty) else len(part)
            if len(empty):
                break
        if self.seen < last and self.seen == self.next_slot:
            self._pass_over_hole(self.seen, now_s, ended=ended)
        return end

    def _pass_over_hole(self, slot: int, now_s: float, *, ended: bool) -> None:
        if not ended and not self._states[slot + 1 : slot + 1025].any():
            self._hole_since_s = None
        elif self._hole_since_s is None or self._hole_since_s[0] != slot:
            self._hole_since_s = (slot, now_s)
        elif now_s - self._hole_since_s[1] >= HOLE_TIMEOUT_S:
            self._holes[slot] = now_s + LATE_TIMEOUT_S
            self._is_whole = False
            self._states[slot] = VOID
            self._hole_since_s = None

    def late_slot(self) -> int | None:
        """A slot that was passed over and is stored now; the same until :meth:`late_is_read`."""
        return next((slot for slot in self._holes if self._states[slot] == COMMITTED), None)

    def late_is_read(self, slot: int) -> None:
        """What :meth:`late_slot` gave is read."""
        del self._holes[slot]

    def is_delivered(self) -> bool:
        """Whether every point of it that is settled was delivered, and none can be missing."""
        return self._is_whole and REJECTED not in self._states

    def may_be_late(self, now_s: float) -> bool:
        """Whether a slot that was passed over may still be stored."""
        return any(until_s > now_s for until_s in self._holes.values())

    def send(self, slots: NDArray[np.int32]) -> None:
        """Points go on their way: one entry in ``slots`` for each."""
        unique, counts = np.unique(slots, return_counts=True)
        self._left[unique] += counts.astype(np.int32)
        self.unsettled += len(unique)

    def mark(self, slots: NDArray[np.int32], *, rejected: bool) -> None:
        """Points are delivered, or rejected: one entry in ``slots`` for each."""
        unique, counts = np.unique(slots, return_counts=True)
        self._left[unique] -= counts.astype(np.int32)
        if rejected:
            self._has_rejected[unique] = True
        done = unique[self._left[unique] == 0]
        self._states[done] = np.where(self._has_rejected[done], REJECTED, DELIVERED)
        self.unsettled -= len(done)

    def settled_points(self, state: int) -> int:
        """How many points that were read have this state."""
        return points_in(self.columns[: self.next_slot], state)

    def is_hurried(self) -> bool:
        """Whether someone waits for a point that is not settled."""
        wanted = min(int(self.fields[0]), self.slots)
        if not wanted:
            return False
        states = self._states[:wanted]
        if ((states == COMMITTED) | (states == EMPTY)).any():
            return True
        self.fields[0] = 0
        return False
