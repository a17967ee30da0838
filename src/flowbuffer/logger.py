"""The public door: :class:`MetricLogger`."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flowbuffer import job_end
from flowbuffer.active_run import end_run, find_run
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.errors import FlowbufferError, InvalidPoint
from flowbuffer.handle import Handle
from flowbuffer.report import Progress, Report, Stats
from flowbuffer.settings import Settings, environment_rank
from flowbuffer.spool.points import Number
from flowbuffer.spool.producer import Places, Producer
from flowbuffer.spool.states import committed_points, segments_before, want

if TYPE_CHECKING:
    import numpy.typing

    from flowbuffer.collector import Collector, Stream
    from flowbuffer.passthrough import PassThrough

_log = logging.getLogger("flowbuffer")

#: A method of the producer that logs, or one around it.
Append = Callable[..., Places]


class MetricLogger:
    """Logs metrics to one MLflow run, from any thread, at about a microsecond a point.

    A point is safe when the call returns: it is in a mapped file, from where it is delivered even
    if this process is killed. Nothing that the server does raises in the calls that log.

    Args:
        run_id: The run. None means MLflow's active run, else ``MLFLOW_RUN_ID``, else a run is
            started, and ended by :meth:`close`.
        tracking_uri: As MLflow takes it. None means MLflow's current one.
        settings: None means :meth:`Settings.from_env`.

    Raises:
        SettingError: A setting is out of its range.
        SpoolError: The spool cannot be used; the message says what would help.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        tracking_uri: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        import mlflow

        self._settings = Settings.from_env() if settings is None else settings
        self._uri = tracking_uri or mlflow.get_tracking_uri()
        self._run_id, self._owns_run = find_run(run_id, tracking_uri)
        self._fluent = False
        self._ended = False
        self._opening = threading.RLock()
        self._warned: set[str] = set()
        self._invalid = 0
        self._stream: Stream | None = None
        self._collector: Collector | None = None
        self._producer: Producer | PassThrough | None = None
        _loggers.add(self)
        self._open()

    @property
    def run_id(self) -> str:
        """The run that this logger logs to."""
        return self._run_id

    @property
    def settings(self) -> Settings:
        """The settings in use."""
        return self._settings

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._ended

    # What the training loop calls. The attributes that begin with _append are the producer's
    # methods; see _open.

    def log_metric(
        self, key: str, value: Number, step: int | None = None, timestamp: int | None = None
    ) -> Handle:
        """Log one point.

        Args:
            key: As MLflow takes it: letters, digits, spaces and ``_ - . : /``, at most 250.
            value: Anything with ``__float__``; NaN and infinities are values.
            step: 64 bits, signed. None is 0, as in MLflow.
            timestamp: ms since the epoch, from 0. None is the time of the call.

        Raises:
            InvalidPoint: An argument is none of that (``strict``). Nothing else is affected.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return Handle(self._append(key, value, step, timestamp))

    def log_metrics(
        self, metrics: Mapping[str, Number], step: int | None = None, timestamp: int | None = None
    ) -> Handle:
        """Log one point per key, all with one step and one time. The arguments are as in
        :meth:`log_metric`.

        Raises:
            InvalidPoint: A key or value cannot be logged; the others were.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return Handle(self._append_many(metrics, step, timestamp))

    def log_series(
        self,
        key: str,
        values: numpy.typing.ArrayLike,
        steps: numpy.typing.ArrayLike | None = None,
        timestamps: numpy.typing.ArrayLike | None = None,
    ) -> Handle:
        """Log many points of one key.

        Args:
            key: As in :meth:`log_metric`.
            values: 1-D, n numbers; n may be 0.
            steps: 1-D, n whole numbers. None counts from 0.
            timestamps: 1-D, n times in ms since the epoch. None is the time of the call for all.

        Raises:
            InvalidPoint: An argument is none of that; nothing of the series was logged.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return Handle(self._append_series(key, values, steps, timestamps))

    # Waiting, telling, ending.

    def flush(self, timeout: float | None = None) -> Report:
        """Wait until everything that was logged before this call is delivered or rejected.

        Args:
            timeout: The most seconds to wait; None waits for as long as it takes, but not for a
                run that is gone from the server.

        Returns:
            The counts of this logger; ``pending`` is 0 if everything was settled in time.
        """
        return self._flush(timeout, progress=False)

    def stats(self) -> Stats:
        """The counts of this logger, and how delivery is doing."""
        counts = self._counts()
        stream, collector = self._stream, self._collector
        if stream is None or collector is None:
            return Stats(**counts)
        failure = stream.sender.failure
        return Stats(
            **counts,
            lag_s=_lag_s(stream),
            backlog_bytes=collector.spool.used_bytes(),
            ties_moved=stream.source.ties.moved,
            ties_moved_most_ms=stream.source.ties.moved_most_ms,
            retries=stream.sender.retries,
            last_error="" if failure is None else failure.reason,
        )

    def close(self, timeout: float | None = None) -> Report:
        """Flush, then stop; the logger takes no more points. Closing again waits again.

        Args:
            timeout: The most seconds to wait; None means ``shutdown_timeout_s``. What is not
                delivered by then stays in the spool.
        """
        return self._close(timeout, "FINISHED")

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(None, "FINISHED" if kind is None else "FAILED")

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._run_id, self._uri, self._settings)

    def __repr__(self) -> str:
        return f"<MetricLogger of run {self._run_id}>"

    # For job_end.

    def flush_at_end(self, timeout: float) -> None:
        """Flush when the job's main thread has ended."""
        self._flush(timeout, progress=True)

    def end_of_run(self, timeout: float) -> None:
        """Flush before the run is marked ended; close, if this logger is the fluent functions'."""
        if self._fluent:
            self._close(timeout, "FINISHED", progress=True)
        else:
            self._flush(timeout, progress=True)

    def close_at_end(self, timeout: float) -> None:
        """Close at the end of the job."""
        self._close(timeout, "FINISHED", progress=True)

    # How it works.

    def _open(self) -> None:
        """Make this process a producer of the run."""
        if self._settings.enabled:
            from flowbuffer.collector import collector_of  # it imports NumPy

            collector = collector_of(self._settings)
            self._collector = collector
            spool = collector.spool
            directory = spool.add_producer(_this_producer(self._run_id, self._uri))
            producer = Producer(directory, spool, self._settings, SYSTEM_CLOCK, collector.hurry)
            self._stream = collector.add(directory, self._uri, adopted=False)
            collector.start()
            self._use(producer)
        else:
            from flowbuffer.passthrough import PassThrough

            self._use(PassThrough(self._run_id, self._uri, SYSTEM_CLOCK))
        job_end.watch(self)

    def _use(self, producer: Producer | PassThrough) -> None:
        self._producer = producer
        self._append = self._wrapped(producer.append)
        self._append_many = self._wrapped(producer.append_many)
        self._append_series = self._wrapped(producer.append_series)

    def _wrapped(self, append: Append) -> Append:
        """The producer's method, with what seldom-used settings add to it."""
        producer, collector = self._producer, self._collector
        if isinstance(producer, Producer) and self._settings.durability == "power":
            append = _then(append, producer.sync)
        if collector is not None and self._settings.delivery == "inline":
            append = _then(append, lambda _: collector.drain())
        return append if self._settings.strict else self._lenient(append)

    def _lenient(self, append: Append) -> Append:
        """For ``strict=False``: what cannot be logged is counted, and warned of once per key."""

        def append_or_count(what: Any, *args: Any) -> Places:
            try:
                return append(what, *args)
            except InvalidPoint as error:
                with self._opening:
                    self._invalid += error.count
                    about = repr(what if isinstance(what, str) else type(what))[:300]
                    first_time = about not in self._warned
                    self._warned.add(about)
                if first_time:
                    _log.warning("a point was not logged (strict=False): %s", error)
                return [*error.stored, None, str(error)]

        return append_or_count

    def _flush(self, timeout: float | None, *, progress: bool) -> Report:
        start_s = time.monotonic()
        producer, stream, collector = self._producer, self._stream, self._collector
        if isinstance(producer, Producer) and stream is not None and collector is not None:
            barrier = self._hurry_to(producer)
            self._wait(
                lambda: stream.done or stream.sender.gone or _is_settled(stream, barrier),
                None if timeout is None else start_s + timeout,
                progress=progress,
            )
        return Report(**self._counts(), seconds=time.monotonic() - start_s)

    def _hurry_to(self, producer: Producer) -> tuple[int, int]:
        """Have everything that was logged until now sent without lingering; where that ends."""
        number, offset = producer.barrier()
        want(producer.directory.path / f"{number:08d}.slots", offset)
        return number, offset

    def _close(self, timeout: float | None, status: str, *, progress: bool = False) -> Report:
        with self._opening:
            again, self._ended = self._ended, True
        start_s = time.monotonic()
        timeout = self._settings.shutdown_timeout_s if timeout is None else timeout
        producer, stream, collector = self._producer, self._stream, self._collector
        if isinstance(producer, Producer) and stream is not None and collector is not None:
            producer.close()
            stream.reader.finish(producer.barrier())
            self._hurry_to(producer)
            deadline_s = start_s + timeout
            self._wait(lambda: stream.done or stream.sender.gone, deadline_s, progress=progress)
            # What dead producers left is worth waiting for while it gets somewhere.
            self._wait(
                lambda: all(s.stuck for s in collector.streams if s.adopted),
                deadline_s,
                progress=progress,
            )
        self._append = self._append_many = self._append_series = _refuse
        if again:
            return Report(**self._counts(), seconds=time.monotonic() - start_s)
        job_end.unwatch(self)
        report = Report(**self._counts(), seconds=time.monotonic() - start_s)
        if report.pending:
            job_end.tell(
                f"{report.pending} points of run {self._run_id} are not delivered yet"
                f"{self._last_error()}. They are safe in {self._spool_dir}; deliver them with: "
                f"flowbuffer sync --spool {self._spool_dir}"
            )
        if report.rejected or any(report.dropped.values()):
            dropped = ", ".join(f"{count} dropped ({why})" for why, count in report.dropped.items())
            job_end.tell(
                f"run {self._run_id}: {report.rejected} points rejected"
                + (f", {dropped}" if dropped else "")
                + (f"; see rejected.jsonl in {self._spool_dir}" if report.rejected else "")
            )
        if self._owns_run:
            end_run(self._run_id, self._uri, status)
        return report

    def _wait(self, until: Callable[[], bool], deadline_s: float | None, *, progress: bool) -> None:
        collector = self._collector
        assert collector is not None
        start_s = time.monotonic()
        shown = Progress(self._counts)
        pause_s = 0.001
        while not until():
            now_s = time.monotonic()
            if deadline_s is not None and now_s >= deadline_s:
                break
            if not collector.has_thread:
                collector.drain()
                pause_s = 0.05
            collector.hurry()
            if progress:
                shown.show(now_s - start_s)
            SYSTEM_CLOCK.sleep(
                pause_s if deadline_s is None else min(pause_s, max(deadline_s - now_s, 0))
            )
            pause_s = min(pause_s * 1.5, 0.05)
        shown.close()

    def _counts(self) -> dict[str, Any]:
        producer, stream = self._producer, self._stream
        dropped: Counter[str] = Counter()
        if producer is not None:
            dropped.update(producer.dropped)
        if self._invalid:
            dropped["invalid"] = self._invalid
        if stream is None:
            return {"delivered": getattr(producer, "stored", 0), "dropped": dict(dropped)}
        reader = stream.reader
        return {
            "delivered": reader.delivered,
            "rejected": reader.rejected,
            "pending": 0 if stream.done else reader.unread() + reader.on_their_way,
            "dropped": dict(dropped),
        }

    def _last_error(self) -> str:
        failure = self._stream.sender.failure if self._stream is not None else None
        return "" if failure is None else f" ({failure.reason})"

    @property
    def _spool_dir(self) -> Path:
        return self._settings.resolved_spool_dir()

    # After a fork the child is another process: its first call makes it a producer of its own.

    def _forget_after_fork(self) -> None:
        self._opening = threading.RLock()
        self._owns_run = False
        if isinstance(self._producer, Producer):
            self._producer.abandon()
        self._producer = self._stream = self._collector = None
        self._invalid = 0
        if not self._ended:
            self._append = self._reopening("_append")
            self._append_many = self._reopening("_append_many")
            self._append_series = self._reopening("_append_series")

    def _reopening(self, name: str) -> Callable[..., Any]:
        def reopen(*args: Any) -> Any:
            with self._opening:
                if self._producer is None:
                    self._open()
            return getattr(self, name)(*args)

        return reopen


