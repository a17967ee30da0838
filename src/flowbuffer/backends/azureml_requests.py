"""What delivery uses of the store that ``azureml-mlflow`` makes, and of its credentials.

Read of the plugin's versions 1.60.0 and 1.62.0.post6, which are alike here. It posts a batch in the
caller's thread, tries again for minutes, waits for its ingestion in a thread of its own, and renews
its token by a timer that does not survive a fork. Delivery keeps its store, and the host and
credentials in there; the rest is done here.
"""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowbuffer.backends.rest import SingleRequests, batch_fields
from flowbuffer.backends.translation import said_by
from flowbuffer.clock import SYSTEM_CLOCK, Clock
from flowbuffer.errors import (
    RejectedError,
    RetriableError,
    TooLargeError,
    TransportError,
    UnauthorisedError,
)

#: The most metrics in one request (Azure Machine Learning, "Service limits").
MAX_METRICS = 250

#: What the service answers with (``aml_service_pb2`` of the plugin).
_BATCH_ID, _IS_COMPLETE, _TOKEN = map(
    frozenset[str], (["batch_tracking_id"], ["is_complete"], ["token"])
)
_API = "/api/2.0/preview/mlflow/runs/"
#: What the service answers to more metrics than it takes in one request.
_TOO_MANY = re.compile(r"MetricV2Dto\.Value/Count, Limit=([0-9]{1,6})\b")
#: A token is renewed when so much of its life is left, in s, as by the plugin; or a third of it.
_RENEW_BEFORE_S = 95.0
_AUTHENTICATION = "azureml.mlflow._common._authentication.azureml_token_authentication"


@dataclass(frozen=True)
class Ingestion:
    """A batch that the service has accepted.

    Attributes:
        run_id: Its run.
        batch_id: What the service calls it; empty if it is stored already.
    """

    run_id: str
    batch_id: str


