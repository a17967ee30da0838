"""The reading side of the spool: columns out, states back.

One reader works one producer's folder. It reads each segment from its first slot, delivered slots
included, so that whoever derives something from the sequence of points (see ``ordering``) derives
the same after a restart; what was derived at the end of a deleted segment is kept in ``carry``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowbuffer.clock import Clock
from flowbuffer.errors import SpoolError, is_passing
from flowbuffer.spool import dead_letters, layout
from flowbuffer.spool.carry import Carry, read_carry, write_carry
from flowbuffer.spool.dead_letters import DeadLetter
from flowbuffer.spool.files import write_file
from flowbuffer.spool.layout import COMMITTED, DELIVERED, REJECTED
from flowbuffer.spool.notes import DeliveryNote, delivery_note, write_delivery_note
from flowbuffer.spool.outcomes import Outcome, is_there, keep_states, segment_outcome
from flowbuffer.spool.reading.blocks import Blocks, no_columns
from flowbuffer.spool.reading.columns import Block, mapped_segment, text_at
from flowbuffer.spool.reading.key_table import KeyTable
from flowbuffer.spool.reading.open_segment import OpenSegment
from flowbuffer.spool.segment_files import Ending, names_in, segment_numbers, segment_path
from flowbuffer.spool.tally import points_in


class Reader:
    """Reads what one producer wrote, and keeps the record of what became of it.

    Args:
        folder: The producer's folder; the caller holds its ``reader.lock``.
        alive: Whether points may still come. See :meth:`expect_no_more`.
        clock: Tells how long a slot has been empty.

    Attributes:
        delivered, rejected: Points, those of deleted segments included.
        on_their_way: Points that were read and are not settled yet.
        carry: What :meth:`keep` was given for the last deleted segment; empty at first.
        problems: What was found damaged, a sentence each; what is damaged is kept as a dead letter.
    """

    def __init__(self, folder: Path, clock: Clock, *, alive: bool) -> None:
        self.folder = folder
        self.delivered = 0
        self.rejected = 0
        self.on_their_way = 0
        self.carry = b""
        self.problems: list[str] = []
        self._clock = clock
        self._alive = alive  # a call may be between its reservation and its store
        self._closed = False
        self._note = delivery_note(folder)  # of who had the folder before
        self._keys = KeyTable(folder / "keys", self.problems.append)
        self._blocks = Blocks(folder, self._keys, self._bury)
        self._open: list[OpenSegment] = []
        self._first = 0  # the number of the oldest segment that may exist
        self._next = 0  # the number of the next segment to open
        self._read_carry()

    def expect_no_more(self) -> None:
        """No point will come any more: what is there is all."""
        self._alive = False

    @property
    def finished(self) -> bool:
        """The producer is dead, or closed and read up to the segment where it was."""
        return not self._alive or self._closed

    @property
    def settled(self) -> bool:
        """Finished; and everything that is there was read, and is delivered or rejected."""
        if self.on_their_way or self._reading() or not self.finished:
            return False
        try:
            return not any(number >= self._next for number in segment_numbers(self.folder))
        except OSError:
            return False  # they cannot be listed now

    @property
    def has_unripe(self) -> bool:
        """Points were seen that the next look will give out."""
        segment = self._reading()
        return segment is not None and segment.seen > segment.next_slot

    def key(self, identity: int) -> str:
        """The key of a key id that :meth:`read` gave out."""
        return self._keys.key(identity)

    def tie_keys(self, identities: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """For each key id that :meth:`read` gave out the first one with the same metric."""
        return self._keys.tie_keys(identities)

    def text(self, segment_number: int, position: int, identity: int) -> str:
        """The value of a parameter or tag that :meth:`read` gave out.

        Raises:
            OSError: It cannot be read any more.
        """
        journal = segment_path(self.folder, segment_number, Ending.JOURNAL)
        return text_at(journal, position, identity)

    def read(self, limit: int) -> Block | None:
        """The next points, about ``limit`` of them; None if there are none now. After an error they
        can be read again.

        Points of a living producer are given out one look after they were first seen, so that all
        of a slot is visible when its state is, on weakly ordered processors too.

        Raises:
            OSError, MemoryError: They cannot be read now.
        """
        late = self._late_point()
        if late is not None:
            return late
        segment = self._reading() or self._open_next()
        if segment is None:
            return None
        while (end := self._readable_end(segment, limit)) != segment.next_slot:
            slots = np.arange(segment.next_slot, end, dtype=np.int32)
            block = self._block(segment, slots, end, limit)
            if block is not None:
                return block  # else all of them are void
        return None

    def mark(
        self, segment_number: int, slots: NDArray[np.int32], *, rejected: bool = False
    ) -> None:
        """Record that points are delivered, or rejected: one entry in ``slots`` for each point."""
        if rejected:
            self.rejected += len(slots)
        else:
            self.delivered += len(slots)
        self.on_their_way -= len(slots)
        self._segment(segment_number).mark(slots, rejected=rejected)

    def keep(self, segment_number: int, carry: bytes) -> None:
        """Give what outlives a segment that was read to its end; it can be deleted from then on."""
        self._segment(segment_number).carry = carry

    def retire(self) -> None:
        """Delete the oldest segments of which nothing is left to deliver.

        Raises:
            OSError: One cannot be deleted now; it can be tried again.
        """
        while self._open:
            segment = self._open[0]
            if segment.carry is None or segment.unsettled or self._may_be_late(segment):
                return
            path = segment_path(self.folder, segment.number)
            if not segment.is_delivered():
                keep_states(path, segment.columns["state"].tobytes())
            # A restart counts what is settled in later segments again.
            delivered, rejected = (
                sum(later.settled_points(state) for later in self._open[1:])
                for state in (DELIVERED, REJECTED)
            )
            carry = Carry(
                segment.number + 1,
                max(self.delivered - delivered, 0),
                max(self.rejected - rejected, 0),
                segment.carry,
            )
            write_carry(self.folder, carry, path)
            self.carry = segment.carry
            self._open.pop(0)
            self._delete(segment.number)
            self._first = segment.number + 1

    @property
    def delivered_segments(self) -> int | None:
        """Of a settled folder, how many segments it had, if all points are delivered; None if some
        are not."""
        return None if self.rejected or self.problems or self.has_lost else self._next

    @property
    def has_lost(self) -> bool:
        """Whether a segment was ever found damaged, and is kept, or was found missing.

        Raises:
            OSError: That is not known now.
        """
        return bool(names_in(self.folder, (Ending.DAMAGED, Ending.LOST)))

    def bury(self, letter: DeadLetter) -> None:
        """Keep a point that was given out as a dead letter; it is rejected then.

        Raises:
            OSError: The letter cannot be written now; the point is as it was.
        """
        dead_letters.append(self.folder, letter)
        self.forget(letter)

    def forget(self, letter: DeadLetter) -> None:
        """As :meth:`bury`, where there is no folder any more to keep it in."""
        assert letter.segment is not None
        self.mark(letter.segment, np.array([letter.slot], np.int32), rejected=True)

    def hurried(self) -> bool:
        """Whether someone waits for a point that is not settled."""
        return any(segment.is_hurried() for segment in self._open)

    def note(self, note: DeliveryNote) -> None:
        """Tell how delivery is doing, if that is news."""
        if note != self._note:
            self._note = note
            try:
                write_delivery_note(self.folder, note)
            except OSError:
                pass  # a full disk; no promise rests on it

    def note_done(self) -> None:
        """Tell that everything is settled, and that the folder stays for what cannot be sent."""
        self.note(replace(self._note, done=True))

    def close(self) -> None:
        """Let go of the mapped segments."""
        self._open.clear()

    # Finding what can be read.

    def _reading(self) -> OpenSegment | None:
        for segment in self._open[-1:]:  # another thread may ask for numbers meanwhile
            return segment if segment.carry is None else None
        return None

    def _segment(self, number: int) -> OpenSegment:
        return next(segment for segment in self._open if segment.number == number)

    def _readable_end(self, segment: OpenSegment, limit: int) -> int:
        """The end of the slots that can be given out now."""
        if not self._alive:
            return min(segment.slots, segment.next_slot + limit)
        last = segment.slots
        closed, _ = layout.parse_closed(segment.fields[1:].tobytes())
        if closed:
            last = min(closed - 1, segment.slots)
            self._closed = True
        if segment.next_slot >= last:
            return segment.slots
        ended = self._closed or is_there(segment_path(self.folder, segment.number + 1))
        end = segment.look(last, self._clock.monotonic_s(), ended=ended)
        return min(end, segment.next_slot + limit)

    def _late_point(self) -> Block | None:
        for segment in list(self._open):
            slot = segment.late_slot()
            if slot is not None:
                slots = np.array([slot], dtype=np.int32)
                block = self._block(segment, slots, segment.next_slot, 1 << 62)
                segment.late_is_read(slot)
                return block
        return None

    def _may_be_late(self, segment: OpenSegment) -> bool:
        return not self.finished and segment.may_be_late(self._clock.monotonic_s())

    def _open_next(self) -> OpenSegment | None:
        while not is_there(path := segment_path(self.folder, self._next)):
            later = [number for number in segment_numbers(self.folder) if number > self._next]
            if not later:
                return None
            if not is_there(path):  # and was not made while we looked
                if segment_outcome(path) is Outcome.UNKNOWN:
                    self._problem(f"{path} is missing; what it held was wiped from the spool")
                    write_file(path.with_suffix(Ending.LOST), b"")
                self._next += 1
        number = self._next
        try:
            columns, fields, missing = mapped_segment(path, number)
        except (SpoolError, ValueError) as error:
            kept = path.replace(path.with_suffix(Ending.DAMAGED))  # for nobody to delete
            self._problem(f"{path} cannot be read and is kept as {kept.name}: {error}")
            self._next = number + 1
            return self._open_next()
        if missing:
            self._problem(f"{path} was cut off: {missing} of its slots are missing")
        segment = OpenSegment(number, columns, fields, is_whole=not missing)
        self._open.append(segment)
        self._next = number + 1
        return segment

    # From slots to points.

    def _block(
        self, segment: OpenSegment, slots: NDArray[np.int32], end: int, limit: int
    ) -> Block | None:
        """These slots as points; the segment is read up to ``end`` then, or less far if that is
        more than ``limit`` points.

        Nothing is read unless all of it is, so that it can be tried again. Slots that cannot be
        read for what is in them are read in halves, down to the one at fault.

        Raises:
            OSError, MemoryError: They cannot be read now.
        """
        try:
            columns, end, buried = self._blocks.columns(segment, slots, end, limit)
        except Exception as error:
            if is_passing(error):
                raise
            if len(slots) > 1:
                half = len(slots) // 2
                return self._block(segment, slots[:half], int(slots[half]), limit)
            self._bury(segment, int(slots[0]), f"it cannot be read: {error!r}")
            columns, buried = no_columns(), slots
        block_slots, state = columns[0], columns[6]
        unsettled = block_slots[state == COMMITTED]
        segment.send(unsettled)
        self.on_their_way += len(unsettled)
        self.delivered += int((state == DELIVERED).sum())
        self.rejected += int((state == REJECTED).sum())
        self.rejected += points_in(segment.columns[buried], REJECTED)
        # Only now, so that whoever counts meanwhile counts a point twice rather than never.
        ends = segment.next_slot < end == segment.slots
        segment.next_slot = end
        if not len(block_slots) and not ends:
            return None
        return Block(segment.number, ends, *columns)

    def _bury(self, segment: OpenSegment, slot: int, reason: str) -> None:
        """Keep what cannot be read as a dead letter, so that it neither blocks nor disappears.

        Raises:
            OSError: The letter cannot be written now; the slot is as it was.
        """
        if segment.columns["state"][slot] in (DELIVERED, REJECTED):
            return
        row = segment.columns[slot : slot + 1]
        as_rejected = row.copy()
        as_rejected["state"] = REJECTED
        letter = DeadLetter(
            segment=segment.number,
            slot=slot,
            reason=reason,
            raw=row.tobytes().hex(),
            points=points_in(as_rejected, REJECTED),
        )
        dead_letters.append(self.folder, letter)
        segment.columns["state"][slot] = REJECTED
        self._problem(f"{segment_path(self.folder, segment.number)}, slot {slot}: {reason}")

    # Files.

    def _read_carry(self) -> None:
        try:
            self._first, self.delivered, self.rejected, self.carry = read_carry(self.folder)
        except SpoolError as error:
            self._problem(f"{self.folder / 'carry'} is not used: {error}")
            self._first = min(segment_numbers(self.folder), default=0)
        self._next = self._first
        for number in segment_numbers(self.folder):
            if number < self._first:
                self._delete(number)

    def _delete(self, number: int) -> None:
        for ending in (Ending.JOURNAL, Ending.SLOTS):
            segment_path(self.folder, number, ending).unlink(missing_ok=True)

    def _problem(self, text: str) -> None:
        self.problems.append(text)
