"""The functions that log to MLflow's active run, one logger for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from flowbuffer.clock import SYSTEM_CLOCK, checked_timeout
from flowbuffer.logger.active_run import check_server, current_uri, starts_runs
from flowbuffer.logger.by_run import all_loggers, logger_of, run_settings
from flowbuffer.logger.handle import Handle
from flowbuffer.logger.metric_logger import MetricLogger
from flowbuffer.logger.report import Report, Stats
from flowbuffer.spool.writing.points import Number

if TYPE_CHECKING:
    import numpy.typing


def log_metric(
    key: str,
    value: Number,
    step: SupportsIndex | None = None,
    timestamp: SupportsIndex | None = None,
) -> Handle:
    """:meth:`MetricLogger.log_metric` on the active run; one is started if there is none."""
    return _active_logger().log_metric(key, value, step, timestamp)


def log_metrics(
    metrics: Mapping[str, Number],
    step: SupportsIndex | None = None,
    timestamp: SupportsIndex | None = None,
) -> Handle:
    """:meth:`MetricLogger.log_metrics` on the active run; one is started if there is none."""
    return _active_logger().log_metrics(metrics, step, timestamp)


def log_series(
    key: str,
    values: numpy.typing.ArrayLike,
    steps: numpy.typing.ArrayLike | None = None,
    timestamps: numpy.typing.ArrayLike | None = None,
) -> Handle:
    """:meth:`MetricLogger.log_series` on the active run; one is started if there is none."""
    return _active_logger().log_series(key, values, steps, timestamps)


def log_param(key: str, value: Any) -> Handle:
    """:meth:`MetricLogger.log_param` on the active run; one is started if there is none."""
    return _active_logger().log_param(key, value)


def log_params(params: Mapping[str, Any]) -> Handle:
    """:meth:`MetricLogger.log_params` on the active run; one is started if there is none."""
    return _active_logger().log_params(params)


def set_tag(key: str, value: Any) -> Handle:
    """:meth:`MetricLogger.set_tag` on the active run; one is started if there is none."""
    return _active_logger().set_tag(key, value)


def set_tags(tags: Mapping[str, Any]) -> Handle:
    """:meth:`MetricLogger.set_tags` on the active run; one is started if there is none."""
    return _active_logger().set_tags(tags)


def flush(timeout: float | None = None) -> Report:
    """Flush every run that these functions logged to; the counts of all together.

    Args:
        timeout: The most seconds for all of them together; None waits for as long as it takes.
    """
    timeout = checked_timeout(timeout)
    start_s = SYSTEM_CLOCK.monotonic_s()
    reports = []
    for logger in all_loggers():
        left_s = None
        if timeout is not None:
            left_s = max(timeout - (SYSTEM_CLOCK.monotonic_s() - start_s), 0.0)
        reports.append(logger.flush(left_s))
    return Report(**_sum(reports), seconds=SYSTEM_CLOCK.monotonic_s() - start_s)


def stats() -> Stats:
    """:meth:`MetricLogger.stats` of every run that these functions logged to, together."""
    all_stats = [logger.stats() for logger in all_loggers()]
    return Stats(
        **_sum(all_stats),
        lag_s=max((s.lag_s for s in all_stats), default=0.0),
        backlog_bytes=max((s.backlog_bytes for s in all_stats), default=0),
        ties_moved=sum(s.ties_moved for s in all_stats),
        ties_moved_most_ms=max((s.ties_moved_most_ms for s in all_stats), default=0),
        retries=sum(s.retries for s in all_stats),
        last_error=next((s.last_error for s in all_stats if s.last_error), ""),
    )


def _sum(reports: Sequence[Report]) -> dict[str, Any]:
    dropped: dict[str, int] = {}
    for report in reports:
        for reason, count in report.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return {
        "delivered": sum(report.delivered for report in reports),
        "rejected": sum(report.rejected for report in reports),
        "pending": sum(report.pending for report in reports),
        "dropped": dropped,
    }


def _active_logger() -> MetricLogger:
    import mlflow

    run = mlflow.active_run()
    if run is None and starts_runs(run_settings()):
        check_server(current_uri())
        run = mlflow.start_run()
    return logger_of(current_uri(), None if run is None else run.info.run_id)
