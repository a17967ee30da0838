"""MLflow's REST API as delivery uses it: each call is one HTTP request, and each answer one error.

MLflow's own would try again for minutes inside one call, multiply our retries, and drop
``Retry-After``.
"""

from __future__ import annotations

import json
import math
import threading
from email.utils import parsedate_to_datetime
from typing import Any

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.credentials import redacted
from flowbuffer.errors import (
    DoubtfulError,
    RejectedError,
    RetriableError,
    RunGoneError,
    TooLargeError,
    TransportError,
    UnauthorisedError,
)

_here = threading.local()


def is_delivering() -> bool:
    """Whether this thread is in a request of delivery's own."""
    return getattr(_here, "delivers", False)


class SingleRequests:
    """What delivery uses of ``RestStore``.

    MLflow turns a batch into protocol buffers, JSON, a dict and JSON again; here it is a dict and
    JSON.

    Args:
        store: The store; it knows the server and the credentials.
        timeout_s: How long an answer may take, in s.
    """

    def __init__(self, store: Any, timeout_s: float) -> None:
        from mlflow.protos.service_pb2 import MlflowService
        from mlflow.utils.rest_utils import _REST_API_PATH_PREFIX, extract_api_info_for_service

        self._store = store
        self._endpoints = extract_api_info_for_service(MlflowService, _REST_API_PATH_PREFIX)
        self._timeout_s = (min(timeout_s, 10.0), timeout_s)  # to connect, to read

    def log_batch(self, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        """``POST mlflow/runs/log-batch``, as MLflow's REST API documents it."""
        from mlflow.protos.service_pb2 import LogBatch

        self._request(LogBatch, batch_fields(run_id, metrics, params, tags))

    def call_endpoint(self, api: Any, json_body: str | None = None, **_: Any) -> Any:
        """``RestStore._call_endpoint``, for whatever else is asked."""
        from mlflow.utils.proto_json_utils import parse_dict

        body = json.loads(json_body) if json_body else None
        answer = api.Response()
        parse_dict(self._request(api, body), answer)
        return answer

    def _request(self, api: Any, body: Any) -> Any:
        endpoint, method = self._endpoints[api]
        return self.ask(endpoint, method, body)

    def ask(self, endpoint: str, method: str, body: Any) -> Any:
        """One request to the server of the store, and what its JSON answer says.

        Raises:
            TransportError: The server's answer is another than 200, or there is none.
        """
        return self._send(self._store.get_host_creds(), endpoint, method, body)

    def _send(self, host_and_credentials: Any, endpoint: str, method: str, body: Any) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.utils.rest_utils import http_request

        _here.delivers = True
        try:
            response = http_request(
                host_and_credentials,
                endpoint,
                method,
                max_retries=0,
                raise_on_status=False,
                timeout=self._timeout_s,
                **{"params" if method == "GET" else "json": body},
            )
        except MlflowException as error:
            raise RetriableError(first_line(error)) from error
        finally:
            _here.delivers = False
        if response.status_code != 200:
            code, said = _said(response.text)
            raise error_of_status(
                response.status_code,
                f"{response.status_code} {said}",
                retry_after_s(response.headers.get("Retry-After"), SYSTEM_CLOCK.now_ns() / 1e9),
                code=code,
            )
        return response.json()


def batch_fields(run_id: str, metrics: Any, params: Any, tags: Any) -> dict[str, Any]:
    """A batch as MLflow's REST API documents it, from MLflow's entities."""
    return {
        "run_id": run_id,
        "metrics": [_metric_fields(metric) for metric in metrics],
        "params": [{"key": param.key, "value": param.value} for param in params],
        "tags": [{"key": tag.key, "value": tag.value} for tag in tags],
    }


def _metric_fields(metric: Any) -> dict[str, Any]:
    value = metric.value
    fields = {
        "key": metric.key,
        "value": value if math.isfinite(value) else _NOT_FINITE[repr(value)],
        "timestamp": metric.timestamp,
        "step": metric.step,
    }
    for name in ("model_id", "dataset_name", "dataset_digest"):
        if getattr(metric, name):
            fields[name] = getattr(metric, name)
    return fields


#: As protocol buffers write them in JSON (protobuf.dev, "ProtoJSON Format").
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def error_of_status(
    status: int, reason: str, retry_after: float | None = None, *, code: str = ""
) -> TransportError:
    """The error that an HTTP status, with MLflow's error code, stands for."""
    kind: type[TransportError]
    if status in (408, 429) or status >= 500 or status < 400:
        kind = RetriableError
    elif status in (401, 403):
        kind = UnauthorisedError
    elif status == 404:
        kind = RunGoneError
    elif status == 413:
        kind = TooLargeError
    elif code == "BAD_REQUEST":
        # What MLflow makes of any error of its database but an OperationalError: a value that does
        # not fit its column, and a connection pool that is exhausted (store/db/utils.py).
        kind = DoubtfulError
    else:
        kind = RejectedError
    return kind(reason, retry_after)


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """Seconds from a ``Retry-After`` header (RFC 9110, 10.2.3): a number, or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now_s
        except (TypeError, ValueError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


def first_line(error: Exception) -> str:
    """The first line of what an error says, of bounded length and without credentials."""
    return redacted((str(error) or type(error).__name__).split("\n")[0])[:1000]


def _said(body: str) -> tuple[str, str]:
    """MLflow's error code, empty if there is none, and the message in the body of an error."""
    try:
        said = json.loads(body)
        code = str(said.get("error_code", ""))
        message = f": {said['message'] if 'message' in said else said['Error']['Message']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message = "", " ".join(body[:100_000].split())
    return code, redacted(code + message)[:1000]
