"""A logger for Lightning's ``Trainer``: :class:`FlowbufferLogger`."""

from __future__ import annotations

import logging
import uuid
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

try:
    from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
    from lightning.pytorch.utilities import rank_zero_only
except ImportError:
    try:
        from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
        from pytorch_lightning.utilities import rank_zero_only
    except ImportError as error:
        raise ImportError(
            "flowbuffer.integrations.lightning needs lightning, or pytorch_lightning: "
            f"pip install 'flowbuffer[lightning]' ({error})"
        ) from error

from flowbuffer.backends.experiments import find_or_create
from flowbuffer.integrations.loggable import Loggable
from flowbuffer.logger.active_run import starts_runs
from flowbuffer.logger.metric_logger import MetricLogger
from flowbuffer.settings.environment import environment_run_id
from flowbuffer.settings.settings import Settings, settings_with

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger("flowbuffer")

#: What :meth:`FlowbufferLogger.finalize` makes of Lightning's words; others are ``FINISHED``.
_STATUSES = {"failed": "FAILED", "aborted": "KILLED"}


class FlowbufferLogger(Logger):
    """Logs what a ``LightningModule`` logs to one MLflow run, in the place of Lightning's own
    ``MLFlowLogger``: ``Trainer(logger=FlowbufferLogger())``.

    The process of global rank 0 logs; in the others every call returns at once. The run is looked
    for, or created, when the logger is first used, which asks the server; what is logged is
    buffered. Several trainings, validations and tests with one logger go to one run. Graphs are not
    logged, nor are checkpoints.

    Args:
        experiment_name: Where a new run is created; the experiment, too, if there is none.
            Offline it is not known: ``flowbuffer sync`` has its own.
        run_name: Of a new run. None lets MLflow make one up.
        tracking_uri: As MLflow takes it. None means MLflow's current one when the run is created.
        tags: For the run; at most 8000 characters each.
        prefix: Put before every metric's key, with a ``-`` between them; empty puts nothing.
        run_id: Go on with this run. None means the one that ``MLFLOW_RUN_ID`` names, which
            :meth:`finalize` leaves open, else a new one.
        settings: None means ``Settings()``.
    """

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        *,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        prefix: str = "",
        run_id: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tracking_uri = tracking_uri
        self._tags = dict(tags or {})
        self._prefix = f"{prefix}-" if prefix else ""
        self._settings = settings
        self._run_id = run_id
        self._experiment_id: str | None = None
        self._is_known = False  # the run was looked for, or created
        self._ends_run = False
        self._logger: MetricLogger | None = None
        self._loggable = Loggable("")

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricLogger:
        """The :class:`flowbuffer.MetricLogger` of the run; another one once the run was ended. In
        processes of other ranks, Lightning's object of which every method does nothing.

        Raises:
            SettingError: A setting is out of its range.
            SpoolError: The spool cannot be used; the message says what would help.
            InvalidPoint: A tag cannot be set.
            mlflow.MlflowException: The server has no such run, or creates none.
        """
        if self._logger is None or self._logger.closed:
            self._logger = self._open()
        return self._logger

    @property
    def run_id(self) -> str | None:
        """The run, created if need be; None in processes of other ranks, unless it was given."""
        self._know_run()
        return self._run_id

    @property
    def name(self) -> str:
        """The id of the experiment, as ``MLFlowLogger`` has it, offline or in processes of other
        ranks its name. With :attr:`version` it names the folder of the checkpoints."""
        self._know_run()
        return self._experiment_id or self._experiment_name

    @property
    def version(self) -> str | None:
        """The same as :attr:`run_id`."""
        return self.run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log one point per key; it returns before they are delivered.

        Args:
            metrics: Numbers, or tensors of one element; NaN and infinities are numbers. A tensor
                on a GPU is waited for; Lightning itself hands over floats. Characters that MLflow
                takes in no key are left out of it. What is no number is not logged. Both are warned
                of, once per key.
            step: 64 bits, signed. None is 0.

        Raises:
            SpoolFull: There is no room in the spool (``when_full``).
        """
        if self._prefix:
            metrics = {f"{self._prefix}{key}": value for key, value in metrics.items()}
        self.experiment.log_metrics(self._loggable.metrics(metrics), step)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace | None) -> None:
        """Log parameters. MLflow keeps the first value of each: another one is rejected.

        Args:
            params: Those within dicts, namespaces, dataclasses and lists of dicts have keys like
                ``optimizer/lr`` and ``layers/0/size``. Values are logged as ``str`` makes them, but
                for what is over 6000 characters.

        Raises:
            SpoolFull: There is no room in the spool (``when_full``).
        """
        given = _as_mapping(params or {})
        assert given is not None, "hyperparameters are a mapping or a namespace"
        self.experiment.log_params(self._loggable.params(_flat(given)))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Deliver what was logged, within ``shutdown_timeout_s``, and mark the run ended.

        Nothing happens if nothing used the logger. It may be used again: that goes to the same run.
        A server that cannot be reached is warned of.

        Args:
            status: ``failed`` is ``FAILED`` in MLflow, ``aborted`` is ``KILLED``; ``success``,
                ``finished`` and all others are ``FINISHED``.
        """
        logger = self._logger
        if logger is None or logger.closed:
            return
        ended = _STATUSES.get(status, "FINISHED")
        if not self._ends_run:
            logger.close(failed=ended != "FINISHED")
            return
        from mlflow.exceptions import MlflowException

        try:
            self._client().set_terminated(logger.run_id, ended)  # the logger is closed first
        except MlflowException as error:
            _log.warning("run %s could not be marked %s: %s", logger.run_id, ended, error)

    def __getstate__(self) -> dict[str, Any]:
        # Where Lightning starts processes, the one of rank 0 opens a logger of its own.
        return {**self.__dict__, "_logger": None}

    def _know_run(self) -> None:
        if not self._is_known:
            _ = self.experiment

    def _client(self) -> MlflowClient:
        import mlflow

        return mlflow.MlflowClient(self._tracking_uri)

    def _open(self) -> MetricLogger:
        import mlflow

        settings = settings_with(self._settings, {})
        self._tracking_uri = self._tracking_uri or mlflow.get_tracking_uri()
        tags: dict[str, Any] = {}
        if not self._is_known:
            tags = self._find_run(online=starts_runs(settings))
        logger = MetricLogger(self._run_id, tracking_uri=self._tracking_uri, settings=settings)
        logger.closes_with_run = True
        logger.set_tags(tags)
        self._is_known = True
        return logger

    def _find_run(self, *, online: bool) -> dict[str, Any]:
        """Look for the run, or create it; the tags that it is to get."""
        given, named = self._run_id, environment_run_id()
        self._ends_run = online and (given is not None or named is None)
        if not online:
            self._run_id = given or named or uuid.uuid4().hex
            name = {} if self._run_name is None else {"mlflow.runName": self._run_name}
            return {**self._tags, **name}
        client = self._client()
        if given or named:
            run = client.get_run(given or named)
        else:
            from mlflow.tracking.context.registry import resolve_tags

            experiment_id = find_or_create(client, self._experiment_name)
            run = client.create_run(experiment_id, tags=resolve_tags(), run_name=self._run_name)
        self._run_id = run.info.run_id
        self._experiment_id = run.info.experiment_id
        return self._tags


def _as_mapping(value: Any) -> Mapping[Any, Any] | None:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else None


def _flat(params: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """Parameters on one level, with keys like those of ``MLFlowLogger``."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        path = f"{above}{key}"
        below = _as_mapping(value)
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            below = dict(enumerate(value))
        flat.update({path: value} if below is None else _flat(below, f"{path}/"))
    return flat
