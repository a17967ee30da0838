"""Replacements of the methods of ``mlflow.MlflowClient`` that log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flowbuffer.dropin.arguments import NotBuffered, are_certain, key_about
from flowbuffer.dropin.buffered_run import BufferedRun
from flowbuffer.dropin.calls import METHODS, Calls, Original
from flowbuffer.dropin.known_runs import buffered_run, forget_run, known_run
from flowbuffer.dropin.synchronous import ABSENT, Mode, answer, mode_of, start_sized_queue
from flowbuffer.logger.active_run import settled_uri
from flowbuffer.logger.by_run import wait_for_run
from flowbuffer.logger.handle import Handle


def _asked(synchronous: Any) -> Any:
    """``synchronous`` as MLflow's own method takes it."""
    return None if synchronous is ABSENT else synchronous


class Pair(NamedTuple):
    """A parameter."""

    key: Any
    value: Any


class Methods(Calls):
    """Replacements of the methods of ``mlflow.MlflowClient`` that log."""

    names = METHODS

    def _call(
        self,
        client: Any,
        method: str,
        run_id: Any,
        synchronous: Any,
        log: Callable[[BufferedRun], Handle],
        store: Callable[[Any], Any],
        otherwise: Any = None,
        params: Any = (),
    ) -> Any:
        """Buffer with ``log``; what cannot be is stored with ``store(synchronous)``."""
        asked = _asked(synchronous)
        if not self.on or type(client._tracking_client) is not self._tracking_client:
            return store(asked)  # delivery has a tracking client of its own
        mode = mode_of(synchronous)
        if self._silent:
            return answer(mode, Handle(), otherwise)
        if self._buffers(mode) and self._reaches_store(method):
            if mode is Mode.OPERATION:
                start_sized_queue(client._tracking_client.store)
            try:
                run = buffered_run(client._tracking_client, run_id)
                if run.reaches_store(method):
                    return answer(mode, log(run), otherwise)
            except NotBuffered:
                pass
        wait_for_run(run_id)
        stored = store(asked)
        if mode is not Mode.OPERATION and isinstance(run_id, str):
            self._remember(client._tracking_client.tracking_uri, run_id, params)
        return stored

    def _remember(self, uri: str, run_id: str, params: Any) -> None:
        """MLflow itself has stored these parameters."""
        try:
            if not are_certain(params):
                raise NotBuffered
            known = known_run(settled_uri(uri), run_id) if params else None
            if known is not None:
                known.remember_params(params)
        except NotBuffered:
            forget_run(run_id)  # nobody knows any more what they were

    def _key(self, key: Any, model_id: Any, name: Any, digest: Any) -> Any:
        """What a metric is logged under; it is about the active model if about no other one."""
        return key_about(key, model_id or self._fluent.get_active_model_id(), name, digest)

    def log_metric(self, original: Original) -> Original:
        """``MlflowClient.log_metric``."""

        def log_metric(
            client: Any,
            run_id: str,
            key: str,
            value: Any,
            timestamp: int | None = None,
            step: int | None = None,
            synchronous: bool | None = None,
            dataset_name: str | None = None,
            dataset_digest: str | None = None,
            model_id: str | None = None,
        ) -> Any:
            about = (model_id, dataset_name, dataset_digest)
            return self._call(
                client,
                "log_metric",
                run_id,
                synchronous,
                lambda run: run.log_metric(
                    self._key(key, *about), value, 0 if step is None else step, timestamp
                ),
                lambda synchronous: original(
                    client,
                    run_id,
                    key,
                    value,
                    timestamp,
                    step,
                    synchronous,
                    dataset_name=dataset_name,
                    dataset_digest=dataset_digest,
                    model_id=model_id,
                ),
            )

        return log_metric

    def log_param(self, original: Original) -> Original:
        """``MlflowClient.log_param``."""

        def log_param(
            client: Any, run_id: str, key: str, value: Any, synchronous: bool | None = None
        ) -> Any:
            return self._call(
                client,
                "log_param",
                run_id,
                synchronous,
                lambda run: run.log_params({key: value}),
                lambda synchronous: original(client, run_id, key, value, synchronous),
                value,
                [Pair(key, value)],
            )

        return log_param

    def set_tag(self, original: Original) -> Original:
        """``MlflowClient.set_tag``."""

        def set_tag(
            client: Any, run_id: str, key: str, value: Any, synchronous: bool | None = None
        ) -> Any:
            return self._call(
                client,
                "set_tag",
                run_id,
                synchronous,
                lambda run: run.set_tags({key: value}),
                lambda synchronous: original(client, run_id, key, value, synchronous),
            )

        return set_tag

    def log_batch(self, original: Original) -> Original:
        """``MlflowClient.log_batch``."""

        def log_batch(
            client: Any,
            run_id: str,
            metrics: Sequence[Any] = (),
            params: Sequence[Any] = (),
            tags: Sequence[Any] = (),
            synchronous: bool | None = None,
        ) -> Any:
            def store(synchronous: Any) -> Any:
                return original(client, run_id, metrics, params, tags, synchronous)

            if are_certain(metrics, params, tags) and not (metrics or params or tags):
                return store(_asked(synchronous))
            return self._call(
                client,
                "log_batch",
                run_id,
                synchronous,
                lambda run: run.log_batch(
                    metrics, params, tags, self._fluent.get_active_model_id()
                ),
                store,
                params=params,
            )

        return log_batch
