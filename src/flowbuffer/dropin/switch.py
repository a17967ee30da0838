"""The switch: ``flowbuffer.enable()`` and ``flowbuffer.disable()``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from types import TracebackType
from typing import Any, NamedTuple

from flowbuffer.dropin.calls import METHODS, OURS, Calls
from flowbuffer.dropin.functions import Functions
from flowbuffer.dropin.methods import Methods
from flowbuffer.dropin.reads import Waits, flush_async_logging, request
from flowbuffer.forks import in_child
from flowbuffer.logger.by_run import use_settings, wait_for_own_runs
from flowbuffer.originals import is_as_shipped
from flowbuffer.settings.settings import Settings


class _Replaced(NamedTuple):
    owner: Any
    name: str
    original: Any
    replacement: Any


_replaced: list[_Replaced] = []
_lock = threading.RLock()


class Switch:
    """What :func:`enable` returns: ``with flowbuffer.enable(): ...`` disables at the end."""

    def __enter__(self) -> Switch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        disable()


def enable(**settings: Any) -> Switch:
    """Buffer MLflow's own calls, in this process, from now on.

    ``mlflow.log_metric``, ``log_metrics``, ``log_param``, ``log_params``, ``set_tag`` and
    ``set_tags``, and the ``log_metric``, ``log_param``, ``set_tag`` and ``log_batch`` of
    ``MlflowClient``, return at once; what reads a run waits for what was logged to it. To enable it
    again changes the settings of the runs that are logged to for the first time from then on.

    A function that was taken from MLflow before (``from mlflow import log_metric``) stays MLflow's
    own, and stores synchronously. With ``FLOWBUFFER_ENABLED=1`` there is no before.

    With ``FLOWBUFFER_ENABLED=0`` nothing is changed: the variable is there to switch off what a
    program switches on.

    Args:
        settings: Those of :class:`Settings`, by name; they win over the environment.

    Raises:
        SettingError: One of them is out of its range, or no setting.
    """
    chosen = Settings.from_env(**settings)
    if chosen.enabled is not False:
        use_settings(chosen.with_changes(enabled=True))
        with _lock:
            if not _replaced:
                for owner, name, make in _replacements():
                    _replace(owner, name, make)
            Calls.on = True
    return Switch()


def disable() -> None:
    """Give MLflow its own calls back, and deliver what was logged until then, within
    ``shutdown_timeout_s``. A function that was taken from MLflow in between is MLflow's own, too.
    """
    with _lock:
        Calls.on = False
        while _replaced:
            owner, name, original, replacement = _replaced.pop()
            for holder in _holders_of(owner):
                if vars(holder).get(name) is replacement:
                    setattr(holder, name, original)
    wait_for_own_runs()
    use_settings(None)


def _replacements() -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    from mlflow.store.tracking.abstract_store import AbstractStore
    from mlflow.tracking import fluent
    from mlflow.tracking._tracking_service import utils
    from mlflow.tracking._tracking_service.client import TrackingServiceClient
    from mlflow.tracking.client import MlflowClient
    from mlflow.utils.async_logging.async_logging_queue import AsyncLoggingQueue
    from requests import Session

    known = fluent, MlflowClient, TrackingServiceClient, utils, AsyncLoggingQueue
    makers: Any
    for owner, makers in (
        (TrackingServiceClient, Waits(TrackingServiceClient)),
        (MlflowClient, Methods(*known)),
        (fluent, Functions(*known)),
    ):
        for name in makers.names:
            # Not every version has every method; a function that somebody has replaced goes its own
            # way, and comes to the client's methods.
            if hasattr(owner, name) and (owner is not fluent or is_as_shipped(fluent, name)):
                yield owner, name, getattr(makers, name)
    yield AbstractStore, "flush_async_logging", flush_async_logging
    yield Session, "request", request


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    replacement = wraps(original)(make(original))
    setattr(replacement, OURS, True)
    if name in METHODS and isinstance(owner, type):
        Calls.ours[name] = replacement
    for holder in _holders_of(owner):
        if vars(holder).get(name) is original:
            setattr(holder, name, replacement)
    _replaced.append(_Replaced(owner, name, original, replacement))


def _holders_of(owner: Any) -> list[Any]:
    """Who has a function: ``mlflow`` has what ``mlflow.tracking.fluent`` has."""
    import mlflow

    return [owner] if isinstance(owner, type) else [owner, mlflow]


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


in_child("dropin.switch", _new_lock)
