"""What a tracking URI says, without asking anybody: nobody else takes one apart.

A SQLite file is ``sqlite[+driver]:///path[?query]``; a fourth slash begins an absolute path. A
folder of MLflow's file store is ``file:...``, or a path alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote


def scheme_of(tracking_uri: str) -> str:
    """The scheme without a driver, in small letters; empty where there is none."""
    return tracking_uri.partition(":")[0].split("+")[0].lower() if ":" in tracking_uri else ""


def is_azureml(tracking_uri: str) -> bool:
    """Whether Azure ML's plugin is asked."""
    return tracking_uri.startswith("azureml:")


def is_http(tracking_uri: str) -> bool:
    """Whether MLflow's own client asks a tracking server."""
    return tracking_uri.startswith(("http://", "https://"))


def is_file(tracking_uri: str) -> bool:
    """Whether the store is a file or a folder on this machine, which one writes at a time."""
    return tracking_uri.startswith(("sqlite", "file:")) or _is_path(tracking_uri)


def is_file_store(tracking_uri: str) -> bool:
    """Whether an absolute URI is that of MLflow's file store, a folder."""
    return tracking_uri.startswith("file:")


def is_one_place(tracking_uri: str) -> bool:
    """Whether an absolute URI leads every process to the same store: none in memory, and none whose
    path only MLflow or SQLite resolves, when it opens it."""
    if tracking_uri.startswith("sqlite"):
        path = sqlite_path(tracking_uri)
        return path is not None and not path.startswith("file:")
    return tracking_uri != ""


def absolute_uri(tracking_uri: str) -> str:
    """A tracking URI that means the same from every working directory."""
    path = _after_slashes(tracking_uri)
    if path is not None:
        if not path or path.startswith(("/", ":memory:", "file:")):
            return tracking_uri
        return with_path(tracking_uri, os.path.abspath(path))
    if tracking_uri.startswith("file:") and not tracking_uri.startswith("file:/"):
        return Path(unquote(tracking_uri[5:])).absolute().as_uri()
    if _is_path(tracking_uri):
        return Path(tracking_uri).absolute().as_uri()
    return tracking_uri


def with_path(tracking_uri: str, path: str) -> str:
    """The URI of a SQLite file with another path."""
    scheme, _, rest = tracking_uri.partition(":///")
    _, mark, query = rest.partition("?")
    return f"{scheme}:///{path}{mark}{query}"


def sqlite_path(tracking_uri: str) -> str | None:
    """The file of a SQLite database; None for a database in memory, and everything else."""
    path = _after_slashes(tracking_uri)
    return None if not path or ":memory:" in path else path


def path_of(tracking_uri: str) -> Path | None:
    """Where an absolute URI has a store of files, SQLite's or MLflow's; None for a server's."""
    path = _after_slashes(tracking_uri)
    if path is None and tracking_uri.startswith("file://"):
        path = tracking_uri[7:].partition("?")[0]
    return None if path is None else Path(path)


def _after_slashes(tracking_uri: str) -> str | None:
    """What a SQLite URI has in the place of the path; None for everything else."""
    scheme, _, rest = tracking_uri.partition(":///")
    return rest.partition("?")[0] if scheme.split("+")[0] == "sqlite" else None


def _is_path(tracking_uri: str) -> bool:
    """Whether it is a path alone; MLflow has names without slashes for Databricks."""
    return "://" not in tracking_uri and not tracking_uri.startswith(("file:", "databricks", "uc"))
