"""A logger that is interrupted at one line of what its calls do, delivery and waiting included."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from flowbuffer import MetricLogger, Settings
from flowbuffer.collector import destinations
from flowbuffer.errors import FlowbufferError
from flowbuffer.spool.files import FileLock
from flowbuffer.testing import FakeTransport
from support.interrupted_producer import _raise
from support.interruptions import Line, Log, Trap, in_another_thread, lines_of
from support.waiting import wait_until

RUN = "run"
#: How long a wait may take: nothing here takes as long, unless it hangs.
PATIENCE_S = 60.0


class Site:
    """A logger with a backend in memory.

    Args:
        root: Its spool.
        delivery: Who delivers; with `process` no collector process can be started, so that whoever
            waits delivers.
    """

    def __init__(self, root: Path, delivery: str) -> None:
        self.transport = FakeTransport()
        self.settings = Settings(
            spool_dir=root, delivery=delivery, linger_s=0.0, shutdown_timeout_s=PATIENCE_S
        )
        self.logger: MetricLogger | None = None
        self.log = Log(
            lambda *args: self._logger().log_metric(*args),
            lambda *args: self._logger().log_metrics(*args),
            lambda *args: self._logger().log_series(*args),
            lambda *args: self._logger().log_param(*args),
        )

    def _logger(self) -> MetricLogger:
        assert self.logger is not None
        return self.logger

    def open(self) -> None:
        """Open the logger, again if that was interrupted."""
        while self.logger is None:
            try:
                self.logger = MetricLogger(RUN, tracking_uri="fake://", settings=self.settings)
            except KeyboardInterrupt:
                continue

    def calls(self) -> None:
        log, logger = self.log, self._logger()
        log.metric("known")
        _attempt(lambda: logger.log_metric("waited for", 1.0).wait(PATIENCE_S))
        log.metrics("known", "new")
        log.param()
        log.series("known", 3)
        _attempt(lambda: logger.flush(PATIENCE_S))
        _attempt(logger.stats)
        log.metric("known")

    def end(self) -> None:
        """Close, again if it was interrupted."""
        logger = self._logger()
        for _ in range(2):
            if _attempt(lambda: logger.close(PATIENCE_S)):
                return

    def work(self) -> None:
        self.open()
        self.calls()
        self.end()

    def faults(self) -> list[str]:
        """What is wrong in the end."""
        report = self._logger().close(PATIENCE_S)
        keys = {key for _, key, *_ in self.transport.rows} - {"waited for"}
        params = {key: value for (_, key), value in self.transport.params.items()}
        found = self.log.faults(self._values, params, keys)
        if report.pending or report.rejected:
            found.append(f"after the end: {report}")
        try:
            wait_until(lambda: not self._held())
        except TimeoutError:
            found.append(f"held for ever: {self._held()}")
        return found

    def _held(self) -> list[str]:
        """The locks that somebody holds."""
        root = self.settings.resolved_spool_dir()
        try:
            return [lock.name for lock in root.glob("**/*.lock") if FileLock.is_held(lock)]
        except FileNotFoundError:
            return ["of a folder that is being deleted"]

    def _values(self, key: str) -> list[float]:
        return [value for _, _, value in self.transport.history(RUN, key)]


def _attempt(call: Callable[[], object]) -> bool:
    try:
        call()
    except KeyboardInterrupt:
        return False
    return True


#: What happens at the line.
HANDLERS: dict[str, Callable[[Site, Log], Any]] = {
    "raise": lambda *_: _raise(),
    "metric": lambda _, log: log.metric("known"),
    "param": lambda _, log: log.param(),
    "flush": lambda site, _: site.logger and site.logger.flush(PATIENCE_S),
}


@contextmanager
def equipment(transport: Callable[[], FakeTransport]) -> Iterator[None]:
    """A backend in memory for every tracking URI, and no collector process."""

    def no_process(*_: Any, **__: Any) -> Any:
        raise OSError("no process here")

    with (
        mock.patch.object(destinations, "MlflowTransport", side_effect=lambda *_: transport()),
        mock.patch.object(subprocess, "Popen", no_process),
    ):
        yield


def lines(root: Path, delivery: str) -> list[Line]:
    """The lines that can be interrupted."""
    site = Site(root, delivery)
    with equipment(lambda: site.transport):
        return lines_of(site.work)


def interrupt(root: Path, delivery: str, line: Line, name: str) -> list[str]:
    """What is wrong after `name` happened at `line`."""
    site = Site(root, delivery)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    closing = False

    def handle() -> None:
        try:
            site.log.in_handler(lambda log: HANDLERS[name](site, log))
        except (FlowbufferError, AssertionError):
            if site.logger is not None and not closing:
                raise

    trap = Trap(line, handle)
    with equipment(lambda: site.transport):
        for work in (site.open, site.calls):
            trap.run(work) if not trap.sprung else work()
        logger = site._logger()
        problem = in_another_thread(
            lambda: [site.log.metric("known"), site.log.param(), logger.flush(PATIENCE_S)]
        )
        closing = True
        trap.run(site.end) if not trap.sprung else site.end()
        found = site.faults()
    if problem:
        found.append(problem)
    if not trap.sprung:
        found.append("the line was not reached")
    if before and len(os.listdir("/proc/self/fd")) > before + 6:
        found.append("descriptors are left open")
    return found
