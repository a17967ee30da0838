"""What a workspace of Azure ML's has of experiments and runs, and what it answers to MLflow."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flowbuffer.clock import Clock

_TERMINAL = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class _Point:
    key: str
    timestamp: int
    step: int
    value: float
    visible_s: float

    @property
    def row(self) -> tuple[str, int, int, str]:
        return self.key, self.timestamp, self.step, repr(self.value)  # as text NaN equals itself


@dataclass
class AzureMLRun:
    """What the service knows of a run.

    Attributes:
        status: As MLflow names it: ``RUNNING``, ``FINISHED``, ``FAILED``, ``KILLED``.
        visible_at_end: How many points could be read when it last got a final status; None before.
        duplicates: How many points came that the run had already.
    """

    run_id: str
    experiment_id: str
    name: str
    start_time: int
    status: str = "RUNNING"
    end_time: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    visible_at_end: int | None = None
    duplicates: int = 0
    _points: dict[str, list[_Point]] = field(default_factory=dict)
    _rows: set[tuple[str, int, int, str]] = field(default_factory=set)


class Refused(Exception):
    """An answer other than 200, in the form of the service (mlflow issue 11462)."""

    def __init__(
        self, status: int, error_code: str, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        kind = "ValidationError" if status == 400 else "UserError"
        self.answer = (
            status,
            {
                "Error": {"Code": kind, "Severity": None, "Message": message, "Details": []},
                "Correlation": {"operation": uuid.uuid4().hex, "request": uuid.uuid4().hex[:16]},
                "Environment": "local",
                "ComponentName": "mlflow",
                "statusCode": status,
                "error_code": error_code,
            },
            retry_after_s,
        )


class Workspace:
    """Experiments and their runs. Its caller holds a lock.

    Args:
        ingestion_delay_s, max_rows, max_params, keeps_once, clock: As of ``AzureMLEndpoint``.

    Attributes:
        tracking_uri: Where runs are said to have their artifacts.
        experiments: The names of the experiments, by id.
        runs: By id.
    """

    def __init__(
        self,
        *,
        ingestion_delay_s: float,
        max_rows: int,
        max_params: int,
        keeps_once: bool,
        clock: Clock,
    ) -> None:
        self.tracking_uri = ""
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, AzureMLRun] = {}
        self._ingestion_delay_s = ingestion_delay_s
        self._max_rows, self._max_params = max_rows, max_params
        self._keeps_once, self._clock = keeps_once, clock
        self._due_s: dict[str, float] = {}  # of each accepted batch, by its tracking id

    def answer(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body of the answer to a request of MLflow's REST API.

        Raises:
            Refused: The answer is another one than 200.
        """
        served = _SERVED.get(name)
        if served is None:
            raise Refused(404, "ENDPOINT_NOT_FOUND", f"{name} is not served by this endpoint")
        return served(self, body)

    def new_run(self, run_id: str, experiment_id: str, name: str, tags: Any) -> AzureMLRun:
        """Create a run."""
        run = AzureMLRun(run_id, experiment_id, name, self._clock.now_ns() // 1_000_000)
        run.tags.update(tags)
        self.runs[run_id] = run
        return run

    def visible(self, run: AzureMLRun) -> int:
        """How many points can be read now."""
        return sum(len(self.history(run, key)) for key in run._points)

    def history(self, run: AzureMLRun, key: str) -> list[tuple[int, int, float]]:
        """(time in ms, step, value) of a key, as far as it can be read now, in MLflow's order."""
        now_s = self._clock.monotonic_s()
        points = run._points.get(key, ())
        return sorted((p.timestamp, p.step, p.value) for p in points if p.visible_s <= now_s)

    def end(self, run: AzureMLRun, status: str) -> None:
        """End a run."""
        run.status = status
        run.end_time = self._clock.now_ns() // 1_000_000
        run.visible_at_end = self.visible(run)

    def _run(self, run_id: str) -> AzureMLRun:
        if run_id not in self.runs:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", f"Run {run_id} was not found")
        return self.runs[run_id]

    def _log(self, body: Mapping[str, Any], delay_s: float) -> float:
        """Take metrics, params and tags, all or nothing; returns when the metrics are visible."""
        run = self._run(body["run_id"])
        metrics, params = body.get("metrics", []), _pairs(body.get("params", ()))
        _limit("MetricV2Dto.Value/Count", self._max_rows, len(metrics))
        _limit("Parameters", self._max_params, len(run.params | params))
        for key, value in params.items():
            if run.params.get(key, value) != value:
                raise Refused(
                    400,
                    "INVALID_PARAMETER_VALUE",
                    f"Changing param values is not allowed. Param with key='{key}' was already "
                    f"logged with value='{run.params[key]}', and now with '{value}'.",
                )
        run.params |= params
        run.tags |= _pairs(body.get("tags", ()))
        visible_s = self._clock.monotonic_s() + delay_s
        for metric in metrics:
            key, time, step = metric["key"], int(metric["timestamp"]), int(metric.get("step", 0))
            # Protocol buffers leave out zeros, and write NaN and Infinity as text.
            point = _Point(key, time, step, float(metric.get("value", 0.0)), visible_s)
            known = point.row in run._rows
            run.duplicates += known
            if not (known and self._keeps_once):
                run._rows.add(point.row)
                run._points.setdefault(key, []).append(point)
        return visible_s

    # One for each name.

    def _log_batch(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self._log(body, 0.0)
        return {}

    def _log_metric(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._log_batch({"run_id": body["run_id"], "metrics": [body]})

    def _log_parameter(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._log_batch({"run_id": body["run_id"], "params": [body]})

    def _set_tag(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._log_batch({"run_id": body["run_id"], "tags": [body]})

    def _log_batch_async(self, body: Mapping[str, Any]) -> dict[str, Any]:
        visible_s = self._log(body, self._ingestion_delay_s)
        if not body.get("metrics"):
            return {}  # params and tags are there at once; the plugin then polls nothing
        batch = uuid.uuid4().hex
        self._due_s[batch] = visible_s
        return {"batch_tracking_id": batch}

    def _get_run_data_status(self, body: Mapping[str, Any]) -> dict[str, Any]:
        due_s = self._due_s.get(body["batch_tracking_id"])
        if due_s is None:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", "No such batch")
        return {"is_complete": due_s <= self._clock.monotonic_s()}

    def _get_history(self, body: Mapping[str, Any]) -> dict[str, Any]:
        key = body["metric_key"]
        rows = self.history(self._run(body["run_id"]), key)
        return {"metrics": [_metric(key, *row) for row in rows]}

    def _get_one_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        run = self._run(body["run_id"])
        latest = [(key, self.history(run, key)) for key in run._points]
        data = {
            "metrics": [_metric(key, *rows[-1]) for key, rows in latest if rows],
            "params": [{"key": key, "value": value} for key, value in run.params.items()],
            "tags": [{"key": key, "value": value} for key, value in run.tags.items()],
        }
        return {"run": {"info": self._info(run), "data": data}}

    def _create_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        run_id = str(uuid.uuid4())
        tags = _pairs(body.get("tags", ()))
        run = self.new_run(run_id, body["experiment_id"], body.get("run_name", run_id), tags)
        return {"run": {"info": self._info(run), "data": {}}}

    def _update_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        run = self._run(body["run_id"])
        run.name = body.get("run_name", run.name)
        if body.get("status") in _TERMINAL:
            self.end(run, body["status"])
        else:
            run.status = body.get("status", run.status)
        return {"run_info": self._info(run)}

    def _info(self, run: AzureMLRun) -> dict[str, Any]:
        info = {
            "run_id": run.run_id,
            "run_uuid": run.run_id,
            "run_name": run.name,
            "experiment_id": run.experiment_id,
            "status": run.status,
            "start_time": run.start_time,
            "lifecycle_stage": "active",
            "artifact_uri": f"{self.tracking_uri}/experiments/_/runs/{run.run_id}/artifacts",
        }
        return info if run.end_time is None else {**info, "end_time": run.end_time}

    def _experiment(self, experiment_id: str) -> dict[str, Any]:
        if experiment_id not in self.experiments:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", "No such experiment")
        name = self.experiments[experiment_id]
        found = {"experiment_id": experiment_id, "name": name, "lifecycle_stage": "active"}
        return {"experiment": found}

    def _get_experiment(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._experiment(body["experiment_id"])

    def _get_experiment_by_name(self, body: Mapping[str, Any]) -> dict[str, Any]:
        ids = {name: number for number, name in self.experiments.items()}
        return self._experiment(ids.get(body["experiment_name"], ""))

    def _create_experiment(self, body: Mapping[str, Any]) -> dict[str, Any]:
        experiment_id = str(uuid.uuid4())
        self.experiments[experiment_id] = body["name"]
        return {"experiment_id": experiment_id}


_SERVED: dict[str, Callable[[Workspace, Mapping[str, Any]], dict[str, Any]]] = {
    "runs/log-batch-async": Workspace._log_batch_async,
    "runs/get-run-data-status": Workspace._get_run_data_status,
    "runs/log-batch": Workspace._log_batch,
    "runs/log-metric": Workspace._log_metric,
    "runs/log-parameter": Workspace._log_parameter,
    "runs/set-tag": Workspace._set_tag,
    "runs/create": Workspace._create_run,
    "runs/get": Workspace._get_one_run,
    "runs/update": Workspace._update_run,
    "metrics/get-history": Workspace._get_history,
    "experiments/get": Workspace._get_experiment,
    "experiments/get-by-name": Workspace._get_experiment_by_name,
    "experiments/create": Workspace._create_experiment,
}


def _limit(field_name: str, limit: int, size: int) -> None:
    if size > limit:
        raise Refused(
            400,
            "INVALID_PARAMETER_VALUE",
            f"A field of the entity is over the size limit. FieldName={field_name}, Limit={limit}, "
            f"Size={size}. See https://aka.ms/azure-machine-learning-limits for service limits "
            "documentation.",
        )


def _pairs(items: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {item["key"]: item.get("value", "") for item in items}


def _metric(key: str, timestamp: int, step: int, value: float) -> dict[str, Any]:
    # json writes NaN and Infinity bare, which protocol buffers' parser takes as text only.
    text = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(repr(value))
    return {"key": key, "timestamp": timestamp, "step": step, "value": text or value}
