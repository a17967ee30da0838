"""What stands in for a producer where nothing is spooled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flowbuffer.clock import Clock
from flowbuffer.spool.layout import PARAM
from flowbuffer.spool.writing.places import Places
from flowbuffer.spool.writing.points import checked_mapping

_MAX_BATCH = 1000


class Silence:
    """A process of a distributed job that does not log (the setting ``ranks``)."""

    def append(self, *_: Any) -> Places:
        """Nothing."""
        return ()

    append_many = append_series = append_texts = append


class PassThrough:
    """``enabled=False``: the same calls, straight to MLflow. Each returns once MLflow stored it, or
    raises what MLflow raised.
    """

    def __init__(
        self, run_id: str, tracking_uri: str, stored_key: Callable[[str], str], clock: Clock
    ) -> None:
        from mlflow.tracking import MlflowClient

        self.stored = 0
        self._run_id = run_id
        self._stored_key = stored_key
        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._clock = clock

    def append(self, key: str, value: Any, step: Any = None, timestamp: Any = None) -> Places:
        """``MlflowClient.log_metric``."""
        self._client.log_metric(
            self._run_id, self._stored_key(key), value, timestamp, step, synchronous=True
        )
        self.stored += 1
        return ()

    def append_many(
        self, metrics: Mapping[str, Any], step: Any = None, timestamp: Any = None
    ) -> Places:
        """``MlflowClient.log_batch``."""
        metrics = checked_mapping("metrics", metrics)
        time = self._now_ms() if timestamp is None else timestamp
        self._log([(key, value, time, step or 0) for key, value in metrics.items()])
        return ()

    def append_series(
        self, key: str, values: Any, steps: Any = None, timestamps: Any = None
    ) -> Places:
        """``MlflowClient.log_batch``, as often as it takes."""
        count = len(values)
        all_steps = range(count) if steps is None else steps
        times = [self._now_ms()] * count if timestamps is None else timestamps
        columns = zip(values, times, all_steps, strict=True)
        self._log([(key, value, int(time), int(step)) for value, time, step in columns])
        return ()

    def append_texts(self, kind: int, texts: Mapping[str, Any]) -> Places:
        """``MlflowClient.log_batch`` of parameters or, as ``kind`` says, tags."""
        from mlflow.entities import Param, RunTag

        texts = checked_mapping("parameters" if kind == PARAM else "tags", texts)
        if kind == PARAM:
            params = [Param(key, str(value)) for key, value in texts.items()]
            self._client.log_batch(self._run_id, params=params, synchronous=True)
        else:
            tags = [RunTag(key, str(value)) for key, value in texts.items()]
            self._client.log_batch(self._run_id, tags=tags, synchronous=True)
        self.stored += len(texts)
        return ()

    def _log(self, points: list[tuple[str, Any, int, int]]) -> None:
        from mlflow.entities import Metric

        for first in range(0, len(points), _MAX_BATCH):
            metrics = [
                Metric(self._stored_key(key), *point)
                for key, *point in points[first : first + _MAX_BATCH]
            ]
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            self.stored += len(metrics)

    def _now_ms(self) -> int:
        return self._clock.now_ns() // 1_000_000
