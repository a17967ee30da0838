"""Replacements of what reads runs, or ends them: it waits for what was logged before."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from flowbuffer.dropin.calls import Original
from flowbuffer.dropin.known_runs import (
    experiment_of,
    forget_run,
    models_were_logged,
    remember_new,
)
from flowbuffer.logger.active_run import current_uri, settled_uri
from flowbuffer.logger.by_run import wait_for_run, wait_for_server, wait_for_url

_here = threading.local()


def is_reading() -> bool:
    """Whether this thread is in a call that has waited for what it reads: its requests need not."""
    return getattr(_here, "reads", False)


class Waits:
    """Methods of ``TrackingServiceClient`` that wait for what was logged before they go on, and the
    one that makes runs.

    Args:
        tracking_client: ``TrackingServiceClient``.
    """

    names = (
        "create_run",
        "get_run",
        "get_metric_history",
        "delete_tag",
        "delete_run",
        "restore_run",
        "log_outputs",
        "search_runs",
        "get_logged_model",
        "search_logged_models",
    )

    def __init__(self, tracking_client: Any) -> None:
        self._tracking_client = tracking_client

    def create_run(self, original: Original) -> Original:
        """What is logged to a new run need not look for it."""

        def create_run(client: Any, *args: Any, **kwargs: Any) -> Any:
            run = original(client, *args, **kwargs)
            if type(client) is self._tracking_client:
                remember_new(run)
            return run

        return create_run

    def _after(self, original: Original, wait: Callable[..., None]) -> Original:
        def method(client: Any, *args: Any, **kwargs: Any) -> Any:
            if type(client) is not self._tracking_client:
                return original(client, *args, **kwargs)  # delivery's own
            wait(client, *args, **kwargs)
            before = is_reading()
            _here.reads = True
            try:
                return original(client, *args, **kwargs)
            finally:
                _here.reads = before

        return method

    def _of_run(self, original: Original) -> Original:
        return self._after(
            original, lambda one, run_id, *_, **__: wait_for_run(run_id, one.tracking_uri)
        )

    def _of_experiments(self, original: Original) -> Original:
        def wait(client: Any, experiment_ids: Any, *_: Any, **__: Any) -> None:
            asked = frozenset(map(str, experiment_ids or ()))
            wait_for_server(
                settled_uri(client.tracking_uri),
                lambda run_id: experiment_of(client, run_id) in asked,
            )

        return self._after(original, wait)

    get_run = get_metric_history = delete_tag = _of_run
    search_runs = search_logged_models = _of_experiments

    def get_logged_model(self, original: Original) -> Original:
        """A model has the metrics of any run."""
        return self._after(
            original, lambda one, *_, **__: wait_for_server(settled_uri(one.tracking_uri))
        )

    def delete_run(self, original: Original) -> Original:
        """A deleted run, or a restored one, is looked for again."""

        def wait(_: Any, run_id: str) -> None:
            wait_for_run(run_id)
            forget_run(run_id)

        return self._after(original, wait)

    restore_run = delete_run

    def log_outputs(self, original: Original) -> Original:
        """From then on MLflow finds out for each metric whether it belongs to the model."""
        return self._after(original, lambda _, run_id, *__, **___: models_were_logged(run_id))


def request(original: Original) -> Original:
    """``requests.Session.request``: who asks a tracking server past MLflow's client reads what this
    process logged, too."""

    def request(session: Any, method: str, url: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(url, str) and _READS.search(url) and not is_reading():
            wait_for_url(url)
        return original(session, method, url, *args, **kwargs)

    return request


#: The paths of MLflow's REST API, and its GraphQL, under which runs are read.
_READS = re.compile(r"/mlflow/(runs/(get|search)|metrics/|logged-models/)|/graphql$")


def flush_async_logging(original: Original) -> Original:
    """``AbstractStore.flush_async_logging``: everything that was logged, however it was."""

    def flush_async_logging(store: Any) -> Any:
        wait_for_server(current_uri())
        return original(store)

    return flush_async_logging
