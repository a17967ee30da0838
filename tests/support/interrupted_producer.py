"""A producer that is interrupted at one line of what its calls do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flowbuffer.errors import FlowbufferError
from flowbuffer.spool.files import FileLock
from support.interruptions import Line, Log, Trap, in_another_thread, lines_of
from support.small_spool import RUN, SmallSpool

SLOTS = 4


def _raise() -> None:
    raise KeyboardInterrupt


#: What happens at the line: the name, and what a signal handler does there.
HANDLERS: dict[str, Callable[[Log], None]] = {
    "raise": lambda _: _raise(),
    "metric": lambda log: log.metric("known"),
    "new key": lambda log: log.metric("of the handler"),
    "metrics": lambda log: log.metrics("known", "another of the handler"),
    "series": lambda log: log.series("known", 3),
    "param": lambda log: log.param(),
    "segments": lambda log: [log.metric("known") for _ in range(2 * SLOTS)] and None,
}


class Site:
    """A small spool, and the calls that its producer takes."""

    def __init__(self, root: Path) -> None:
        self.spool = SmallSpool(root, segment_slots=SLOTS)
        producer = self.producer = self.spool.producer
        producer._journal_limit = 200  # so that a journal ends its segment
        self.log = Log(
            producer.append,
            producer.append_many,
            producer.append_series,
            lambda key, value: producer.append_texts(4, {key: value}),
        )

    def calls(self) -> None:
        """One of each, in each state of the files."""
        log = self.log
        log.metric("known")
        for n in range(2):
            log.metrics("known", f"new{n}")
            log.metric("known")
            log.series("known", 3)
            log.param()
            log.metrics("known", "a", "b", "c", "d")  # over the end of a segment
            self.barrier()
        for _ in range(2):
            log.series("long", 10)
        log.metric("known")

    def barrier(self) -> None:
        try:
            self.producer.barrier()
        except KeyboardInterrupt:
            pass

    def end(self) -> None:
        """Close, again if it was interrupted."""
        for _ in range(2):
            try:
                self.producer.close()
                return
            except KeyboardInterrupt:
                continue

    def work(self) -> None:
        self.calls()
        self.end()

    def faults(self) -> list[str]:
        """What is wrong in the end."""
        spool, log = self.spool, self.log
        found = []
        lock = self.spool.directory.path / "producer.lock"
        if not FileLock.is_held(lock):
            found.append("the producer does not look alive any more")
        try:
            self.producer.append("late", 1.0)
            found.append("a closed producer took a point")
        except FlowbufferError:
            pass
        spool.stream.reader.expect_no_more()
        spool.deliver()
        keys = {key for _, key, *_ in spool.transport.rows}
        params = {key: value for (_, key), value in spool.transport.params.items()}
        found += log.faults(spool.values, params, keys)
        found += spool.stream.reader.problems
        if (spool.directory.path / "rejected.jsonl").exists():
            found.append("there are dead letters")
        spool.directory.lock.release()
        if FileLock.is_held(lock):
            found.append("the producer's lock is held for ever")
        return found


def lines(root: Path) -> list[Line]:
    """The lines that can be interrupted."""
    return lines_of(Site(root).work)


def interrupt(root: Path, line: Line, name: str) -> list[str]:
    """What is wrong after `name` happened at `line`."""
    site = Site(root)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    ending = False

    def handle() -> None:
        try:
            site.log.in_handler(HANDLERS[name])
        except FlowbufferError:
            if not ending:  # a closed producer takes no points
                raise

    trap = Trap(line, handle)
    trap.run(site.calls)
    late = site.log
    problem = in_another_thread(
        lambda: [
            late.metric("known"),
            late.metric("of another thread"),
            late.param(),
            [late.metric("known") for _ in range(2 * SLOTS)],
        ]
    )
    ending = True
    if not trap.sprung:
        trap.run(site.end)
    site.end()
    found = site.faults()
    if problem:
        found.append(problem)
    if not trap.sprung:
        found.append("the line was not reached")
    if before and len(os.listdir("/proc/self/fd")) > before + 1:  # a spare one
        found.append("descriptors are left open")
    return found


__all__ = ["HANDLERS", "RUN", "interrupt", "lines"]
