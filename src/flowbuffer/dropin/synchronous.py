"""The argument ``synchronous`` of MLflow's calls: what it asks for, and what the caller gets back.

It is ``None`` where the caller did not give it. MLflow's functions make a yes or no of that before
they call a client's method, so :data:`ABSENT` is handed to them in its place.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

from flowbuffer.logger.handle import Handle
from flowbuffer.settings.environment import says_async_logging


class _Absent:
    """As ``synchronous``: the caller did not give it."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


class OwnTime(int):
    """As ``timestamp``: the present, in ms since the epoch, which the caller did not give.

    MLflow's functions take the time before they call a client's method. For the order of points it
    makes a difference whether somebody gave it.
    """


#: MLflow has a future for each request, which takes 1000 metrics; so has an operation of ours.
_POINTS_IN_FUTURE = 1000


class _Delivery:
    """A handle as the future that MLflow's ``RunOperations`` waits for."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def result(self, timeout: float | None = None) -> None:
        """Wait for delivery; raise what went wrong."""
        self._handle.wait(timeout)

    def done(self) -> bool:
        """Whether :meth:`result` would return, or raise, at once."""
        return self._handle.done()

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Wait for delivery; return what went wrong."""
        return self._handle.exception(timeout)


class Mode(Enum):
    """What a call with some ``synchronous`` does, and gives back."""

    STORES = auto()  # it returns when the value is stored
    OPERATION = auto()  # it returns at once, a RunOperations to wait for
    NOTHING = auto()  # it returns at once what MLflow's own returns when the value is stored


def mode_of(synchronous: Any) -> Mode:
    """What a call with this ``synchronous`` does."""
    if synchronous is None or synchronous is ABSENT:
        if not says_async_logging():
            return Mode.NOTHING
        from mlflow.environment_variables import MLFLOW_ENABLE_ASYNC_LOGGING

        synchronous = not MLFLOW_ENABLE_ASYNC_LOGGING.get()
    return Mode.STORES if synchronous else Mode.OPERATION


def answer(mode: Mode, handle: Handle, otherwise: Any = None) -> Any:
    """What a buffered call gives back; ``otherwise`` is what MLflow's own returns."""
    if mode is not Mode.OPERATION:
        return otherwise
    from mlflow.utils.async_logging.run_operations import RunOperations

    parts = range(0, max(len(handle), 1), 2 * _POINTS_IN_FUTURE)
    return RunOperations([_Delivery(Handle(handle[i : i + 2 * _POINTS_IN_FUTURE])) for i in parts])


def start_sized_queue(store: Any) -> None:
    """MLflow's queue starts with the first asynchronous call. It has nothing to do here, but who
    gave it a size finds it as with MLflow alone."""
    from mlflow.environment_variables import MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE

    if MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE.is_set():
        queue = getattr(store, "_async_logging_queue", None)
        if queue is not None and not queue.is_active():
            queue.activate()
