"""Something happens between two lines: an exception, a handler that logs, or a fork.

A trace function sees a line before it is executed. What it does there is what a signal handler does
that Python runs at that moment.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import flowbuffer

SOURCE = str(Path(flowbuffer.__file__).parent)


class Line(NamedTuple):
    """A line of the project's source."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{Path(self.file).relative_to(SOURCE)}:{self.number}"


@contextmanager
def traced(see: Callable[[FrameType], None], file: str = SOURCE) -> Iterator[None]:
    """Call `see` before each line of the files whose names begin with `file`, in this thread."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            see(frame)
        return local

    def trace(frame: FrameType, *_: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(file) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(work: Callable[[], object]) -> list[Line]:
    """Every line of the project that `work` executes in this thread, in the order of the first
    time."""
    found: dict[Line, None] = {}
    with traced(lambda frame: found.setdefault(Line(frame.f_code.co_filename, frame.f_lineno))):
        work()
    return list(found)


class Trap:
    """Does something once, when this thread is about to execute a line.

    Attributes:
        sprung: Whether the line was reached.
    """

    def __init__(self, line: Line, action: Callable[[], object]) -> None:
        self.sprung = False
        self._line = line
        self._action = action

    def run(self, work: Callable[[], object]) -> None:
        """Do `work` with the trap set."""
        with traced(self._see, self._line.file):
            work()

    def _see(self, frame: FrameType) -> None:
        if frame.f_lineno == self._line.number and not self.sprung:
            self.sprung = True
            self._action()


class Log:
    """What was logged by calls that returned, and what perhaps by one that was interrupted.

    Each value is of one point only: it tells the key and the place in the order of the calls.

    Args:
        metric: Logs one point: key, value, step.
        metrics: Logs a point for each key.
        series: Logs many points of a key.
        param: Logs a parameter.
    """

    def __init__(
        self,
        metric: Callable[[str, float, int], object],
        metrics: Callable[[dict[str, float], int], object],
        series: Callable[[str, list[float]], object],
        param: Callable[[str, str], object],
    ) -> None:
        self.certain: dict[str, list[float]] = {}
        self.perhaps: dict[str, list[float]] = {}
        self.params: dict[str, str] = {}
        self.params_perhaps: dict[str, str] = {}
        self.handled: set[float] = set()
        self._calls = metric, metrics, series, param
        self._count = 0

    def in_handler(self, handle: Callable[[Log], None]) -> None:
        """Log in the middle of another call, which is neither before nor after it."""
        inner = Log(*self._calls)
        inner._count = self._count + 1000
        try:
            handle(inner)
        finally:
            for key, values in inner.perhaps.items():
                self.perhaps.setdefault(key, []).extend(values)
                self.certain.setdefault(key, []).extend(inner.certain.get(key, ()))
                self.handled.update(values)
            self.params.update(inner.params)
            self.params_perhaps.update(inner.params_perhaps)

    def _next(self) -> int:
        self._count += 1
        return self._count

    def metric(self, key: str) -> None:
        """Log one point."""
        n = self._next()
        value = _value(key, n)
        self._points({key: [value]}, lambda: self._calls[0](key, value, n))

    def metrics(self, *keys: str) -> None:
        """Log one point of each key."""
        n = self._next()
        values = {key: _value(key, n) for key in keys}
        points = {key: [value] for key, value in values.items()}
        self._points(points, lambda: self._calls[1](values, n))

    def series(self, key: str, count: int) -> None:
        """Log `count` points of a key in one call."""
        values = [_value(key, self._next()) for _ in range(count)]
        self._points({key: values}, lambda: self._calls[2](key, values))

    def param(self) -> None:
        """Log a parameter of its own."""
        n = self._next()
        key, value = f"p{n}", str(n)
        self.params_perhaps[key] = value
        try:
            self._calls[3](key, value)
        except KeyboardInterrupt:
            return
        self.params[key] = value

    def _points(self, points: dict[str, list[float]], call: Callable[[], object]) -> None:
        for key, values in points.items():
            self.perhaps.setdefault(key, []).extend(values)
        try:
            call()
        except KeyboardInterrupt:
            return
        for key, values in points.items():
            self.certain.setdefault(key, []).extend(values)

    def faults(
        self, history: Callable[[str], list[float]], params: dict[str, str], keys: set[str]
    ) -> list[str]:
        """What is not as it was logged: nothing is missing, mixed, twice or in another order."""
        found = []
        for key, perhaps in self.perhaps.items():
            stored = history(key)
            certain = set(self.certain.get(key, ()))
            if missing := sorted(certain - set(stored)):
                found.append(f"{key}: {len(missing)} lost, as {missing[:3]}")
            if strange := sorted(set(stored) - set(perhaps)):
                found.append(f"{key}: {len(strange)} were never logged, as {strange[:3]}")
            if len(set(stored)) != len(stored):
                found.append(f"{key}: some are there twice")
            parts = (
                [value for value in stored if value in self.handled],
                [value for value in stored if value not in self.handled],
            )
            found += [f"{key}: out of order {part}" for part in parts if part != sorted(part)]
        if strange_keys := sorted(keys - self.perhaps.keys()):
            found.append(f"keys that were never logged: {strange_keys}")
        if lost := sorted(self.params.items() - params.items()):
            found.append(f"parameters lost: {lost}")
        if strange_params := sorted(params.items() - self.params_perhaps.items()):
            found.append(f"parameters that were never logged: {strange_params}")
        return found


def _value(key: str, n: int) -> float:
    """Rises with `n`, and says which key it is of."""
    return n + int.from_bytes(key.encode()[:3], "big") / 2**25


def in_another_thread(work: Callable[[], object], timeout_s: float = 30.0) -> str:
    """What is wrong with `work` in a thread of its own: empty, an error, or that it hangs."""
    problems = ["another thread waits for ever"]

    def run() -> None:
        try:
            work()
            problems[0] = ""
        except BaseException as error:
            problems[0] = f"another thread: {error!r}"

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return problems[0]
