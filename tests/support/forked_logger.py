"""A process that is forked while another thread is in a call that logs, at one line of it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from flowbuffer.spool.tally import tally
from support.interrupted_logger import PATIENCE_S, Site, equipment
from support.interruptions import Line, Trap, lines_of

#: Small, so that segments end in the course of the calls.
SLOTS = 4


class ForkSite(Site):
    """A logger whose segments end often."""

    def open(self) -> None:
        super().open()
        spooling = self._logger()._spooling
        assert spooling is not None
        spooling.producer._segment_slots = [SLOTS, SLOTS]

    def calls(self) -> None:
        log = self.log
        for n in range(3):
            log.metric("known")
            log.metrics("known", f"new{n}", "a", "b")
            log.param()
            log.series("known", 3)


def lines(root: Path) -> list[Line]:
    """The lines of the calls that log."""
    site = ForkSite(root, "thread")
    with equipment(lambda: site.transport):
        site.open()
        found = lines_of(site.calls)
        site.end()
    return found


def fork_at(root: Path, line: Line) -> list[str]:
    """What is wrong after a fork at `line`."""
    site = ForkSite(root, "thread")
    there, forked = threading.Event(), threading.Event()

    def hold() -> None:
        there.set()
        forked.wait(PATIENCE_S)

    trap = Trap(line, hold)

    def log() -> None:
        trap.run(site.calls)
        there.set()

    with equipment(lambda: site.transport):
        site.open()
        thread = threading.Thread(target=log, daemon=True)
        thread.start()
        there.wait(PATIENCE_S)
        found = _fork(site)
        forked.set()
        thread.join(PATIENCE_S)
        if thread.is_alive():
            found.append("the thread that was logging hangs")
        site.end()
        found += site.faults()
    if not trap.sprung:
        found.append("the line was not reached")
    return found


def _fork(site: Site) -> list[str]:
    """What is wrong in a child that logs."""
    logger = site._logger()
    own = logger.folder
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(PATIENCE_S))
        said = "the child failed"
        try:
            logger.log_metric("child", 1.0)
            said = "" if logger.folder is None else str(logger.folder)
        finally:
            os.write(writes, said.encode())
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    folder = Path(said)
    if not folder.is_absolute():
        return [said or "the child hangs"]
    if folder == own:
        return ["the child stores into its parent's slots"]
    found = tally(folder)
    if found is not None and found.pending + found.delivered != 1:
        return [f"of the child's point: {found}"]
    return []
