"""One logger for each run in this process, shared by all who log to it, so that order is kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.forks import in_child
from flowbuffer.logger.metric_logger import MetricLogger
from flowbuffer.logger.others import Others, folders_of_server, folders_under_url, goes_to
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.folders import folders

_log = logging.getLogger("flowbuffer")

#: A read of some of a server's runs waits so long, in s, for all of them, before it asks which ones
#: they are.
_MOMENT_S = 0.5

#: A tracking URI as the caller has it, and a run.
RunKey = tuple[str, str | None]

_loggers: dict[RunKey, MetricLogger] = {}
_lock = threading.RLock()
_settings: Settings | None = None


def run_settings() -> Settings:
    """What :func:`use_settings` was given, else what the environment says."""
    return Settings.from_env() if _settings is None else _settings


def use_settings(settings: Settings | None) -> None:
    """Give the settings of loggers that are made from now on; None is what the environment says."""
    global _settings
    _settings = settings


def logger_of(tracking_uri: str, run_id: str | None) -> MetricLogger:
    """The open logger of a run, made if there is none.

    It is closed when the run is marked ended.

    Args:
        tracking_uri: As MLflow takes it.
        run_id: None for a process that logs without a run of MLflow's.

    Raises:
        SpoolError: The spool cannot be used.
    """
    key = tracking_uri, run_id
    logger = _loggers.get(key)
    if logger is None or logger.closed:
        with _lock:
            logger = _loggers.get(key)
            if logger is None or logger.closed:
                logger = MetricLogger(run_id, tracking_uri=tracking_uri, settings=run_settings())
                logger.closes_with_run = True
                _loggers[key] = logger
    return logger


def all_loggers() -> list[MetricLogger]:
    """Every logger that was made here, open or closed."""
    return list(_loggers.values())


def wait_for_run(run_id: object, tracking_uri: str = "") -> None:
    """Wait until what was logged to a run is delivered, by any process with the same spool, for
    ``read_timeout_s`` at most.

    Args:
        run_id: The run.
        tracking_uri: Where it is read, with credentials if there are any.
    """
    if not isinstance(run_id, str):
        return  # MLflow will say what is wrong with it
    settings = run_settings()
    _wait_for(
        [logger for (_, own_id), logger in list(_loggers.items()) if own_id == run_id],
        folders(settings.resolved_spool_dir(), run_id),
        settings.read_timeout_s,
        tracking_uri,
    )


def wait_for_server(tracking_uri: str, is_read: Callable[[str], bool] | None = None) -> None:
    """:func:`wait_for_run` of every run of a server.

    Of runs elsewhere, which may be another name of the same server, only those that this process
    logged to, and only while nothing holds them up: what is read then need not wait for a server
    that is gone.

    Args:
        tracking_uri: As :func:`settled_uri` has it.
        is_read: Whether a run can be among what is read; asked only of runs for which it would
            have to be waited longer than a moment.
    """
    settings = run_settings()
    _wait_for(
        [
            logger
            for (uri, _), logger in list(_loggers.items())
            if not logger.closed and (uri == tracking_uri or not logger.is_held_up())
        ],
        folders_of_server(settings.resolved_spool_dir(), tracking_uri),
        settings.read_timeout_s,
        tracking_uri,
        is_read,
    )


def wait_for_url(url: str) -> None:
    """:func:`wait_for_run` of every run of the server that a request goes to."""
    settings = run_settings()
    _wait_for(
        [logger for (uri, _), logger in list(_loggers.items()) if goes_to(url, uri)],
        folders_under_url(settings.resolved_spool_dir(), url),
        settings.read_timeout_s,
    )


def wait_for_own_runs() -> None:
    """:func:`wait_for_run` of every run that this process logged to, for ``shutdown_timeout_s`` at
    most."""
    settings = run_settings()
    loggers = [logger for logger in all_loggers() if not logger.closed]
    root = settings.resolved_spool_dir()
    found = [
        folder for run_id in {one.run_id for one in loggers} for folder in folders(root, run_id)
    ]
    _wait_for(loggers, found, settings.shutdown_timeout_s)


def _wait_for(
    loggers: list[MetricLogger],
    found: Iterable[Path],
    timeout_s: float,
    tracking_uri: str = "",
    is_read: Callable[[str], bool] | None = None,
) -> None:
    """Wait for what these loggers have logged, and for what others have in the folders."""
    start_s = SYSTEM_CLOCK.monotonic_s()
    left = [logger for logger in loggers if not logger.closed]
    own = {logger.folder for logger in left}
    others = Others([folder for folder in found if folder not in own], run_settings(), tracking_uri)
    try:
        if is_read is not None:
            left = _wait(left, others, start_s + min(timeout_s, _MOMENT_S))
            left = [logger for logger in left if is_read(logger.run_id)]
            others.leave_all_but(is_read)
        _wait(left, others, start_s + timeout_s)
        if not others.are_over():
            _log.warning("after %g s not all that was logged is delivered yet", timeout_s)
    finally:
        others.end()


def _wait(loggers: list[MetricLogger], others: Others, until_s: float) -> list[MetricLogger]:
    """Wait for all of it, until then; the loggers that have something pending still, for a longer
    wait."""
    left = [
        logger
        for logger in loggers
        if logger.flush(max(until_s - SYSTEM_CLOCK.monotonic_s(), 0.0)).pending
    ]
    SYSTEM_CLOCK.wait_until(others.are_over, until_s, lambda _: others.push())
    return left


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


in_child("logger.by_run", _new_lock)
