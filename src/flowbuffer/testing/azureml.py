"""A tracking service that behaves like Azure ML's, on this machine, for the tests of a job.

The real ``azureml-mlflow`` talks to it over TLS, unmodified::

    with AzureMLEndpoint(ingestion_delay_s=2.0) as service:
        subprocess.run([sys.executable, "train.py"], env=os.environ | service.job_environment())
        service.end_job()
        assert len(service.history(service.run_id, "loss")) == 1000

It needs the extra ``flowbuffer[azureml]``. Artifacts, models and searches are not served. What is
known of the service, and what is assumed, is said where it is answered.
"""

from __future__ import annotations

import base64
import json
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flowbuffer.clock import SYSTEM_CLOCK, Clock
from flowbuffer.testing._loopback import Answer, LoopbackServer, tls_context

_TERMINAL = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class Received:
    """A request that was answered, or whose answer was lost.

    Attributes:
        name: What was asked for, such as ``runs/log-batch-async`` or ``token``.
        status: The HTTP status of the answer; 0 if its connection was dropped instead.
        metrics: How many metrics it brought.
        at_s: When, on the endpoint's clock, in s.
        connection: A number for its connection.
    """

    name: str
    status: int
    metrics: int
    at_s: float
    connection: int


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


class _Refused(Exception):
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


