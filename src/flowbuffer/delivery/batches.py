"""Points on their way to the server, and how a batch that was refused comes apart."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from flowbuffer.delivery.ordering import Rows

#: How often a request fails before its content may be to blame, while nothing else of the run is
#: stored, or if it is one point; how often, if something was stored since.
DOUBTS = 5
DOUBTS_BESIDE_OTHERS = 3

#: In so many parts a batch is taken while nothing is stored: enough to find one point in ten
#: thousand, and few enough to be sent soon when the server is back.
PARTS_IN_DOUBT = 15


@dataclass(eq=False)
class Part:
    """Points that go in one request.

    ``blamed``: they are the second half of what the server rejected. Once the first half is stored
    the fault must be in them, and sending them as a whole would be a request for nothing.
    ``doubts``: how often sending them failed, for what may be their content. ``stored_before``: how
    many requests of the run were stored when it first did, of them or of what they were part of; -1
    if it never did. ``beside_others``: others were stored since.
    """

    rows: Rows
    blamed: bool = False
    doubts: int = 0
    stored_before: int = -1
    beside_others: bool = False


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
        in_order: A key's rows must be stored one after another, as those of a parameter.
        aside: What may be at fault. It takes nobody's place until that is known.
    """

    parts: deque[Part]
    keys: set[int]
    attempt: int = 0
    due_s: float = 0.0
    sending: bool = False
    is_split: bool = False
    in_order: bool = False
    aside: bool = False

    def is_at_fault(self, stored: int) -> bool:
        """After the first part failed: whether its content must be to blame, because it failed
        again and again while others of the run were stored.

        As long as nothing is stored it may be the whole store, and nothing is to blame. But so that
        a point at fault keeps none of the others from being stored, which then tells, the part is
        taken apart, or goes behind the others, and a single batch of one is aside.

        Args:
            stored: How many requests of the run have been stored so far.
        """
        part = self.parts[0]
        if part.stored_before < 0:
            part.stored_before = stored
        part.doubts += 1
        part.beside_others = stored > part.stored_before
        if part.beside_others:
            return part.doubts >= (DOUBTS_BESIDE_OTHERS if len(part.rows) > 1 else DOUBTS)
        if part.doubts < DOUBTS and not self.is_split:
            return False
        if len(part.rows) > 1 and len(self.parts) < PARTS_IN_DOUBT:
            attempt = self.attempt if self.is_split else 0
            self.take_apart(blame=False)
            self.attempt = attempt
        else:
            self.step_aside()
        return False

    def step_aside(self) -> None:
        """Let others go before the first part, which fails again and again."""
        if len(self.parts) > 1:
            self._put_behind()
        else:
            self.aside = True

    def _put_behind(self) -> None:
        """Move the first part behind the others, but not past one with its key, if that counts."""
        first = self.parts.popleft()
        keys = first.rows["key"]
        behind = len(self.parts)
        for number, part in enumerate(self.parts):
            if self.in_order and np.isin(keys, part.rows["key"]).any():
                behind = number
                break
        self.parts.insert(behind, first)

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
        whole = self.parts.popleft()
        half = (len(whole.rows) + 1) // 2
        first, second = (
            Part(rows, stored_before=whole.stored_before)
            for rows in (whole.rows[:half], whole.rows[half:])
        )
        second.blamed = blame
        self.parts.extendleft([second, first])
