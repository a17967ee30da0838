"""``flowbuffer status``: who logs to a spool, and what of it waits for delivery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from flowbuffer.backends.credentials import redacted
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.collector.handover import collector_lock
from flowbuffer.commands.places import folders_of_run
from flowbuffer.errors import FlowbufferError
from flowbuffer.spool.files import FileLock, check_private, read_file
from flowbuffer.spool.folders import Spool, has_producer
from flowbuffer.spool.notes import delivery_note, parked_reason
from flowbuffer.spool.producer_info import OFFLINE, read_info
from flowbuffer.spool.segment_files import Ending, closed_outcome, names_in
from flowbuffer.spool.tally import tally


@dataclass(frozen=True, kw_only=True)
class ProducerStatus:
    """A producer: one process logging to one run. What cannot be known is None.

    Attributes:
        folder: Its folder.
        run_id, tracking_uri, host, pid, rank, local_rank, world_size, delivery: As in
            ``ProducerInfo``.
        started_s: How long ago it began to log, in s.
        state: ``alive``; ``closed``, it takes no more points; ``dead``, its process ended without
            closing it, or all of it is settled; ``damaged``, see ``last_error``.
        pending, delivered, rejected, unknown: Points; unknown are those in damaged segments.
        oldest_s: The age of the oldest point that is pending, in s; None if none is.
        last_error: What holds delivery up; empty if nothing is known to.
        parked: Whether that will hold it up until somebody does something.
    """

    folder: str
    run_id: str
    state: str
    host: str | None = None
    pid: int | None = None
    rank: int | None = None
    local_rank: int | None = None
    world_size: int | None = None
    delivery: str | None = None
    tracking_uri: str | None = None
    pending: int = 0
    delivered: int = 0
    rejected: int = 0
    unknown: int = 0
    oldest_s: float | None = None
    started_s: float | None = None
    last_error: str = ""
    parked: bool = False


@dataclass(frozen=True, kw_only=True)
class SpoolStatus:
    """A spool.

    Attributes:
        spool: Its folder.
        used_bytes: What it takes on the disk.
        collector_runs: Whether a collector process is at work.
        collector_pid: Its process id; None if none runs, or it has only just started.
        producers: By run, the run that was begun last first; those of a run by rank.
    """

    spool: str
    used_bytes: int
    collector_runs: bool
    collector_pid: int | None
    producers: tuple[ProducerStatus, ...]


def status(spool: Spool, run_id: str | None = None) -> SpoolStatus:
    """What is in a spool now. Nothing in it is changed, and no server is asked.

    Args:
        spool: The spool.
        run_id: Only what was logged to this run; the beginning of its id is enough.

    Raises:
        FlowbufferError: There is no such run.
    """
    runs, pid = collector(spool.root)
    folders = list(spool.folders()) if run_id is None else folders_of_run(spool, run_id)
    rows = (producer_status(folder) for folder in folders)
    return SpoolStatus(
        spool=str(spool.root),
        used_bytes=spool.used_bytes(),
        collector_runs=runs,
        collector_pid=pid,
        producers=_ordered([row for row in rows if row is not None]),
    )


def _ordered(rows: list[ProducerStatus]) -> tuple[ProducerStatus, ...]:
    ages: dict[str, float] = {}
    for row in rows:
        age_s = math.inf if row.started_s is None else row.started_s
        ages[row.run_id] = min(age_s, ages.get(row.run_id, math.inf))

    def order(row: ProducerStatus) -> tuple[float, str, int, int]:
        return ages[row.run_id], row.run_id, row.rank or 0, row.pid or 0

    return tuple(sorted(rows, key=order))


def collector(root: Path) -> tuple[bool, int | None]:
    """Whether a collector process works a spool, and its process id; of several the first."""
    for path in (collector_lock(root), *sorted(root.glob("collector-*.lock"))):
        if FileLock.is_held(path):
            text = read_file(path, limit=32)
            return True, int(text) if text.isdigit() else None
    return False, None


def producer_status(folder: Path) -> ProducerStatus | None:
    """One producer's row; None if the folder is gone, because all of it is delivered."""
    try:
        check_private(folder.parent)
        check_private(folder)
        info = read_info(folder)
        counts = _counts(folder)
        if counts is None:
            return None
        closed = closed_outcome(folder) != 0
        state = "closed" if closed else "alive" if has_producer(folder) else "dead"
        return ProducerStatus(
            folder=str(folder),
            run_id=info.run_id,
            state=state,
            host=info.host,
            pid=info.pid,
            rank=info.rank,
            local_rank=info.local_rank,
            world_size=info.world_size,
            delivery=info.delivery,
            tracking_uri=info.tracking_uri,
            started_s=max(SYSTEM_CLOCK.now_ns() / 1e9 - info.start_ms / 1e3, 0.0),
            last_error=_last_error(folder),
            parked=parked_reason(folder) is not None and info.delivery != OFFLINE,
            **counts,
        )
    except (FlowbufferError, OSError) as error:
        if not folder.exists():
            return None
        return _refused(folder, str(error))


def _refused(folder: Path, why: str) -> ProducerStatus:
    try:
        counts = _counts(folder) or {}
    except (FlowbufferError, OSError):
        counts = {}
    return ProducerStatus(
        folder=str(folder),
        run_id=unquote(folder.parent.name),
        state="damaged",
        last_error=why,
        **counts,
    )


def _counts(folder: Path) -> dict[str, Any] | None:
    found = tally(folder)
    if found is None:
        return None
    age_s = None
    if found.oldest_ms is not None:
        age_s = max(SYSTEM_CLOCK.now_ns() / 1e9 - found.oldest_ms / 1e3, 0.0)
    return {
        "pending": found.pending,
        "delivered": found.delivered,
        "rejected": found.rejected,
        "unknown": found.unknown,
        "oldest_s": age_s,
    }


def _last_error(folder: Path) -> str:
    kept = [f"{name} could not be read" for name in sorted(names_in(folder, Ending.DAMAGED))]
    said = (parked_reason(folder), delivery_note(folder).last_error, *kept)
    return redacted("; ".join(dict.fromkeys(str(text) for text in said if text)))
