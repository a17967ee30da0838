"""The writing side of the spool: one fixed-size store into a mapped file per point.

The path of a point takes no lock, allocates nothing beyond the point's own objects, and makes no
system call. A slot is reserved with ``itertools.count`` (atomic under the interpreter's lock) and
stored with one ``Struct.pack_into``; a store beyond the end of the segment fails, and that failure
is how a thread learns that it is time for the next segment.

Nothing here is guarded by a lock. A signal handler, or a ``__del__``, may log between any two lines
of a call that logs, in the same thread, or end it by an exception; other threads log all the time.
So each change of state is one operation of a dict, a list or a count, made when what it publishes
is whole, and whoever finds something half done by a call that was interrupted goes on from there.
"""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowbuffer.clock import Clock
from flowbuffer.errors import FlowbufferError, InvalidPoint
from flowbuffer.settings import Settings
from flowbuffer.spool import layout
from flowbuffer.spool.directory import ProducerDirectory, Spool
from flowbuffer.spool.growing_file import append_frame
from flowbuffer.spool.layout import COMMITTED, EXPLICIT, SERIES, SLOT, SLOT_SIZE, STATE_OFFSET, VOID
from flowbuffer.spool.places import DROPPED, LEFT_TO_PARENT, Places, Segment
from flowbuffer.spool.points import (
    checked_key,
    checked_mapping,
    checked_series,
    checked_step,
    checked_text,
    checked_timestamp,
    checked_value,
)
from flowbuffer.spool.room import Room
from flowbuffer.spool.segments import segment, sync_directory
from flowbuffer.spool.written_keys import WrittenKeys
from flowbuffer.turn import Turn

#: The first segment is small, so that a short job takes little; the others hold 64 Ki points.
FIRST_SEGMENT_SLOTS = 4096
SEGMENT_SLOTS = 65536

#: A journal longer than this, in bytes, ends its segment.
_LONG_JOURNAL = 64 << 20

_pack_into = SLOT.pack_into

#: Reserves a slot's offset; the mapped segment; the segment.
_Store = tuple[Callable[[], int], Any, Segment]


