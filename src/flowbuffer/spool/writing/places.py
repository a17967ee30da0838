"""Where points are in a spool, as the calls that log tell it, and handles ask for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from flowbuffer.spool.files import opened


class Segment:
    """A segment as a handle knows it: where it is, without keeping it mapped.

    Attributes:
        path: The segment's file.
        number: Its place among the producer's segments, from 0.
        hurry: Called when someone waits for one of its points.
    """

    __slots__ = ("hurry", "number", "path")

    def __init__(self, path: Path, number: int, hurry: Callable[[], None]) -> None:
        self.path = path
        self.number = number
        self.hurry = hurry


#: Where points are: for each its segment, then the offset of its slot in the segment's file. None
#: and text instead say why a point is nowhere. Flat, because one is made per call.
Places = Sequence[Segment | int | str | None]

#: The place of a point that was dropped.
DROPPED: Final[Places] = (
    None,
    "it was dropped: the spool was full (when_full='drop_newest')",
)


#: The place of a point whose call was interrupted by a fork, in the child.
LEFT_TO_PARENT: Final[Places] = (
    None,
    "this process was forked in the middle of the call; its parent logs the point",
)


def fsync_places(places: Places) -> None:
    """Bring the points at these places to the disk itself (``durability="power"``)."""
    for segment in {segment for segment in places[::2] if isinstance(segment, Segment)}:
        try:
            with opened(segment.path, os.O_RDWR) as file:
                os.fsync(file.fileno())
        except FileNotFoundError:
            continue  # delivered already
