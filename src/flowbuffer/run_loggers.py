"""One logger for each run in this process, shared by all who log to it, so that order is kept."""

from __future__ import annotations

import logging
import os
import threading

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.logger import MetricLogger
from flowbuffer.settings import Settings
from flowbuffer.spool.directory import folders
from flowbuffer.spool.states import Waiting, hurry_to_end, parked_reason

_log = logging.getLogger("flowbuffer")

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


def flush_run(run_id: object) -> None:
    """Wait until what was logged to a run is delivered, by any process with the same spool, for
    ``read_timeout_s`` at most."""
    if not isinstance(run_id, str):
        return  # MLflow will say what is wrong with it
    loggers = [logger for (_, own_id), logger in list(_loggers.items()) if own_id == run_id]
    _flush(loggers, run_settings().read_timeout_s, {run_id})


def flush_all(tracking_uri: str) -> None:
    """:func:`flush_run` of every run that this process logged to, but of runs elsewhere only while
    nothing holds them up: what is read then need not wait for a server that is gone."""
    loggers = [
        logger
        for (uri, _), logger in list(_loggers.items())
        if not logger.closed and (uri == tracking_uri or not logger.is_held_up())
    ]
    _flush(loggers, run_settings().read_timeout_s, {logger.run_id for logger in loggers})


def flush_at_end() -> None:
    """:func:`flush_run` of every run that this process logged to, for ``shutdown_timeout_s``."""
    loggers = [logger for logger in all_loggers() if not logger.closed]
    run_ids = {logger.run_id for logger in loggers}
    _flush(loggers, run_settings().shutdown_timeout_s, run_ids)


def flush_server(url: str) -> None:
    """:func:`flush_run` of every run of the server that a request goes to."""
    loggers = [
        logger
        for (uri, _), logger in list(_loggers.items())
        if uri.startswith("http") and url.startswith(uri.rstrip("/") + "/") and not logger.closed
    ]
    if loggers:
        _flush(loggers, run_settings().read_timeout_s, {logger.run_id for logger in loggers})


def _flush(loggers: list[MetricLogger], timeout_s: float, run_ids: set[str]) -> None:
    deadline_s = SYSTEM_CLOCK.monotonic_s() + timeout_s
    open_ones = [logger for logger in loggers if not logger.closed]
    own = {logger.folder for logger in open_ones}
    others = [
        Waiting(folder, hurry_to_end(folder))
        for run_id in run_ids
        for folder in folders(run_settings().resolved_spool_dir(), run_id)
        if folder not in own and parked_reason(folder) is None
    ]
    for logger in open_ones:
        logger.flush(max(deadline_s - SYSTEM_CLOCK.monotonic_s(), 0.0))
    if not SYSTEM_CLOCK.wait_until(lambda: all(one.is_over() for one in others), deadline_s):
        _log.warning("after %g s not all that was logged is delivered yet", timeout_s)


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)
