"""What makes a folder a spool: the file ``spool.json`` in it.

A folder that was there before flowbuffer belongs to somebody. Only one that is marked, or empty, or
holds nothing but what flowbuffer put there before it marked its spools, is used; in any other one
nothing is made, locked or deleted.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Final

from flowbuffer.errors import SpoolError, SpoolFormatError
from flowbuffer.spool.files import MOVE_IT, check_own, check_private, opened, read_file
from flowbuffer.spool.layout import FORMAT_VERSION, is_own_file, is_producer_name

MARK: Final = "spool.json"

_WHAT: Final = "a spool of flowbuffer: points on their way to MLflow"
_UNFINISHED: Final = re.compile(r"\.spool\.json\.[0-9a-f]{12}\.new")
_MOST_BYTES: Final = 1 << 26
_MOST_NAMES: Final = 3  # that a message tells


def is_marked(root: Path) -> bool:
    """Whether a folder, which need not be there, is marked as a spool.

    Raises:
        SpoolError: Another version of flowbuffer marked it, or the file is no such mark.
    """
    path = root / MARK
    version = _version(root)
    if version is None and not os.path.lexists(path):
        return False
    if version is None:
        version = _version(root)  # it may have been marked between the two looks
    if version is None:
        raise SpoolFormatError(
            f"{path} does not say that {root} is a spool of flowbuffer; {MOVE_IT}, or remove the "
            "file if you know that it is one"
        )
    if version != FORMAT_VERSION:
        raise SpoolFormatError(
            f"the spool {root} has format version {version}; this flowbuffer knows version "
            f"{FORMAT_VERSION} and leaves it alone: use the version that made it, or {MOVE_IT}"
        )
    return True


def check_spool(root: Path) -> bool:
    """Refuse a folder that is no spool, and must not become one. Changes nothing.

    Returns:
        Whether it is a spool, marked or of a version that marked none; False if it is empty.

    Raises:
        SpoolError: It holds other things, or is not this user's alone.
        OSError: It is not there, or cannot be read.
    """
    check_own(root)
    used = is_marked(root)
    if not used:
        with os.scandir(root) as found:
            entries = [entry for entry in found if not _UNFINISHED.fullmatch(entry.name)]
        used = bool(entries)
        others = _others(entries)
        if others and not is_marked(root):  # by another process, since we looked
            raise SpoolError(
                f"{root} is not a spool: it holds other things ({_listed(others)}), and flowbuffer "
                "leaves it alone; set FLOWBUFFER_SPOOL_DIR (spool_dir) to a folder of its own, "
                f"like {root / 'flowbuffer'}"
            )
    check_private(root)
    return used


def check_outside(root: Path) -> None:
    """Refuse a folder within a spool, there or not.

    Raises:
        SpoolError: It is in one.
    """
    for parent in Path(os.path.realpath(root)).parents:
        if _version(parent) is not None:
            raise SpoolError(f"{root} is within the spool {parent}: name that one, or {MOVE_IT}")


def mark(root: Path) -> None:
    """Mark a folder that :func:`check_spool` passed. Any number of processes may do so at once.

    Raises:
        OSError: It cannot be written.
    """
    fresh = root / f".{MARK}.{os.urandom(6).hex()}.new"
    content = json.dumps({"what": _WHAT, "format": FORMAT_VERSION}).encode()
    try:
        with opened(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
            os.write(file.fileno(), content)
            os.fsync(file.fileno())
        fresh.replace(root / MARK)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def unfinished_marks(root: Path) -> list[Path]:
    """What a process that died while it marked the spool left behind."""
    try:
        with os.scandir(root) as found:
            return [Path(entry.path) for entry in found if _UNFINISHED.fullmatch(entry.name)]
    except FileNotFoundError:
        return []  # wiped


def _others(entries: list[os.DirEntry[str]]) -> list[str]:
    """The names of what did not come from a flowbuffer that marked no spools yet."""
    own = {entry.name for entry in entries if _is_old(entry)}
    if own == {"collector.log"}:  # anybody may have a log of that name
        own.clear()
    return sorted({entry.name for entry in entries} - own)


def _is_old(entry: os.DirEntry[str]) -> bool:
    try:
        if entry.is_dir(follow_symlinks=False):
            return not entry.name.startswith(".") and _is_old_run(entry.path)
        if entry.name == "collector.lock":
            return re.fullmatch(rb"[0-9]{0,10}", _content(Path(entry.path))) is not None
        if entry.name == "runs.lock":
            return not _content(Path(entry.path))
        if entry.name == "runs.json":
            said = json.loads(_content(Path(entry.path)))
            return all(isinstance(runs, dict) for runs in said.values())
        return entry.name == "collector.log" and entry.is_file(follow_symlinks=False)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _is_old_run(path: str) -> bool:
    """Whether all that is in a folder are folders of producers, and there are any."""
    with os.scandir(path) as found:
        folders = list(found)
    return bool(folders) and all(
        folder.is_dir(follow_symlinks=False) and _is_old_producer(folder) for folder in folders
    )


def _is_old_producer(folder: os.DirEntry[str]) -> bool:
    if folder.name.startswith("."):
        return is_unfinished(Path(folder.path))
    content = _content(Path(folder.path) / "producer.json")
    if is_producer_name(folder.name):
        return True  # readable or not
    said = json.loads(content)
    return isinstance(said, dict) and {"run_id", "format", "checksum"} <= said.keys()


def is_unfinished(folder: Path) -> bool:
    """Whether a hidden folder is one that flowbuffer was making, or deleting: its name is of that
    kind, and so is the name of all that is in it."""
    return is_producer_name(folder.name) and not foreign(folder)


def foreign(folder: Path) -> list[str]:
    """The names of what is in a producer's folder, and was not made by flowbuffer; none if it was
    wiped."""
    try:
        with os.scandir(folder) as found:
            return sorted(
                entry.name
                for entry in found
                if not (is_own_file(entry.name) and entry.is_file(follow_symlinks=False))
            )
    except FileNotFoundError:
        return []


def _version(root: Path) -> int | None:
    """The format version that the mark of a folder tells; None if it has none."""
    try:
        said = json.loads(_content(root / MARK))
        version = said["format"] if said["what"] == _WHAT else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return version if isinstance(version, int) else None


def _content(path: Path) -> bytes:
    """Of a regular file; anything else is not even opened, as its other end would notice.

    Raises:
        OSError: It is none, or cannot be read.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise SpoolError(f"{path} is not a regular file")
    return read_file(path, limit=_MOST_BYTES)


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
