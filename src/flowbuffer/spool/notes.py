"""What delivery tells of a folder, beside the slots: ``delivery.json``, how it is doing, and
``parked.json``, why the run takes no more points. For people and for who waits: no point depends on
them, and what cannot be read tells nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from flowbuffer.spool.files import read_file, write_file

_DELIVERY: Final = "delivery.json"
_PARKED: Final = "parked.json"
_MOST_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class DeliveryNote:
    """How delivery is doing.

    Attributes:
        retries: Requests that were sent again.
        last_error: What the last request failed with; empty after a success.
        unauthorised: It failed because the credentials were refused.
        ties_moved, ties_moved_most_ms: Points whose time was moved, and the farthest, in ms.
        warnings: What whoever logs should know, although all is well so far.
        done: Everything is settled, and the folder stays for what cannot be sent.
    """

    retries: int = 0
    last_error: str = ""
    unauthorised: bool = False
    ties_moved: int = 0
    ties_moved_most_ms: int = 0
    warnings: tuple[str, ...] = ()
    done: bool = False


def write_delivery_note(folder: Path, note: DeliveryNote) -> None:
    """Tell how delivery is doing.

    Raises:
        OSError: It cannot be written.
    """
    write_file(folder / _DELIVERY, json.dumps(asdict(note)).encode())


def delivery_note(folder: Path) -> DeliveryNote:
    """How delivery is doing. What is not told, or makes no sense, is as if nothing had happened."""
    try:
        said = _read(folder / _DELIVERY)
    except (OSError, ValueError, RecursionError):
        return DeliveryNote()
    nothing = vars(DeliveryNote())
    for name, value in said.items():
        if isinstance(value, list):
            said[name] = tuple(value)
    return DeliveryNote(**{n: said[n] for n in nothing if type(said.get(n)) is type(nothing[n])})


def park(folder: Path, reason: str | None) -> None:
    """Write down why nobody delivers this producer's points; None takes it back, if that can be
    done.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / _PARKED
    if reason is not None:
        write_file(path, json.dumps({"reason": reason}).encode())
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def is_parked(folder: Path) -> bool:
    """Whether something is known against delivering this producer's points."""
    return os.path.lexists(folder / _PARKED)


def parked_reason(folder: Path) -> str | None:
    """Why the run of this producer takes no points; None if nothing is known against it."""
    if not is_parked(folder):
        return None
    try:
        return str(_read(folder / _PARKED)["reason"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, RecursionError):
        return f"{_PARKED} is damaged"


def is_parked_since(folder: Path, start_ns: int) -> bool:
    """Whether that was written after a time, in ns since the epoch.

    Raises:
        OSError: That is not known now.
    """
    try:
        return (folder / _PARKED).stat().st_mtime_ns > start_ns
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, Any]:
    said = json.loads(read_file(path, limit=_MOST_BYTES))
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no JSON object")
    return said
