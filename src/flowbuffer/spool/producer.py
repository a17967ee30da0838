"""The writing side of the spool: one fixed-size store into a mapped file per point.

The path of a point takes no lock, allocates nothing beyond the point's own objects, and makes no
system call. A slot is reserved with ``itertools.count`` (atomic under the interpreter's lock) and
stored with one ``Struct.pack_into``; a store beyond the end of the segment fails, and that failure
is how a thread learns that it is time for the next segment.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowbuffer.clock import Clock
from flowbuffer.errors import FlowbufferError, InvalidPoint
from flowbuffer.settings import Settings
from flowbuffer.spool import layout
from flowbuffer.spool.directory import ProducerDirectory, Spool
from flowbuffer.spool.growing_file import GrowingFile
from flowbuffer.spool.layout import COMMITTED, EXPLICIT, SERIES, SLOT, SLOT_SIZE, STATE_OFFSET, VOID
from flowbuffer.spool.places import DROPPED, Places, Segment
from flowbuffer.spool.points import (
    MetricKey,
    checked_key,
    checked_series,
    checked_step,
    checked_text,
    checked_timestamp,
    checked_value,
)
from flowbuffer.spool.room import Room
from flowbuffer.spool.segments import new_segment, sync_directory

#: The first segment is small, so that a short job takes little; the others hold 64 Ki points.
FIRST_SEGMENT_SLOTS = 4096
SEGMENT_SLOTS = 65536

#: A journal longer than this, in bytes, ends its segment.
_LONG_JOURNAL = 64 << 20

_pack_into = SLOT.pack_into


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
        self._stored_key = stored_key
        # A journal goes with its segment, so a segment ends when its journal is long.
        self._journal_limit = min(_LONG_JOURNAL, settings.max_spool_bytes // 8)
        # A small spool has room for several segments still, so that delivered ones can go.
        most = max(settings.max_spool_bytes // 4 // SLOT_SIZE, 1)
        self._segment_slots = [min(slots, most) for slots in segment_slots]
        self._lock = threading.RLock()  # a signal handler may flush while this thread holds it
        self._end: tuple[int, int] | None = None  # the last barrier, once stopped
        self._last_buffer: Any = None
        self._power = settings.durability == "power"
        self._key_ids: dict[Any, int] = {}  # by str or MetricKey; by (str,) of texts
        self._keys = GrowingFile(directory.path / "keys", durable=self._power)
        self._journal: GrowingFile | None = None
        # What a store needs, in one tuple, so that no thread ever sees halves of two segments.
        # At first there is no room, so the first store makes the first segment.
        self._current: tuple[Callable[[], int], Any, Segment] = (
            itertools.count().__next__,
            bytearray(),
            Segment(self._path(-1, "slots"), -1, hurry),
        )
        if self._power:
            for folder in (directory.path, directory.path.parent, spool.root):
                sync_directory(folder)

    @property
    def dropped(self) -> Counter[str]:
        """Points for which there was no room, by reason."""
        return self._room.dropped

    # The calls that log. Everything that can fail comes before the reservation.

    def append(self, key: str, value: Any, step: Any = None, timestamp: Any = None) -> Places:
        """Store one point and return its place.

        Raises:
            InvalidPoint: The key, value, step or timestamp cannot be logged.
            SpoolFull: There is no room (``when_full``).
        """
        try:
            key_id = self._key_ids[key]
        except (KeyError, TypeError):
            if not self._add_key(key):
                return DROPPED
            key_id = self._key_ids[key]
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
            if not self._make_room(error, buffer, offset, segment, step):
                return DROPPED
            return self.append(key, value, step, timestamp)
        return segment, offset

    def append_many(
        self, metrics: Mapping[str, Any], step: Any = None, timestamp: Any = None
    ) -> Places:
        """Store one point per key, all with one step and time; the places in the order of the keys.

        Raises:
            InvalidPoint: As :meth:`append`, after all points that can be logged were stored.
            SpoolFull: There is no room (``when_full``).
        """
        if step is None:
            step = 0
        elif type(step) is not int:
            step = checked_step(step)
        if timestamp is None:
            time, flags = self._now_ns(), 0
        else:
            time, flags = checked_timestamp(timestamp), EXPLICIT
        places: list[Segment | int | str | None] = []
        errors: list[InvalidPoint] = []
        key_ids = self._key_ids
        reserve, buffer, segment = self._current
        for key, value in metrics.items():
            try:
                key_id = key_ids[key]
                if type(value) is not float:
                    value = checked_value(key, value)
            except (KeyError, InvalidPoint):
                try:
                    value = checked_value(key, value)
                    if not self._add_key(key):
                        places += DROPPED
                        continue
                    key_id = key_ids[key]
                except InvalidPoint as error:
                    errors.append(error)
                    continue
            offset = reserve()
            try:
                _pack_into(buffer, offset, time, value, step, offset, key_id, flags, COMMITTED)
            except BaseException as error:
                if self._make_room(error, buffer, offset, segment, step):
                    places += self.append(key, value, step, timestamp)
                else:
                    places += DROPPED
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
        if not self._add_key(key, len(columns[0])):
            return DROPPED
        key_id = self._key_ids[key]
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
        try:
            checked = {checked_key(key): checked_text(kind, key, texts[key]) for key in texts}
        except InvalidPoint as error:
            error.count = len(texts)
            raise
        places: list[Segment | int | str | None] = []
        for key, text in checked.items():
            if not self._add_key((key,)):
                places += DROPPED
                continue
            key_id = self._key_ids[(key,)]
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
        with self._lock:
            if self._end is None:
                self._end = self.barrier()
                _, self._last_buffer, segment = self._current
                self._current = (itertools.count().__next__, bytearray(), segment)
                self._keys.close()
                self._close_journal()

    def close(self, *, failed: bool = False) -> None:
        """Stop, and leave the folder to whoever delivers it, and deletes it then.

        Args:
            failed: The job did not end well.
        """
        self.stop()
        assert self._end is not None
        buffer, self._last_buffer = self._last_buffer, None
        if buffer is None:
            return  # closed before
        if self._current[2].path.exists():
            outcome = layout.FAILED if failed else layout.FINISHED
            slots = (self._end[1] - layout.SEGMENT_HEADER_SIZE) // SLOT_SIZE
            fields = layout.closed_fields(slots, outcome)
            buffer[layout.CLOSED_OFFSET : layout.CLOSED_OFFSET + len(fields)] = fields
        else:
            self.directory.lock.release()  # nothing was logged, or all of it is delivered

    def abandon(self) -> None:
        """In a forked child: close what was inherited; the parent goes on writing."""
        if self._end is None:
            self._keys.close()
            self._close_journal()

    # What is seldom needed: keys, segments, journals, no room.

    def _add_key(self, key: Any, points: int = 1) -> bool:
        """Give a key its id; False if its ``points`` were dropped because the disk is full."""
        if isinstance(key, MetricKey):
            stored = key.stored(self._checked_stored_key(key.key))
        elif isinstance(key, tuple):
            (stored,) = key  # of a parameter or tag, which the template is not for
        else:
            stored = self._checked_stored_key(key)
            key = str(key)
        return self._room.wait_for(lambda: self._write_key(key, stored), points) is not None

    def _checked_stored_key(self, key: Any) -> str:
        return checked_key(self._stored_key(checked_key(key)))

    def _write_key(self, key: Any, stored: str) -> int:
        with self._lock:
            self._check_open()
            if key not in self._key_ids:
                identity = len(self._key_ids)
                self._keys.write(layout.frame(identity, stored.encode()))
                self._key_ids[key] = identity
            return self._key_ids[key]

    def _make_room(
        self,
        error: BaseException,
        buffer: Any,
        offset: int,
        segment: Segment,
        step: Any,
        points: int = 1,
    ) -> bool:
        """After a store failed: True if it can be tried again, False if the points were dropped.

        Raises:
            SpoolFull: There is no room.
            BaseException: ``error`` itself where it was no lack of room; the slot is void then.
        """
        if offset + SLOT_SIZE <= len(buffer):
            buffer[offset + STATE_OFFSET] = VOID
            if isinstance(error, struct.error):
                checked_step(step)
            raise error
        return self._room.wait_for(lambda: self._advance(segment), points) is not None

    def _advance(self, full: Segment) -> Segment:
        """Go on to the segment after ``full``, unless another thread did; the current one."""
        with self._lock:
            self._check_open()
            reserve, buffer, segment = self._current
            if segment is not full:
                return segment
            self._current = self._next_segment(full.number + 1)
            self._close_journal()
            # If room was left, it is taken here, so that the reader does not wait for it.
            while (offset := reserve()) + SLOT_SIZE <= len(buffer):
                buffer[offset + STATE_OFFSET] = VOID
            return self._current[2]

    def _next_segment(self, number: int) -> tuple[Callable[[], int], Any, Segment]:
        slots = self._segment_slots[number > 0]
        self._room.take(layout.segment_size(slots))
        path = self._path(number, "slots")
        buffer = new_segment(path, number, slots, durable=self._power)
        reserve = itertools.count(layout.SEGMENT_HEADER_SIZE, SLOT_SIZE).__next__
        return reserve, buffer, Segment(path, number, self._hurry)

    def _append_frame(self, frame: bytes, key_id: int, points: int, flags: int = SERIES) -> Places:
        """Store a journal frame and the slot that points to it."""
        while True:
            time = self._now_ns()
            written = self._room.wait_for(lambda: self._write_journal(frame), points)
            if written is None:
                return DROPPED
            reserve, buffer, segment, position = written
            slot = (time, float(points), position)
            offset = reserve()
            try:
                _pack_into(buffer, offset, *slot, offset, key_id, flags, COMMITTED)
            except BaseException as error:
                if not self._make_room(error, buffer, offset, segment, position, points):
                    return DROPPED
                continue
            return segment, offset

    def _write_journal(self, frame: bytes) -> tuple[Callable[[], int], Any, Segment, int]:
        """Write to the journal of the current segment; what its slot needs, and the offset."""
        with self._lock:
            self._check_open()
            journal_size = 0 if self._journal is None else self._journal.size
            if self._current[2].number < 0 or journal_size > self._journal_limit:
                self._advance(self._current[2])
            self._room.take(len(frame))
            reserve, buffer, segment = self._current
            if self._journal is None:
                path = self._path(segment.number, "journal")
                self._journal = GrowingFile(path, durable=self._power)
            return reserve, buffer, segment, self._journal.write(frame)

    def _check_open(self) -> None:
        if self._end is not None:
            raise FlowbufferError("this logger is closed; a closed logger takes no more points")

    def _path(self, number: int, kind: str) -> Path:
        return self.directory.path / f"{number:08d}.{kind}"

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
