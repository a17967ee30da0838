"""What a tracking URI says: tables of cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowbuffer.backends import uris


def test_a_stored_uri_means_the_same_elsewhere(tmp_path, monkeypatch) -> None:
    """A later process, in another folder, delivers to the same store."""
    monkeypatch.chdir(tmp_path)
    for given, absolute in (
        ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"),
        ("sqlite+pysqlite:///a/b.db?timeout=3", f"sqlite+pysqlite:///{tmp_path}/a/b.db?timeout=3"),
        ("mlruns", (tmp_path / "mlruns").as_uri()),
        ("file:my%20runs", (tmp_path / "my runs").as_uri()),
    ):
        assert uris.absolute_uri(given) == absolute
        assert uris.absolute_uri(absolute) == absolute


@pytest.mark.parametrize(
    "uri",
    [
        *("sqlite:////there/mlflow.db", "sqlite:///:memory:", "sqlite://", "sqlite:///"),
        *("sqlite:///file:a.db?uri=true", "file:///there", "databricks", "databricks://profile"),
        *("http://host:5000", "azureml://host/x", "postgresql://u:p@h/d"),
    ],
)
def test_what_means_the_same_everywhere_stays(uri: str) -> None:
    """An absolute URI, one of a server, and one in memory are as they were."""
    assert uris.absolute_uri(uri) == uri


@pytest.mark.parametrize(
    ("uri", "sqlite", "store", "one_place", "file"),
    [
        ("sqlite:////a/b.db", "/a/b.db", "/a/b.db", True, True),
        ("sqlite+pysqlite:////a/b.db?timeout=3", "/a/b.db", "/a/b.db", True, True),
        ("sqlite://", None, None, False, True),
        ("sqlite:///:memory:", None, ":memory:", False, True),
        ("sqlite:///file:b.db?uri=true", "file:b.db", "file:b.db", False, True),
        ("sqlite:///file::memory:?cache=shared", None, "file::memory:", False, True),
        ("file:///a/b", None, "/a/b", True, True),
        ("http://host:5000/x", None, None, True, False),
        ("azureml://host/x", None, None, True, False),
        ("postgresql+psycopg2://u:p@h:5/d?x=/y", None, None, True, False),
        ("", None, None, False, True),
    ],
)
def test_which_file_it_is(
    uri: str, sqlite: str | None, store: str | None, one_place: bool, file: bool
) -> None:
    """SQLite's file, what the doctor looks for, whether others find it, and who writes it."""
    assert uris.sqlite_path(uri) == sqlite
    assert uris.path_of(uri) == (None if store is None else Path(store))
    assert uris.is_one_place(uri) == one_place
    assert uris.is_file(uri) == file


@pytest.mark.parametrize(
    ("uri", "scheme"),
    [
        *(("sqlite+pysqlite:///a", "sqlite"), ("HTTPS://h", "https"), ("file:a", "file")),
        *(("azureml://h", "azureml"), ("databricks", ""), ("./mlruns", "")),
    ],
)
def test_its_scheme(uri: str, scheme: str) -> None:
    """Without a driver, in small letters."""
    assert uris.scheme_of(uri) == scheme
    assert uris.is_azureml(uri) == (scheme == "azureml")
    assert uris.is_http("http://h")
    assert not uris.is_http("ftp://h")


def test_another_file_keeps_the_query() -> None:
    """What SQLAlchemy made of a relative path takes its place."""
    assert uris.with_path("sqlite:///a.db?timeout=3", "/x/a.db") == "sqlite:////x/a.db?timeout=3"
