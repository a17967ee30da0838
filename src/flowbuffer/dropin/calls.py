"""What takes the place of MLflow's own functions and methods while the switch is on.

Each replacement is made from the original. It buffers what MLflow would certainly store; with
everything else it waits for what was logged before, and calls the original.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

from flowbuffer.dropin.synchronous import Mode
from flowbuffer.logger.by_run import run_settings
from flowbuffer.originals import is_as_shipped
from flowbuffer.settings.environment import environment_job_place

Original = Callable[..., Any]

#: The attribute by which a replacement says what it is.
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
        utils: ``mlflow.tracking._tracking_service.utils``, which makes stores.
        queue: ``AsyncLoggingQueue``, which a store has.

    A wrapper or a mock that somebody puts on MLflow's way from a call to the store, before or after
    the switch is on, sees each call as with MLflow alone: calls that would pass it are not buffered
    while it is there.

    Attributes:
        on: Whether the switch is on. A replacement may outlive it, taken from MLflow or put back by
            somebody; it is MLflow's own then.
    """

    on = False
    #: The replacements of the client's methods, by name.
    ours: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, fluent: Any, client: Any, tracking_client: Any, utils: Any, queue: Any
    ) -> None:
        self._fluent = fluent
        self._client = client
        self._tracking_client = tracking_client
        self._queue = queue
        self._enqueue = queue.log_batch_async
        self._stores = {
            name: getattr(tracking_client, name)
            for name in METHODS
            if is_as_shipped(client, name) and is_as_shipped(tracking_client, name)
        }
        self._clients = sys.modules[client.__module__]
        self._get_store = utils._get_store
        self._utils = utils
        self._silent = not run_settings().logs(environment_job_place().rank)

    def _reaches_store(self, method: str) -> bool:
        """Whether a call of a client's method comes to the store with nobody's wrapper or mock in
        between; it is MLflow's own call where one is, so that it sees it."""
        tracking_client = self._tracking_client
        return (
            getattr(tracking_client, method) is self._stores.get(method)
            and self._clients.TrackingServiceClient is tracking_client
            and self._utils._get_store is self._get_store
        )

    @staticmethod
    def _has_own_clock() -> bool:
        """Whether ``time.time`` is Python's: with another clock there calls are MLflow's own, which
        goes by it, as ours does not."""
        return time.time is _time

    def _buffers(self, mode: Mode) -> bool:
        if not self._has_own_clock():
            return False
        if mode is Mode.OPERATION:
            # Somebody, like a test, who has put something in the place of MLflow's queue is to see
            # what comes to it.
            return bool(self._queue.log_batch_async is self._enqueue)
        return mode is Mode.NOTHING
