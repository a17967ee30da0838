"""What happens when a job or a run ends: everything that logs is closed first, in bounded time.

Covered are the normal end of the process, an uncaught exception and ``sys.exit`` (``atexit``, and
before it the moment when the interpreter joins its threads, which is all that a child of
``multiprocessing`` has), SIGTERM where nobody else handles it, Ctrl-C while one of them waits, and
the end of an MLflow run. No promise rests on any of them: what they do not reach is in the spool.

``atexit`` calls last what was registered first. So everything is closed twice: where the first
logger was made, and once more where MLflow was imported (``plugin``), after what the program's own
handlers logged in between. What is logged even later is delivered by the call that logs it.
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

from flowbuffer.collector.deliverers import stop_threads
from flowbuffer.forks import in_child
from flowbuffer.logger.patience import Patience
from flowbuffer.logger.run_status import set_status
from flowbuffer.notices import tell
from flowbuffer.settings.settings import Settings
from flowbuffer.turn import Turn


class EndsWithJob(Protocol):
    """What is flushed and closed at the end, within what is left of :data:`patience`."""

    @property
    def run_id(self) -> str: ...

    @property
    def settings(self) -> Settings: ...

    @property
    def logged(self) -> int:
        """How many points it was given."""

    def flush_at_end(self) -> None:
        """Flush; others may still log."""

    def end_of_run(self) -> None:
        """The run is about to be marked ended: flush."""

    def close_at_end(self, status: str) -> None:
        """Flush and close, say what was left, and mark a run of its own ended."""


_watched: list[EndsWithJob] = []
_own_ends: set[str] = set()  # runs that flowbuffer itself is marking ended
_installed = False
_is_over = False
_turn = Turn()

#: What is left of the time to wait at the end.
patience = Patience(lambda: {id(logger): logger.logged for logger in list(_watched)})


def watch(logger: EndsWithJob) -> None:
    """Flush and close ``logger`` at the end of the job, and flush it at the end of its run."""
    with _turn:
        if logger not in _watched:
            _watched.append(logger)
        _install()
    _handle_sigterm()


def is_watched(logger: EndsWithJob) -> bool:
    """Whether the end of the logger is still to come."""
    return logger in _watched


def unwatch(logger: EndsWithJob) -> None:
    """The logger has ended."""
    with _turn:
        if logger in _watched:
            _watched.remove(logger)


def is_over() -> bool:
    """Whether no hook of flowbuffer's comes after what is logged now."""
    return _is_over


