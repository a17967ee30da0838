"""MLflow's REST API as delivery uses it: each call is one HTTP request, and each answer one error.

MLflow's own would try again for minutes inside one call, multiply our retries, drop
``Retry-After``, follow a redirect to wherever it leads, and take an empty answer, or the JSON of
anybody, for its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from flowbuffer.backends.credentials import hint, redacted
from flowbuffer.backends.translation import (
    code_of,
    error_of_status,
    first_line,
    message_of,
    retry_after_s,
)
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.errors import RetriableError

if TYPE_CHECKING:
    from flowbuffer.backends.http_session import Answer


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

        from flowbuffer.backends.http_session import Requests, withholds  # and with it libraries

        self._store = store
        self._endpoints = extract_api_info_for_service(MlflowService, _REST_API_PATH_PREFIX)
        self._requests = Requests(timeout_s)
        self._withholds = withholds

    def close(self) -> None:
        """Close the connections that are not in use; the next request makes new ones."""
        self._requests.close()

    def log_batch(self, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        """``POST mlflow/runs/log-batch``, as MLflow's REST API documents it."""
        from mlflow.protos.service_pb2 import LogBatch

        self._request(LogBatch, batch_fields(run_id, metrics, params, tags))

    def call_endpoint(
        self, api: Any, json_body: str | None = None, endpoint: str | None = None, **_: Any
    ) -> Any:
        """``RestStore._call_endpoint``, for whatever else is asked."""
        from mlflow.utils.proto_json_utils import parse_dict

        body = json.loads(json_body) if json_body else None
        answer = api.Response()
        try:
            parse_dict(self._request(api, body, endpoint), answer)
        except ValueError as error:
            raise RetriableError(f"the answer is not MLflow's: {first_line(error)}") from error
        return answer

    def _request(self, api: Any, body: Any, path: str | None = None) -> dict[str, Any]:
        endpoint, method = self._endpoints[api]
        fields = frozenset(api.Response.DESCRIPTOR.fields_by_name)
        empty = not fields or "next_page_token" in fields  # something is stored, or nothing found
        return self.ask(path or endpoint, method, body, fields, empty=empty)

    def ask(
        self, endpoint: str, method: str, body: Any, fields: frozenset[str], *, empty: bool
    ) -> dict[str, Any]:
        """One request to the server of the store, and what its JSON answer says.

        Args:
            endpoint: The path below the server's.
            method: As HTTP has it.
            body: What is asked.
            fields: Those that the answer may have. See :func:`is_answer`.
            empty: Whether it may have none.

        Raises:
            TransportError: The answer is none of MLflow's, or is no 200, or there is none.
        """
        return self._send(self._store.get_host_creds(), endpoint, method, body, fields, empty=empty)

    def _send(
        self,
        host_and_credentials: Any,
        endpoint: str,
        method: str,
        body: Any,
        fields: frozenset[str],
        *,
        empty: bool,
    ) -> dict[str, Any]:
        try:
            answer = self._requests.request(host_and_credentials, endpoint, method, body)
        except Exception as error:
            raise RetriableError(first_line(error)) from error
        said = _parsed(answer)
        if answer.status == 200 and is_answer(said, fields, empty=empty):
            return cast(dict[str, Any], said)
        code = self._code_of(answer.status, said)
        text = f"{code}: {message_of(said)}" if code else _shown(answer)
        if answer.status == 200:
            text = f"not an answer of MLflow's to {endpoint}: {text}"
        elif answer.status in range(300, 400):
            text = f"redirected, and delivery follows no redirect: {text}"
        elif answer.status in (401, 403) and self._withholds(host_and_credentials):
            text = f"{hint(host_and_credentials.host)}: {text}"
        raise error_of_status(
            answer.status,
            f"{answer.status} {redacted(text)[:1000]}",
            retry_after_s(answer.headers.get("Retry-After"), SYSTEM_CLOCK.now_ns() / 1e9),
            code=code,
        )

    def _code_of(self, status: int, said: Any) -> str:  # noqa: ARG002
        return code_of(said)


def is_answer(said: Any, fields: frozenset[str], *, empty: bool) -> bool:
    """Whether a server that answered 200 with this JSON is MLflow's.

    It answers an object that has at least one of the endpoint's fields, or, to what only stores
    something, an object with nothing in it. More fields than these do not matter, as a newer MLflow
    may have them; but an object of which no field is known, like ``{"login": "required"}``, is
    somebody else's, and so is an empty body, ``null`` or a list.
    """
    if not isinstance(said, Mapping) or "error_code" in said:
        return False
    return not fields.isdisjoint(said) if said else empty


def _parsed(answer: Answer) -> Any:
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError):
        return None


def _shown(answer: Answer) -> str:
    """The text of an answer that is not MLflow's."""
    return " ".join(answer.body[:100_000].decode(errors="replace").split()) or "(an empty answer)"


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
