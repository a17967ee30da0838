"""From the bytes of a segment to columns of points: what is checked, and how."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flowbuffer.errors import SpoolFormatError
from flowbuffer.spool import layout
from flowbuffer.spool.files import opened
from flowbuffer.spool.segment_files import offset_of, slot_at

SLOT_DTYPE: Final = np.dtype(layout.SLOT_COLUMNS)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Block:
    """Consecutive points of one segment, in the order of the calls; columns of one length.

    Who makes one (``blocks``, ``series_columns``, ``logger.succession``) goes by their order.

    ``slot``: index in the segment (the points of a series share theirs). ``key``: key id.
    ``time``: ms since the epoch. ``explicit``: the caller gave that time. ``state``: of the slot.
    ``kind``: 0 for a metric; PARAM or TAG for a text, whose ``step`` is its offset in the journal.
    """

    segment: int
    ends_segment: bool
    slot: NDArray[np.int32]
    key: NDArray[np.uint32]
    time: NDArray[np.int64]
    explicit: NDArray[np.bool_]
    value: NDArray[np.float64]
    step: NDArray[np.int64]
    state: NDArray[np.uint8]
    kind: NDArray[np.uint8]

    def only(self, points: NDArray[np.bool_]) -> Block:
        """Some of the points."""
        columns = [f.name for f in fields(self) if f.name not in ("segment", "ends_segment")]
        return replace(self, **{name: getattr(self, name)[points] for name in columns})


def mapped_segment(path: Path, number: int) -> tuple[NDArray[Any], NDArray[np.uint32], int]:
    """The slots of a segment and its fields ``wanted``, ``closed``, ``outcome`` and their checksum,
    as arrays over the mapped file; and how many slots are missing, because the file was cut off.

    Raises:
        SpoolFormatError: It is not segment ``number`` of this format, or has not one whole slot.
        SpoolError: It is a link, or not a regular file of this user.
    """
    with opened(path, os.O_RDWR) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        header = os.pread(descriptor, layout.SEGMENT_HEADER_SIZE, 0)
        slots = layout.parse_segment_header(header, number)
        # A file cut short holds what fits; to read beyond its end would be a SIGBUS.
        held = min(slots, max(slot_at(size), 0))
        if not held:
            raise SpoolFormatError("it has no slots")
        data = mmap.mmap(descriptor, layout.segment_size(held))
    return (
        np.frombuffer(data, SLOT_DTYPE, held, offset_of(0)),
        np.frombuffer(data, "<u4", 4, layout.WANTED_OFFSET),
        slots - held,
    )


def sound_slots(
    slots: NDArray[np.int32], rows: NDArray[Any], keys: Sequence[int]
) -> NDArray[np.bool_]:
    """Which of these slots can be what a producer wrote, if its key ids are ``keys``."""
    offsets = layout.SEGMENT_HEADER_SIZE + slots.astype(np.int64) * layout.SLOT_SIZE
    sound: NDArray[np.bool_] = (
        np.isin(rows["key"], keys)
        & (rows["offset"] == offsets)
        & np.isin(rows["flags"], layout.FLAGS)
        & np.isin(rows["state"], layout.STATES)
        & (rows["time"] >= 0)
    )
    return sound


def series_columns(journal: Path, slot: Sequence[Any]) -> Sequence[NDArray[Any]]:
    """The points of a series in the columns of :class:`Block`, from the columns of its slot.

    Raises:
        SpoolFormatError: Its frame is damaged, or is not the one that the slot means.
        OSError, struct.error: The journal is missing, or too short.
    """
    index, key, time, _, value, position, state, kind = slot
    n, payload = _journal_frame(journal, int(position))
    flags, own_key, first = layout.SERIES_HEADER.unpack_from(payload)
    has_steps, has_times = bool(flags & layout.SERIES_STEPS), bool(flags & layout.SERIES_TIMES)
    start = layout.SERIES_HEADER.size
    if len(payload) != start + 8 * n * (1 + has_steps + has_times):
        raise SpoolFormatError("it has not the length that it says")
    if (own_key, float(n)) != (key, value):
        raise SpoolFormatError("it is not the one that its slot means")
    steps = first + np.arange(n, dtype=np.int64)
    if has_steps:
        steps = np.frombuffer(payload, "<i8", n, start + 8 * n)
    times = np.full(n, time, np.int64)
    if has_times:
        times = np.frombuffer(payload, "<i8", n, len(payload) - 8 * n)
    return [
        np.full(n, index, np.int32),
        np.full(n, key, np.uint32),
        times,
        np.full(n, has_times, np.bool_),
        np.frombuffer(payload, "<f8", n, start),
        steps,
        np.full(n, state, np.uint8),
        np.full(n, kind, np.uint8),
    ]


def text_at(journal: Path, position: int, key: int) -> str:
    """The value of a parameter or tag, from its slot's key id and offset in the journal.

    Raises:
        SpoolFormatError: Its frame is damaged, or is not the one that the slot means.
        OSError, struct.error: The journal is missing, or too short.
    """
    _, payload = _journal_frame(journal, position)
    if layout.TEXT_HEADER.unpack_from(payload) != (key,):
        raise SpoolFormatError("it is not the one that its slot means")
    try:
        return payload[layout.TEXT_HEADER.size :].decode()
    except UnicodeDecodeError as error:
        raise SpoolFormatError(f"it is no text: {error}") from error


def _journal_frame(journal: Path, position: int) -> tuple[int, bytes]:
    with opened(journal, os.O_RDONLY) as file:
        size = os.fstat(file.fileno()).st_size
        if not 0 <= position < size:
            raise SpoolFormatError("its frame is beyond the journal's end")
        file.seek(position)
        head = file.read(layout.FRAME_HEADER.size)
        length = layout.FRAME_HEADER.unpack(head)[1]
        return layout.parse_frame(head + file.read(max(min(length, size - file.tell()), 0)))
