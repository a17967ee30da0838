"""A person who waits sees how it goes, and nothing that goes wrong with that ends the wait."""

import errno
import io
import os
import sys
from typing import Any

import pytest

from flowbuffer.clock import Clock
from flowbuffer.logger.progress import Progress


class TurnedClock(Clock):
    """Stands still until a test turns it."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.monotonic_s = lambda: self.now_s


class Stream(io.StringIO):
    """Standard error of some kind."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


class Wait:
    """A wait of which a test says how it goes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stream: Any, bound_s: float | None) -> None:
        monkeypatch.setattr(sys, "stderr", stream)
        self.clock = TurnedClock()
        self.counts = {"delivered": 500, "rejected": 0, "pending": 30_000}
        deadline_s = None if bound_s is None else self.clock.now_s + bound_s
        self.progress = Progress(lambda: self.counts, deadline_s, clock=self.clock)

    def go_on(self, seconds: float, rate: int, look_s: float = 0.5) -> None:
        """Deliver ``rate`` points a second, and look again and again."""
        for _ in range(int(seconds / look_s)):
            self.clock.now_s += look_s
            self.counts["delivered"] += int(rate * look_s)
            self.counts["pending"] -= int(rate * look_s)
            self.progress.show(self.clock.now_s - 100.0)


def columns(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("flowbuffer.logger.progress._columns", lambda: count)


def test_a_terminal_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal one line is drawn again: points, the rate of the last seconds, the bound, and
    that an interrupt loses nothing; it is gone in the end."""
    stream = Stream(terminal=True)
    columns(monkeypatch, 120)
    wait = Wait(monkeypatch, stream, 60.0)
    wait.go_on(10, rate=1800)
    wait.go_on(10, rate=1000)
    line = stream.getvalue().split("\r")[-1]
    assert "/s, gives up in 40 s, nothing is lost: Ctrl-C to leave now" in line
    assert " 1,000/s" in line
    assert "\n" not in stream.getvalue()
    wait.progress.close()
    assert stream.getvalue().split("\r")[-2:] == [" " * len(line), ""]


def test_a_log_has_a_line_every_15_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a log or a pipe there is a line every 15 s, none before."""
    stream = Stream(terminal=False)
    wait = Wait(monkeypatch, stream, 60.0)
    wait.go_on(14, rate=100)
    assert stream.getvalue() == ""
    wait.go_on(20, rate=100)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("flowbuffer: delivering ")
        assert " 100/s" in line
    assert "gives up in 45 s, nothing is lost: Ctrl-C to leave now" in lines[0]


def test_a_notebook_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook, whose standard error is no terminal, one line is drawn again."""

    class OutStream(Stream):
        __module__ = "ipykernel.iostream"

    stream = OutStream(terminal=False)
    Wait(monkeypatch, stream, None).go_on(3, rate=100)
    assert stream.getvalue().startswith("\rflowbuffer: ")
    assert "gives up" not in stream.getvalue()


@pytest.mark.parametrize("count", [1, 2, 20, 40, 60, 80, 81, 120])
def test_it_fits(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The line is never as wide as the terminal, however narrow that is; at 80 columns it has all
    that there is to say."""
    stream = Stream(terminal=True)
    columns(monkeypatch, count)
    Wait(monkeypatch, stream, 60.0).go_on(5, rate=1000)
    line = stream.getvalue().split("\r")[-1]
    assert len(line) < count
    if count >= 80:
        assert "/29,000" in line
        assert "1,000/s, gives up in 55 s" in line
        assert "Ctrl-C" in line


def test_a_short_wait_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is shown within the first second."""
    stream = Stream(terminal=True)
    Wait(monkeypatch, stream, 60.0).go_on(0.9, rate=1000, look_s=0.1)
    assert stream.getvalue() == ""


class Broken(Stream):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:  # noqa: ARG002
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def closed() -> Stream:
    stream = Stream(terminal=True)
    stream.close()
    return stream


@pytest.mark.parametrize(
    "stream", [None, closed(), Broken(terminal=True), Broken(terminal=False), object()]
)
def test_nothing_that_is_wrong_with_standard_error_raises(
    monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    """No standard error, a closed one, a broken pipe: the wait goes on."""
    wait = Wait(monkeypatch, stream, 60.0)
    wait.go_on(20, rate=1000)
    wait.progress.close()


def test_counts_that_fail_do_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spool that cannot be counted ends the line, not the wait."""
    wait = Wait(monkeypatch, Stream(terminal=True), 60.0)
    del wait.counts["pending"]
    wait.progress.show(2.0)
