"""A callback for transformers' ``Trainer``: :class:`FlowbufferCallback`."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "flowbuffer.integrations.transformers needs transformers: "
        f"pip install 'flowbuffer[transformers]' ({error})"
    ) from error

from flowbuffer.integrations.loggable import Loggable
from flowbuffer.logger.active_run import mark_ended, starts_runs
from flowbuffer.logger.metric_logger import MetricLogger
from flowbuffer.settings.environment import environment_run_id
from flowbuffer.settings.settings import Settings, settings_with

_log = logging.getLogger("flowbuffer")


class FlowbufferCallback(TrainerCallback):
    """Logs what a ``Trainer`` logs to an MLflow run, in the place of transformers' own
    ``MLflowCallback``: ``Trainer(..., callbacks=[FlowbufferCallback()])``, with ``mlflow`` not in
    ``report_to``.

    The run is MLflow's active one. If there is none, each training starts one, as
    ``mlflow.start_run`` does (so ``MLFLOW_RUN_ID`` and ``MLFLOW_EXPERIMENT_NAME`` are heeded), with
    the arguments' ``run_name``, and ends it; what is evaluated afterwards goes to the same run. A
    run that an evaluation starts stays active. A training that raises leaves its run active, too:
    it becomes ``FAILED`` when the next one begins.

    The parameters are the training's arguments and the model's configuration. The world's process 0
    logs; in the others nothing happens. Checkpoints are not logged.

    Args:
        tags: For the run; at most 8000 characters each.
        settings: None means ``Settings()``.
    """

    def __init__(
        self, *, tags: Mapping[str, Any] | None = None, settings: Settings | None = None
    ) -> None:
        self._tags = dict(tags or {})
        self._settings = settings
        self._run_id: str | None = None
        self._tracking_uri: str | None = None
        self._owns_run = False  # it was started here, and is to be ended here
        self._trains = False
        self._logger: MetricLogger | None = None
        self._loggable = Loggable("_")

    @property
    def run_id(self) -> str | None:
        """The run that was last logged to; None before, and in processes other than the world's
        first."""
        return self._run_id

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,  # noqa: ARG002
        model: Any = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Find a run, or start one, and log the parameters. This asks the server.

        Raises:
            SettingError: A setting is out of its range.
            SpoolError: The spool cannot be used; the message says what would help.
            InvalidPoint: A tag cannot be set.
            mlflow.MlflowException: The server starts no run.
        """
        if not state.is_world_process_zero:
            return
        if self._trains:
            self._end("FAILED")
        self._trains = True
        if self._own_logger() is None:
            self._begin(args, model)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,  # noqa: ARG002
        logs: Mapping[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Log one point per key, all with the step ``state.global_step``; it returns before they
        are delivered.

        Args:
            args: Of the training.
            state: Of the training.
            control: Not used.
            logs: Numbers, or tensors of one element, which are waited for if they are on a GPU. A
                ``_`` takes the place of each character that MLflow takes in no key. What is no
                number is not logged. Both are warned of, once per key.
            model: Whose configuration is logged, if the run was not found before.
            kwargs: Not used.

        Raises:
            SpoolFull: There is no room in the spool (``when_full``).
        """
        if not state.is_world_process_zero:
            return
        if self._run_id is None or (not self._trains and self._has_other_run()):
            self._begin(args, model)
        self._open_logger().log_metrics(self._loggable.metrics(logs or {}), state.global_step)

    def on_train_end(
        self,
        args: Any,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """If the run was started here: deliver what was logged, within ``shutdown_timeout_s``, and
        mark the run ended. A server that cannot be reached is warned of."""
        if state.is_world_process_zero:
            self._trains = False
            self._end("FINISHED")

    def _begin(self, args: Any, model: Any) -> None:
        import mlflow

        if "mlflow" in (args.report_to or ()):
            _log.warning("'mlflow' is in report_to: what is logged is logged twice")
        tags = dict(self._tags)
        self._owns_run = False
        run = mlflow.active_run()
        if run is None and starts_runs(self._current_settings()):
            run = mlflow.start_run(run_name=args.run_name)
            self._owns_run = True
        if run is not None:
            self._run_id = run.info.run_id
        else:
            self._run_id = environment_run_id() or uuid.uuid4().hex
            self._owns_run = True
            if args.run_name:
                tags["mlflow.runName"] = args.run_name
        self._tracking_uri = mlflow.get_tracking_uri()
        logger = self._open_logger()
        logger.set_tags(tags)
        logger.log_params(self._loggable.params({**_config_of(model), **args.to_dict()}))

    def _has_other_run(self) -> bool:
        """Whether the program made another run the active one."""
        import mlflow

        run = mlflow.active_run()
        return run is not None and run.info.run_id != self._run_id

    def _open_logger(self) -> MetricLogger:
        logger = self._logger
        if logger is None or logger.closed or logger.run_id != self._run_id:
            logger = self._logger = MetricLogger(
                self._run_id, tracking_uri=self._tracking_uri, settings=self._current_settings()
            )
            logger.closes_with_run = True
        return logger

    def _current_settings(self) -> Settings:
        return settings_with(self._settings, {})

    def _own_logger(self) -> MetricLogger | None:
        """That of the run that was started here, while nobody ended it."""
        logger = self._logger
        return None if not self._owns_run or logger is None or logger.closed else logger

    def _end(self, status: str) -> None:
        logger = self._own_logger()
        self._owns_run = False
        if logger is None:
            return
        if not starts_runs(logger.settings):
            logger.close(failed=status != "FINISHED")
            return
        from mlflow.exceptions import MlflowException

        try:
            # The logger is closed first.
            mark_ended(logger.run_id, self._tracking_uri or "", status)
        except MlflowException as error:
            _log.warning("run %s could not be marked %s: %s", logger.run_id, status, error)


def _config_of(model: Any) -> dict[str, Any]:
    config = getattr(model, "config", None) or {}
    return dict(config if isinstance(config, Mapping) else config.to_dict())
