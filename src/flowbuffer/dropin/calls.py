"""What takes the place of MLflow's own functions and methods while the switch is on.

Each replacement is made from the original. It buffers what MLflow would certainly store; with
everything else it waits for what was logged before, and calls the original.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flowbuffer.dropin.modes import Mode
from flowbuffer.environment import environment_place
from flowbuffer.run_loggers import run_settings

Original = Callable[..., Any]

#: The attribute that tells a replacement from what others put in its place.
OURS = "flowbuffers"

#: The methods of a client that log.
METHODS = ("log_metric", "log_param", "set_tag", "log_batch")

_time = time.time


class Calls:
    """What both kinds of replacements know of MLflow.

    Args:
        fluent: ``mlflow.tracking.fluent``.
        client: ``mlflow.MlflowClient``.
        tracking_client: ``TrackingServiceClient``, which a client has.
        queue: ``AsyncLoggingQueue``, which a store has.

    Attributes:
        on: Whether the switch is on. A replacement may outlive it, taken from MLflow or put back by
            somebody; it is MLflow's own then.
    """

    on = False

    def __init__(self, fluent: Any, client: Any, tracking_client: Any, queue: Any) -> None:
        self._fluent = fluent
        self._client = client
        self._tracking_client = tracking_client
        self._queue = queue
        self._enqueue = queue.log_batch_async
        self._stores = {name: getattr(tracking_client, name) for name in METHODS}
        self._silent = not run_settings().logs(environment_place().rank)

    def _buffers(self, mode: Mode) -> bool:
        if time.time is not _time:
            return False  # MLflow goes by the clock that somebody has put there, ours does not
        if mode is Mode.OPERATION:
            # Somebody, like a test, who has put something in the place of MLflow's queue is to see
            # what comes to it.
            return bool(self._queue.log_batch_async is self._enqueue)
        return mode is Mode.NOTHING
