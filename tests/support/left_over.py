"""What producers leave in a spool, written without a process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowbuffer import Settings
from flowbuffer.clock import SYSTEM_CLOCK, Clock
from flowbuffer.spool.folders import ProducerDirectory, Spool
from flowbuffer.spool.notes import park
from flowbuffer.spool.producer_info import OFFLINE, this_producer
from flowbuffer.spool.writing.producer import Producer


def leave(
    root: Path,
    run_id: str = "run",
    uri: str = "fake://",
    values: Iterable[float] = range(100),
    *,
    end: str = "finished",
    clock: Clock = SYSTEM_CLOCK,
    start_ms: int = 1_700_000_000_000,
    **info: Any,
) -> ProducerDirectory:
    """Log `values` to "loss" as a producer that then is `end`: finished, failed, killed, alive."""
    spool = Spool(root)
    directory = spool.add_producer(this_producer(run_id, uri, start_ms, **info))
    if info.get("delivery") == OFFLINE:
        park(directory.path, "flowbuffer is offline")
    producer = Producer(directory, spool, Settings(spool_dir=root), clock, lambda: None)
    for step, value in enumerate(values):
        producer.append("loss", float(value), step)
    if end in ("finished", "failed"):
        producer.close(failed=end == "failed")
    if end != "alive":
        directory.lock.release()
    return directory
