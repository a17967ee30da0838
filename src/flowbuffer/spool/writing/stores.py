"""What a producer stores its points into: one segment after the other, from the first to the end.

As in ``producer`` nothing here is guarded by a lock, and each change of state is one operation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowbuffer.errors import FlowbufferError, SpoolGone
from flowbuffer.spool import layout
from flowbuffer.spool.folders import ProducerDirectory
from flowbuffer.spool.layout import DELIVERED, EMPTY, REJECTED, SLOT_SIZE, STATE_OFFSET, VOID
from flowbuffer.spool.outcomes import Outcome, is_there, segment_outcome
from flowbuffer.spool.segment_files import offset_of, segment_path, slot_at
from flowbuffer.spool.writing.places import Segment
from flowbuffer.spool.writing.room import Room
from flowbuffer.spool.writing.segments import points_in, segment
from flowbuffer.turn import Turn

#: Reserves a slot's offset; the mapped segment; the segment.
Store = tuple[Callable[[], int], Any, Segment]


class Stores:
    """The segments of one producer.

    Args:
        directory: The producer's folder, its lock held.
        room: Of the spool.
        hurry: Called when someone waits for a point.
        segment_slots: The slots of the first segment and of the others.
        durable: Bring each segment to the disk itself.

    Attributes:
        is_gone: It was found that the folder was wiped, and nothing is stored there any more.
    """

    def __init__(
        self,
        directory: ProducerDirectory,
        room: Room,
        hurry: Callable[[], None],
        segment_slots: list[int],
        *,
        durable: bool,
    ) -> None:
        self.directory = directory
        self.is_gone = False
        self._room = room
        self._hurry = hurry
        self._segment_slots = segment_slots
        self._durable = durable
        self._turn = Turn()
        self._open = True
        self._is_closed = False
        self._in_child = False  # forked, while the parent goes on
        self._end: tuple[int, int] | None = None  # the last barrier, once stopped
        # What a store needs, in one tuple, so that no thread ever sees halves of two segments.
        # At first there is no room, so the first store makes the first segment.
        self._current: Store = (
            itertools.count().__next__,
            bytearray(),
            Segment(segment_path(directory.path, -1), -1, hurry),
        )
        # Every store that there was, by number; None once the next one is there. Who makes a store
        # that another thread, or the call that it interrupted, has made finds that here.
        self._stores: dict[int, Store | None] = {}
        self._logged_before: dict[int, int] = {}  # points of each full segment, by its number

    def used(self) -> object:
        """Something that is another thing after each call that stored a point."""
        reserve, _, segment = self._current
        return segment.number, repr(reserve.__self__)  # type: ignore[attr-defined]

    def barrier(self) -> tuple[int, int]:
        """A place (segment number, offset) that every point logged until now lies before."""
        if self._end is not None:
            return self._end
        reserve, buffer, segment = self._current
        offset = reserve()
        if offset + SLOT_SIZE <= len(buffer):
            buffer[offset + STATE_OFFSET] = VOID
        return segment.number, offset

    def stop(self) -> None:
        """Take no more points. The folder stays until :meth:`close`, delivered or not."""
        self._open = False
        reserve, buffer, segment = self._current
        if self._end is None or self._end[0] != segment.number:
            # A call that is under way stores before this end, or finds no room and is refused.
            self._end = segment.number, min(_reserve_rest(reserve, buffer)[0], len(buffer))

    def close(self, *, failed: bool = False) -> None:
        """Stop, and leave the folder to whoever delivers it, and deletes it then.

        Args:
            failed: The job did not end well.
        """
        self.stop()
        self._is_closed = True
        if self.is_gone:
            return
        reserve, _, segment = self._current
        if not segment.path.exists():
            self.directory.lock.release()  # nothing was logged, or all of it is delivered
        else:
            self._write_end(layout.FAILED if failed else layout.FINISHED)
        self._current = (reserve, bytearray(), segment)  # unmapped; closed before, if it is that
        self._stores = dict.fromkeys(self._stores)

    def _write_end(self, outcome: int) -> None:
        _, buffer, _ = self._current
        if buffer and self._end is not None:
            fields = layout.closed_fields(slot_at(self._end[1]), outcome)
            buffer[layout.CLOSED_OFFSET : layout.CLOSED_OFFSET + len(fields)] = fields

    def abandon(self) -> None:
        """In a forked child: the parent goes on writing, and nothing is stored here any more, not
        even by the call in which the fork was."""
        self._in_child = True
        self._open = False
        for store in self._stores.values():
            if store is not None:
                store[1].close()

    # A folder that is wiped while its producer lives.

    def is_wiped(self) -> bool:
        """Whether the folder, or something in it without which its points are not delivered, is
        gone, or another one; False if it cannot be looked at now. It takes some microseconds."""
        if self._is_closed or self._in_child:
            return False
        segment, lock = self._current[2], self._path_of("producer.lock")
        try:
            found = not self.directory.lock.is_at(lock) or not all(map(is_there, self._needed()))
            if not found and segment.number >= 0 and not is_there(segment.path):
                found = segment_outcome(segment.path) is Outcome.UNKNOWN
        except (OSError, ValueError):  # or the lock was released meanwhile
            return False
        return found and not self._is_closed  # once it is closed, who has delivered it removes it

    def _needed(self) -> list[Path]:
        return [self._path_of("producer.json")]

    def give_up(self) -> None:
        """Store nothing in the folder any more, as it was wiped. It may be called again.

        What is left of it is for others to deliver. The last segment stays mapped, so that all that
        was logged can be counted, also what a call that is under way stores.
        """
        self.is_gone = True
        self.stop()
        self._write_end(layout.FINISHED)
        self.directory.lock.release()

    def logged(self) -> tuple[int, int, int]:
        """The points that were stored, and how many in the last segment, which need not have a
        name any more, are delivered, and rejected."""
        found = points_in(self._current[1])
        logged = sum(found.values()) - found[EMPTY] - found[VOID]
        return logged + sum(self._logged_before.values()), found[DELIVERED], found[REJECTED]

    # From one segment to the next.

    def _advance(self, full: Segment) -> Segment:
        """Go on to the segment after ``full``, unless that was done already; the current one."""
        with self._turn:  # else every thread makes the same segment
            self._check_open()
            reserve, buffer, current = self._current
            if current is not full:
                return current
            number = full.number + 1
            if number not in self._stores:
                self._stores.setdefault(number, self._new_store(number))
            store = self._stores[number]
            if store is not None:
                # If room was left, it is taken, so that the reader does not wait for it.
                for offset in _reserve_rest(reserve, buffer):
                    if offset + SLOT_SIZE <= len(buffer):
                        buffer[offset + STATE_OFFSET] = VOID
                points = points_in(buffer)
                self._logged_before[full.number] = sum(points.values()) - points[VOID]
                self._current = store
                self._stores[full.number] = None
            self._check_open()
            return self._current[2]

    def _new_store(self, number: int) -> Store:
        slots = self._segment_slots[number > 0]
        self._room.take(layout.segment_size(slots))
        path = segment_path(self.directory.path, number)
        buffer = segment(path, number, slots, durable=self._durable)
        reserve = itertools.count(offset_of(0), SLOT_SIZE).__next__
        return reserve, buffer, Segment(path, number, self._hurry)

    def _check_open(self) -> None:
        if self._open:
            return
        if self.is_gone:  # that is set first
            raise SpoolGone(f"{self.directory.path} was wiped while points were logged to it")
        raise FlowbufferError("this logger is closed; a closed logger takes no more points")

    def _path_of(self, name: str) -> Path:
        return self.directory.path / name


def _reserve_rest(reserve: Any, buffer: Any) -> list[int]:
    """Reserve what is left of a segment, in one step; the offsets, one or more beyond its end."""
    counter = reserve.__self__
    # A count says where it is by its text alone; others may have taken it further by now.
    reached = int(re.findall(r"\d+", repr(counter))[0])
    left = max(len(buffer) - reached, 0) // SLOT_SIZE
    return list(itertools.islice(counter, left + 1))
