"""A producer's folder on its way: what it holds, as rows, and what became of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from flowbuffer.delivery.ordering import ROW, Rows, TieRule
from flowbuffer.errors import is_passing
from flowbuffer.metric_key import parsed
from flowbuffer.spool import dead_letters
from flowbuffer.spool.dead_letters import DeadLetter
from flowbuffer.spool.folders import Claim
from flowbuffer.spool.layout import COMMITTED, PARAM, TAG
from flowbuffer.spool.mark import foreign
from flowbuffer.spool.reading.columns import Block
from flowbuffer.spool.reading.reader import Reader

if TYPE_CHECKING:
    from flowbuffer.delivery.sender import Sender

_log = logging.getLogger("flowbuffer")

#: How often it is tested whether a producer lives, in s.
_TEST_EVERY_S = 0.1

_KINDS: Final = {0: "metric", PARAM: "param", TAG: "tag"}


class Stream:
    """One producer's folder on its way, from its claim until it is handed on or let go.

    Args:
        sender: Of its run; :meth:`Sender.add` makes the stream.
        number: What its rows have as ``stream``.
        claim: The right to deliver the folder.

    Attributes:
        path: The folder.
        adopted: Its producer was dead when it was claimed.
        since_s: When it was claimed, on the monotonic clock.
        leaving: It is to be handed on as soon as nothing of it is on its way. Whoever wants that
            says so, and may take it back.
        paused: Nothing more is read of it now; what was read goes on its way. The collector says so
            of one that is leaving.
        is_let_go: It ended by :meth:`let_go`, and not because others may have it.
        ties: Its rule for ties.
        refused: Of points that raised when they were read the letters, for whoever reads to write.
    """

    def __init__(self, sender: Sender, number: int, claim: Claim) -> None:
        self.sender = sender
        self.number = number
        self.claim = claim
        self.path = claim.path
        self.adopted = claim.is_orphaned
        self.since_s = sender.clock.monotonic_s()
        self.leaving = self.paused = self.is_let_go = False
        self.reader = Reader(claim.path, sender.clock, alive=not self.adopted)
        self.refused: list[Callable[[], DeadLetter]] = []
        self._keys = sender.keys
        self._test_at_s = -inf
        self._block: Block | None = None  # read, and not given out yet
        self._numbers: dict[tuple[int, int], int] = {}  # of the run's keys, by kind and own id
        try:
            self.ties = TieRule(self.reader.carry)
        except ValueError as error:
            self.reader.problems.append(f"{self.path / 'carry'} is not used: {error}")
            self.ties = TieRule()

    @property
    def stuck(self) -> bool:
        """Whether the last request of its run failed; waiting may be in vain."""
        return self.sender.failure is not None

    # The folder, for the collector.

    def test_producer(self, now_s: float) -> bool:
        """See now and then whether the producer still lives. Returns whether it is found dead."""
        if self.reader.finished or now_s < self._test_at_s:
            return False
        self._test_at_s = now_s + _TEST_EVERY_S
        is_dead = self.claim.is_orphaned
        if is_dead:
            self.reader.expect_no_more()
        return is_dead

    def hand_on(self) -> None:
        """Leave the folder to others, whatever of it is on its way."""
        self._end()
        self.claim.release()

    def let_go(self) -> bool:
        """Of a settled folder: remove it, unless it has to stay for what nobody can deliver, or for
        what is not flowbuffer's. Returns whether it has to."""
        self._end()
        self.is_let_go = True
        for problem in self.reader.problems:
            _log.warning("the spool is damaged: %s", problem)
        try:
            others = foreign(self.path)
            if others:
                _log.warning("%s is kept: %s is not flowbuffer's", self.path, others[0])
            damaged = self.reader.problems or self.reader.has_lost
            if others or damaged or dead_letters.are_in(self.path):
                self.reader.note_done()
                return True
            self.claim.remove(delivered=self.reader.delivered_segments)
        except OSError as error:
            _log.warning("%s cannot be removed: %s", self.path, error)
        finally:
            self.claim.release()
        return False

    def _end(self) -> None:
        self.reader.close()
        self.sender.streams.pop(self.number, None)

    # The points, for the sender.

    def read(self, limit: int) -> tuple[Rows, NDArray[np.uint8]] | None:
        """About ``limit`` of the next points, without those that are settled, and their kinds; None
        if there are none now. A point that raises when it is numbered or ordered is a dead letter.

        Raises:
            OSError, MemoryError: They cannot be read now; they can be read again.
        """
        if self._block is None and not self.paused:
            self._block = self.reader.read(limit)
        if self._block is None:
            return None
        block = self._block
        found = self._rows(block)
        if block.ends_segment:
            self.reader.keep(block.segment, self.ties.state())
        self._block = None
        return found

    def _rows(self, block: Block) -> tuple[Rows, NDArray[np.uint8]]:
        try:
            return self._as_rows(block)
        except Exception as error:
            if is_passing(error):
                raise
        ties, refused = self.ties.copy(), len(self.refused)
        try:
            return self._in_halves(block)
        except BaseException:
            self.ties = ties
            del self.refused[refused:]
            raise

    def _in_halves(self, block: Block) -> tuple[Rows, NDArray[np.uint8]]:
        """The points of a block of which one is at fault."""
        try:
            return self._as_rows(block)
        except Exception as error:
            if is_passing(error):
                raise
            if len(block.slot) == 1:
                if block.state[0] == COMMITTED:
                    reason = f"it cannot be delivered: {error!r}"
                    self.refused.append(partial(_letter_of, block, reason))
                return np.zeros(0, ROW), np.zeros(0, np.uint8)
        first = np.arange(len(block.slot)) < len(block.slot) // 2
        halves = [self._in_halves(block.only(points)) for points in (first, ~first)]
        rows, kinds = zip(*halves, strict=True)
        return np.concatenate(rows), np.concatenate(kinds)

    def _as_rows(self, block: Block) -> tuple[Rows, NDArray[np.uint8]]:
        pending = np.flatnonzero(block.state == COMMITTED)
        rows = np.empty(len(pending), ROW)
        rows["stream"], rows["segment"] = self.number, block.segment
        rows["slot"], rows["identity"] = block.slot[pending], block.key[pending]
        rows["step"], rows["value"] = block.step[pending], block.value[pending]
        kinds = block.kind[pending]
        rows["key"] = self._keys.numbers(kinds, rows["identity"], self._numbers, self.reader.key)
        # Last, as the rule goes on from every point that it was given.
        rows["time"] = self.ties.apply(block, self.reader.tie_keys(block.key))[pending]
        return rows, kinds

    def text(self, row: Any) -> str:
        """The value of a parameter or tag.

        Raises:
            OSError: It cannot be read any more.
        """
        return self.reader.text(int(row["segment"]), int(row["step"]), int(row["identity"]))

    def letter(self, row: Any, reason: str) -> DeadLetter:
        """A point as a dead letter; its value is left out if it cannot be read.

        Raises:
            OSError, MemoryError: It cannot be read now.
        """
        try:
            return self._letter(row, reason)
        except Exception as error:
            if is_passing(error):
                raise
            return DeadLetter(
                run_id=self.sender.run_id,
                reason=f"{reason} ({error!r})",
                segment=int(row["segment"]),
                slot=int(row["slot"]),
            )

    def _letter(self, row: Any, reason: str) -> DeadLetter:
        number = int(row["key"])
        kind = self._keys.kind(number)
        key, about = parsed(self._keys.key(number))
        value = float(row["value"])
        return DeadLetter(
            run_id=self.sender.run_id,
            kind=_KINDS[kind],
            key=key,
            value=self._text_or_none(row) if kind else value if isfinite(value) else str(value),
            step=None if kind else int(row["step"]),
            about=about,
            timestamp=int(row["time"]),
            reason=reason,
            segment=int(row["segment"]),
            slot=int(row["slot"]),
        )

    def _text_or_none(self, row: Any) -> str | None:
        try:
            return self.text(row)
        except Exception as error:
            if is_passing(error):
                raise
            return None

    def mark(self, rows: Rows) -> None:
        """Those of ``rows`` that are its own are delivered."""
        own = rows[rows["stream"] == self.number]
        for segment in np.unique(own["segment"]).tolist():
            self.reader.mark(segment, own["slot"][own["segment"] == segment])


def _letter_of(block: Block, reason: str) -> DeadLetter:
    """The only point of a block, which could not become a row."""
    value = float(block.value[0])
    return DeadLetter(
        value=value if isfinite(value) else str(value),
        step=int(block.step[0]),
        timestamp=int(block.time[0]),
        reason=reason,
        segment=block.segment,
        slot=int(block.slot[0]),
    )
