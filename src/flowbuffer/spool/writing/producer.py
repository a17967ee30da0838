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

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowbuffer.clock import Clock
from flowbuffer.errors import InvalidPoint, SpoolGone
from flowbuffer.settings.settings import Settings
from flowbuffer.spool import layout
from flowbuffer.spool.folders import ProducerDirectory, Spool
from flowbuffer.spool.layout import COMMITTED, EXPLICIT, SERIES, SLOT, SLOT_SIZE, STATE_OFFSET, VOID
from flowbuffer.spool.segment_files import Ending, segment_path
from flowbuffer.spool.writing.growing_file import append_frame
from flowbuffer.spool.writing.places import DROPPED, LEFT_TO_PARENT, Places, Segment
from flowbuffer.spool.writing.points import (
    checked_key,
    checked_mapping,
    checked_series,
    checked_step,
    checked_text,
    checked_timestamp,
    checked_value,
)
from flowbuffer.spool.writing.room import Room
from flowbuffer.spool.writing.segments import sync_directory
from flowbuffer.spool.writing.stores import Store, Stores
from flowbuffer.spool.writing.written_keys import WrittenKeys

#: The first segment is small, so that a short job takes little; the others hold 64 Ki points.
FIRST_SEGMENT_SLOTS = 4096
SEGMENT_SLOTS = 65536

#: A journal longer than this, in bytes, ends its segment.
_LONG_JOURNAL = 64 << 20

_pack_into = SLOT.pack_into


class Producer(Stores):
    """One process logging to one run.

    Args:
        directory: The producer's folder, its lock held.
        spool: The spool that the folder is part of.
        settings: ``max_spool_bytes``, ``when_full``, ``block_timeout_s`` and ``durability``.
        clock: The time of the points.
        hurry: Called when delivery should not linger: someone waits, or the spool is full.
        stored_key: Makes the key that is stored from the key that the caller gave.
        anew: What gives, for the name of a call that logs, the one that takes its place where the
            folder was wiped; None raises :class:`SpoolGone`.
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
        anew: Callable[[], Callable[[str], Callable[..., Places]] | None] = lambda: None,
        segment_slots: tuple[int, int] = (FIRST_SEGMENT_SLOTS, SEGMENT_SLOTS),
    ) -> None:
        room = Room(spool, settings, clock, hurry)
        # A small spool has room for several segments still, so that delivered ones can go.
        most = max(settings.max_spool_bytes // 4 // SLOT_SIZE, 1)
        slots = [min(slots, most) for slots in segment_slots]
        durable = settings.durability == "power"
        super().__init__(directory, room, hurry, slots, durable=durable)
        self._anew = anew
        self._now_ns = clock.now_ns
        # A journal goes with its segment, so a segment ends when its journal is long.
        self._journal_limit = min(_LONG_JOURNAL, settings.max_spool_bytes // 8)
        self._keys = WrittenKeys(self._path_of("keys"), room, stored_key, durable=durable)
        self._key_ids = self._keys.metrics
        self._journal_end = (-1, 0)  # the number of the last journal written to, and its size
        if durable:
            for folder in (directory.path, directory.path.parent, spool.root):
                sync_directory(folder)

    @property
    def dropped(self) -> Counter[str]:
        """Points for which there was no room, by reason."""
        return self._room.dropped

    def go_on_from(self, before: Producer) -> None:
        """Begin with the key ids of another producer, whose key table is in the folder already."""
        self._keys.go_on_from(before._keys)

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
            try:
                key_id = self._add_key(key)
            except SpoolGone as gone:
                return self._log_anew(gone, "append", key, value, step, timestamp)
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
            try:
                lost = self._make_room(error, buffer, offset, segment, step)
            except SpoolGone as gone:
                return self._log_anew(gone, "append", key, value, step, timestamp)
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
                except SpoolGone as gone:
                    places += self._log_anew(gone, "append", key, value, step, timestamp)
                    continue
            offset = reserve()
            try:
                _pack_into(buffer, offset, time, value, step, offset, key_id, flags, COMMITTED)
            except BaseException as error:
                try:
                    lost = self._make_room(error, buffer, offset, segment, step)
                    places += lost or self.append(key, value, step, timestamp)
                except SpoolGone as gone:
                    places += self._log_anew(gone, "append", key, value, step, timestamp)
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
        try:
            key_id = self._add_key(key, len(columns[0]))
        except SpoolGone as gone:
            return self._log_anew(gone, "append_series", key, values, steps, timestamps)
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
            try:
                places += self._append_frame(frame, key_id, len(value))
            except SpoolGone as gone:
                rest: list[Any] = [None if column is None else column[first:] for column in columns]
                if rest[1] is None:
                    rest[1] = range(first, len(columns[0]))
                return [*places, *self._log_anew(gone, "append_series", key, *rest)]
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
            try:
                places += self._append_text(kind, key, text)
            except SpoolGone as gone:
                places += self._log_anew(gone, "append_texts", kind, {key: text})
        return places

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

    def _log_anew(self, gone: SpoolGone, name: str, *args: Any) -> Places:
        """What a call that met a wiped folder did not log."""
        self.is_gone = True
        anew = self._anew()
        if anew is None:
            raise gone
        return anew(name)(*args)

    def _needed(self) -> list[Path]:
        written = self._keys.metrics or self._keys.texts
        return super()._needed() + ([self._path_of("keys")] if written else [])

    def _append_text(self, kind: int, key: str, text: str) -> Places:
        self._check_open()
        key_id = self._keys.add_text(key)
        if key_id is None:
            return DROPPED
        return self._append_frame(layout.text_frame(key_id, text), key_id, 1, kind)

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

    def _write_journal(self, frame: bytes) -> tuple[Store, int]:
        """Write to the journal of the current segment; what its slot needs, and the offset."""
        self._check_open()
        _, _, segment = self._current
        number, size = self._journal_end
        if segment.number < 0 or (segment.number == number and size > self._journal_limit):
            self._advance(segment)
        self._room.take(len(frame))
        store = self._current
        number = store[2].number
        journal = segment_path(self.directory.path, number, Ending.JOURNAL)
        position = append_frame(journal, frame, durable=self._durable)
        self._journal_end = number, position + len(frame)
        return store, position
