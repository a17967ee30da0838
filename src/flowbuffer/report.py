"""What a logger tells: counts, and the progress of a long wait."""

from __future__ import annotations

import logging
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
        unknown: Points of which nobody knows what became: what held them was wiped from the spool,
            or is damaged.
        dropped: Points that were never stored, by reason: ``spool_full`` (``when_full``),
            ``invalid`` (``strict=False``).
        seconds: How long the call that made this report took.
    """

    delivered: int = 0
    rejected: int = 0
    pending: int = 0
    unknown: int = 0
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


_warned: set[str] = set()


def warn_once(text: str) -> None:
    """Warn of something that is not wrong yet; once in this process, whoever finds it."""
    if text not in _warned:
        _warned.add(text)
        logging.getLogger("flowbuffer").warning("%s", text)


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
            self._bar = _new_bar()
            self._settled_before = settled
        settled -= self._settled_before
        self._bar.update(
            self._bar.task_ids[0], completed=settled, total=settled + counts["pending"]
        )
        self._bar.refresh()

    def close(self) -> None:
        """Leave the terminal to others."""
        if self._bar is not None:
            self._bar.stop()


def _new_bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f}/s")

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("flowbuffer: delivering"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("points"),
        RateColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,  # no thread can be started at the interpreter's end
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task("", total=None)
    bar.start()
    console.show_cursor(True)  # else it were lost if the job is killed meanwhile
    return bar
