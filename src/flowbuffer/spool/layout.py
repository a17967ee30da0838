"""The bytes of a spool, all little-endian. Format version 1.

::

    <spool_dir>/                     mode 0700, files 0600
      spool.json                     the mark: this folder is a spool, of this format
      collector.lock                 flock, held by the collector process; its pid
      collector.environment          the fingerprint of that process's environment
      collector-<fingerprint>.lock   as collector.lock, of one with another environment
      collector.log                  what that process has to say
      runs.json, runs.lock           runs that ``flowbuffer sync`` created
      <run>/<producer>/              one producer: one process logging to one run
        producer.json                who wrote this, and for which server; no credentials
        producer.lock                flock, held while the producer lives
        reader.lock                  flock, held by whoever delivers this folder
        keys                         key table: frames, in the order of their ids
        00000000.slots               a segment: a header and a fixed number of slots
        00000000.journal             frames that the slots of that segment point to
        carry                        one frame: what outlives a deleted segment
        delivery.json                how delivery is doing: for people and who waits; no point
                                     depends on it
        rejected.jsonl               dead letters, one JSON object a line
        00000000.damaged             a segment that could not be read, kept
        00000000.states              what became of the slots of a segment that was deleted, if not
                                     all of them are delivered (see ``outcomes``)
        00000000.lost                this segment was found missing; empty
        retried.jsonl                dead letters whose points were put into the spool again
        parked.json                  why this run takes no more points, if it does not
      removed, removed.old           which folders were removed whole (see ``removed``)

A run's folder is named after the run, a producer's ``<host>-<pid>-<12 hex digits>``, with a dot
before it while it is being made or deleted. A file that is not whole yet has a number and ``.new``
after its name, and a dot before it. What has another name is not flowbuffer's, and is left alone.

**Segment**: a header of 64 bytes, then slots of 40.

    ======  =====  ===========================================================================
    offset  type   header
    ======  =====  ===========================================================================
    0       8s     magic ``FLOWSLOT``
    8       u16    format version
    10      u16    size of a slot in bytes
    12      u32    number of slots
    16      u32    number of this segment, as in the file's name
    20      u32    CRC-32 of bytes 0 to 19
    24      u32    wanted: how many slots from the first somebody waits for (skips the linger)
    28      u32    closed: 0, or 1 + how many slots hold points: the producer was closed here
    32      u32    outcome: of a closed producer's job, 1 finished · 2 failed
    36      u32    CRC-32 of bytes 28 to 35, once the producer was closed
    40      24x    zero
    ======  =====  ===========================================================================

    ======  =====  ===========================================================================
    offset  type   slot
    ======  =====  ===========================================================================
    0       i64    time: ns since the epoch, of the call; in ms if EXPLICIT
    8       f64    value; of a SERIES: the number of its points; of a PARAM or TAG: 1
    16      i64    step; of a SERIES, PARAM or TAG: the offset of its frame in the journal
    24      u32    offset of this slot in its file, so that a misplaced slot shows
    28      u32    key id
    32      u16    0, or one of: 1 EXPLICIT, the caller gave the timestamp · 2 SERIES · 4 PARAM ·
                   8 TAG
    34      5x     zero
    39      u8     state: 0x00 empty · 0x17 committed · 0x2B delivered · 0x4D rejected · 0x8E void
    ======  =====  ===========================================================================

The state is the last byte and is stored last; its values differ in three bits or more, so that a
damaged one is seen. A producer writes a slot once; after that only the
state changes, and only the one that delivers changes it. An empty slot of a dead producer, and a
void one anywhere, held no point whose call returned.

**Frame** (keys, journal, carry): a header of 16 bytes, then the payload.

    ======  =====  ===========================================================================
    offset  type   frame header
    ======  =====  ===========================================================================
    0       4s     magic ``FLOW``
    4       u32    length of the payload in bytes
    8       u32    id: of a key; of a journal frame, the number of its points; of a carry, version
    12      u32    CRC-32 of the header's bytes 4 to 11 and the payload
    ======  =====  ===========================================================================

A frame that is torn or damaged fails its checksum and is reported; a key frame carries its own id,
so that a damaged table can lose keys but never swap them.

**Key payload**: the key, UTF-8. Of metrics that are about a model or a dataset, it is followed by a
NUL and the model's id, a NUL and the dataset's name, a NUL and its digest.

**Series payload** (n points): u32 flags (1: steps follow, else they count from the next field;
2: timestamps follow in ms, given by the caller, else the slot's time), u32 key id, i64 first step,
then n f64 values, then n i64 steps if they follow, then n i64 timestamps if they follow.

**Text payload** (a parameter's or a tag's value): u32 key id, then the value, UTF-8.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, Final

from flowbuffer.errors import SpoolFormatError

FORMAT_VERSION: Final = 1

EMPTY: Final = 0x00
COMMITTED: Final = 0x17
DELIVERED: Final = 0x2B
REJECTED: Final = 0x4D
VOID: Final = 0x8E
STATES: Final = (EMPTY, COMMITTED, DELIVERED, REJECTED, VOID)

EXPLICIT: Final = 1
SERIES: Final = 2
PARAM: Final = 4
TAG: Final = 8
TEXT: Final = PARAM | TAG
FLAGS: Final = (0, EXPLICIT, SERIES, PARAM, TAG)

SLOT: Final = struct.Struct("<qdqIIH5xB")
SLOT_SIZE: Final = SLOT.size
FLAGS_OFFSET: Final = 32
STATE_OFFSET: Final = SLOT_SIZE - 1

#: The same slot as the reader's columns.
SLOT_COLUMNS: Final = {
    "names": ["time", "value", "step", "offset", "key", "flags", "state"],
    "formats": ["<i8", "<f8", "<i8", "<u4", "<u4", "<u2", "u1"],
    "offsets": [0, 8, 16, 24, 28, 32, 39],
    "itemsize": SLOT_SIZE,
}

SEGMENT_HEADER: Final = struct.Struct("<8sHHII")
SEGMENT_HEADER_SIZE: Final = 64
SEGMENT_MAGIC: Final = b"FLOWSLOT"
CHECKSUM: Final = struct.Struct("<I")
CHECKSUM_OFFSET: Final = 20
WANTED: Final = struct.Struct("<I")
WANTED_OFFSET: Final = 24
CLOSED: Final = struct.Struct("<III")
CLOSED_OFFSET: Final = 28
FINISHED: Final = 1
FAILED: Final = 2

#: The most slots that a reader accepts in one segment; bounds what a damaged header can ask for.
MAX_SEGMENT_SLOTS: Final = 1 << 20

FRAME_HEADER: Final = struct.Struct("<4sIII")
FRAME_MAGIC: Final = b"FLOW"
MAX_FRAME_PAYLOAD: Final = 64 << 20

#: MLflow's limit on the length of a metric's key, in characters (``MAX_ENTITY_KEY_LENGTH``).
MAX_KEY_LENGTH: Final = 250
#: What a key is about: a model's id, a dataset's name (at most 500 characters) and digest (36).
MAX_KEY_BYTES: Final = 4 * (MAX_KEY_LENGTH + 1000)

SERIES_HEADER: Final = struct.Struct("<IIq")
SERIES_STEPS: Final = 1
SERIES_TIMES: Final = 2
#: The most points in one journal frame; a longer series is several slots.
MAX_SERIES_POINTS: Final = 65536

TEXT_HEADER: Final = struct.Struct("<I")

#: So many ids may be without a key; a larger one in a key table is damage.
_SKIPPED_IDS: Final = 65536

#: The names of all files that flowbuffer makes in a producer's folder: it deletes no other.
_FILES: Final = (
    "producer.json",
    "producer.lock",
    "reader.lock",
    "keys",
    "carry",
    "delivery.json",
    "rejected.jsonl",
    "retried.jsonl",
    "parked.json",
)
_SEGMENT_FILE: Final = re.compile(r"[0-9]{8,}\.(slots|journal|states|lost|damaged|([0-9]+\.)?new)")
_REPLACED: Final = re.compile(r"\.(.+?)(\.[0-9]+)?\.(new|reused)")
_PRODUCER: Final = re.compile(r"\.?[^.].*-[0-9]+-[0-9a-f]{12}")


def is_own_file(name: str) -> bool:
    """Whether flowbuffer gives this name to a file in a producer's folder."""
    replaced = _REPLACED.fullmatch(name)
    plain = name if replaced is None else replaced[1]
    return plain in _FILES or _SEGMENT_FILE.fullmatch(plain) is not None


