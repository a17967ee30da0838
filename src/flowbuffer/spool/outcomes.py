"""What became of points: the one place that says "delivered", in which absence never means success.

A point is delivered if its slot says so; if its segment was retired, which ``carry`` says, and
nothing else is kept of it; or if its folder was removed by whoever delivered it, which the file
``removed`` of the spool says. What is gone without such a record may have been wiped, so nobody
knows what became of it. What cannot be looked at now is pending: whoever waits asks again.

A retired segment in which not all is delivered leaves its slots' states: ``00000000.states`` is one
frame, its id the number of slots, its payload their states, compressed by zlib. One that was found
missing leaves an empty file, ``00000000.lost``.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from flowbuffer.errors import SpoolFormatError
from flowbuffer.spool import dead_letters, layout, removed
from flowbuffer.spool.carry import read_carry, write_in_room_of
from flowbuffer.spool.files import opened, read_file
from flowbuffer.spool.segment_files import Ending, number_of, slot_at


class Outcome(Enum):
    """What became of a point."""

    #: To be delivered; or what became of it cannot be looked up now.
    PENDING = "pending"
    DELIVERED = "delivered"
    #: A dead letter.
    REJECTED = "rejected"
    #: Its segment cannot be read, and is kept.
    DAMAGED = "damaged"
    #: Nobody knows: it is not delivered as far as is known.
    UNKNOWN = "unknown"


_BY_STATE = {
    layout.EMPTY: Outcome.PENDING,
    layout.COMMITTED: Outcome.PENDING,
    layout.DELIVERED: Outcome.DELIVERED,
    layout.REJECTED: Outcome.REJECTED,
    layout.VOID: Outcome.UNKNOWN,  # stored long after it was passed over, if at all
}


def slot_outcomes(segment: Path, offsets: Sequence[int]) -> list[Outcome]:
    """What became of the slots at these offsets of a segment.

    Args:
        segment: The path of its file, which need not be there any more.
        offsets: In bytes, from the file's start.
    """
    try:
        try:
            return _of_states(_states_in(segment, offsets))
        except FileNotFoundError:
            return _of_absent(segment, offsets)
    except OSError:
        return [Outcome.PENDING] * len(offsets)


def segment_outcome(segment: Path) -> Outcome:
    """What became of the points of a segment whose file is not there: DELIVERED if they all were,
    REJECTED if each of them was delivered or rejected.

    Raises:
        OSError: That is not known now.
    """
    folder, number = segment.parent, number_of(segment)
    if is_there(segment.with_suffix(Ending.DAMAGED)):
        return Outcome.DAMAGED
    if is_there(segment.with_suffix(Ending.LOST)):
        return Outcome.UNKNOWN
    if is_there(segment.with_suffix(Ending.STATES)):
        return Outcome.REJECTED
    if number < _first_segment(folder):
        return Outcome.DELIVERED
    recorded = _recorded(folder, number)
    if recorded is None and is_there(folder):
        reused = ("carry", segment.with_suffix(Ending.STATES).name)  # see write_in_room_of
        being_retired = any(is_there(folder / f".{name}.reused") for name in reused)
        return Outcome.PENDING if being_retired else Outcome.UNKNOWN
    return recorded or folder_outcome(folder, number)


def folder_outcome(folder: Path, number: int = 0) -> Outcome:
    """What became of the points of a producer's folder: PENDING if it is there, and may hold some;
    DELIVERED if they all were; REJECTED if each of them was delivered or rejected; UNKNOWN if
    nobody removed it who knew.

    Args:
        folder: Of a producer.
        number: Up to which of its segments.

    Raises:
        OSError: That is not known now.
    """
    for _ in range(2):
        if is_there(folder):
            return Outcome.PENDING
        recorded = _recorded(folder, number)
        if recorded is not None:
            return recorded
        if is_there(folder.with_name(f".{folder.name}")):
            return Outcome.PENDING  # it is being removed
    return Outcome.UNKNOWN


def _recorded(folder: Path, number: int) -> Outcome | None:
    """What is recorded of a segment of a folder that was removed; None if it was not."""
    delivered = removed.find(folder)
    if delivered is None:
        return None
    if delivered < 0:
        return Outcome.REJECTED
    return Outcome.DELIVERED if number < delivered else Outcome.UNKNOWN


def reasons(segment: Path, offsets: Sequence[int], outcomes: Sequence[Outcome]) -> list[str]:
    """Why slots of a segment are not delivered; nothing for those that are pending."""
    why = []
    refused = {
        slot_at(offset)
        for offset, outcome in zip(offsets, outcomes, strict=True)
        if outcome is Outcome.REJECTED
    }
    if refused:
        why += _reasons_of_rejected(segment, refused)
    if Outcome.DAMAGED in outcomes:
        why.append(f"its segment is damaged, and kept as {segment.with_suffix(Ending.DAMAGED)}")
    if Outcome.UNKNOWN in outcomes:
        why.append(_why_unknown(segment))
    return why


def _reasons_of_rejected(segment: Path, slots: set[int]) -> list[str]:
    try:
        letters = dead_letters.about(segment.parent, number_of(segment), slots)
    except OSError:
        letters = []
    found = [f"{letter.key!r}: {letter.reason}" for letter in letters]
    return found or ["it was rejected, and the dead letter with the reason is gone"]


def _why_unknown(segment: Path) -> str:
    folder = segment.parent
    try:
        if is_there(folder):
            return f"what became of it is not known: {segment} was wiped, or is damaged"
        if removed.find(folder) == -1:
            return (
                "what became of it is not known any more: it was delivered or rejected, and then "
                f"{folder} was removed (flowbuffer clean --rejected, or rejected --retry)"
            )
    except OSError:
        pass
    return (
        f"the spool was wiped: {folder} is gone, and not because its points were delivered; "
        "what became of it is not known"
    )


# States.


def keep_states(segment: Path, states: bytes) -> None:
    """Keep the states of a segment's slots beyond the segment, also on a full disk.

    Args:
        segment: The path of its file, which may be gone then.
        states: One byte for each slot.

    Raises:
        OSError: They cannot be written now.
    """
    frame = layout.frame(len(states), zlib.compress(states, 1))
    write_in_room_of(segment, segment.with_suffix(Ending.STATES), frame)


def _of_states(states: Sequence[int | None]) -> list[Outcome]:
    """None is a slot that is not there. A damaged state is that of a point not given up yet."""
    return [
        Outcome.UNKNOWN if state is None else _BY_STATE.get(state, Outcome.PENDING)
        for state in states
    ]


def _states_in(segment: Path, offsets: Sequence[int]) -> list[int | None]:
    with opened(segment, os.O_RDONLY) as file:
        descriptor = file.fileno()
        found = [os.pread(descriptor, 1, at + layout.STATE_OFFSET) for at in offsets]
    return [state[0] if state else None for state in found]


def _of_absent(segment: Path, offsets: Sequence[int]) -> list[Outcome]:
    outcome = segment_outcome(segment)
    if outcome is Outcome.REJECTED:
        kept = _kept_states(segment)
        slots = map(slot_at, offsets)
        found = _of_states([kept[slot] if 0 <= slot < len(kept) else None for slot in slots])
        return [Outcome.UNKNOWN if one is Outcome.PENDING else one for one in found]
    return [outcome] * len(offsets)


def _kept_states(segment: Path) -> bytes:
    """The states of a retired segment's slots; none if there are none to be known."""
    try:
        content = read_file(segment.with_suffix(Ending.STATES), limit=2 * layout.MAX_SEGMENT_SLOTS)
        slots, packed = layout.parse_frame(content)
        states = zlib.decompressobj().decompress(packed, layout.MAX_SEGMENT_SLOTS)
    except (FileNotFoundError, SpoolFormatError, zlib.error):
        return b""
    return states if len(states) == slots else b""


def _first_segment(folder: Path) -> int:
    """The number of the oldest segment that was not retired; 0 if that cannot be known."""
    try:
        return read_carry(folder).first
    except SpoolFormatError:
        return 0


def is_there(path: Path) -> bool:
    """Whether something is at ``path``.

    Raises:
        OSError: That is not known now.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
