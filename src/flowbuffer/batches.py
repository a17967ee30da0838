"""Points on their way to the server, and how a batch that was refused comes apart."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from flowbuffer.ordering import Rows


@dataclass(eq=False)
class Part:
    """Points that go in one request.

    ``blamed``: they are the second half of what the server rejected. Once the first half is stored
    the fault must be in them, and sending them as a whole would be a request for nothing.
    """

    rows: Rows
    blamed: bool = False


@dataclass(eq=False)
class Batch:
    """Points on their way: one part or, once it was refused, several after one another.

    Attributes:
        parts: Those that are not settled; the first one is on its way, or goes next.
        keys: The numbers of their keys, which are in no other batch meanwhile.
        attempt: How often the first part has failed.
        due_s: When it is to be sent, in monotonic time.
        sending: It is on its way.
        is_split: A part was refused, and taken apart.
    """

    parts: deque[Part]
    keys: set[int]
    attempt: int = 0
    due_s: float = 0.0
    sending: bool = False
    is_split: bool = False

    def take_apart(self, *, blame: bool) -> Rows | None:
        """After the first part was refused: split it, down to the point at fault; that one is given
        back, and is out of the batch.

        Args:
            blame: The fault is in one of its points; else there were too many of them.
        """
        self.attempt = 0
        for part in self.parts:
            part.blamed = False  # the fault is in the first part; in others there need be none
        if len(self.parts[0].rows) > 1:
            self._split(blame=blame)
            return None
        return self.parts.popleft().rows

    def make_ready(self) -> None:
        """Split the first part for as long as it would be refused as a whole."""
        while self.parts[0].blamed and len(self.parts[0].rows) > 1:
            self._split(blame=True)

    def _split(self, *, blame: bool) -> None:
        self.is_split = True
        rows = self.parts.popleft().rows
        half = (len(rows) + 1) // 2
        self.parts.extendleft([Part(rows[half:], blamed=blame), Part(rows[:half])])
