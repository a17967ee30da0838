"""When to send again: a table of cases, because the policy is pure."""

from __future__ import annotations

import random

import pytest

from flowbuffer.backends.credentials import without_credentials
from flowbuffer.backends.translation import error_of_status, retry_after_s
from flowbuffer.delivery.retry import RetryPolicy
from flowbuffer.errors import (
    DoubtfulError,
    RejectedError,
    RetriableError,
    RunGoneError,
    TooLargeError,
    TransportError,
    UnauthorisedError,
)

POLICY = RetryPolicy(first_s=1.0, most_s=8.0, uniform=lambda _low, high: high)


@pytest.mark.parametrize(
    ("error", "attempt", "expected_s"),
    [
        pytest.param(RetriableError("503"), 1, 1.0, id="first"),
        pytest.param(RetriableError("503"), 3, 4.0, id="doubled"),
        pytest.param(RetriableError("503"), 1000, 8.0, id="bounded"),
        pytest.param(RetriableError("429", 5.0), 1, 6.0, id="what the server asks for, and jitter"),
        pytest.param(RetriableError("503", 1e9), 1, 3601.0, id="an hour at most"),
        pytest.param(UnauthorisedError("401"), 1, 1.0, id="soon: a gateway refuses for a while"),
        pytest.param(UnauthorisedError("401"), 3, 4.0, id="later while unauthorised"),
        pytest.param(UnauthorisedError("401"), 9, 30.0, id="slowly while unauthorised"),
        pytest.param(RunGoneError("404"), 1, 5.0, id="soon: a run may be restored"),
        pytest.param(RunGoneError("404"), 4, 40.0, id="later while the run is gone"),
        pytest.param(RunGoneError("404"), 99, 300.0, id="seldom while the run is gone"),
    ],
)
def test_the_wait(error: TransportError, attempt: int, expected_s: float) -> None:
    """P5: a failing server is asked again later and later, and never sooner than it asked for."""
    assert POLICY.wait_s(error, attempt) == expected_s


@pytest.mark.parametrize(
    ("statuses", "code", "kind"),
    [
        ((408, 429, 500, 502, 503, 504, 302), "", RetriableError),
        ((400, 402, 404, 405, 409, 410, 422, 451), "", RetriableError),  # a gateway's
        ((401, 403), "", UnauthorisedError),
        ((401, 403), "PERMISSION_DENIED", UnauthorisedError),
        ((413,), "", TooLargeError),
        ((429, 503), "REQUEST_LIMIT_EXCEEDED", RetriableError),
        ((200, 204, 302), "INVALID_PARAMETER_VALUE", RetriableError),
        ((404,), "RESOURCE_DOES_NOT_EXIST", RunGoneError),
        ((404,), "ENDPOINT_NOT_FOUND", RetriableError),
        ((400,), "BAD_REQUEST", DoubtfulError),
        ((500,), "INTERNAL_ERROR", DoubtfulError),
        ((400, 409, 422), "INVALID_PARAMETER_VALUE", RejectedError),
    ],
)
def test_the_status_decides(
    statuses: tuple[int, ...], code: str, kind: type[TransportError]
) -> None:
    """What a status means is decided in one place; only MLflow's own error code is final."""
    assert {type(error_of_status(status, "", code=code)) for status in statuses} == {kind}


@pytest.mark.parametrize(
    ("header", "expected_s"),
    [
        (None, None),
        ("7", 7.0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 59.0),
        ("soon", None),
        ("-3", None),
        ("inf", None),
    ],
)
def test_retry_after(header: str | None, expected_s: float | None) -> None:
    """The server's Retry-After is read as RFC 9110 writes it, and nonsense is no header."""
    assert retry_after_s(header, 946684740.0) == expected_s


def test_no_credential_is_in_a_stored_uri() -> None:
    """P8: what goes to the disk of a tracking URI is without user and password."""
    assert without_credentials("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert without_credentials("postgresql+psycopg2://u:p%40@/db?host=/tmp") == (
        "postgresql+psycopg2:///db?host=/tmp"
    )
    assert without_credentials("postgresql://h/db?user=u&sslmode=require&password=p%26") == (
        "postgresql://h/db?sslmode=require"
    )
    assert without_credentials("https://h/x?api_token=t") == "https://h/x"
    assert without_credentials("sqlite:///mlflow.db") == "sqlite:///mlflow.db"
    assert without_credentials("file:///a@b/mlruns") == "file:///a@b/mlruns"


def test_the_seed_of_the_training_code_is_left_alone() -> None:
    """Jitter does not draw from the global generator, which the training code may have seeded."""
    random.seed(7)
    before = random.getstate()
    assert RetryPolicy().wait_s(RetriableError("503"), 3) >= 0
    assert random.getstate() == before
