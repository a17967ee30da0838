"""``flowbuffer doctor``: what is wrong with the settings, the spool, the server, the versions."""

from __future__ import annotations

import os
import platform
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError

from flowbuffer.backends.credentials import vouch_for, without_credentials
from flowbuffer.backends.mlflow_client import database_of, store_of, warm_up
from flowbuffer.backends.uris import absolute_uri, is_http, path_of
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.commands.servers import Server
from flowbuffer.commands.settings import settings_said, unknown_variables, valid_settings
from flowbuffer.commands.status import status
from flowbuffer.errors import FlowbufferError, TransportError, UnauthorisedError
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.files import MOVE_IT, check_private, file_system_of
from flowbuffer.spool.folders import REMOTE_FILE_SYSTEMS, Spool, folders
from flowbuffer.spool.mark import check_spool
from flowbuffer.words import counted, gone, size

#: How long a server may take to answer, in s.
_ANSWER_S = 10.0
#: A clock that is off by more than this, in s, is worth a warning.
_SKEW_S = 2.0
#: Less than this on the disk, in bytes, and a producer finds no room for a segment.
_A_SEGMENT_BYTES = 4 << 20
_OLDEST = {"mlflow": (3, 1), "numpy": (1, 26)}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        result: ``ok``; ``warn``, it works, and may not for long, or not as expected; ``fail``.
        detail: What was found.
        advice: What to do about it; empty if nothing.
    """

    name: str
    result: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


def doctor(spool_dir: Path | None = None, tracking_uri: str | None = None) -> list[Check]:
    """Look at everything. Nothing is changed or created.

    Args:
        spool_dir: The spool; None means the settings'.
        tracking_uri: The server; None means MLflow's current one.
    """
    settings = valid_settings()
    if spool_dir is not None:
        settings = settings.with_changes(spool_dir=spool_dir)
    root = settings.resolved_spool_dir()
    return [
        *_settings(),
        *_spool(root),
        *_room(root, settings),
        *_left_over(root),
        *_server(tracking_uri),
        *_versions(),
    ]


def _settings() -> Iterator[Check]:
    said = [one for one in settings_said() if one.error]
    for one in said:
        advice = f"correct or unset {one.origin}; nothing is logged with it as it is"
        yield Check(name="settings", result="fail", detail=one.error, advice=advice)
    unknown = unknown_variables()
    for words in unknown:
        advice = "correct or unset the variable"
        yield Check(name="settings", result="warn", detail=words, advice=advice)
    if not said and not unknown:
        yield Check(name="settings", result="ok", detail="every variable is a setting")


def _spool(root: Path) -> Iterator[Check]:
    there = _nearest(root)
    if root.exists():
        yield _permissions(root)
    elif there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        yield Check(name="spool", result="ok", detail=f"{root} will be made")
    else:
        yield Check(
            name="spool", result="fail", detail=f"{root} cannot be made in {there}", advice=MOVE_IT
        )
    kind = file_system_of(there)
    if kind in REMOTE_FILE_SYSTEMS or kind.startswith("fuse"):
        detail = f"{root} lies on a {kind} file system"
        yield Check(name="file system", result="fail", detail=detail, advice=MOVE_IT)
    else:
        yield Check(name="file system", result="ok", detail=kind or "not known")


def _permissions(root: Path) -> Check:
    try:
        check_spool(root)
    except (FlowbufferError, OSError) as error:
        return Check(name="spool", result="fail", detail=str(error), advice=MOVE_IT)
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        detail = f"{root} is not writable"
        return Check(name="spool", result="fail", detail=detail, advice=f"chmod 700 {root}")
    for folder in folders(root):
        try:
            check_private(folder.parent)
            check_private(folder)
        except (FlowbufferError, OSError) as error:
            detail = f"a folder is not delivered: {error}"
            advice = f"chmod -R go-rwx {folder.parent}"
            return Check(name="spool", result="fail", detail=detail, advice=advice)
    return Check(name="spool", result="ok", detail=str(root))


def _room(root: Path, settings: Settings) -> Iterator[Check]:
    free = shutil.disk_usage(_nearest(root)).free
    used = _used_bytes(root)
    most = settings.max_spool_bytes
    detail = f"{size(free)} free; the spool has {size(used)} of {size(most)}"
    result: Literal["ok", "warn", "fail"] = "ok"
    advice = ""
    if free < _A_SEGMENT_BYTES or used >= most:
        result, advice = "fail", f"deliver with: flowbuffer sync; or make room, or {MOVE_IT}"
    elif free < most - used or used > 0.9 * most:
        result = "warn"
        advice = "with the server down for long it fills up; make room, or lower max_spool_bytes"
    yield Check(name="room", result=result, detail=detail, advice=advice)


def _used_bytes(root: Path) -> int:
    try:
        return Spool(root, make=False).used_bytes() if root.is_dir() else 0
    except (FlowbufferError, OSError):
        return 0  # told by another check


def _left_over(root: Path) -> Iterator[Check]:
    try:
        found = status(Spool(root, make=False)) if root.is_dir() else None
    except (FlowbufferError, OSError):
        return  # told by another check
    rows = [] if found is None else found.producers
    runs = found is not None and found.collector_runs
    parked = {row.run_id: row for row in rows if row.parked and row.pending}
    left = sum(row.pending for row in rows if row.state != "alive" and row.run_id not in parked)
    refused = sum(row.rejected for row in rows)
    damaged = [row.last_error for row in rows if row.state == "damaged"]
    if runs:
        yield Check(name="left over", result="ok", detail="a collector process is at work")
    elif left:
        wait = "waits" if left == 1 else "wait"
        detail = f"{counted(left)} {wait} for a process that delivers"
        advice = "deliver with: flowbuffer sync"
        yield Check(name="left over", result="warn", detail=detail, advice=advice)
    else:
        yield Check(name="left over", result="ok", detail="nothing waits")
    for run_id, row in parked.items():
        detail = f"run {run_id} cannot be delivered: {row.last_error}"
        advice = gone(run_id, str(row.tracking_uri))
        yield Check(name="run", result="warn", detail=detail, advice=advice)
    if refused:
        were = "was" if refused == 1 else "were"
        detail = f"{counted(refused)} {were} refused by the server, or damaged"
        advice = "see why with: flowbuffer rejected"
        yield Check(name="rejected", result="warn", detail=detail, advice=advice)
    for error in damaged:
        advice = "it is left alone; nothing else is affected"
        yield Check(name="damaged", result="warn", detail=error, advice=advice)


def _server(tracking_uri: str | None) -> Iterator[Check]:
    try:
        import mlflow
    except ImportError as error:
        yield Check(name="server", result="fail", detail=str(error), advice="pip install mlflow")
        return
    uri = absolute_uri(tracking_uri or mlflow.get_tracking_uri())
    vouch_for(uri)
    name = without_credentials(uri)
    missing = _missing_file(uri)
    if missing is not None:
        yield Check(name="server", result="ok", detail=f"{name} will be made at {missing}")
        return
    server = Server(uri, _ANSWER_S / 2)
    found = _answers(server, uri)
    yield found
    if found.result == "ok":
        yield from _writing(server)
    if is_http(uri):
        yield from _clock(name)


def _missing_file(uri: str) -> Path | None:
    """Where a store of files would be made: looking at it would make it."""
    path = path_of(uri)
    return None if path is None or path.exists() else path


def _answers(server: Server, uri: str) -> Check:
    advice = "set MLFLOW_TRACKING_URI, or start the server; what is logged meanwhile is kept"

    def ask() -> None:
        server.ask(lambda client: client.search_experiments(max_results=1))

    try:
        warm_up(uri)
        _within(_ANSWER_S, ask)
    except UnauthorisedError as error:
        advice = "renew the credentials (MLFLOW_TRACKING_TOKEN, or USERNAME and PASSWORD)"
        detail = f"{server.name} refuses the credentials: {error}"
    except TimeoutError:
        detail = f"{server.name} did not answer within {_ANSWER_S:g} s"
    except (TransportError, ImportError) as error:
        detail = f"{server.name} does not answer as it should: {error}"
    else:
        return Check(name="server", result="ok", detail=f"{server.name} answers")
    return Check(name="server", result="fail", detail=detail, advice=advice)


def _writing(server: Server) -> Iterator[Check]:
    """How metrics come into a database; nothing where the server is none."""

    def why_not(client: Any) -> str | None:
        is_database = hasattr(store_of(client), "engine")
        return database_of(client).why_not() if is_database else None

    try:
        reason = server.ask(why_not)
    except TransportError:
        return  # it answered a moment ago, and delivery goes on trying
    if reason is not None:
        detail = f"metrics go MLflow's own way, some ten times slower: {reason}"
        detail = detail if reason else "metrics are written in bulk"
        yield Check(name="database", result="ok", detail=detail)


def _within(seconds: float, ask: Callable[[], None]) -> None:
    """Ask in a thread: some stores try for minutes.

    Raises:
        TimeoutError: It took longer.
        Exception: What ``ask`` raised.
    """
    errors: list[Exception] = []

    def answer() -> None:
        try:
            ask()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=answer, name="flowbuffer-doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]


def _clock(uri: str) -> Iterator[Check]:
    skew_s = _skew_s(uri)
    if skew_s is None:
        return  # no answer, which another check tells; or one without a date
    detail = f"this machine's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'}"
    if abs(skew_s) > _SKEW_S:
        advice = "synchronise the clock (NTP): points carry this machine's time"
        detail += " the server's"
        yield Check(name="clock", result="warn", detail=detail, advice=advice)
    else:
        yield Check(name="clock", result="ok", detail="as the server's, to the second")


def _skew_s(uri: str) -> float | None:
    """By how many seconds this machine's clock is ahead of the server's, to half a second."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as response:
            date = response.headers.get("Date")
    except HTTPError as error:
        date = error.headers.get("Date")
        error.close()
    except (OSError, ValueError):
        return None
    try:
        server_s = parsedate_to_datetime(date).timestamp() + 0.5
    except (TypeError, ValueError):
        return None
    return SYSTEM_CLOCK.now_ns() / 1e9 - server_s


def _versions() -> Iterator[Check]:
    said = [f"python {platform.python_version()}"]
    for name in ("flowbuffer", "mlflow", "numpy", "azureml-mlflow"):
        found = _version(name)
        if found is not None:
            said.append(f"{name} {found}")
            if _leading_numbers(found) < _OLDEST.get(name, ()):
                oldest = ".".join(map(str, _OLDEST[name]))
                detail = f"{name} {found} is older than {oldest}"
                advice = f"pip install '{name}>={oldest}'"
                yield Check(name="versions", result="fail", detail=detail, advice=advice)
    yield Check(name="versions", result="ok", detail=", ".join(said))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _leading_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _nearest(path: Path) -> Path:
    """``path``, or what there is of it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
