"""What a tracking URI says, without asking anybody."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote


def absolute_uri(tracking_uri: str) -> str:
    """A tracking URI that means the same from every working directory."""
    scheme, separator, rest = tracking_uri.partition(":///")
    if scheme.split("+")[0] == "sqlite":
        if not separator or rest.startswith(("/", ":memory:", "file:")):
            return tracking_uri
        path, mark, query = rest.partition("?")
        return f"{scheme}:///{os.path.abspath(path)}{mark}{query}"
    if tracking_uri.startswith("file:") and not tracking_uri.startswith("file:/"):
        return Path(unquote(tracking_uri[5:])).absolute().as_uri()
    if "://" not in tracking_uri and not tracking_uri.startswith(("file:", "databricks", "uc")):
        return Path(tracking_uri).absolute().as_uri()
    return tracking_uri


def is_file(tracking_uri: str) -> bool:
    """Whether the store is a file or a folder on this machine, which one writes at a time."""
    return tracking_uri.startswith(("sqlite", "file:")) or "://" not in tracking_uri


def sqlite_path(tracking_uri: str) -> str | None:
    """The file of a SQLite database; None for a database in memory, and everything else."""
    scheme, _, rest = tracking_uri.partition(":///")
    path = rest.partition("?")[0]
    if scheme.split("+")[0] != "sqlite" or not path or ":memory:" in path:
        return None
    return path