class AzureMLEndpoint:
    """A loopback Azure ML workspace with one running job; a context manager. Thread-safe.

    Args:
        ingestion_delay_s: How long a batch that was accepted takes until it can be read, in s.
        latency_s: How long each request takes at least, in s.
        max_rows: The most metrics in one request; more are refused with the service's own 400.
        max_params: The most parameters of a run, refused in the same way.
        token_lifetime_s: How long a token is valid from its issue, in s.
        refresh_grace_s: For how long an expired token still gets a new one, in s.
        keeps_once: Whether equal points (key, timestamp, step, value) are kept once, as MLflow's
            SQL stores do. What Azure ML does is not documented: test with both.
        clock: Decides what is visible and what has expired, and waits for the latency.

    Attributes:
        run_id: The job's run.
        experiment_id: Its experiment.
        tracking_uri: ``azureml://localhost:...``.
        ca_bundle: A PEM file with the endpoint's certificate, and with those of certifi.
        requests: Every request so far, in the order of the answers.
    """

    def __init__(
        self,
        *,
        ingestion_delay_s: float = 0.0,
        latency_s: float = 0.0,
        max_rows: int = 250,
        max_params: int = 200,
        token_lifetime_s: float = 86_400.0,
        refresh_grace_s: float = 0.0,
        keeps_once: bool = True,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.run_id = f"job_{uuid.uuid4().hex[:10]}"
        self.experiment_id = str(uuid.uuid4())
        self.requests: list[Received] = []
        self._ingestion_delay_s, self._latency_s = ingestion_delay_s, latency_s
        self._max_rows, self._max_params = max_rows, max_params
        self._token_lifetime_s, self._refresh_grace_s = token_lifetime_s, refresh_grace_s
        self._keeps_once, self._clock = keeps_once, clock
        self._lock = threading.Lock()
        self._experiments = {self.experiment_id: "flowbuffer"}
        self._runs: dict[str, AzureMLRun] = {}
        self._due_s: dict[str, float] = {}  # of each accepted batch, by its tracking id
        self._expires_s: dict[str, float] = {}  # of each token
        self._throttled: list[float] = []  # the Retry-After of each 429 to come
        self._answers_to_lose = 0
        # The plugin keeps tokens by workspace and run, whatever the host: no two endpoints of a
        # process may have the same.
        self._scope = (
            "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/flowbuffer/providers"
            f"/Microsoft.MachineLearningServices/workspaces/{uuid.uuid4().hex}"
        )
        self._new_run(self.run_id, self.experiment_id, "job", {})
        self._folder = tempfile.TemporaryDirectory(prefix="flowbuffer-azureml-")
        self.ca_bundle = Path(self._folder.name) / "ca.pem"
        self._tls = tls_context(self.ca_bundle)
        self._server = LoopbackServer(self, self._tls)
        self._port: int = self._server.server_address[1]
        self.tracking_uri = f"azureml://localhost:{self._port}/mlflow/v2.0{self._scope}"

    def __enter__(self) -> AzureMLEndpoint:
        self._server.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    # What a test asks for.

    def job_environment(self) -> dict[str, str]:
        """The variables that a job has on Azure ML compute, with a new token.

        ``REQUESTS_CA_BUNDLE`` and ``no_proxy`` come on top, so that the endpoint is reached. Set
        them before MLflow is used: its plugin reads them once per process and tracking URI.
        """
        token, expires_s = self._new_token()
        _, subscription, _, group, *_ = self._scope.removeprefix("/").split("/")
        host = f"https://localhost:{self._port}"
        return {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_TRACKING_TOKEN": token,
            "MLFLOW_RUN_ID": self.run_id,
            "MLFLOW_EXPERIMENT_ID": self.experiment_id,
            "MLFLOW_EXPERIMENT_NAME": self._experiments[self.experiment_id],
            "AZUREML_RUN_ID": self.run_id,
            "AZUREML_RUN_TOKEN": token,
            "AZUREML_RUN_TOKEN_EXPIRY": str(int(expires_s)),
            "AZUREML_ARM_SUBSCRIPTION": subscription,
            "AZUREML_ARM_RESOURCEGROUP": group,
            "AZUREML_ARM_WORKSPACE_NAME": self._scope.rpartition("/")[2],
            "AZUREML_ARM_PROJECT_NAME": self._experiments[self.experiment_id],
            "AZUREML_EXPERIMENT_ID": self.experiment_id,
            "AZUREML_SERVICE_ENDPOINT": host,
            "AZUREML_CURRENT_CLOUD": "AzureCloud",
            "REQUESTS_CA_BUNDLE": str(self.ca_bundle),
            "no_proxy": "localhost",
        }

    def history(self, run_id: str, key: str) -> list[tuple[int, int, float]]:
        """(time in ms, step, value) of a key, as far as it can be read now, in MLflow's order.

        Raises:
            KeyError: There is no such run.
        """
        with self._lock:
            return self._history(self._runs[run_id], key)

    def run(self, run_id: str) -> AzureMLRun:
        """The run; it goes on changing.

        Raises:
            KeyError: There is no such run.
        """
        return self._runs[run_id]

    def visible(self, run_id: str) -> int:
        """How many points of a run can be read now.

        Raises:
            KeyError: There is no such run.
        """
        with self._lock:
            return self._visible(self._runs[run_id])

    def count(self, name: str, status: int = 200) -> int:
        """How many requests of this name were answered with this status."""
        return sum(seen.name == name and seen.status == status for seen in list(self.requests))

    def end_job(self, exit_code: int = 0) -> None:
        """End the job's run, as the service does once the job's process has ended."""
        with self._lock:
            self._end(self._run(self.run_id), "FAILED" if exit_code else "FINISHED")

    def throttle(self, times: int = 1, retry_after_s: float = 1.0) -> None:
        """Answer the next requests for runs with 429; ``Retry-After`` is rounded up to whole s."""
        with self._lock:
            self._throttled += [retry_after_s] * times

    def lose_answers(self, times: int = 1) -> None:
        """Take the next requests that log something, and drop their connections unanswered."""
        with self._lock:
            self._answers_to_lose += times

    def stop(self) -> None:
        """Drop all connections and take no more, until :meth:`start`."""
        self._server.end()

    def start(self) -> None:
        """Listen again on the same port, after :meth:`stop`."""
        self._server = LoopbackServer(self, self._tls, self._port)
        self._server.begin()

    def restart(self) -> None:
        """Drop all connections; the port and all that was accepted are kept."""
        self.stop()
        self.start()

    # What is answered. Called with the lock held, except for `answer`.

    def answer(self, path: str, body: Mapping[str, Any], token: str, connection: int) -> Answer:
        """Answer a request; the server calls this."""
        if self._latency_s:
            self._clock.sleep(self._latency_s)
        name = path.rpartition("/mlflow/")[2]
        if path.startswith("/history/"):
            name = path.rpartition("/")[2]
        lost = False
        with self._lock:
            answer: Answer
            try:
                answer = 200, self._said(name, path, body, token), None
                lost = self._answers_to_lose > 0 and "log-" in name
                self._answers_to_lose -= lost
            except _Refused as refused:
                answer = refused.answer
            status = 0 if lost else answer[0]
            metrics = len(body.get("metrics", ())) + (name == "runs/log-metric")
            now_s = self._clock.monotonic_s()
            self.requests.append(Received(name, status, metrics, now_s, connection))
        return None if lost else answer

    def _said(self, name: str, path: str, body: Mapping[str, Any], token: str) -> dict[str, Any]:
        if self._scope not in path:
            raise _Refused(404, "ENDPOINT_NOT_FOUND", f"No workspace at {path}")
        grace_s = self._refresh_grace_s if name == "token" else 0.0
        if self._clock.now_ns() / 1e9 >= self._expires_s.get(token, 0.0) + grace_s:
            raise _Refused(401, "UNAUTHENTICATED", "The token is invalid, or has expired")
        if name == "token":
            token, expires_s = self._new_token()
            expiry = datetime.fromtimestamp(expires_s, timezone.utc).isoformat()
            return {"token": token, "expiryTimeUtc": expiry}
        if self._throttled and name.startswith("runs/"):
            wait_s = self._throttled.pop(0)
            raise _Refused(429, "REQUEST_LIMIT_EXCEEDED", "Too many requests", wait_s)
        served = _SERVED.get(name)
        if served is None:
            raise _Refused(404, "ENDPOINT_NOT_FOUND", f"{name} is not served by this endpoint")
        return served(self, body)

    def _new_token(self) -> tuple[str, float]:
        """A token as the plugin decodes it, without checking its signature; and its expiry."""
        expires_s = self._clock.now_ns() / 1e9 + self._token_lifetime_s
        claims = {"exp": int(expires_s), "jti": uuid.uuid4().hex}
        token = ".".join([_base64({"alg": "none", "typ": "JWT"}), _base64(claims), "eA"])
        self._expires_s[token] = expires_s
        return token, expires_s

    def _run(self, run_id: str) -> AzureMLRun:
        if run_id not in self._runs:
            raise _Refused(404, "RESOURCE_DOES_NOT_EXIST", f"Run {run_id} was not found")
        return self._runs[run_id]

    def _new_run(self, run_id: str, experiment_id: str, name: str, tags: Any) -> AzureMLRun:
        run = AzureMLRun(run_id, experiment_id, name, self._clock.now_ns() // 1_000_000)
        run.tags.update(tags)
        self._runs[run_id] = run
        return run

    def _visible(self, run: AzureMLRun) -> int:
        return sum(len(self._history(run, key)) for key in run._points)

    def _history(self, run: AzureMLRun, key: str) -> list[tuple[int, int, float]]:
        now_s = self._clock.monotonic_s()
        points = run._points.get(key, ())
        return sorted((p.timestamp, p.step, p.value) for p in points if p.visible_s <= now_s)

    def _end(self, run: AzureMLRun, status: str) -> None:
        run.status = status
        run.end_time = self._clock.now_ns() // 1_000_000
        run.visible_at_end = self._visible(run)

    def _log(self, body: Mapping[str, Any], delay_s: float) -> float:
        """Take metrics, params and tags, all or nothing; returns when the metrics are visible."""
        run = self._run(body["run_id"])
        metrics, params = body.get("metrics", []), _pairs(body.get("params", ()))
        _limit("MetricV2Dto.Value/Count", self._max_rows, len(metrics))
        _limit("Parameters", self._max_params, len(run.params | params))
        for key, value in params.items():
            if run.params.get(key, value) != value:
                raise _Refused(
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
            raise _Refused(404, "RESOURCE_DOES_NOT_EXIST", "No such batch")
        return {"is_complete": due_s <= self._clock.monotonic_s()}

    def _get_history(self, body: Mapping[str, Any]) -> dict[str, Any]:
        key = body["metric_key"]
        rows = self._history(self._run(body["run_id"]), key)
        return {"metrics": [_metric(key, *row) for row in rows]}

    def _get_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        run = self._run(body["run_id"])
        latest = [(key, self._history(run, key)) for key in run._points]
        data = {
            "metrics": [_metric(key, *rows[-1]) for key, rows in latest if rows],
            "params": [{"key": key, "value": value} for key, value in run.params.items()],
            "tags": [{"key": key, "value": value} for key, value in run.tags.items()],
        }
        return {"run": {"info": self._info(run), "data": data}}

    def _create_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        run_id = str(uuid.uuid4())
        tags = _pairs(body.get("tags", ()))
        run = self._new_run(run_id, body["experiment_id"], body.get("run_name", run_id), tags)
        return {"run": {"info": self._info(run), "data": {}}}

    def _update_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        run = self._run(body["run_id"])
        run.name = body.get("run_name", run.name)
        if body.get("status") in _TERMINAL:
            self._end(run, body["status"])
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
        if experiment_id not in self._experiments:
            raise _Refused(404, "RESOURCE_DOES_NOT_EXIST", "No such experiment")
        name = self._experiments[experiment_id]
        found = {"experiment_id": experiment_id, "name": name, "lifecycle_stage": "active"}
        return {"experiment": found}

    def _get_experiment(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._experiment(body["experiment_id"])

    def _get_experiment_by_name(self, body: Mapping[str, Any]) -> dict[str, Any]:
        ids = {name: number for number, name in self._experiments.items()}
        return self._experiment(ids.get(body["experiment_name"], ""))

    def _create_experiment(self, body: Mapping[str, Any]) -> dict[str, Any]:
        experiment_id = str(uuid.uuid4())
        self._experiments[experiment_id] = body["name"]
        return {"experiment_id": experiment_id}


_SERVED: dict[str, Callable[[AzureMLEndpoint, Mapping[str, Any]], dict[str, Any]]] = {
    "runs/log-batch-async": AzureMLEndpoint._log_batch_async,
    "runs/get-run-data-status": AzureMLEndpoint._get_run_data_status,
    "runs/log-batch": AzureMLEndpoint._log_batch,
    "runs/log-metric": AzureMLEndpoint._log_metric,
    "runs/log-parameter": AzureMLEndpoint._log_parameter,
    "runs/set-tag": AzureMLEndpoint._set_tag,
    "runs/create": AzureMLEndpoint._create_run,
    "runs/get": AzureMLEndpoint._get_run,
    "runs/update": AzureMLEndpoint._update_run,
    "metrics/get-history": AzureMLEndpoint._get_history,
    "experiments/get": AzureMLEndpoint._get_experiment,
    "experiments/get-by-name": AzureMLEndpoint._get_experiment_by_name,
    "experiments/create": AzureMLEndpoint._create_experiment,
}


def _limit(field_name: str, limit: int, size: int) -> None:
    if size > limit:
        raise _Refused(
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


def _base64(claims: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
