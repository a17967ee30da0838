"""A producer's folder that ``flowbuffer sync`` delivers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowbuffer.delivery.stream import Stream
from flowbuffer.spool.files import check_private
from flowbuffer.spool.layout import SLOT_SIZE
from flowbuffer.spool.producer_info import ProducerInfo, read_info
from flowbuffer.spool.segment_files import closed_outcome, offset_of, segment_numbers, segment_path
from flowbuffer.spool.tally import Tally, tally, tally_since
from flowbuffer.spool.waiting import Waiting, last_barrier, want
from flowbuffer.words import gone


@dataclass(eq=False)
class Target:
    """A producer's folder on its way, with the points that it had when sync began.

    ``outcome``: as in ``layout``, noted before delivery deletes it; None if there was nothing to
    note. ``left``: why it is left. The times are on the monotonic clock.
    """

    folder: Path
    info: ProducerInfo
    barrier: tuple[int, int]
    waiting: Waiting
    before: Tally
    outcome: int | None
    stream: Stream | None = None
    settled: bool = False
    left: str = ""
    look_at_s: float = 0.0
    hurry_at_s: float = 0.0
    untaken_since_s: float | None = None

    @classmethod
    def of(cls, folder: Path) -> Target | None:
        """What is there now; None if the folder is gone.

        Raises:
            FlowbufferError: It cannot be read, or is not private.
            OSError: It cannot be read.
        """
        check_private(folder.parent)
        check_private(folder)
        info = read_info(folder)
        outcome = closed_outcome(folder) if segment_numbers(folder) else None
        barrier = last_barrier(folder)
        before = tally(folder)
        if before is None:
            return None
        return cls(folder, info, barrier, Waiting(folder, barrier), before, outcome)

    @property
    def over(self) -> bool:
        """Nothing more is to be done about it."""
        return self.settled or bool(self.left)

    def leave_as_gone(self, reason: str) -> None:
        """Leave it: its run is not, or no more, on the server."""
        self.left = f"{reason}; {gone(self.info.run_id, self.info.tracking_uri)}"

    def pending_now(self) -> int:
        """How many of its points are not settled; cheap, as nothing is read from the disk."""
        own, before = self.stream, self.before
        if self.settled or not before.pending:
            return 0
        if own is None:
            return before.pending
        settled = own.reader.delivered + own.reader.rejected - before.delivered - before.rejected
        return min(max(before.pending - settled, 0), before.pending)

    def what_became(self) -> tuple[int, int, int, int]:
        """Of the points that were pending at the start: delivered, rejected, pending, unknown.

        Raises:
            OSError: That cannot be known now.
        """
        before = self.before
        now = tally_since(self.folder, before)
        unknown = min(max(now.unknown - before.unknown, 0), before.pending)
        pending = 0 if self.settled else min(now.pending, before.pending - unknown)
        settled = before.pending - unknown - pending
        rejected = min(max(now.rejected - before.rejected, 0), settled)
        delivered = min(max(now.delivered - before.delivered, 0), settled - rejected)
        return delivered, rejected, pending, unknown

    def hurry(self) -> None:
        """Have whoever delivers it send all of it without lingering."""
        last, end = self.barrier
        for number in segment_numbers(self.folder):
            path = segment_path(self.folder, number)
            try:
                slots_end = end if number == last else path.stat().st_size
                if number <= last and slots_end > offset_of(0):
                    want(path, slots_end - SLOT_SIZE)
            except OSError:
                continue  # delivered and deleted meanwhile, or not ours to write to