class Producer:
    """One process logging to one run.

    Args:
        directory: The producer's folder, its lock held.
        spool: The spool that the folder is part of.
        settings: ``max_spool_bytes``, ``when_full``, ``block_timeout_s`` and ``durability``.
        clock: The time of the points.
        hurry: Called when delivery should not linger: someone waits, or the spool is full.
        stored_key: Makes the key that is stored from the key that the caller gave.
        segment_slots: The slots of the first segment and of the others.
    """

    def __init__(
        self,
        directory: ProducerDirectory,
        spool: Spool,
        settings: Settings,
        clock: Clock,
        hurry: Callable[[], None],
        stored_key: Callable[[str], str] = str,
        segment_slots: tuple[int, int] = (FIRST_SEGMENT_SLOTS, SEGMENT_SLOTS),
    ) -> None:
        self.directory = directory
        self._room = Room(spool, settings, clock, hurry)
        self._now_ns = clock.now_ns
        self._hurry = hurry
        # A journal goes with its segment, so a segment ends when its journal is long.
        self._journal_limit = min(_LONG_JOURNAL, settings.max_spool_bytes // 8)
        # A small spool has room for several segments still, so that delivered ones can go.
        most = max(settings.max_spool_bytes // 4 // SLOT_SIZE, 1)
        self._segment_slots = [min(slots, most) for slots in segment_slots]
        self._turn = Turn()
        self._power = settings.durability == "power"
        path = directory.path / "keys"
        self._keys = WrittenKeys(path, self._room, stored_key, durable=self._power)
        self._key_ids = self._keys.metrics
        self._journal_end = (-1, 0)  # the number of the last journal written to, and its size
        self._open = True
        self._in_child = False  # forked, while the parent goes on
        self._end: tuple[int, int] | None = None  # the last barrier, once stopped
        # What a store needs, in one tuple, so that no thread ever sees halves of two segments.
        # At first there is no room, so the first store makes the first segment.
        self._current: _Store = (
            itertools.count().__next__,
            bytearray(),
            Segment(self._path(-1, "slots"), -1, hurry),
        )
        # Every store that there was, by number; None once the next one is there. Who makes a store
        # that another thread, or the call that it interrupted, has made finds that here.
        self._stores: dict[int, _Store | None] = {}
        if self._power:
            for folder in (directory.path, directory.path.parent, spool.root):
                sync_directory(folder)

    @property
    def dropped(self) -> Counter[str]:
        """Points for which there was no room, by reason."""
        return self._room.dropped

    def go_on_from(self, before: Producer) -> None:
        """Begin with the key ids of another producer, whose key table is in the folder already."""
        self._keys.go_on_from(before._keys)

    def used(self) -> object:
        """Something that is another thing after each call that stored a point."""
        reserve, _, segment = self._current
        return segment.number, repr(reserve.__self__)  # type: ignore[attr-defined]

    # The calls that log. Everything that can fail comes before the reservation.

    def append(self, key: str, value: Any, step: Any = None, timestamp: Any = None) -> Places:
        """Store one point and return its place.

        Raises:
            InvalidPoint: The key, value, step or timestamp cannot be logged.
            SpoolFull: There is no room (``when_full``).
        """
        try:
            key_id: int | None = self._key_ids[key]
        except (KeyError, TypeError):
            key_id = self._add_key(key)
            if key_id is None:
                return DROPPED
        if type(value) is not float:
            value = checked_value(key, value)
        if step is None:
            step = 0
        elif type(step) is not int:
            step = checked_step(step)
        # The time comes before the reservation: a thread that is held up between the two then
        # stores a time before its neighbours', and rises to theirs within its own call. The other
        # way round, all that the others logged meanwhile would rise to its time.
        if timestamp is None:
            time = self._now_ns()
            flags = 0
        else:
            time = checked_timestamp(timestamp)
            flags = EXPLICIT
        reserve, buffer, segment = self._current
        offset = reserve()
        try:
            _pack_into(buffer, offset, time, value, step, offset, key_id, flags, COMMITTED)
        except BaseException as error:
            lost = self._make_room(error, buffer, offset, segment, step)
            return lost or self.append(key, value, step, timestamp)
        return segment, offset

    def append_many(
        self, metrics: Mapping[str, Any], step: Any = None, timestamp: Any = None
    ) -> Places:
        """Store one point per key, all with one step and time; the places in the order of the keys.

        Raises:
            InvalidPoint: As :meth:`append`, after all points that can be logged were stored.
            SpoolFull: There is no room (``when_full``).
        """
        step = 0 if step is None else checked_step(step)
        if timestamp is None:
            time, flags = self._now_ns(), 0
        else:
            time, flags = checked_timestamp(timestamp), EXPLICIT
        places: list[Segment | int | str | None] = []
        errors: list[InvalidPoint] = []
        key_ids, (reserve, buffer, segment) = self._key_ids, self._current
        for key, value in checked_mapping("metrics", metrics).items():
            try:
                key_id: int | None = key_ids[key]
                if type(value) is not float:
                    value = checked_value(key, value)
            except (KeyError, InvalidPoint):
                try:
                    value = checked_value(key, value)
                    key_id = self._add_key(key)
                    if key_id is None:
                        places += DROPPED
                        continue
                except InvalidPoint as error:
                    errors.append(error)
                    continue
            offset = reserve()
            try:
                _pack_into(buffer, offset, time, value, step, offset, key_id, flags, COMMITTED)
            except BaseException as error:
                lost = self._make_room(error, buffer, offset, segment, step)
                places += lost or self.append(key, value, step, timestamp)
                reserve, buffer, segment = self._current
                continue
            places += segment, offset
        if errors:
            invalid = InvalidPoint("; ".join(map(str, errors)))
            invalid.stored, invalid.count = places, len(errors)
            raise invalid
        return places

    def append_series(
        self, key: str, values: Any, steps: Any = None, timestamps: Any = None
    ) -> Places:
        """Store a series: one journal frame and one slot for each 64 Ki points of it.

        Raises:
            InvalidPoint: As :meth:`append`, for the series as a whole; nothing of it was stored.
            SpoolFull: There is no room (``when_full``).
        """
        columns = checked_series(checked_key(key), values, steps, timestamps)
        key_id = self._add_key(key, len(columns[0]))
        if key_id is None:
            return DROPPED
        places: list[Segment | int | str | None] = []
        for first in range(0, len(columns[0]), layout.MAX_SERIES_POINTS):
            value, step, time = (
                None if column is None else column[first : first + layout.MAX_SERIES_POINTS]
                for column in columns
            )
            assert value is not None
            frame = layout.series_frame(key_id, first, value, step, time)
            places += self._append_frame(frame, key_id, len(value))
        return places

    def append_texts(self, kind: int, texts: Mapping[str, Any]) -> Places:
        """Store parameters or, as ``kind`` says, tags: a journal frame and a slot for each.

        Raises:
            InvalidPoint: A key or value cannot be logged; nothing of the call was stored.
            SpoolFull: There is no room (``when_full``).
        """
        texts = checked_mapping("parameters" if kind == layout.PARAM else "tags", texts)
        try:
            checked = {checked_key(key): checked_text(kind, key, texts[key]) for key in texts}
        except InvalidPoint as error:
            error.count = len(texts)
            raise
        places: list[Segment | int | str | None] = []
        for key, text in checked.items():
            self._check_open()
            key_id = self._keys.add_text(key)
            if key_id is None:
                places += DROPPED
                continue
            places += self._append_frame(layout.text_frame(key_id, text), key_id, 1, kind)
        return places

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
        assert self._end is not None
        reserve, buffer, segment = self._current
        if not segment.path.exists():
            self.directory.lock.release()  # nothing was logged, or all of it is delivered
        elif buffer:
            outcome = layout.FAILED if failed else layout.FINISHED
            slots = (self._end[1] - layout.SEGMENT_HEADER_SIZE) // SLOT_SIZE
            fields = layout.closed_fields(slots, outcome)
            buffer[layout.CLOSED_OFFSET : layout.CLOSED_OFFSET + len(fields)] = fields
        self._current = (reserve, bytearray(), segment)  # unmapped; closed before, if it is that
        self._stores = dict.fromkeys(self._stores)

    def abandon(self) -> None:
        """In a forked child: the parent goes on writing, and nothing is stored here any more, not
        even by the call in which the fork was."""
        self._in_child = True
        self._open = False
        for store in self._stores.values():
            if store is not None:
                store[1].close()

    # What is seldom needed: keys, segments, journals, no room.

    def _add_key(self, key: Any, points: int = 1) -> int | None:
        self._check_open()
        return self._keys.add_metric(key, points)

    def _make_room(
        self,
        error: BaseException,
        buffer: Any,
        offset: int,
        segment: Segment,
        step: Any,
        points: int = 1,
    ) -> Places | None:
        """After a store failed: None if it can be tried again; else why the points are nowhere.

        Raises:
            SpoolFull: There is no room.
            BaseException: ``error`` itself where it was no lack of room; the slot is void then.
        """
        if self._in_child:
            return LEFT_TO_PARENT
        if offset + SLOT_SIZE <= len(buffer):
            buffer[offset + STATE_OFFSET] = VOID
            if isinstance(error, struct.error):
                checked_step(step)
            raise error
        return None if self._room.wait_for(lambda: self._advance(segment), points) else DROPPED

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
                self._current = store
                self._stores[full.number] = None
            self._check_open()
            return self._current[2]

    def _new_store(self, number: int) -> _Store:
        slots = self._segment_slots[number > 0]
        self._room.take(layout.segment_size(slots))
        path = self._path(number, "slots")
        buffer = segment(path, number, slots, durable=self._power)
        reserve = itertools.count(layout.SEGMENT_HEADER_SIZE, SLOT_SIZE).__next__
        return reserve, buffer, Segment(path, number, self._hurry)

    def _append_frame(self, frame: bytes, key_id: int, points: int, flags: int = SERIES) -> Places:
        """Store a journal frame and the slot that points to it."""
        while True:
            time = self._now_ns()
            written = self._room.wait_for(lambda: self._write_journal(frame), points)
            if written is None:
                return DROPPED
            (reserve, buffer, segment), position = written
            slot = (time, float(points), position)
            offset = reserve()
            try:
                _pack_into(buffer, offset, *slot, offset, key_id, flags, COMMITTED)
            except BaseException as error:
                lost = self._make_room(error, buffer, offset, segment, position, points)
                if lost is not None:
                    return lost
                continue
            return segment, offset

    def _write_journal(self, frame: bytes) -> tuple[_Store, int]:
        """Write to the journal of the current segment; what its slot needs, and the offset."""
        self._check_open()
        _, _, segment = self._current
        number, size = self._journal_end
        if segment.number < 0 or (segment.number == number and size > self._journal_limit):
            self._advance(segment)
        self._room.take(len(frame))
        store = self._current
        number = store[2].number
        position = append_frame(self._path(number, "journal"), frame, durable=self._power)
        self._journal_end = number, position + len(frame)
        return store, position

    def _check_open(self) -> None:
        if not self._open:
            raise FlowbufferError("this logger is closed; a closed logger takes no more points")

    def _path(self, number: int, kind: str) -> Path:
        return self.directory.path / f"{number:08d}.{kind}"


def _reserve_rest(reserve: Any, buffer: Any) -> list[int]:
    """Reserve what is left of a segment, in one step; the offsets, one or more beyond its end."""
    return list(itertools.islice(reserve.__self__, len(buffer) // SLOT_SIZE + 1))
