"""The reading side of the spool: columns out, states back.

One reader works one producer's folder. It reads each segment from its first slot, delivered slots
included, so that whoever derives something from the sequence of points (see ``ordering``) derives
the same after a restart; what was derived at the end of a deleted segment is kept in ``carry``.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowbuffer.clock import Clock
from flowbuffer.errors import SpoolError
from flowbuffer.spool import layout
from flowbuffer.spool.carry import Carry, read_carry, write_carry
from flowbuffer.spool.columns import (
    Block,
    mapped_segment,
    series_columns,
    sound_slots,
    text_at,
)
from flowbuffer.spool.files import open_file, write_file
from flowbuffer.spool.key_table import KeyTable
from flowbuffer.spool.layout import (
    COMMITTED,
    DELIVERED,
    EMPTY,
    EXPLICIT,
    REJECTED,
    SERIES,
    TEXT,
    VOID,
)
from flowbuffer.spool.open_segment import OpenSegment
from flowbuffer.spool.states import points_in, segment_numbers


class Reader:
    """Reads what one producer wrote, and keeps the record of what became of it.

    Args:
        folder: The producer's folder; the caller holds its ``reader.lock``.
        alive: Whether points may still come. See :meth:`producer_died`.
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
        self._note: dict[str, Any] = {}
        self._keys = KeyTable(folder / "keys", self.problems.append)
        self._open: list[OpenSegment] = []
        self._first = 0  # the number of the oldest segment that may exist
        self._next = 0  # the number of the next segment to open
        self._read_carry()

    def producer_died(self) -> None:
        """No point will come any more: what is there is all."""
        self._alive = False

    @property
    def finished(self) -> bool:
        """The producer is dead, or closed and read up to the segment where it was."""
        return not self._alive or self._closed

    @property
    def exhausted(self) -> bool:
        """Everything that the producer wrote was read, and it writes no more."""
        if self._reading() or not self.finished:
            return False
        return not any(number >= self._next for number in self._numbers())

    @property
    def settled(self) -> bool:
        """Exhausted, and everything read is delivered or rejected."""
        return self.on_their_way == 0 and self.exhausted

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
        journal = self._path(segment_number).with_suffix(".journal")
        return text_at(journal, position, identity)

    def read(self, limit: int) -> Block | None:
        """The next points, about ``limit`` of them; None if there are none now.

        Points of a living producer are given out one look after they were first seen, so that all
        of a slot is visible when its state is, on weakly ordered processors too.
        """
        late = self._late_points()
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
        """Delete the oldest segments of which nothing is left to deliver."""
        while self._open:
            segment = self._open[0]
            if segment.carry is None or segment.unsettled or self._may_be_late(segment):
                return
            self.carry = segment.carry
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
            write_carry(self.folder, carry, self._path(segment.number))
            self._open.pop(0)
            self._delete(segment.number)
            self._first = segment.number + 1

    def hurried(self) -> bool:
        """Whether someone waits for a point that is not settled."""
        return any(segment.is_hurried() for segment in self._open)

    def dead_letter(self, letter: dict[str, Any]) -> None:
        """Append to ``rejected.jsonl``; call it before :meth:`mark`."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        descriptor = open_file(self.folder / "rejected.jsonl", flags)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" * bool(torn) + json.dumps(letter).encode() + b"\n")
        finally:
            os.close(descriptor)

    def note(self, note: dict[str, Any]) -> None:
        """Tell how delivery is doing (``delivery.json``), if that is news."""
        if note != self._note and (self._note or any(note.values())):
            self._note = note
            try:
                write_file(self.folder / "delivery.json", json.dumps(note).encode())
            except OSError:
                pass  # a full disk; no promise rests on it

    def note_done(self) -> None:
        """Tell that everything is settled, and that the folder stays for what cannot be sent."""
        self.note({**self._note, "done": True})

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
        ended = self._closed or self._path(segment.number + 1).exists()
        end = segment.look(last, self._clock.monotonic_s(), ended=ended)
        return min(end, segment.next_slot + limit)

    def _late_points(self) -> Block | None:
        for segment in list(self._open):
            late = segment.late_slots()
            if late:
                slots = np.array(late, dtype=np.int32)
                return self._block(segment, slots, segment.next_slot, 1 << 62)
        return None

    def _may_be_late(self, segment: OpenSegment) -> bool:
        return not self.finished and segment.may_be_late(self._clock.monotonic_s())

    def _open_next(self) -> OpenSegment | None:
        path = self._path(self._next)
        if not path.exists():
            later = [number for number in self._numbers() if number > self._next]
            if not later:
                return None
            if not path.exists():  # and was not made while we looked
                self._problem(f"{path} is missing; what it held was wiped from the spool")
                self._next = later[0]
                path = self._path(self._next)
        number = self._next
        try:
            columns, fields, missing = mapped_segment(path, number)
        except (SpoolError, ValueError) as error:
            kept = path.replace(path.with_suffix(".damaged"))  # for nobody to delete
            self._problem(f"{path} cannot be read and is kept as {kept.name}: {error}")
            self._next = number + 1
            return self._open_next()
        if missing:
            self._problem(f"{path} was cut off: {missing} of its slots are missing")
        segment = OpenSegment(number, columns, fields)
        self._open.append(segment)
        self._next = number + 1
        return segment

    # From slots to columns.

    def _block(
        self, segment: OpenSegment, slots: NDArray[np.int32], end: int, limit: int
    ) -> Block | None:
        """These slots as points; the segment is read up to ``end`` then, or less far if that is
        more than ``limit`` points."""
        rows = segment.columns[slots]
        present = (rows["state"] != VOID) & (rows["state"] != EMPTY)
        slots, rows = slots[present], rows[present]
        sound = sound_slots(slots, rows, self._keys.known(rows["key"]))
        for slot, row in zip(slots[~sound].tolist(), rows[~sound], strict=True):
            self._bury(segment, slot, row.tobytes(), "the slot is damaged")
        for at in np.flatnonzero(sound & ((rows["flags"] & TEXT) != 0)).tolist():
            sound[at] = self._has_text(segment, int(slots[at]), rows[at])
        slots, rows = slots[sound], rows[sound]
        explicit = (rows["flags"] & EXPLICIT) != 0
        time = np.where(explicit, rows["time"], rows["time"] // 1_000_000)
        kind = (rows["flags"] & TEXT).astype(np.uint8)
        names = ("value", "step", "state")
        columns = [slots, rows["key"], time, explicit, *(rows[name] for name in names), kind]
        series = np.flatnonzero(rows["flags"] & SERIES)
        if len(series):
            columns, last = self._with_series(segment, columns, series, limit)
            if last is not None:
                end = last + 1
        block_slots, state = columns[0], columns[6]
        unsettled = block_slots[state == COMMITTED]
        segment.send(unsettled)
        self.on_their_way += len(unsettled)
        self.delivered += int((state == DELIVERED).sum())
        self.rejected += int((state == REJECTED).sum())
        # Only now, so that whoever counts meanwhile counts a point twice rather than never.
        ends = segment.next_slot < end == segment.slots
        segment.next_slot = end
        if not len(block_slots) and not ends:
            return None
        return Block(segment.number, ends, *columns)

    def _with_series(
        self,
        segment: OpenSegment,
        columns: Sequence[NDArray[Any]],
        series: NDArray[np.intp],
        limit: int,
    ) -> tuple[list[NDArray[Any]], int | None]:
        """The columns with each series in place of its slot, cut when ``limit`` points are there.

        Returns the columns and, if they were cut, the last slot that is in them.
        """
        parts: list[Sequence[NDArray[Any]]] = []
        count = first = 0
        last: int | None = None
        for at in series.tolist():
            parts.append([column[first:at] for column in columns])
            count += at - first
            first = at + 1
            points = self._series(segment, [column[at] for column in columns])
            if points is not None:
                parts.append(points)
                count += len(points[0])
            if count >= limit and first < len(columns[0]):
                last = int(columns[0][at])
                break
        else:
            parts.append([column[first:] for column in columns])
        return [np.concatenate(column) for column in zip(*parts, strict=True)], last

    def _series(self, segment: OpenSegment, slot: Sequence[Any]) -> Sequence[NDArray[Any]] | None:
        """The points of a series slot as columns; None if its frame is damaged."""
        try:
            return series_columns(self._path(segment.number).with_suffix(".journal"), slot)
        except (OSError, struct.error) as error:
            index, value = int(slot[0]), slot[4]
            raw = segment.columns[index].tobytes()
            self._bury(segment, index, raw, f"a series of {value:g} points is damaged: {error}")
            return None

    def _has_text(self, segment: OpenSegment, slot: int, row: Any) -> bool:
        """Whether the frame of a parameter or tag is whole; if not, it is a dead letter."""
        if row["state"] == COMMITTED:
            try:
                self.text(segment.number, int(row["step"]), int(row["key"]))
            except (OSError, struct.error) as error:
                self._bury(segment, slot, row.tobytes(), f"a parameter or tag is damaged: {error}")
                return False
        return True

    def _bury(self, segment: OpenSegment, slot: int, raw: bytes, reason: str) -> None:
        """Keep what cannot be read as a dead letter, so that it neither blocks nor disappears."""
        if segment.columns["state"][slot] in (DELIVERED, REJECTED):
            return
        self._problem(f"{self._path(segment.number)}, slot {slot}: {reason}")
        letter = {"segment": segment.number, "slot": slot, "reason": reason, "bytes": raw.hex()}
        segment.columns["state"][slot] = REJECTED
        points = points_in(segment.columns[slot : slot + 1], REJECTED)
        self.dead_letter(letter if points == 1 else {**letter, "points": points})
        self.rejected += points

    # Files.

    def _read_carry(self) -> None:
        try:
            self._first, self.delivered, self.rejected, self.carry = read_carry(self.folder)
        except SpoolError as error:
            self._problem(f"{self.folder / 'carry'} is not used: {error}")
            self._first = min(self._numbers(), default=0)
        self._next = self._first
        for number in self._numbers():
            if number < self._first:
                self._delete(number)

    def _numbers(self) -> list[int]:
        return segment_numbers(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.slots"

    def _delete(self, number: int) -> None:
        path = self._path(number)
        path.with_suffix(".journal").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def _problem(self, text: str) -> None:
        self.problems.append(text)