def _then(append: Append, finish: Callable[[Places], None]) -> Append:
    def append_and_finish(*args: Any) -> Places:
        places = append(*args)
        finish(places)
        return places

    return append_and_finish


def _refuse(*_: Any) -> Any:
    raise FlowbufferError("this logger is closed; a closed logger takes no more points")


def _unpickled(run_id: str, tracking_uri: str, settings: Settings) -> MetricLogger:
    return MetricLogger(run_id, tracking_uri=tracking_uri, settings=settings)


def _is_settled(stream: Stream, barrier: tuple[int, int]) -> bool:
    segments = segments_before(stream.directory.path, barrier)
    return not any(committed_points(path, end) for path, end in segments)


def _lag_s(stream: Stream) -> float:
    """The age of the oldest point that is not settled: the one sent first, or read next."""
    found_s = [SYSTEM_CLOCK.monotonic_s() - stream.sender.since_s]
    oldest_ms = stream.reader.oldest_unread_ms()
    if oldest_ms is not None:
        found_s.append(SYSTEM_CLOCK.now_ns() / 1e9 - oldest_ms / 1e3)
    return max(0.0, *found_s)


def _this_producer(run_id: str, uri: str) -> Any:
    from flowbuffer.spool.directory import this_producer
    from flowbuffer.transport import absolute_uri, without_credentials

    now_ms = SYSTEM_CLOCK.now_ns() // 1_000_000
    return this_producer(run_id, without_credentials(absolute_uri(uri)), environment_rank(), now_ms)


_loggers: weakref.WeakSet[MetricLogger] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for logger in list(_loggers):
        logger._forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
