"""What the other producers of a spool have logged, whatever process they are of, living or dead:
whoever reads runs waits for that, too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from flowbuffer.backends.credentials import without_credentials
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.collector.deliverers import Delivery, delivery_of, last_error
from flowbuffer.errors import SpoolError
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.folders import has_producer
from flowbuffer.spool.notes import parked_reason
from flowbuffer.spool.producer_info import OFFLINE, read_info
from flowbuffer.spool.waiting import Waiting, hurry_to_end

#: How many folders of dead producers this process delivers at once, if nobody else does.
_AT_ONCE = 16


class Belongs(NamedTuple):
    """Where the points of a folder belong; empty where nobody delivers them."""

    folder: Path
    tracking_uri: str  # without credentials
    run_id: str


#: What was found in each spool, by the name of a run's folder: when that was changed last, in ns,
#: and the producers' folders in it.
_known: dict[Path, dict[str, tuple[int, list[Belongs]]]] = {}
#: Folders for which a read has waited in vain, and what was in the way.
_in_vain: dict[Path, str] = {}
#: A barrier after every point.
_EVERYTHING = (1 << 62, 0)
#: A folder may be changed again without a later time for so long, in ns.
_SAME_TIME_NS = 1_000_000_000


def folders_of_server(root: Path, tracking_uri: str) -> list[Path]:
    """The folders of a spool whose points go to one server."""
    uri = without_credentials(tracking_uri).rstrip("/")
    return [one.folder for one in _look(root) if one.tracking_uri.rstrip("/") == uri]


def folders_under_url(root: Path, url: str) -> list[Path]:
    """The folders of a spool whose points go to the server that a request goes to."""
    return [one.folder for one in _look(root) if goes_to(url, one.tracking_uri)]


def goes_to(url: str, tracking_uri: str) -> bool:
    """Whether a request goes to the server of a tracking URI."""
    return tracking_uri.startswith("http") and url.startswith(tracking_uri.rstrip("/") + "/")


def _look(root: Path) -> list[Belongs]:
    """Every producer's folder. What has not changed since the last look is not read again: there
    may be thousands, and each read of runs looks."""
    known = _known.get(root, {})
    found = {}
    now_ns = SYSTEM_CLOCK.now_ns()
    for name, changed_ns in _subfolders(root):
        seen = known.get(name)
        if seen is None or seen[0] != changed_ns:
            its = [_belongs(root / name / one) for one, _ in _subfolders(root / name)]
            seen = (changed_ns if now_ns - changed_ns > _SAME_TIME_NS else 0), its
        found[name] = seen
    _known[root] = found
    return [one for _, its in found.values() for one in its]


def _subfolders(folder: Path) -> Iterator[tuple[str, int]]:
    """Names, and when each was changed last, in ns since the epoch."""
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError:
        return  # it is gone, or cannot be looked at
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield entry.name, entry.stat(follow_symlinks=False).st_mtime_ns
        except OSError:
            continue  # it is gone meanwhile


def _belongs(folder: Path) -> Belongs:
    try:
        info = read_info(folder)
    except SpoolError:
        return Belongs(folder, "", "")
    return Belongs(folder, "" if info.delivery == OFFLINE else info.tracking_uri, info.run_id)


class Others:
    """What is in some folders now, and is not delivered yet.

    Args:
        found: The folders.
        settings: Of this process.
        tracking_uri: The server that is read, with credentials if there are any.
    """

    def __init__(self, found: Iterable[Path], settings: Settings, tracking_uri: str = "") -> None:
        self._settings = settings
        self._uri = tracking_uri
        self._left: dict[Path, Waiting] = {}
        self._delivered_here: dict[Path, Delivery] = {}
        for folder in found:
            try:
                if not Waiting(folder, _EVERYTHING).is_over() and not _is_in_vain(folder):
                    self._left[folder] = Waiting(folder, hurry_to_end(folder))
            except OSError:
                pass  # it cannot be looked at

    def are_over(self) -> bool:
        """Whether who waits may stop: nothing of it is pending any more, or nobody can deliver what
        is."""
        for folder, waiting in list(self._left.items()):
            if waiting.is_over() or parked_reason(folder) is not None:
                self._leave(folder)
        return not self._left

    def leave_all_but(self, is_wanted: Callable[[str], bool]) -> None:
        """From now on wait only for the runs that are wanted."""
        for folder in list(self._left):
            if not is_wanted(_belongs(folder).run_id):
                self._leave(folder)

    def push(self) -> None:
        """Deliver here what dead producers left, if nobody else does."""
        for folder in self._left:
            delivery = self._delivered_here.get(folder)
            if delivery is None and len(self._delivered_here) < _AT_ONCE:
                delivery = self._delivery(folder)
            if delivery is not None:
                delivery.push()

    def end(self) -> None:
        """Stop waiting, and remember what was in the way: the next read does not wait for the same
        in vain."""
        for folder in list(self._left):
            _in_vain[folder] = last_error(folder)
            self._leave(folder)

    def _delivery(self, folder: Path) -> Delivery | None:
        try:
            if has_producer(folder):
                return None
            uri = read_info(folder).tracking_uri
            if without_credentials(self._uri) == uri:
                uri = self._uri
            delivery = delivery_of(self._settings, uri)
            delivery.begin(folder)
        except (SpoolError, OSError):
            return None  # it is gone meanwhile, or cannot be read
        self._delivered_here[folder] = delivery
        return delivery

    def _leave(self, folder: Path) -> None:
        self._left.pop(folder, None)
        delivery = self._delivered_here.pop(folder, None)
        if delivery is not None:
            delivery.end()


def _is_in_vain(folder: Path) -> bool:
    """Whether a read is not to wait for a folder: nobody can deliver it, or an earlier read has
    waited, and what was in the way then still is."""
    if parked_reason(folder) is not None:
        return True
    return folder in _in_vain and _in_vain[folder] == last_error(folder) != ""
