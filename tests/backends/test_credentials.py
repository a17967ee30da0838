"""A credential belongs to the server that it was given for, and reaches no other (P8)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowbuffer import MetricLogger, Settings
from flowbuffer.backends import credentials
from flowbuffer.backends.base import Request
from flowbuffer.backends.credentials import belongs, check_may_ask, vouch_for
from flowbuffer.backends.mlflow_transport import MlflowTransport
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.commands import cli
from flowbuffer.errors import TransportError, UnauthorisedError
from support.answering import AnsweringServer, said
from support.waiting import wait_until

RUN = "b" * 32
SECRET = "the-secret-of-one-server"


@pytest.fixture(autouse=True)
def nobody_is_vouched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_vouched_for", set())


@pytest.fixture
def servers() -> Iterator[tuple[AnsweringServer, AnsweringServer]]:
    """The one that the environment names, with its token, and another."""
    with AnsweringServer() as own, AnsweringServer() as other:
        yield own, other


def seen(server: AnsweringServer) -> set[str | None]:
    return {received.headers.get("Authorization") for received in server.requests}


def send(uri: str) -> TransportError | None:
    outcomes: list[TransportError | None] = []
    transport = MlflowTransport(uri, Settings(delivery="inline"), SYSTEM_CLOCK)
    transport.send(Request(RUN, ["loss"], [0.5], [1], [1]), outcomes.append, lambda: None)
    return outcomes[0]


@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        ({"MLFLOW_TRACKING_TOKEN": SECRET}, f"Bearer {SECRET}"),
        (
            {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": SECRET},
            "Basic bWU6dGhlLXNlY3JldC1vZi1vbmUtc2VydmVy",
        ),
    ],
)
def test_the_environments_credentials_are_for_its_server(
    servers, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sent: str
) -> None:
    """The server that ``MLFLOW_TRACKING_URI`` names gets them, and another that a folder of the
    spool names gets the points without them."""
    own, other = servers
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own.uri)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert send(own.uri) is None
    assert send(other.uri) is None
    assert (seen(own), seen(other)) == ({sent}, {None})


def test_who_refuses_for_want_of_credentials_is_told_of(servers, monkeypatch) -> None:
    """What would help is said: name the server."""
    own, other = servers
    other.answer = lambda _: said(401, {"error_code": "UNAUTHENTICATED", "message": "log in"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own.uri)
    assert "--tracking-uri" not in str(send(other.uri))  # none were withheld
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    error = send(other.uri)
    assert isinstance(error, UnauthorisedError)
    assert f"flowbuffer sync --tracking-uri {other.uri}" in error.reason
    vouch_for(other.uri)
    assert "--tracking-uri" not in str(send(other.uri))
    assert seen(other) == {None, f"Bearer {SECRET}"}


def test_credentials_in_a_uri_are_for_that_uri(servers, monkeypatch) -> None:
    """A URI with a user and a password has brought its own, whoever names it."""
    own, other = servers
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    assert send(other.uri.replace("http://", "http://me:mine@")) is None
    assert seen(other) == {"Basic bWU6bWluZQ=="}


def test_headers_of_plugins_are_for_the_named_server(servers, monkeypatch) -> None:
    """A header provider, which may add a token, is asked for no other server."""
    from mlflow.tracking.request_header import registry

    class Provider:
        def in_context(self) -> bool:
            return True

        def request_headers(self) -> dict[str, str]:
            return {"X-Api-Key": SECRET}

    providers = registry._request_header_provider_registry
    monkeypatch.setattr(providers, "_registry", [*providers._registry, Provider()])
    own, other = servers
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own.uri)
    assert send(own.uri) is None
    assert send(other.uri) is None
    assert {received.headers.get("X-Api-Key") for received in own.requests} == {SECRET}
    assert {received.headers.get("X-Api-Key") for received in other.requests} == {None}
    assert all("mlflow" in received.headers["User-Agent"] for received in other.requests)


@pytest.mark.parametrize(
    ("named", "asked", "same"),
    [
        ("https://host/mlflow", "https://host:443/elsewhere", True),
        ("https://HOST", "https://host", True),
        ("http://me:pw@host:80", "http://host", True),
        ("https://host", "http://host", False),
        ("https://host", "https://host:8443", False),
        ("https://host", "https://host.evil.example", False),
        ("https://host", "https://evil.example/https://host", False),
        ("https://host", "https://host@evil.example", False),
        ("azureml://host/mlflow/v2.0/a", "https://host/mlflow/v2.0/b", True),
        ("azureml://host/mlflow/v2.0/a", "azureml://evil.example/mlflow/v2.0/a", False),
        ("postgresql://me:pw@host/db", "postgresql://host/db", True),
        ("postgresql://host/db", "postgresql://evil.example/db", False),
        ("postgresql:///db", "postgresql:///db?host=evil.example", False),
    ],
)
def test_what_is_the_same_server(
    monkeypatch: pytest.MonkeyPatch, named: str, asked: str, same: bool
) -> None:
    """Scheme, host and port, with the ports that are meant where none is named."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    assert belongs(named)
    assert belongs(asked) == same