def is_child() -> bool:
    """Whether this process was started by ``multiprocessing``."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


def has_failed() -> bool:
    """Whether an exception that nobody caught ends this process; not asked of interactive ones."""
    return hasattr(sys, "last_type") and not hasattr(sys, "ps1")


def _was_interrupted() -> bool:
    """Whether Ctrl-C ends this process, be it in the program or in a wait."""
    return patience.interrupted or (
        has_failed() and issubclass(sys.last_type, KeyboardInterrupt)  # type: ignore[arg-type]
    )


# The end of a run.


def true_status(status: str | None) -> str:
    """The status of a run that ends now: none is finished that was interrupted."""
    interrupted = _was_interrupted() if patience.final else patience.interrupted
    return "KILLED" if interrupted and status in (None, "FINISHED") else status or "FINISHED"


def end_own_run(run_id: str, end: Callable[[], None]) -> None:
    """Have ``end`` mark a run ended that flowbuffer started; a server that does not take it raises
    nothing."""
    _own_ends.add(run_id)
    try:
        end()
    except Exception as error:
        tell(f"run {run_id} could not be marked as ended: {error}")
    finally:
        _own_ends.discard(run_id)


def _flush_run(run_id: str) -> KeyboardInterrupt | None:
    """Flush what logs to a run; what interrupted it."""
    interrupt = None
    for logger in list(_watched):
        if logger.run_id == run_id:
            try:
                logger.end_of_run()
            except KeyboardInterrupt as error:
                interrupt = error
                patience.interrupt(error)
            except Exception as error:  # the run is to be marked ended all the same
                tell(f"run {run_id}: {error}")
    return interrupt


def _wrap_set_terminated() -> None:
    """Every way to end a run, fluent or by client, goes through ``set_terminated``."""
    from mlflow.tracking._tracking_service.client import TrackingServiceClient

    original = TrackingServiceClient.set_terminated

    def set_terminated(
        self: Any, run_id: str, status: str | None = None, end_time: int | None = None
    ) -> None:
        interrupt = None
        try:
            interrupt = _flush_run(run_id)
            by_us = patience.final or run_id in _own_ends
            if not patience.interrupted and not (patience.in_vain and by_us):
                # Where the server is gone this tries again for minutes.
                original(self, run_id, true_status(status), end_time)
                return
        except KeyboardInterrupt as error:
            interrupt = error
            patience.interrupt(error)
        finally:
            _keep_exit_status()
        if not patience.exhausted:
            in_haste = patience.interrupted
            set_status(self, run_id, true_status(status), end_time, in_haste=in_haste)
        if interrupt is not None and not patience.final:
            raise interrupt.with_traceback(None)

    set_terminated.__doc__ = original.__doc__
    TrackingServiceClient.set_terminated = set_terminated


# The end of the process.


def _install() -> None:
    """Once per process, and inherited by forked children."""
    global _installed
    if _installed:
        return
    atexit.register(_at_exit)
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        # Called last registered first; what executors registered must come after ours.
        import concurrent.futures.thread  # noqa: F401

        try:
            register(_before_threads_are_joined)
        except RuntimeError:
            pass  # a thread that outlived the main thread makes its first logger: atexit it is
    _wrap_set_terminated()
    _installed = True  # only now: who was interrupted here has it done again, which harms nothing


def _before_threads_are_joined() -> None:
    """The main thread is done; others may still log, so nothing is closed yet. In a child of
    ``multiprocessing`` nothing comes after this."""
    global _is_over
    patience.final = True
    if is_child():
        _is_over = True
        _end_all(lambda logger: logger.close_at_end(_status()))
    else:
        _end_all(lambda logger: logger.flush_at_end())


def _at_exit() -> None:
    patience.final = True
    _end_all(lambda logger: logger.close_at_end(_status()))


def at_the_very_end() -> None:
    """The last that ``atexit`` calls, but for what was registered before MLflow was imported."""
    global _is_over
    _is_over = True
    _at_exit()
    try:
        stop_threads()
    except KeyboardInterrupt as error:
        patience.interrupt(error)
    _keep_exit_status()


def _status() -> str:
    return "FAILED" if has_failed() else "FINISHED"


def _end_all(end: Callable[[EndsWithJob], None]) -> None:
    """End each logger. Whatever a signal handler raises meanwhile ends none of the others."""
    _hear_interrupts()
    for logger in list(_watched):
        while True:
            try:
                end(logger)
            except Exception as error:  # the others are to be closed all the same
                tell(f"run {logger.run_id}: {error}")
            except BaseException as error:
                # sys.exit() in a handler of the program's: what is due is due all the same.
                if isinstance(error, KeyboardInterrupt):
                    patience.interrupt(error)
                continue
            break
    _keep_exit_status()


# Ctrl-C. The first one ends all waiting, the second one the process.

_handler_before: Any = None


def _hear_interrupts() -> None:
    global _handler_before
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and handler is not _on_interrupt:
            _handler_before = handler
            signal.signal(signal.SIGINT, _on_interrupt)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """While the process ends."""
    signal.signal(number, signal.SIG_DFL)
    _end_by_interrupt.append(_EndByInterrupt())
    interrupt = KeyboardInterrupt()
    patience.interrupt(interrupt)
    if _handler_before is not signal.default_int_handler:
        _handler_before(number, frame)
    raise interrupt


class _EndByInterrupt:
    """Ends the process as Ctrl-C does, once the interpreter takes its modules apart: after all that
    ``atexit`` calls, whose work is not to be cut short."""

    def __del__(
        self, kill: Any = os.kill, pid: Any = os.getpid, number: int = signal.SIGINT
    ) -> None:
        kill(pid(), number)


_end_by_interrupt: list[_EndByInterrupt] = []


def _keep_exit_status() -> None:
    """CPython ends by SIGINT after an uncaught KeyboardInterrupt, unless something was executed
    from text since then, as modules do that are imported at the end: it goes by the last text."""
    if patience.final and _was_interrupted():
        try:
            exec("raise KeyboardInterrupt")
        except KeyboardInterrupt:
            pass


# SIGTERM.


def _handle_sigterm() -> None:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, _frame: FrameType | None) -> None:
    """Deliver what is pending, then do what SIGTERM does to a process that does not handle it.

    That is nothing where the process is the first one of a container: the kernel keeps signals with
    their default action from it. A program that stock Python lets go on then goes on, and its
    loggers with it.
    """
    handler, final = signal.getsignal(signal.SIGINT), patience.final
    try:
        patience.final = True
        _end_all(lambda logger: logger.close_at_end("KILLED"))
    finally:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    signal.signal(number, _on_sigterm)
    if not final:
        patience.final = False
        patience.begin()
        signal.signal(signal.SIGINT, handler)


def _forget_after_fork() -> None:
    """In a forked child nothing is pending, and signals end it as they would have."""
    global _is_over
    _is_over = patience.final = False
    _watched.clear()
    patience.begin()
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGTERM) is _on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is _on_interrupt:
            signal.signal(signal.SIGINT, _handler_before)


in_child("logger.job_end", _forget_after_fork)
