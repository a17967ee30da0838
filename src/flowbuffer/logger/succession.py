"""One logger, several producers in turn: what a producer leaves to the one after it.

The second goes on with the first one's key ids, and delivery of its points with the first one's
state of the rule for ties. So order holds across both: also where the rule has moved points of the
first ahead of the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowbuffer.spool import layout
from flowbuffer.spool.carry import Carry, carry_frame, read_carry
from flowbuffer.spool.files import read_file
from flowbuffer.spool.segment_files import segment_numbers, segment_path
from flowbuffer.spool.writing.producer import Producer

#: How often the segments of a folder are read again because one was deleted meanwhile.
_TRIES = 100


@dataclass(frozen=True)
class Inheritance:
    """What a producer leaves.

    Attributes:
        folder: Its own.
        keys: Its key table.
        ties: The state of the rule for ties after its last point.
        producer: Itself, for its key ids.
    """

    folder: Path
    keys: bytes
    ties: bytes
    producer: Producer

    def files(self) -> dict[str, bytes]:
        """What the next producer's folder begins with."""
        return {"keys": self.keys, "carry": carry_frame(Carry(derived=self.ties))}


def inheritance(producer: Producer) -> Inheritance | None:
    """What a stopped producer, whose folder is still its own, leaves; None if it cannot be read."""
    folder = producer.directory.path
    try:
        keys = read_file(folder / "keys", limit=layout.MAX_FRAME_PAYLOAD)
        return Inheritance(folder, keys, _ties_at_end(folder), producer)
    except OSError:
        return None  # nothing was logged, or it was wiped


def _ties_at_end(folder: Path) -> bytes:
    import numpy as np

    from flowbuffer.delivery.ordering import TieRule
    from flowbuffer.spool.reading.blocks import Blocks
    from flowbuffer.spool.reading.columns import Block, mapped_segment
    from flowbuffer.spool.reading.key_table import KeyTable
    from flowbuffer.spool.reading.open_segment import OpenSegment

    keys = KeyTable(folder / "keys", lambda _: None)
    blocks = Blocks(folder, keys, lambda *_: None)  # damage is for whoever delivers it
    for _ in range(_TRIES):
        carry = read_carry(folder)
        ties = TieRule(carry.derived)
        try:
            for number in segment_numbers(folder):
                if number >= carry.first:
                    slots, fields, _ = mapped_segment(segment_path(folder, number), number)
                    segment = OpenSegment(number, slots, fields)
                    used = np.flatnonzero(slots["state"]).astype(np.int32)
                    columns, _, _ = blocks.columns(segment, used, segment.slots, 1 << 62)
                    block = Block(number, True, *columns)
                    ties.apply(block, keys.tie_keys(block.key))
        except FileNotFoundError:
            pass
        if read_carry(folder) == carry:
            return ties.state()  # no segment was deleted meanwhile
    raise OSError(f"{folder} changes all the time")
