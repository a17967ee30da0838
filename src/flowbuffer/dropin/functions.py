"""Replacements of ``mlflow.log_metric`` and its like."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from flowbuffer.dropin.arguments import NotBuffered
from flowbuffer.dropin.buffered_run import BufferedRun
from flowbuffer.dropin.calls import Calls, Original
from flowbuffer.dropin.known_runs import known_run
from flowbuffer.dropin.synchronous import ABSENT, OwnTime, answer, mode_of
from flowbuffer.logger.active_run import current_uri
from flowbuffer.logger.handle import Handle

#: What the short way answers where it cannot be taken: the caller goes the long one.
_LONG = object()


class Functions(Calls):
    """Replacements of the functions in ``mlflow.tracking.fluent``.

    They take the short way to a run that was logged to before: no client is built, and nobody is
    asked. The long way is the original, which comes to the methods of :class:`Methods`.
    """

    names = ("log_metric", "log_metrics", "log_param", "log_params", "set_tag", "set_tags")

    def _run(self, run_id: str | None) -> BufferedRun | None:
        """The run, if it is known and the metric is about no model."""
        fluent = self._fluent
        if fluent.get_active_model_id() is not None:
            return None
        if run_id is None:
            active = fluent.active_run()
            if active is None:
                return None
            run_id = active.info.run_id
        run = known_run(current_uri(), run_id)
        return None if run is None or run.has_models else run

    def _short_way(
        self,
        method: str,
        synchronous: Any,
        run_id: str | None,
        log: Callable[[BufferedRun], Handle],
        otherwise: Any = None,
    ) -> Any:
        if not self.on:
            return _LONG
        mode = mode_of(synchronous)
        if self._silent:
            return answer(mode, Handle(), otherwise)
        if self._buffers(mode) and self._is_ours(method):
            run = self._run(run_id)
            if run is not None and run.reaches_store(method):
                try:
                    return answer(mode, log(run), otherwise)
                except NotBuffered:
                    pass
        return _LONG

    def _is_ours(self, method: str) -> bool:
        """Whether our method of the client, and what it calls, is in its place; what somebody else
        has put there, like a test's mock, is called by way of MLflow's own function."""
        client = self._client
        return (
            self._fluent.MlflowClient is client
            and getattr(client, method) is self.ours.get(method)
            and self._reaches_store(method)
        )

    def _handed_on(self, method: str, synchronous: Any) -> Any:
        """``synchronous`` as MLflow's own function is called with it: only our method knows the
        object for "not given"."""
        return ABSENT if synchronous is None and self._is_ours(method) else synchronous

    def _own_time(self, synchronous: Any) -> OwnTime | None:
        """The time to call MLflow's own function with where nobody gave one, by which our method
        knows that; None lets MLflow take the time."""
        if synchronous is not ABSENT or not self._has_own_clock():
            return None
        return OwnTime(time.time() * 1000)

    def log_metric(self, original: Original) -> Original:
        """``mlflow.log_metric``."""

        def log_metric(
            key: str,
            value: Any,
            step: int | None = None,
            synchronous: bool | None = None,
            timestamp: int | None = None,
            run_id: str | None = None,
            model_id: str | None = None,
            dataset: Any = None,
        ) -> Any:
            found = _LONG
            if model_id is None and dataset is None:
                found = self._short_way(
                    "log_metric",
                    synchronous,
                    run_id,
                    lambda run: run.log_metric(key, value, step or 0, timestamp or None),
                )
            if found is not _LONG:
                return found
            synchronous = self._handed_on("log_metric", synchronous)
            timestamp = timestamp or self._own_time(synchronous)
            return original(key, value, step, synchronous, timestamp, run_id, model_id, dataset)

        return log_metric

    def log_metrics(self, original: Original) -> Original:
        """``mlflow.log_metrics``."""

        def log_metrics(
            metrics: Mapping[str, Any],
            step: int | None = None,
            synchronous: bool | None = None,
            run_id: str | None = None,
            timestamp: int | None = None,
            model_id: str | None = None,
            dataset: Any = None,
        ) -> Any:
            found = _LONG
            if model_id is None and dataset is None:
                found = self._short_way(
                    "log_batch",
                    synchronous,
                    run_id,
                    lambda run: run.log_metrics(metrics, step or 0, timestamp or None),
                )
            if found is not _LONG:
                return found
            synchronous = self._handed_on("log_batch", synchronous)
            timestamp = timestamp or self._own_time(synchronous)
            return original(metrics, step, synchronous, run_id, timestamp, model_id, dataset)

        return log_metrics

    def log_param(self, original: Original) -> Original:
        """``mlflow.log_param``."""

        def log_param(key: str, value: Any, synchronous: bool | None = None) -> Any:
            found = self._short_way(
                "log_param", synchronous, None, lambda run: run.log_params({key: value}), value
            )
            if found is not _LONG:
                return found
            return original(key, value, self._handed_on("log_param", synchronous))

        return log_param

    def log_params(self, original: Original) -> Original:
        """``mlflow.log_params``."""

        def log_params(
            params: Mapping[str, Any], synchronous: bool | None = None, run_id: str | None = None
        ) -> Any:
            found = self._short_way(
                "log_batch", synchronous, run_id, lambda run: run.log_params(params)
            )
            if found is not _LONG:
                return found
            return original(params, self._handed_on("log_batch", synchronous), run_id)

        return log_params

    def set_tag(self, original: Original) -> Original:
        """``mlflow.set_tag``."""

        def set_tag(key: str, value: Any, synchronous: bool | None = None) -> Any:
            found = self._short_way(
                "set_tag", synchronous, None, lambda run: run.set_tags({key: value})
            )
            if found is not _LONG:
                return found
            return original(key, value, self._handed_on("set_tag", synchronous))

        return set_tag

    def set_tags(self, original: Original) -> Original:
        """``mlflow.set_tags``."""

        def set_tags(tags: Mapping[str, Any], synchronous: bool | None = None) -> Any:
            found = self._short_way("log_batch", synchronous, None, lambda run: run.set_tags(tags))
            if found is not _LONG:
                return found
            return original(tags, self._handed_on("log_batch", synchronous))

        return set_tags
