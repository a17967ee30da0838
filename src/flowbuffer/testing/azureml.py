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
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flowbuffer.clock import SYSTEM_CLOCK, Clock
from flowbuffer.testing._loopback import Answer, LoopbackServer, tls_context
from flowbuffer.testing._workspace import AzureMLRun, Refused, Workspace

__all__ = ["AzureMLEndpoint", "AzureMLRun", "Received"]


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
        self._latency_s, self._clock = latency_s, clock
        self._token_lifetime_s, self._refresh_grace_s = token_lifetime_s, refresh_grace_s
        self._lock = threading.Lock()
        self._workspace = Workspace(
            ingestion_delay_s=ingestion_delay_s,
            max_rows=max_rows,
            max_params=max_params,
            keeps_once=keeps_once,
            clock=clock,
        )
        self._workspace.experiments[self.experiment_id] = "flowbuffer"
        self._workspace.new_run(self.run_id, self.experiment_id, "job", {})
        self._expires_s: dict[str, float] = {}  # of each token
        self._throttled: list[float] = []  # the Retry-After of each 429 to come
        self._answers_to_lose = 0
        # The plugin keeps tokens by workspace and run, whatever the host: no two endpoints of a
        # process may have the same.
        self._scope = (
            "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/flowbuffer/providers"
            f"/Microsoft.MachineLearningServices/workspaces/{uuid.uuid4().hex}"
        )
        self._folder = tempfile.TemporaryDirectory(prefix="flowbuffer-azureml-")
        self.ca_bundle = Path(self._folder.name) / "ca.pem"
        self._tls = tls_context(self.ca_bundle)
        self._server = LoopbackServer(self, self._tls)
        self._port: int = self._server.server_address[1]
        self.tracking_uri = f"azureml://localhost:{self._port}/mlflow/v2.0{self._scope}"
        self._workspace.tracking_uri = self.tracking_uri

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
            "MLFLOW_EXPERIMENT_NAME": self._workspace.experiments[self.experiment_id],
            "AZUREML_RUN_ID": self.run_id,
            "AZUREML_RUN_TOKEN": token,
            "AZUREML_RUN_TOKEN_EXPIRY": str(int(expires_s)),
            "AZUREML_ARM_SUBSCRIPTION": subscription,
            "AZUREML_ARM_RESOURCEGROUP": group,
            "AZUREML_ARM_WORKSPACE_NAME": self._scope.rpartition("/")[2],
            "AZUREML_ARM_PROJECT_NAME": self._workspace.experiments[self.experiment_id],
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
            return self._workspace.history(self._workspace.runs[run_id], key)

    def run(self, run_id: str) -> AzureMLRun:
        """The run; it goes on changing.

        Raises:
            KeyError: There is no such run.
        """
        return self._workspace.runs[run_id]

    def visible(self, run_id: str) -> int:
        """How many points of a run can be read now.

        Raises:
            KeyError: There is no such run.
        """
        with self._lock:
            return self._workspace.visible(self._workspace.runs[run_id])

    def count(self, name: str, status: int = 200) -> int:
        """How many requests of this name were answered with this status."""
        return sum(seen.name == name and seen.status == status for seen in list(self.requests))

    def end_job(self, exit_code: int = 0) -> None:
        """End the job's run, as the service does once the job's process has ended."""
        with self._lock:
            self._workspace.end(self.run(self.run_id), "FAILED" if exit_code else "FINISHED")

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
            except Refused as refused:
                answer = refused.answer
            status = 0 if lost else answer[0]
            metrics = len(body.get("metrics", ())) + (name == "runs/log-metric")
            now_s = self._clock.monotonic_s()
            self.requests.append(Received(name, status, metrics, now_s, connection))
        return None if lost else answer

    def _said(self, name: str, path: str, body: Mapping[str, Any], token: str) -> dict[str, Any]:
        if self._scope not in path:
            raise Refused(404, "ENDPOINT_NOT_FOUND", f"No workspace at {path}")
        grace_s = self._refresh_grace_s if name == "token" else 0.0
        if self._clock.now_ns() / 1e9 >= self._expires_s.get(token, 0.0) + grace_s:
            raise Refused(401, "UNAUTHENTICATED", "The token is invalid, or has expired")
        if name == "token":
            token, expires_s = self._new_token()
            expiry = datetime.fromtimestamp(expires_s, timezone.utc).isoformat()
            return {"token": token, "expiryTimeUtc": expiry}
        if self._throttled and name.startswith("runs/"):
            wait_s = self._throttled.pop(0)
            raise Refused(429, "REQUEST_LIMIT_EXCEEDED", "Too many requests", wait_s)
        return self._workspace.answer(name, body)

    def _new_token(self) -> tuple[str, float]:
        """A token as the plugin decodes it, without checking its signature; and its expiry."""
        expires_s = self._clock.now_ns() / 1e9 + self._token_lifetime_s
        claims = {"exp": int(expires_s), "jti": uuid.uuid4().hex}
        token = ".".join([_base64({"alg": "none", "typ": "JWT"}), _base64(claims), "eA"])
        self._expires_s[token] = expires_s
        return token, expires_s


def _base64(claims: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
