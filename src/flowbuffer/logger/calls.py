"""The calls that log, of every logger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex

from flowbuffer.logger.handle import Handle
from flowbuffer.logger.recorders import Recorder
from flowbuffer.spool.layout import PARAM, TAG
from flowbuffer.spool.writing.points import Number

if TYPE_CHECKING:
    import numpy.typing


class LoggingCalls:
    """What a training loop calls. Thread-safe.

    What they do is a recorder's business: its methods are attributes of the logger's own, so that
    no call looks for more than one.
    """

    def _log_by(self, recorder: Recorder) -> None:
        """Log by the methods of a recorder, from now on."""
        self._append = recorder.append
        self._append_many = recorder.append_many
        self._append_series = recorder.append_series
        self._append_texts = recorder.append_texts

    def log_metric(
        self,
        key: str,
        value: Number,
        step: SupportsIndex | None = None,
        timestamp: SupportsIndex | None = None,
    ) -> Handle:
        """Log one point.

        Args:
            key: As MLflow takes it: letters, digits, spaces and ``_ - . : /``, at most 250.
            value: Anything with ``__float__``, or one element; NaN and infinities are values.
            step: 64 bits, signed. None is 0, as in MLflow.
            timestamp: ms since the epoch, from 0. None is the time of the call.

        Raises:
            InvalidPoint: An argument is none of that (``strict``). Nothing else is affected.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return Handle(self._append(key, value, step, timestamp))

    def log_metrics(
        self,
        metrics: Mapping[str, Number],
        step: SupportsIndex | None = None,
        timestamp: SupportsIndex | None = None,
    ) -> Handle:
        """Log one point per key, all with one step and one time. The arguments are as in
        :meth:`log_metric`.

        Raises:
            InvalidPoint: A key or value cannot be logged; the others were.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return Handle(self._append_many(metrics, step, timestamp))

    def log_series(
        self,
        key: str,
        values: numpy.typing.ArrayLike,
        steps: numpy.typing.ArrayLike | None = None,
        timestamps: numpy.typing.ArrayLike | None = None,
    ) -> Handle:
        """Log many points of one key.

        Args:
            key: As in :meth:`log_metric`.
            values: 1-D, n numbers; n may be 0.
            steps: 1-D, n whole numbers. None counts from 0.
            timestamps: 1-D, n times in ms since the epoch. None is the time of the call for all.

        Raises:
            InvalidPoint: An argument is none of that; nothing of the series was logged.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return Handle(self._append_series(key, values, steps, timestamps))

    def log_param(self, key: str, value: Any) -> Handle:
        """Log a parameter. MLflow keeps the first value of each: another one is rejected.

        Args:
            key: As in :meth:`log_metric`; ``key_template`` is not for parameters.
            value: Text, or what ``str`` makes of it; at most 6000 characters.

        Raises:
            InvalidPoint: An argument is none of that. Nothing else is affected.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return self.log_params({key: value})

    def log_params(self, params: Mapping[str, Any]) -> Handle:
        """Log parameters, as :meth:`log_param` does.

        Raises:
            InvalidPoint: A key or value cannot be logged; none of them was.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return Handle(self._append_texts(PARAM, params))

    def set_tag(self, key: str, value: Any) -> Handle:
        """Set a tag; the last value of each key stays.

        Args:
            key: As in :meth:`log_metric`; ``key_template`` is not for tags.
            value: Text, or what ``str`` makes of it; at most 8000 characters.

        Raises:
            InvalidPoint: An argument is none of that. Nothing else is affected.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return self.set_tags({key: value})

    def set_tags(self, tags: Mapping[str, Any]) -> Handle:
        """Set tags, as :meth:`set_tag` does.

        Raises:
            InvalidPoint: A key or value cannot be logged; none of them was.
            SpoolFull: There is no room in the spool (``when_full``).
        """
        return Handle(self._append_texts(TAG, tags))
