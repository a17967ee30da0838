"""What happens when a job or a run ends: everything that logs is closed first, in bounded time.

Covered are the normal end of the process, an uncaught exception and ``sys.exit`` (``atexit``, and
before it the moment when the interpreter joins its threads, which is all that a child of
``multiprocessing`` has), SIGTERM where nobody else handles it, and the end of an MLflow run. No
promise rests on any of them: what they do not reach is in the spool.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.notices import tell
from flowbuffer.settings import Settings


class EndsWithJob(Protocol):
    """What is flushed and closed at the end."""

    @property
    def run_id(self) -> str: ...

    @property
    def settings(self) -> Settings: ...

    def flush_at_end(self, timeout: float) -> None:
        """Flush within ``timeout`` seconds, showing progress."""

    def end_of_run(self, timeout: float) -> None:
        """The run is about to be marked ended: flush within ``timeout`` seconds."""

    def close_at_end(self, timeout: float) -> None:
        """Flush and close within ``timeout`` seconds, and say what was left."""


_watched: list[EndsWithJob] = []
_installed = False
_lock = threading.RLock()


def watch(logger: EndsWithJob) -> None:
    """Flush and close ``logger`` at the end of the job, and flush it at the end of its run."""
    with _lock:
        if logger not in _watched:
            _watched.append(logger)
        _install()
    _handle_sigterm()


def unwatch(logger: EndsWithJob) -> None:
    """The logger was closed."""
    with _lock:
        if logger in _watched:
            _watched.remove(logger)


def flush_run(run_id: str) -> None:
    """Flush what logs to a run; it is about to be marked ended."""
    for logger in list(_watched):
        if logger.run_id == run_id:
            try:
                logger.end_of_run(logger.settings.shutdown_timeout_s)
            except Exception as error:  # the run is to be marked ended all the same
                tell(f"run {run_id}: {error}")


def is_child() -> bool:
    """Whether this process was started by ``multiprocessing``."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


def has_failed() -> bool:
    """Whether an exception that nobody caught ends this process; not asked of interactive ones."""
    return hasattr(sys, "last_type") and not hasattr(sys, "ps1")


def _install() -> None:
    """Once per process, and inherited by forked children."""
    global _installed
    if _installed:
        return
    _installed = True
    atexit.register(_close_all)
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        # Called last registered first; what executors registered must come after ours.
        import concurrent.futures.thread  # noqa: F401

        try:
            register(_flush_all)
        except RuntimeError:
            pass  # a thread that outlived the main thread makes its first logger: atexit it is
    _flush_before_set_terminated()


def _flush_all() -> None:
    """The main thread is done; others may still log, so nothing is closed yet."""
    for logger in list(_watched):
        _spend(logger, logger.flush_at_end)


def _close_all() -> None:
    for logger in list(_watched):
        _spend(logger, logger.close_at_end)


_spent_s = 0.0


def _spend(logger: EndsWithJob, finish: Callable[[float], None]) -> None:
    """Let a logger have what is left of ``shutdown_timeout_s``: the loggers share one."""
    global _spent_s
    start_s = SYSTEM_CLOCK.monotonic_s()
    try:
        finish(max(logger.settings.shutdown_timeout_s - _spent_s, 0.0))
    except Exception as error:  # the others are to be closed all the same
        tell(f"run {logger.run_id}: {error}")
    _spent_s += SYSTEM_CLOCK.monotonic_s() - start_s


def _handle_sigterm() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, _frame: FrameType | None) -> None:
    """Deliver what is pending, then end as SIGTERM ends a process that does not handle it."""
    try:
        _close_all()
    finally:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _flush_before_set_terminated() -> None:
    """Every way to end a run, fluent or by client, goes through ``set_terminated``."""
    from mlflow.tracking._tracking_service.client import TrackingServiceClient

    original = TrackingServiceClient.set_terminated

    def set_terminated(self: Any, run_id: str, *args: Any, **kwargs: Any) -> Any:
        flush_run(run_id)
        return original(self, run_id, *args, **kwargs)

    set_terminated.__doc__ = original.__doc__
    TrackingServiceClient.set_terminated = set_terminated


def _forget_after_fork() -> None:
    """In a forked child nothing is pending, and SIGTERM ends it as it would have."""
    global _lock, _spent_s
    _lock = threading.RLock()
    _spent_s = 0.0
    _watched.clear()
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is _on_sigterm
    ):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_after_fork)
