"""What a logger tells: counts, and the progress of a long wait."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the points that a logger was given.

    Attributes:
        delivered: Points in the backend.
        rejected: Points that the server refused for good; they are dead letters in the spool.
        pending: Points in the spool that are to be delivered.
        dropped: Points that were never stored, by reason: ``spool_full`` (``when_full``),
            ``invalid`` (``strict=False``).
        seconds: How long the call that made this report took.
    """

    delivered: int = 0
    rejected: int = 0
    pending: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stats(Report):
    """A :class:`Report` of a logger at work.

    Attributes:
        lag_s: The age of the oldest point that is pending, in s; 0 if none is.
        backlog_bytes: What the whole spool takes on the disk, in bytes.
        ties_moved: Points that were moved in time so that order holds.
        ties_moved_most_ms: By how much at most, in ms.
        retries: Requests that were sent again.
        last_error: What the last request failed with; empty after a success.
    """

    lag_s: float = 0.0
    backlog_bytes: int = 0
    ties_moved: int = 0
    ties_moved_most_ms: int = 0
    retries: int = 0
    last_error: str = ""


class Progress:
    """A progress bar on a terminal, once a wait took a while: points, rate, time left.

    Args:
        counts: Makes a report of the moment.
    """

    _AFTER_S = 1.0

    def __init__(self, counts: Callable[[], Mapping[str, Any]]) -> None:
        self._counts = counts
        self._bar: Any = None
        self._settled_before = 0

    def show(self, waited_s: float) -> None:
        """Show, or redraw, the bar; on anything but a terminal nothing is shown."""
        if waited_s < self._AFTER_S or not sys.stderr.isatty():
            return
        counts = self._counts()
        settled = counts["delivered"] + counts["rejected"]
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(desc="flowbuffer: delivering", unit=" points", file=sys.stderr)
            self._settled_before = settled
        settled -= self._settled_before
        self._bar.total = settled + counts["pending"]
        self._bar.update(settled - self._bar.n)

    def close(self) -> None:
        """Leave the terminal to others."""
        if self._bar is not None:
            self._bar.close()
