"""The public door: :class:`MetricLogger`."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flowbuffer import job_end
from flowbuffer.active_run import end_run, find_run, run_id_of, settled_uri
from flowbuffer.appends import Append, Lenience, then
from flowbuffer.clock import SYSTEM_CLOCK, checked_timeout
from flowbuffer.delivery import (
    Delivery,
    DeliveryByProcess,
    DeliveryHere,
    delivery_of,
    last_error,
    settings_for,
)
from flowbuffer.environment import environment_experiment, environment_place
from flowbuffer.errors import FlowbufferError
from flowbuffer.ledger import Ledger, is_over
from flowbuffer.logging_calls import LoggingCalls
from flowbuffer.notices import tell
from flowbuffer.progress import Progress
from flowbuffer.report import Report, Stats
from flowbuffer.settings import Settings, settings_with
from flowbuffer.spool.places import sync
from flowbuffer.spool.producer import Producer
from flowbuffer.spool.states import Waiting, park, parked_reason, want

if TYPE_CHECKING:
    from mlflow.entities import Run

    from flowbuffer.passthrough import PassThrough, Silence

_log = logging.getLogger("flowbuffer")

#: What is there for other modules, and not for users.
_INTERNAL = {"close_at_end", "closes_with_run", "end_of_run", "flush_at_end"} | {
    "folder",
    "is_held_up",
    "shows_progress",
}


class MetricLogger(LoggingCalls):
    """Logs metrics to one MLflow run, from any thread, at about a microsecond a point.

    A point is safe when the call returns: it is in a mapped file, from where it is delivered even
    if this process is killed. Nothing that the server does raises in the calls that log.

    Args:
        run_id: The run, or its id. None means MLflow's active run, else ``MLFLOW_RUN_ID``, else a
            run is started, and ended by :meth:`close`.
        tracking_uri: As MLflow takes it. None means MLflow's current one.
        experiment: The name of the experiment of a run that is started. None means MLflow's.
        run_name: The name of a run that is started. None means that MLflow finds one.
        settings: None means ``Settings()``.
        changes: Settings by name, like ``linger_s=0.1``; they win over ``settings``.

    Attributes:
        closes_with_run: Close it when the run is marked ended; else it is only flushed then.

    Raises:
        SettingError: A setting is out of its range.
        SpoolError: The spool cannot be used; the message says what would help.
    """

    def __init__(
        self,
        run_id: str | Run | None = None,
        *,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        run_name: str | None = None,
        settings: Settings | None = None,
        **changes: Any,
    ) -> None:
        import mlflow

        self.closes_with_run = False
        uri = tracking_uri or mlflow.get_tracking_uri()
        self._settings = settings_for(uri, settings_with(settings, changes))
        self._place = environment_place()
        self._logs = self._settings.logs(self._place.rank)
        start = starts_runs(self._settings)
        self._run_id, self._owns_run = find_run(
            run_id_of(run_id), tracking_uri, start=start, experiment=experiment, name=run_name
        )
        self._uri = settled_uri(uri)  # now that MLflow has made the store in which the run is
        self._ended = False
        self._opening = threading.RLock()
        self._lenience = Lenience()
        self._delivery: Delivery | None = None
        self._producer: Producer | PassThrough | Silence | None = None
        self._ledger: Ledger | None = None
        _loggers.add(self)
        self._open()

    @property
    def run_id(self) -> str:
        """The run that this logger logs to."""
        return self._run_id

    @property
    def folder(self) -> Path | None:
        """Where its points wait for delivery; None if it spools none."""
        return self._producer.directory.path if isinstance(self._producer, Producer) else None

    def is_held_up(self) -> bool:
        """Whether something is known to be in the way of delivery."""
        return self.folder is not None and last_error(self.folder) != ""

    @property
    def shows_progress(self) -> bool:
        """Whether a person is told how it goes: by one process of each machine, and by none that
        another one started as its worker."""
        first_here = not self._place.local_rank
        return self._settings.progress == "auto" and first_here and not job_end.is_child()

    @property
    def settings(self) -> Settings:
        """The settings in use."""
        return self._settings

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._ended

    # Waiting, telling, ending.

    def flush(self, timeout: float | None = None) -> Report:
        """Wait until everything that was logged before this call is delivered or rejected.

        Args:
            timeout: The most seconds to wait; None waits for as long as it takes, but not for a
                run that is gone from the server.

        Returns:
            The counts of this logger; ``pending`` is 0 if everything was settled in time.
        """
        return self._flush(checked_timeout(timeout))

    def stats(self) -> Stats:
        """The counts of this logger, and how delivery is doing."""
        counts = self._counts()
        return Stats(**counts, **(self._ledger.stats() if self._ledger is not None else {}))

    def close(self, timeout: float | None = None, *, failed: bool = False) -> Report:
        """Flush, then stop; the logger takes no more points. Closing again waits again.

        Args:
            timeout: The most seconds to wait; None means ``shutdown_timeout_s``. What is not
                delivered by then stays in the spool.
            failed: The job did not end well: a run that this logger started is marked ``FAILED``.
        """
        return self._close(checked_timeout(timeout), "FAILED" if failed else "FINISHED")

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._run_id, self._uri, self._settings)

    def __dir__(self) -> list[str]:
        hidden = re.compile("_[^_]").match
        return [n for n in object.__dir__(self) if n not in _INTERNAL and not hidden(n)]

    def __repr__(self) -> str:
        return f"<MetricLogger of run {self._run_id}>"

    # For job_end.

    def flush_at_end(self, timeout: float) -> None:
        """Flush when the job's main thread has ended."""
        if not self._left_to_others:
            self._flush(timeout)

    def end_of_run(self, timeout: float) -> None:
        """Flush before the run is marked ended; close, if ``closes_with_run``."""
        start_s = time.monotonic()
        if self.closes_with_run:
            self._close(timeout, "FINISHED")
        else:
            self._flush(timeout)
        if self._delivery is not None:
            left = self._delivery.left_by_dead(self._run_id)
            self._wait(lambda: all(map(is_over, left)), start_s + timeout)

    def close_at_end(self, timeout: float) -> None:
        """Close at the end of the job."""
        failed = job_end.has_failed()
        wait = not self._left_to_others
        self._close(timeout, "FAILED" if failed else "FINISHED", wait=wait)

    @property
    def _left_to_others(self) -> bool:
        """At the end of a child, like a data loader's worker, its parent's job goes on, and the
        collector process with it: the child need not wait."""
        return isinstance(self._delivery, DeliveryByProcess) and job_end.is_child()

    # How it works.

    def _open(self) -> None:
        """Make this process a producer of the run."""
        settings = self._settings
        if not self._logs:
            from flowbuffer.passthrough import Silence

            self._use(Silence())
        elif settings.enabled is False:
            from flowbuffer.passthrough import PassThrough

            self._use(PassThrough(self._run_id, self._uri, self._stored_key, SYSTEM_CLOCK))
        else:
            self._delivery = delivery = delivery_of(settings, self._uri)
            directory = delivery.spool.add_producer(self._this_producer())
            producer = Producer(
                directory, delivery.spool, settings, SYSTEM_CLOCK, delivery.push, self._stored_key
            )
            delivery.begin(directory.path)
            self._ledger = Ledger(producer, delivery)
            self._use(producer)
        job_end.watch(self)

    def _this_producer(self) -> Any:
        from flowbuffer.credentials import without_credentials
        from flowbuffer.spool.info import OFFLINE, this_producer
        from flowbuffer.transport import absolute_uri

        settings = self._settings
        return this_producer(
            self._run_id,
            without_credentials(absolute_uri(self._uri)),
            SYSTEM_CLOCK.now_ns() // 1_000_000,
            **asdict(self._place),
            delivery=OFFLINE if settings.offline else settings.delivery,
            settings=settings.of_delivery(),
            experiment=environment_experiment()[1],
        )

    def _stored_key(self, key: str) -> str:
        return self._settings.stored_key(key, self._place)

    def _use(self, producer: Producer | PassThrough | Silence) -> None:
        self._producer = producer
        self._log_by(lambda name: self._wrapped(getattr(producer, name)))

    def _wrapped(self, append: Append) -> Append:
        """The producer's method, with what seldom-used settings add to it."""
        producer = self._producer
        if isinstance(producer, Producer) and self._settings.durability == "power":
            append = then(append, sync)
        if isinstance(self._delivery, DeliveryHere) and self._settings.delivery == "inline":
            push = self._delivery.push
            append = then(append, lambda _: push())
        return append if self._settings.strict else self._lenience.around(append)

    def _flush(self, timeout: float | None) -> Report:
        start_s = time.monotonic()
        producer = self._producer
        if isinstance(producer, Producer):
            folder = producer.directory.path
            waiting = Waiting(folder, self._hurry_to(producer))
            self._wait(
                lambda: waiting.is_over() or parked_reason(folder) is not None,
                None if timeout is None else start_s + timeout,
            )
        return Report(**self._counts(), seconds=time.monotonic() - start_s)

    def _hurry_to(self, producer: Producer) -> tuple[int, int]:
        """Have everything that was logged until now sent without lingering; where that ends.
        A run that is gone may be restored by now: it is looked at again."""
        number, offset = producer.barrier()
        park(producer.directory.path, None)
        want(producer.directory.path / f"{number:08d}.slots", offset)
        return number, offset

    def _close(self, timeout: float | None, status: str, *, wait: bool = True) -> Report:
        with self._opening:
            again, self._ended = self._ended, True
        start_s = time.monotonic()
        deadline_s = start_s + (self._settings.shutdown_timeout_s if timeout is None else timeout)
        producer, delivery, ledger = self._producer, self._delivery, self._ledger
        if isinstance(producer, Producer) and delivery is not None and ledger is not None:
            producer.stop()
            ledger.counts()  # while the folder is there
            producer.close(failed=status != "FINISHED")
            self._hurry_to(producer)
            if wait:
                self._wait(ledger.is_let_go, deadline_s)
                # What dead producers left is worth waiting for while it gets somewhere.
                self._wait(delivery.is_idle, deadline_s)
            if not ledger.is_there():
                producer.directory.lock.release()
            if not again:
                delivery.end()
        self._log_by(lambda _: _refuse)
        report = Report(**self._counts(), seconds=time.monotonic() - start_s)
        if not again:
            job_end.unwatch(self)
            if ledger is not None:
                for words in ledger.last_words(report, waited=wait):
                    tell(words)
            if self._owns_run:
                end_run(self._run_id, self._uri, status)
        return report

    def _wait(self, until: Callable[[], bool], deadline_s: float | None) -> None:
        delivery = self._delivery
        assert delivery is not None
        shown = Progress(self._counts, deadline_s, off=not self.shows_progress)

        def meanwhile(waited_s: float) -> None:
            delivery.push()
            shown.show(waited_s)

        try:
            SYSTEM_CLOCK.wait_until(until, deadline_s, meanwhile)
        finally:
            shown.close()

    def _counts(self) -> dict[str, Any]:
        if self._ledger is None:
            counts: dict[str, Any] = {"delivered": getattr(self._producer, "stored", 0)}
        else:
            counts = self._ledger.counts()
        if self._lenience.invalid:
            counts["dropped"] = {**counts.get("dropped", {}), "invalid": self._lenience.invalid}
        return counts

    # After a fork the child is another process: its first call makes it a producer of its own.

    def _forget_after_fork(self) -> None:
        self._opening = threading.RLock()
        self._owns_run = False
        if isinstance(self._producer, Producer):
            self._producer.abandon()
        self._producer = self._delivery = self._ledger = None
        self._lenience = Lenience()
        if not self._ended:
            self._log_by(self._reopening)

    def _reopening(self, name: str) -> Callable[..., Any]:
        def reopen(*args: Any) -> Any:
            with self._opening:
                if self._producer is None:
                    self._open()
            return getattr(self, f"_{name}")(*args)

        return reopen


def starts_runs(settings: Settings) -> bool:
    """Whether a logger here starts a run where there is none: not offline, and not on a rank that
    does not log."""
    return not settings.offline and settings.logs(environment_place().rank)


def _refuse(*_: Any) -> Any:
    raise FlowbufferError("this logger is closed; a closed logger takes no more points")


def _unpickled(run_id: str, tracking_uri: str, settings: Settings) -> MetricLogger:
    return MetricLogger(run_id, tracking_uri=tracking_uri, settings=settings)


_loggers: weakref.WeakSet[MetricLogger] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for logger in list(_loggers):
        logger._forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