def is_producer_name(name: str) -> bool:
    """Whether flowbuffer gives this name to a producer's folder, unfinished ones included."""
    return _PRODUCER.fullmatch(name) is not None


def segment_size(slots: int) -> int:
    """The size in bytes of the file of a segment of ``slots`` slots."""
    return SEGMENT_HEADER_SIZE + slots * SLOT_SIZE


def segment_header(number: int, slots: int) -> bytes:
    """The 64 bytes at the start of a segment's file."""
    head = SEGMENT_HEADER.pack(SEGMENT_MAGIC, FORMAT_VERSION, SLOT_SIZE, slots, number)
    return (head + CHECKSUM.pack(zlib.crc32(head))).ljust(SEGMENT_HEADER_SIZE, b"\0")


def closed_fields(slots: int, outcome: int) -> bytes:
    """The header's fields ``closed`` and ``outcome``, with their checksum."""
    fields = struct.pack("<II", 1 + slots, outcome)
    return fields + CHECKSUM.pack(zlib.crc32(fields))


def parse_closed(data: bytes) -> tuple[int, int]:
    """``closed`` and ``outcome``; (0, 0) if the producer was not closed, or they are damaged.

    Raises:
        struct.error: ``data`` is too short.
    """
    closed, outcome, checksum = CLOSED.unpack_from(data)
    return (closed, outcome) if checksum == zlib.crc32(data[:8]) and closed else (0, 0)