class AzureMLRequests(SingleRequests):
    """Requests to the service, with a token that is renewed in time.

    Args:
        store: Of the plugin.
        timeout_s: How long an answer may take, in s.
        clock: For the ends of tokens, and of the times when the service asked to be left alone.

    Attributes:
        max_metrics: The most metrics in one request, as far as the service has told.
    """

    def __init__(self, store: Any, timeout_s: float, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(store, timeout_s)
        self.max_metrics = MAX_METRICS
        self._clock = clock
        self._not_before_s = 0.0
        self._token_lock = threading.Lock()
        self._token = ""
        self._token_life_s = 0.0

    def log_batch_async(self, run_id: str, metrics: Any, params: Any, tags: Any) -> Ingestion:
        """``log-batch-async``: in place of the store's method, so that
        ``MlflowClient.log_batch(..., synchronous=False)`` comes here."""
        fields = batch_fields(run_id, metrics, params, tags)
        said = self.ask(_API + "log-batch-async", "POST", fields, _BATCH_ID, empty=not metrics)
        return Ingestion(run_id, str(said.get("batch_tracking_id") or ""))

    def is_complete(self, ingestion: Ingestion) -> bool:
        """``get-run-data-status``: whether a batch can be read."""
        query = {"run_id": ingestion.run_id, "batch_tracking_id": ingestion.batch_id}
        endpoint = _API + "get-run-data-status"
        said = self.ask(endpoint, "GET", query, _IS_COMPLETE, empty=True)
        return bool(said.get("is_complete"))

    def ask(
        self, endpoint: str, method: str, body: Any, fields: frozenset[str], *, empty: bool
    ) -> dict[str, Any]:
        """One request, once the service takes requests again; two, if its token was refused.

        Raises:
            TransportError: As :meth:`SingleRequests.ask`. More metrics than the service takes are
                :class:`TooLargeError`.
        """
        while (left_s := self._not_before_s - self._clock.monotonic_s()) > 0:
            self._clock.sleep(left_s)
        try:
            self.stay_authorised()
            try:
                return super().ask(endpoint, method, body, fields, empty=empty)
            except UnauthorisedError:
                if not self._renew():
                    raise
                return super().ask(endpoint, method, body, fields, empty=empty)
        except RetriableError as error:
            if error.retry_after_s:  # the limit is the workspace's: all requests wait
                until_s = self._clock.monotonic_s() + error.retry_after_s
                self._not_before_s = max(self._not_before_s, until_s)
            raise
        except RejectedError as error:
            limit = _TOO_MANY.search(error.reason)
            if limit is None:
                raise
            self.max_metrics = max(min(self.max_metrics, int(limit[1])), 1)
            raise TooLargeError(error.reason) from error

    # The token of a job. Credentials of azure-identity renew themselves.

    def stay_authorised(self) -> float:
        """Renew the token if little of its life is left; seconds until that is to be asked again.
        One that has expired may be good for nothing any more, not even for another one."""
        auth = self._store.service_context.auth
        if not hasattr(auth, "set_token"):
            return math.inf
        left_s: float = auth.get_token().expires_on - self._clock.now_ns() / 1e9
        if auth.get_token().token != self._token:
            self._token, self._token_life_s = auth.get_token().token, left_s
        before_s = min(_RENEW_BEFORE_S, self._token_life_s / 3)
        if left_s >= before_s:
            return left_s - before_s
        try:
            self._renew()
        except TransportError:
            pass  # the next request will tell whether the token still holds
        return 1.0

    def _renew(self) -> bool:
        """Get a new token with the one there is, as the plugin does; False if there is none to get.

        Raises:
            TransportError: The service gives none.
        """
        from mlflow.utils.rest_utils import MlflowHostCreds

        context = self._store.service_context
        auth = context.auth
        if not hasattr(auth, "set_token"):
            return False
        before = auth.get_token().token
        with self._token_lock:
            if auth.get_token().token != before:
                return True  # another thread was faster
            subscription, group, workspace, run_id, experiment = auth._run_scope_info
            by = "experimentids" if auth._experiment_id else "experiments"
            endpoint = (
                f"/history/v1.0/subscriptions/{subscription}/resourceGroups/{group}/providers"
                f"/Microsoft.MachineLearningServices/workspaces/{workspace}"
                f"/{by}/{experiment}/runs/{run_id}/token"
            )
            host = MlflowHostCreds(context.host_url, token=before)
            token = self._send(host, endpoint, "GET", None, _TOKEN, empty=False)["token"]
            try:
                auth.set_token(token, auth._parse_expiry_time_from_token(token))
            except Exception as error:
                raise RetriableError(f"no token of Azure ML's: {said_by(error)}") from error
        return True

    def _code_of(self, status: int, said: Any) -> str:
        """MLflow's code, or what the service says in its own form, which it uses for limits."""
        code = super()._code_of(status, said)
        if code or not isinstance(said, Mapping):
            return code
        inner, correlation = (said.get(n) or said.get(n.lower()) for n in ("Error", "Correlation"))
        if not isinstance(inner, Mapping) or not isinstance(correlation, Mapping):
            return ""
        return (
            "RESOURCE_DOES_NOT_EXIST"
            if status == 404
            else str(inner.get("Code") or inner.get("code") or "")
        )


def use_single_requests(store: Any, timeout_s: float) -> None:
    """Have a store of the plugin do what delivery asks of it by :class:`AzureMLRequests`."""
    requests = AzureMLRequests(store, timeout_s)
    store.flowbuffers_requests = requests
    store.log_batch_async = requests.log_batch_async
    store._call_endpoint = requests.call_endpoint


def job_of_this_process() -> tuple[str, str] | None:
    """The run and the token of the job that this process is part of, as the plugin has them now;
    None if it has made no store with them.

    ``mlflow.start_run`` removes ``MLFLOW_RUN_ID`` from the environment, and what is in
    ``MLFLOW_TRACKING_TOKEN`` is the first token of the job.
    """
    module = sys.modules.get(_AUTHENTICATION)
    known = module.AzureMLTokenAuthentication._registered_auth.values() if module else ()
    for auth in list(known):
        return auth._run_id, auth._aml_access_token
    return None


def never_prompt() -> None:
    """Without a person before it a process cannot log in: have the plugin not try. Its chain of
    credentials ends with a browser window and a code to be typed in."""
    try:
        from azure.identity import CredentialUnavailableError
        from azureml.mlflow._internal import utils
    except ImportError:
        return

    class NoPrompt:
        def __init__(self, **_: Any) -> None: ...

        def get_token(self, *_: Any, **__: Any) -> Any:
            raise CredentialUnavailableError(
                "no credentials of Azure's in the environment of the collector process"
            )

    utils.InteractiveBrowserCredential = utils.DeviceCodeCredential = NoPrompt
