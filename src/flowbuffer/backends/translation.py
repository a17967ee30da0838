"""What a store or a server said becomes one of our errors. Foreign errors stop here.

Only what is MLflow's can be final: a body with MLflow's ``error_code``, or an exception of a store
that is asked without a server in between. A load balancer, a sign-in page, a proxy or a missing
driver answer in its place, and all that they say passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from flowbuffer.backends.credentials import redacted
from flowbuffer.errors import (
    DoubtfulError,
    RejectedError,
    RetriableError,
    RunGoneError,
    TooLargeError,
    TransportError,
    UnauthorisedError,
)

#: What MLflow says when it failed and not who asked: of the database, but for an OperationalError
#: (store/db/utils.py), and of any other exception. Either is so for a while, or for this content.
_DOUBTFUL = ("BAD_REQUEST", "INTERNAL_ERROR")
#: What our own code, and the database's driver, raise for content that cannot be encoded.
_OF_CONTENT = (ValueError, TypeError, OverflowError)


def error_of_status(
    status: int, reason: str, retry_after: float | None = None, *, code: str = ""
) -> TransportError:
    """The error that an answer other than MLflow's 200 stands for.

    Args:
        status: Of HTTP.
        reason: What was said.
        retry_after: Seconds for which the server asked to be left alone.
        code: MLflow's ``error_code``, as :func:`code_of` reads it; empty if MLflow did not say it.
    """
    kind: type[TransportError]
    if status in (401, 403):
        # MLflow's own have no code, and a gateway's look the same: someone has to log in, or not.
        kind = UnauthorisedError
    elif status == 413:
        kind = TooLargeError
    elif not code or status < 400:
        kind = RetriableError
    elif code in _DOUBTFUL:
        kind = DoubtfulError
    elif status in (408, 425, 429) or status >= 500:
        kind = RetriableError
    elif status != 404:
        kind = RejectedError
    elif code == "RESOURCE_DOES_NOT_EXIST":
        kind = RunGoneError
    else:
        kind = RetriableError  # an endpoint that is not there (yet)
    return kind(reason, retry_after)


def code_of(said: Any) -> str:
    """MLflow's ``error_code`` in the JSON of an answer; empty if there is none that MLflow has."""
    from mlflow.protos.databricks_pb2 import ErrorCode

    code = said.get("error_code") if isinstance(said, Mapping) else None
    return code if isinstance(code, str) and code in ErrorCode.keys() else ""  # noqa: SIM118


def message_of(said: Any) -> str:
    """The message in the JSON of an error, of MLflow's or of Azure ML's; empty if there is none."""
    if not isinstance(said, Mapping):
        return ""
    inner = said.get("Error") or said.get("error")
    found = said.get("message")
    if found is None and isinstance(inner, Mapping):
        found = inner.get("Message") or inner.get("message")
    return "" if found is None else str(found)


def translated(error: Exception, store: Any = None) -> TransportError:
    """What went wrong between us and an answer, as ours.

    Args:
        error: What was raised.
        store: The store of MLflow's that was asked, and raised it. None if it was not asked yet: a
            driver or a plugin that is missing here raises MLflow's exceptions, too.
    """
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, TransportError):
        return error
    kind = type(error).__name__
    reason = first_line(error) if isinstance(error, MlflowException) else said_by(error)
    if store is not None and isinstance(error, MlflowException):
        code = code_of({"error_code": error.error_code})
        if _is_remote(store):
            # Whatever is no answer of the server's is this side's.
            code = code_of(error.json) if isinstance(error, RestException) else ""
        return error_of_status(error.get_http_status_code(), reason, code=code)
    if kind in ("ClientAuthenticationError", "CredentialUnavailableError"):  # of azure-core
        return UnauthorisedError(reason)
    if store is not None and isinstance(error, _OF_CONTENT):
        return DoubtfulError(reason)
    return RetriableError(reason)


def _is_remote(store: Any) -> bool:
    from mlflow.store.tracking.rest_store import RestStore

    return isinstance(store, RestStore)


def may_pass(error: Exception, store: Any) -> bool:
    """Whether what a store raised says nothing but that it cannot be asked now."""
    return isinstance(translated(error, store), RetriableError)


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """Seconds from a ``Retry-After`` header (RFC 9110, 10.2.3): a number, or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now_s
        except (TypeError, ValueError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


def first_line(error: Exception) -> str:
    """The first line of what an error says, of bounded length and without credentials."""
    return redacted((str(error) or type(error).__name__).split("\n")[0])[:1000]


def said_by(error: Exception) -> str:
    """:func:`first_line`, after the error's name."""
    return f"{type(error).__name__}: {first_line(error)}"
