"""How a long wait goes, for the person who waits.

On a terminal and in a notebook it is a line that is drawn again and again, elsewhere a line every
15 s. It is plain text: no library that a program may have shadowed, no thread, and no lock, so that
a signal handler that interrupts one wait can show another.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from flowbuffer.clock import SYSTEM_CLOCK, Clock
from flowbuffer.notices import tell, write

#: A wait shorter than this is no news, in s.
_AFTER_S = 1.0
#: How often a line is drawn again, and how often one is written to a log, in s.
_REDRAW_EVERY_S = 0.5
_LINE_EVERY_S = 15.0
#: The rate is that of so many last seconds.
_RATE_S = 5.0
_BAR_CELLS = 20


class Progress:
    """Shows points, rate and bound of one wait. Nothing that goes wrong with it raises.

    Args:
        counts: Makes a report of the moment.
        deadline_s: When the wait gives up, on ``clock``; None is never.
        off: Show nothing.
        clock: Tells the time.
    """

    def __init__(
        self,
        counts: Callable[[], Mapping[str, Any]],
        deadline_s: float | None = None,
        *,
        off: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._counts = counts
        self._deadline_s = deadline_s
        self._off = off
        self._clock = clock
        self._redrawn = is_redrawn()
        self._next_s = _AFTER_S if self._redrawn else _LINE_EVERY_S
        self._samples: deque[tuple[float, int]] = deque()  # when, and how many were settled
        self._settled_before = 0
        self._drawn = ""

    def show(self, waited_s: float) -> None:
        """Show how it goes, if it is time to.

        Args:
            waited_s: How long the wait has been, in s.
        """
        if not self._off and waited_s >= _AFTER_S:
            try:
                self._show(waited_s)
            except Exception:
                self._off = True

    def close(self) -> None:
        """The wait is over: wipe the line that was drawn, so that what is written next has it."""
        if self._drawn:
            write("\r" + " " * len(self._drawn) + "\r")
            self._drawn = ""

    def _show(self, waited_s: float) -> None:
        now_s = self._clock.monotonic_s()
        look_every_s = _REDRAW_EVERY_S if self._redrawn else _RATE_S
        due = waited_s >= self._next_s
        if not due and self._samples and now_s - self._samples[-1][0] < look_every_s:
            return
        counts = self._counts()
        settled = counts["delivered"] + counts["rejected"]
        if not self._samples:
            self._settled_before = settled
        self._samples.append((now_s, settled))
        while len(self._samples) > 2 and now_s - self._samples[1][0] >= _RATE_S:
            self._samples.popleft()
        if due:
            self._next_s = waited_s + (_REDRAW_EVERY_S if self._redrawn else _LINE_EVERY_S)
            self._write(self._wordings(now_s, settled, counts["pending"]))

    def _wordings(self, now_s: float, settled: int, pending: int) -> list[str]:
        """What there is to say, the longest first."""
        done = settled - self._settled_before
        total = done + pending
        first_s, first = self._samples[0]
        rate = ""
        if now_s > first_s:
            rate = f", {(settled - first) / (now_s - first_s):,.0f}/s"
        bound = ""
        if self._deadline_s is not None:
            bound = f", gives up in {max(self._deadline_s - now_s, 0):.0f} s"
        long_hint = short_hint = ""
        if threading.current_thread() is threading.main_thread():
            long_hint = ", nothing is lost: Ctrl-C to leave now"
            short_hint = ", Ctrl-C loses nothing"
        count = f"{done:,}/{total:,}"
        return [
            f"{_bar(done, total)} {count} points{rate}{bound}{long_hint}",
            f"{count} points{rate}{bound}{long_hint}",
            f"{count} points{rate}{bound}{short_hint}",
            f"{count}{rate}{bound}{short_hint}",
            count,
        ]

    def _write(self, wordings: list[str]) -> None:
        if not self._redrawn:
            tell("delivering " + wordings[1])
            return
        most = _columns() - 1  # a character in the last column may begin a new line
        lines = [f"flowbuffer: {words}" for words in wordings]
        line = next((line for line in lines if len(line) <= most), lines[-1][: max(most, 0)])
        if write("\r" + line.ljust(len(self._drawn))):
            self._drawn = line
        else:
            self._off = True


def _bar(done: int, total: int) -> str:
    full, empty = "\N{BOX DRAWINGS HEAVY HORIZONTAL}", "\N{BOX DRAWINGS LIGHT HORIZONTAL}"
    try:
        (full + empty).encode(sys.stderr.encoding)
    except (UnicodeError, LookupError, TypeError):
        full, empty = "#", "-"
    cells = _BAR_CELLS * done // max(total, 1)
    return full * cells + empty * (_BAR_CELLS - cells)


def is_redrawn() -> bool:
    """Whether a line on standard error can be drawn again: it is a terminal, or a notebook."""
    try:
        return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
    except Exception:  # there is none, or it is closed
        return False


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except Exception:  # a notebook is none
        return 80
