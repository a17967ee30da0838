"""What became of the points of one logger, as the spool tells it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.collector.deliverers import Delivery, last_error
from flowbuffer.logger.report import Report
from flowbuffer.spool.carry import Carry, read_carry
from flowbuffer.spool.notes import delivery_note, parked_reason
from flowbuffer.spool.outcomes import is_there
from flowbuffer.spool.producer_info import OFFLINE
from flowbuffer.spool.tally import Tally, tally_since
from flowbuffer.spool.waiting import Waiting, last_barrier
from flowbuffer.spool.writing.producer import Producer
from flowbuffer.words import counted, gone


class Ledger:
    """Counts for one producer.

    Args:
        producer: Whose points are counted.
        delivery: Who delivers them.
    """

    def __init__(self, producer: Producer, delivery: Delivery) -> None:
        self._producer = producer
        self._delivery = delivery
        self._folder = producer.directory.path
        self._last = Tally()
        self._carried = Carry()

    def counts(self) -> dict[str, Any]:
        """The fields of a :class:`Report`, but for the time that it took."""
        last = self._last
        try:
            self._last = tally_since(self._folder, self._last)
        except OSError:
            pass  # it cannot be counted now, so as of the last time
        if self._producer.is_gone:
            self._last = self._after_wipe(last)
        found = self._last
        return {
            "delivered": found.delivered,
            "rejected": found.rejected,
            "pending": found.pending,
            "unknown": found.unknown,
            "dropped": dict(self._producer.dropped),
        }

    def look(self) -> None:
        """Remember what only the folder tells, for when it is wiped. It takes some microseconds."""
        try:
            carried = read_carry(self._folder)
        except OSError:
            return
        if carried.first > self._carried.first:
            self._carried = carried._replace(derived=b"")

    def _after_wipe(self, last: Tally) -> Tally:
        """What is known of a producer whose folder was wiped: what it logged, and is neither known
        to be settled nor to be delivered still, is unknown.

        Args:
            last: As of the last time.
        """
        found, carried = self._last, self._carried
        logged, delivered, rejected = self._producer.logged()
        delivered = max(last.delivered, found.delivered, carried.delivered + delivered)
        rejected = max(last.rejected, found.rejected, carried.rejected + rejected)
        pending = 0 if self.is_lost() else found.pending
        known = delivered + rejected + pending + found.retried
        return replace(
            found,
            delivered=delivered,
            rejected=rejected,
            pending=pending,
            unknown=max(logged - known, 0),
        )

    def is_lost(self) -> bool:
        """Whether so much of the folder was wiped that nobody can deliver the rest: what is pending
        counts as unknown then, and is not waited for."""
        try:
            return self._producer.is_gone and not is_there(self._folder / "producer.json")
        except OSError:
            return False  # it cannot be looked at now

    def stats(self) -> dict[str, Any]:
        """The fields that :class:`Stats` has and :class:`Report` has not, as of the last count."""
        oldest_ms, note = self._last.oldest_ms, delivery_note(self._folder)
        age_s = 0.0 if oldest_ms is None else SYSTEM_CLOCK.now_ns() / 1e9 - oldest_ms / 1e3
        return {
            "lag_s": max(age_s, 0.0),
            "backlog_bytes": self._delivery.spool.used_bytes(),
            "ties_moved": note.ties_moved,
            "ties_moved_most_ms": note.ties_moved_most_ms,
            "retries": note.retries,
            "last_error": note.last_error,
        }

    def is_there(self) -> bool:
        """Whether a collector still has something to do with the folder, once it is closed; if not,
        there is nothing to wait for, and no lock to keep."""
        try:
            there = is_there(self._folder)
        except OSError:
            there = True
        return there and not delivery_note(self._folder).done

    def is_let_go(self) -> bool:
        """Whether who waits for the points of a closed producer may stop: all are settled, or what
        is left cannot be delivered by anybody."""
        return not self.is_there() or self.is_lost() or parked_reason(self._folder) is not None

    def last_words(self, report: Report, *, waited: bool) -> list[str]:
        """What whoever started the job should know of what was left, and of what was lost.

        Args:
            report: Of the end.
            waited: Whether delivery was waited for; else what is pending is no news.
        """
        run_id = self._producer.directory.info.run_id
        root = self._delivery.spool.root
        words = []
        if report.pending and waited:
            words.append(self._left(report.pending))
        if report.unknown:
            words.append(
                f"run {run_id}: nobody knows what became of {counted(report.unknown)}: what held "
                f"them was wiped from {root}, or is damaged"
            )
        if report.rejected or any(report.dropped.values()):
            dropped = ", ".join(
                f"{count:,} dropped ({why})" for why, count in report.dropped.items()
            )
            words.append(
                f"run {run_id}: {counted(report.rejected)} rejected"
                + (f", {dropped}" if dropped else "")
                + (f"; see: flowbuffer rejected --spool {root}" if report.rejected else "")
            )
        return words

    def _left(self, pending: int) -> str:
        """What is left, why, and what helps."""
        info, root = self._producer.directory.info, self._delivery.spool.root
        error, points = last_error(self._folder), counted(pending)
        are, they, them = ("is", "It is", "it") if pending == 1 else ("are", "They are", "them")
        if parked_reason(self._folder) is not None and info.delivery != OFFLINE:
            return (
                f"{points} of run {info.run_id} cannot be delivered to {info.tracking_uri} "
                f"({error}). {they} kept in {root}: {gone(info.run_id, info.tracking_uri)}"
            )
        return (
            f"{points} of run {info.run_id} {are} not delivered yet"
            + (f" ({error})" if error else "")
            + f". {they} safe in {root}; {self._delivery.goes_on}deliver {them} with: "
            f"flowbuffer sync --spool {root}"
        )


def is_over(folder: Path) -> bool:
    """Whether who waits for what is in a folder now may stop: all of it is settled, or nobody can
    deliver what is left."""
    try:
        waiting = Waiting(folder, last_barrier(folder))
    except OSError:
        return False  # it cannot be looked at now
    return waiting.is_over() or parked_reason(folder) is not None