def test_a_store_that_finds_credentials_by_itself_is_not_made(monkeypatch) -> None:
    """Azure ML's plugin, and a database's driver, would take them wherever the URI leads."""
    stranger = "azureml://evil.example/mlflow/v2.0/x"
    with pytest.raises(UnauthorisedError, match="--tracking-uri azureml://evil"):
        check_may_ask(stranger)
    vouch_for(stranger)
    check_may_ask(stranger)
    check_may_ask("postgresql://elsewhere/db")  # there is no password to be taken
    monkeypatch.setenv("PGPASSWORD", SECRET)
    with pytest.raises(UnauthorisedError):
        check_may_ask("postgresql://elsewhere/db")


def test_sync_of_a_spool_from_elsewhere(servers, monkeypatch, capsys) -> None:
    """``flowbuffer sync`` asks the server that a copied spool names without this user's token, and
    with it once the person names that server."""
    own, other = servers
    script = (
        "import os, sys, flowbuffer\n"
        "logger = flowbuffer.MetricLogger(sys.argv[2], tracking_uri=sys.argv[1], offline=True)\n"
        "logger.log_metric('loss', 0.5)\n"
        "logger.close()\n"
    )
    subprocess.run([sys.executable, "-c", script, other.uri, RUN], check=True, timeout=100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    refused = said(401, {"error_code": "UNAUTHENTICATED", "message": "log in"})
    other.answer = lambda r: None if "Authorization" in r.headers else refused
    spool = os.environ["FLOWBUFFER_SPOOL_DIR"]
    assert cli.main(["sync", "--spool", spool, "--timeout", "1"]) == 1
    assert f"flowbuffer sync --tracking-uri {other.uri}" in capsys.readouterr().err
    assert seen(other) == {None}
    named = ["--tracking-uri", other.uri, "--timeout", "30"]
    assert cli.main(["sync", "--spool", spool, *named]) == 0
    assert len(other.history(RUN, "loss")) == 1
    assert own.requests == []


def test_thread_delivery_adopts_a_folder_without_its_credentials(
    servers, monkeypatch, tmp_path: Path
) -> None:
    """What a dead producer left for another server goes there without this process's token."""
    own, other = servers
    monkeypatch.setenv("FLOWBUFFER_SPOOL_DIR", str(tmp_path / "spool"))
    script = (
        "import os, signal, sys, flowbuffer\n"
        "logger = flowbuffer.MetricLogger(\n"
        "    sys.argv[2], tracking_uri=sys.argv[1], delivery='inline', linger_s=3600.0)\n"
        "logger._append('loss', 0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, other.uri, RUN], check=False, timeout=100)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    settings = Settings.from_env(delivery="thread", linger_s=0.01)
    with MetricLogger("c" * 32, tracking_uri=own.uri, settings=settings) as logger:
        logger.log_metric("loss", 1.0).wait(timeout=60)
        wait_until(lambda: other.history(RUN, "loss"))
    assert (seen(own), seen(other) - {None}) == ({f"Bearer {SECRET}"}, set())
