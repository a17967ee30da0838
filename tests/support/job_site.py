"""Where kill rounds of ``delivery="process"`` take place: a spool, a store, and who is there."""

import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random

from support.held import HeldRequests
from support.logged import Tally, log_for_long, log_from_threads
from support.memory_limit import MemoryLimit
from support.processes import children, finished, forked, killed, pass_time, reap
from support.waiting import wait_until

#: How long anything that has to happen may take, in s. A collector takes 2 to 4 to start.
PATIENCE_S = float(os.environ.get("KILL_ROUNDS_PATIENCE_S", "150"))
#: The longest pause of a thread between its bursts. A server takes some thousand points a second.
PAUSE_S = 0.3


class Site:
    """The spool and the store of all rounds of a kind, as the jobs of one machine have them.

    A neighbour is another job, which only holds its logger open: so the collector stays from round
    to round, and has somebody who starts it anew.
    """

    def __init__(self, folder: Path, store: Path, uri: str, tally: Tally) -> None:
        self.spool = folder / "spool"
        self.store = store
        self.uri = uri
        self.tally = tally
        self.held: HeldRequests | None = None
        self.limit: MemoryLimit | None = None
        self.known: set[int] = set()
        self.neighbour: Worker | None = None

    def collector(self) -> int | None:
        """The pid of the spool's collector; None if there is none, or it only begins to start."""
        pid = self.last_collector()
        return pid if "flowbuffer.collector.process" in children().get(pid, "") else None

    def last_collector(self) -> int:
        """The pid of the collector that was there last."""
        try:
            return int((self.spool / "collector.lock").read_text())
        except (OSError, ValueError):
            return 0

    def kill_collector(self) -> int | None:
        """SIGKILL the collector; its pid if there was one."""
        pid = self.collector()
        if pid is not None:
            self.tally.killed += killed(pid)
        return pid

    def stored_points(self, run_id: str) -> int:
        with closing(sqlite3.connect(self.store, timeout=30)) as connection:
            count = "SELECT count(*) FROM metrics WHERE run_uuid = ?"
            return connection.execute(count, (run_id,)).fetchone()[0]

    @contextmanager
    def locked_store(self) -> Iterator[None]:
        """Nobody can write to the store within the block: a request that comes waits."""
        with closing(sqlite3.connect(self.store, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.execute("ROLLBACK")

    def meet_neighbour(self, run_id: str) -> None:
        """Have a neighbour, at the latest from now on."""
        if self.neighbour is None:
            self.neighbour = Worker(self, run_id)
            self.known.add(self.neighbour.pid)
            self.neighbour.wait_opened()

    def part_from_neighbour(self) -> None:
        """All jobs have ended but the neighbour; it ends, and then the collector by itself."""
        if self.neighbour is not None:
            self.neighbour.stop()
            self.neighbour.finish()
            self.known.discard(self.neighbour.pid)
            self.neighbour = None
        wait_until(lambda: not self.strangers(), PATIENCE_S, every_s=0.05)

    def strangers(self) -> dict[int, str]:
        """The processes, with their commands, that have no business once all jobs have ended."""
        reap(self.known)
        return {pid: command for pid, command in children().items() if pid not in self.known}

    def wait_delivered(self, run_id: str) -> None:
        """Wait until nothing of a run is left in the spool."""
        wait_until(lambda: not self.folders(run_id), PATIENCE_S, every_s=0.01)

    def folders(self, run_id: str) -> list[Path]:
        """The folders of those that log, or logged, to a run."""
        try:
            names = os.listdir(self.spool / run_id)
        except FileNotFoundError:
            return []
        # A hidden one is in the making, or going: swept a minute after its process died.
        return [self.spool / run_id / name for name in names if not name.startswith(".")]


class Worker:
    """A process with a logger open, until it is told to stop or killed.

    Args:
        site: Where it logs.
        run_id: The run.
        records: Log from several threads, with the records of what returned in this folder.
        seed: Decides what is logged.
        rank: Of the process, if it has one.
        one_request: Of its points at most one request is on its way at any time.
        burst: So many points come first, at once.
        before: Called in the process first.
        meanwhile: Called in the process's main thread while others log; it ends with the event.
    """

    def __init__(
        self,
        site: Site,
        run_id: str,
        *,
        records: Path | None = None,
        seed: str = "",
        rank: int = 0,
        one_request: bool = False,
        burst: int = 0,
        with_child: bool = False,
        before: Callable[[], object] | None = None,
        meanwhile: Callable[[threading.Event], object] = threading.Event.wait,
    ) -> None:
        self._opened, opened = os.pipe()
        told, self._tell = os.pipe()

        def work() -> None:
            from flowbuffer import MetricLogger, Settings

            if before:
                before()
            os.environ.update(RANK=str(rank), WORLD_SIZE="4")
            settings = Settings(
                spool_dir=site.spool,
                delivery="process",
                linger_s=0.02,
                max_in_flight=1 if one_request else None,
            )
            logger = MetricLogger(run_id, tracking_uri=site.uri, settings=settings)
            until, threads = threading.Event(), []
            if with_child and records:
                forked(lambda: log_for_long(logger, f"r{rank}child", records, Random(seed), until))
            if records:
                threads = log_from_threads(
                    logger, f"r{rank}t", records, seed, until, burst, PAUSE_S
                )
            os.write(opened, b"o")
            threading.Thread(target=lambda: os.read(told, 1) and until.set(), daemon=True).start()
            meanwhile(until)
            for thread in threads:
                thread.join()
            report = logger.close(PATIENCE_S)
            if report.pending or report.rejected or report.dropped:
                raise RuntimeError(f"{report} at the end of rank {rank}")

        self.pid = forked(work)
        self._over = False
        os.close(opened)
        os.close(told)

    def wait_opened(self) -> None:
        """Wait until it logs."""
        if not pass_time(PATIENCE_S, until_readable=self._opened):
            raise TimeoutError("a process did not open its logger")

    def stop(self) -> None:
        """Tell it to end normally."""
        os.write(self._tell, b"e")

    def finish(self) -> None:
        """Wait for its normal end."""
        try:
            finished(self.pid, 2 * PATIENCE_S)
        finally:
            self._close()

    def has_died(self) -> bool:
        """Whether somebody else killed it."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._close()
            if status != signal.SIGKILL:
                raise RuntimeError(f"a process ended with wait status {status}")
        return bool(pid)

    def kill(self) -> None:
        """SIGKILL it, if it has not ended."""
        if not self._over:
            try:
                if killed(self.pid):
                    return
                raise RuntimeError("a process ended before it was killed")
            finally:
                self._close()

    def _close(self) -> None:
        self._over = True
        os.close(self._opened)
        os.close(self._tell)
