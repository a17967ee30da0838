"""The public door: :class:`MetricLogger`."""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flowbuffer.clock import SYSTEM_CLOCK, checked_timeout
from flowbuffer.collector.deliverers import DeliveryHere, delivery_of, last_error, settings_for
from flowbuffer.forks import in_child
from flowbuffer.logger import job_end, open_loggers
from flowbuffer.logger.active_run import (
    find_run,
    mark_ended,
    run_id_of,
    settled_uri,
    starts_runs,
)
from flowbuffer.logger.recorders import Append, Calls, Lenience, around, then
from flowbuffer.logger.reopening import Reopening
from flowbuffer.logger.report import Report, Stats
from flowbuffer.logger.spooling import Spooling, producer_info
from flowbuffer.notices import warn_without_gil
from flowbuffer.settings.environment import JobPlace, environment_job_place
from flowbuffer.settings.settings import Settings, settings_with
from flowbuffer.spool.writing.places import fsync_places
from flowbuffer.spool.writing.producer import Producer

if TYPE_CHECKING:
    from mlflow.entities import Run

    from flowbuffer.logger.passthrough import PassThrough, Silence

#: What is there for other modules, and not for users.
_INTERNAL = {"close_at_end", "closes_with_run", "end_of_run", "flush_at_end"} | {
    "folder",
    "is_held_up",
    "let_go",
    "logged",
    "shows_progress",
    "used",
}