def parse_segment_header(data: bytes, number: int) -> int:
    """The number of slots of segment ``number``, from the first bytes of its file.

    Raises:
        SpoolFormatError: Not a segment, of another version, damaged, or under a wrong name.
    """
    if len(data) < SEGMENT_HEADER_SIZE:
        raise SpoolFormatError("its header is cut short")
    magic, version, slot_size, slots, own_number = SEGMENT_HEADER.unpack_from(data)
    (checksum,) = CHECKSUM.unpack_from(data, CHECKSUM_OFFSET)
    if magic != SEGMENT_MAGIC:
        raise SpoolFormatError("it does not begin with FLOWSLOT")
    if checksum != zlib.crc32(data[:CHECKSUM_OFFSET]):
        raise SpoolFormatError("the checksum of its header does not match")
    if version != FORMAT_VERSION or slot_size != SLOT_SIZE:
        raise SpoolFormatError(
            f"it has format version {version}; this flowbuffer reads version {FORMAT_VERSION}"
        )
    if own_number != number:
        raise SpoolFormatError(f"it says that it is segment {own_number}")
    if not 0 < slots <= MAX_SEGMENT_SLOTS:
        raise SpoolFormatError(f"it says that it has {slots} slots")
    return int(slots)


def frame(identity: int, payload: bytes) -> bytes:
    """``payload`` as a frame."""
    checksum = zlib.crc32(payload, zlib.crc32(struct.pack("<II", len(payload), identity)))
    return FRAME_HEADER.pack(FRAME_MAGIC, len(payload), identity, checksum) + payload


def series_frame(key: int, first: int, values: Any, steps: Any, timestamps: Any) -> bytes:
    """The points of a series as a frame.

    Args:
        key: The key's id.
        first: The step of the first one where there are no ``steps``.
        values: 1-D, n of float64.
        steps: 1-D, n of int64; None if they rise by one.
        timestamps: 1-D, n of int64, in ms since the epoch; None if all have the slot's.
    """
    flags = (steps is not None and SERIES_STEPS) | (timestamps is not None and SERIES_TIMES)
    columns = [column for column in (values, steps, timestamps) if column is not None]
    content = b"".join(column.tobytes() for column in columns)
    return frame(len(values), SERIES_HEADER.pack(flags, key, first) + content)


def text_frame(key: int, text: str) -> bytes:
    """The value of a parameter or tag as a frame; ``key`` is the key's id."""
    return frame(1, TEXT_HEADER.pack(key) + text.encode())


def parse_frame(
    data: bytes, position: int = 0, limit: int = MAX_FRAME_PAYLOAD
) -> tuple[int, bytes]:
    """The identity and the payload, of at most ``limit`` bytes, of the frame at ``position``.

    Raises:
        SpoolFormatError: No whole, undamaged frame is there.
    """
    if position < 0 or len(data) - position < FRAME_HEADER.size:
        raise SpoolFormatError("a frame is cut short")
    magic, length, identity, checksum = FRAME_HEADER.unpack_from(data, position)
    start = position + FRAME_HEADER.size
    if magic != FRAME_MAGIC or length > limit:
        raise SpoolFormatError("there is no frame where one should be")
    payload = data[start : start + length]
    if len(payload) < length:
        raise SpoolFormatError("a frame is cut short")
    if checksum != zlib.crc32(payload, zlib.crc32(struct.pack("<II", length, identity))):
        raise SpoolFormatError("the checksum of a frame does not match")
    return identity, payload


def key_frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The whole frames of a key table: ids, and payloads. Damaged ones are passed over."""
    # Ids count from 0, but for those of calls that were interrupted before they wrote a frame.
    most = len(data) // FRAME_HEADER.size + _SKIPPED_IDS
    position = data.find(FRAME_MAGIC)
    while position >= 0:
        try:
            identity, payload = parse_frame(data, position, MAX_KEY_BYTES)
            if identity < most:
                yield identity, payload
            position += FRAME_HEADER.size + len(payload)
        except SpoolFormatError:
            position += 1
        position = data.find(FRAME_MAGIC, position)