class MetricLogger(Reopening):
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

    Raises:
        InvalidArgument: ``run_id`` is no run.
        FlowbufferError: A run has to be started, and its server does not answer.
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

        self.closes_with_run = False  # or only flushed, when its run is marked ended
        uri = tracking_uri or mlflow.get_tracking_uri()
        self._settings = settings_for(uri, settings_with(settings, changes))
        self._job_place = environment_job_place()
        self._logs = self._settings.logs(self._job_place.rank)
        start = starts_runs(self._settings)
        self._run_id, self._owns_run = find_run(
            run_id_of(run_id), tracking_uri, start=start, experiment=experiment, name=run_name
        )
        self._uri = settled_uri(uri)  # now that MLflow has made the store in which the run is
        self._ended = False
        self._opening = threading.RLock()
        self._lenience = Lenience()
        self._recorder: PassThrough | Silence | None = None
        self._spooling: Spooling | None = None
        _loggers.add(self)
        try:
            self._open()
        except BaseException:  # the caller has no logger, and can close none
            self._ended = True
            job_end.unwatch(self)
            if self._spooling is not None:
                self._spooling.abandon()
            raise

    @property
    def run_id(self) -> str:
        """The run that this logger logs to."""
        return self._run_id

    @property
    def folder(self) -> Path | None:
        """Where its points wait for delivery; None if it spools none."""
        return None if self._spooling is None else self._spooling.folder

    def is_held_up(self) -> bool:
        """Whether the last request for its points failed: who need not wait for them does not."""
        return self.folder is not None and last_error(self.folder) != ""

    @property
    def shows_progress(self) -> bool:
        """Whether a person is told how it goes: by one process of each machine, and by none that
        another one started as its worker."""
        first_here = not self._job_place.local_rank
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
        start_s = time.monotonic()
        seconds = checked_timeout(timeout)
        if self._spooling is not None:
            self._spooling.flush(None if seconds is None else start_s + seconds)
        return self._report(start_s)

    def stats(self) -> Stats:
        """The counts of this logger, and how delivery is doing."""
        of_delivery = self._spooling.ledger.stats() if self._spooling else {}
        return Stats(**self._counts(), **of_delivery)

    def close(self, timeout: float | None = None, *, failed: bool = False) -> Report:
        """Flush, then stop; the logger takes no more points. Closing again waits again.

        Ctrl-C ends the wait, and every other wait of the same end: what is left stays in the spool,
        and a run that this logger started is marked ``KILLED``.

        Args:
            timeout: The most seconds to wait; None means ``shutdown_timeout_s`` for all waits of
                the end of a job together. What is not delivered by then stays in the spool.
            failed: The job did not end well: a run that this logger started is marked ``FAILED``.
        """
        seconds = checked_timeout(timeout)
        if self._ended and not job_end.is_watched(self):
            job_end.patience.begin()
        shared = seconds is None
        bound_s = self._settings.shutdown_timeout_s if seconds is None else seconds
        deadline_s = job_end.patience.deadline_s(bound_s, shared=shared)
        return self._close(deadline_s, "FAILED" if failed else "FINISHED")

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

    @property
    def logged(self) -> int:
        """How many points it was given."""
        of = self._counts().get
        return sum(of(name, 0) for name in ("delivered", "rejected", "pending", "unknown"))

    def flush_at_end(self) -> None:
        """Flush when the job's main thread has ended."""
        spooling = self._spooling
        if spooling is not None and not spooling.is_left_to_others:
            spooling.flush(self._deadline_s(), ends=True)

    def end_of_run(self) -> None:
        """Flush before the run is marked ended; close, if ``closes_with_run``."""
        deadline_s, spooling = self._deadline_s(), self._spooling
        if self.closes_with_run:
            self._close(deadline_s, "FINISHED")
        elif spooling is not None:
            spooling.flush(deadline_s, ends=True)
        if spooling is not None:
            spooling.wait_for_dead(self._run_id, deadline_s)

    def close_at_end(self, status: str) -> None:
        """Close at the end of the job; a call that comes later opens the logger again."""
        self._close(self._deadline_s(), status, reopens=True)

    def _deadline_s(self) -> float:
        return job_end.patience.deadline_s(self._settings.shutdown_timeout_s)

    # How it works.

    def _open(self) -> None:
        """Make this process a producer of the run."""
        key_of = stored_key_of(self._settings, self._job_place)
        if not self._logs:
            from flowbuffer.logger.passthrough import Silence

            self._use(Silence())
        elif self._settings.enabled is False:
            from flowbuffer.logger.passthrough import PassThrough

            self._use(PassThrough(self._run_id, self._uri, key_of, SYSTEM_CLOCK))
        else:
            warn_without_gil()
            open_loggers.add(self)
            settings = self._settings
            delivery = delivery_of(settings, self._uri)
            before = self._spooling
            left = None if before is None else before.left
            after, files = (None, None) if left is None else (left.folder, left.files())
            directory = delivery.spool.add_producer(
                producer_info(
                    self._run_id, self._uri, settings, self._job_place, delivery.environment
                ),
                after,
                files,
            )
            try:
                producer = Producer(
                    directory,
                    delivery.spool,
                    settings,
                    SYSTEM_CLOCK,
                    delivery.push,
                    key_of,
                    weakref.WeakMethod(self._reopening),  # one that is dropped is held by nobody
                )
                if left is not None:
                    producer.go_on_from(left.producer)
                delivery.begin(directory.path)
                self._use(Spooling(producer, delivery, shows_progress=self.shows_progress))
            except BaseException:
                if self._spooling is before:  # else the logger has it, and it is in use
                    delivery.abandon()
                    directory.lock.release()
                raise
            if before is not None and before.producer.is_gone:
                before.leave()
        self._is_open = True
        job_end.watch(self)

    def _use(self, recorder: Spooling | PassThrough | Silence) -> None:
        if isinstance(recorder, Spooling):
            if self._spooling is not recorder:
                # In one line without a call: nothing comes between, and loses one of the two.
                recorder.before, self._spooling = self._spooling, recorder
            self._log_by(around(recorder.producer, lambda call: self._wrapped(call, recorder)))
        else:
            self._recorder = recorder
            self._log_by(around(recorder, self._wrapped))

    def _wrapped(self, append: Append, spooling: Spooling | None = None) -> Append:
        """``append`` with what seldom-used settings add to it, to be called in its place."""
        if spooling is not None:
            if self._settings.durability == "power":
                append = then(append, fsync_places)
            delivery = spooling.delivery
            if isinstance(delivery, DeliveryHere) and self._settings.delivery == "inline":
                append = then(append, lambda _: delivery.push())
            if job_end.is_over():
                append = then(append, lambda _: self._deliver_late(spooling))
        return append if self._settings.strict else self._lenience.around(append)

    def _deliver_late(self, spooling: Spooling) -> None:
        """Nothing of the process comes after this call that could wait, or tell what is left."""
        spooling.flush(self._deadline_s(), ends=True)
        spooling.say_what_is_left(self._report(time.monotonic()), waited=True)

    def _report(self, start_s: float) -> Report:
        return Report(**self._counts(), seconds=time.monotonic() - start_s)

    def _close(self, deadline_s: float, status: str, *, reopens: bool = False) -> Report:
        start_s = time.monotonic()
        self._ended = self._ended or not reopens
        spooling = self._spooling
        self._log_by(Calls(self._refusing if self._ended else self._reopening))
        self._is_open = False
        open_loggers.remove(self)
        wait = spooling is None or not (reopens and spooling.is_left_to_others)
        interrupt: KeyboardInterrupt | None = None
        if spooling is not None:
            try:
                spooling.stop(failed=status != "FINISHED")
                if wait:
                    spooling.drain(deadline_s)
            except KeyboardInterrupt as error:
                interrupt = error
                job_end.patience.interrupt(error)
                spooling.stop(failed=True)
            spooling.leave()
        report = self._report(start_s)
        if job_end.is_watched(self):
            if spooling is not None:
                spooling.say_what_is_left(report, waited=wait)
            if self._owns_run:
                status = job_end.true_status(status)
                job_end.end_own_run(
                    self._run_id, lambda: mark_ended(self._run_id, self._uri, status)
                )
            job_end.unwatch(self)
        if interrupt is not None and not job_end.patience.final:
            raise interrupt.with_traceback(None)
        return report

    def _counts(self) -> dict[str, Any]:
        if self._spooling is None:
            counts: dict[str, Any] = {"delivered": getattr(self._recorder, "stored", 0)}
        else:
            counts = self._spooling.counts()
        if self._lenience.invalid:
            counts["dropped"] = {**counts.get("dropped", {}), "invalid": self._lenience.invalid}
        return counts

    # After a fork the child is another process: its first call makes it a producer of its own.
    # So does a call after the end of the job, by an atexit handler of the program's.

    def _forget_after_fork(self) -> None:
        self._opening = threading.RLock()
        self._owns_run = False
        if self._spooling is not None:
            self._spooling.producer.abandon()
        self._recorder = self._spooling = None
        self._is_open = False
        self._lenience = Lenience()
        if not self._ended:
            self._log_by(Calls(self._reopening))


def stored_key_of(settings: Settings, job_place: JobPlace) -> Callable[[str], str]:
    """Makes the key that is stored from the key that the caller gave."""
    return lambda key: settings.stored_key(key, job_place)


def _unpickled(run_id: str, tracking_uri: str, settings: Settings) -> MetricLogger:
    return MetricLogger(run_id, tracking_uri=tracking_uri, settings=settings)


_loggers: weakref.WeakSet[MetricLogger] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for logger in list(_loggers):
        logger._forget_after_fork()


in_child("logger.metric_logger", _forget_after_fork)
