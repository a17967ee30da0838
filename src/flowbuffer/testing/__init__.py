"""What the tests of flowbuffer use instead of time and a server; for the tests of others, too."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from flowbuffer.backends.base import Accepted, Done, Request
from flowbuffer.clock import Clock, Event
from flowbuffer.errors import RejectedError, RetriableError, TransportError


class ManualClock(Clock):
    """A clock that stands until it is turned.

    Args:
        now_s: The wall time at the start, in s since the epoch.
    """

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self._wall_ns = round(now_s * 1e9)
        self._monotonic_s = 0.0
        self.now_ns = lambda: self._wall_ns
        self.monotonic_s = lambda: self._monotonic_s

    def turn(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self._wall_ns += round(seconds * 1e9)
        self._monotonic_s += seconds

    def set_wall(self, now_s: float) -> None:
        """Step the wall clock, as an administrator does; also backwards."""
        self._wall_ns = round(now_s * 1e9)

    def sleep(self, seconds: float) -> None:
        """Turn by ``seconds``."""
        self.turn(seconds)

    def wait(self, event: Event, seconds: float | None) -> bool:
        """Turn by ``seconds`` unless the event is set."""
        if event.wait(0):
            return True
        self.turn(seconds or 0.0)
        return False


#: What a :class:`FakeTransport` answers: None stores the request, an error refuses it.
Answer = Callable[[Request], TransportError | None]


class FakeTransport:
    """A backend in memory that keeps points as MLflow's SQL stores do.

    Requests wait in ``waiting`` until :meth:`answer` is called, or are answered at once.

    Args:
        max_in_flight: As of any transport.
        at_once: Answer every request in ``send``.
        answer: Decides each request; by default all are stored.

    Attributes:
        requests: Every request that was sent.
        max_metrics: As of any transport.
        rows: What is stored: (run, key, time, step, value), a set like the stores' primary key.
        params, tags: By run and key. A parameter is not changed once it is stored.
    """

    def __init__(
        self, max_in_flight: int = 1, *, at_once: bool = True, answer: Answer | None = None
    ) -> None:
        self.max_in_flight = max_in_flight
        self.max_metrics = 1000
        self.requests: list[Request] = []
        self.waiting: deque[tuple[Request, Done]] = deque()
        self._accepted: dict[int, Accepted] = {}
        self.rows: set[tuple[str, str, int, int, str]] = set()
        self.params: dict[tuple[str, str], str] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.decide: Answer = answer or (lambda _: None)
        self._at_once = at_once

    def send(self, request: Request, done: Done, accepted: Accepted) -> None:
        """Take a request."""
        self.requests.append(request)
        self._accepted[id(request)] = accepted
        self.waiting.append((request, done))
        if self._at_once:
            self.answer()

    def answer(self, index: int = 0, *, lose: bool = False) -> None:
        """Answer the waiting request at ``index``.

        Args:
            index: Which one; the oldest by default.
            lose: Store it, and say that the connection was lost.
        """
        request, done = self.waiting[index]
        del self.waiting[index]
        error = self.decide(request) or self._conflict(request)
        if error is None:
            self._store(request)
            error = RetriableError("the connection was reset") if lose else None
        done(error)

    def history(self, run_id: str, key: str) -> list[tuple[int, int, float]]:
        """(time, step, value) of a key, as ``get_metric_history`` returns them."""
        found = [
            (time, step, float(value))
            for run, own_key, time, step, value in self.rows
            if (run, own_key) == (run_id, key)
        ]
        # The stores have 0 for NaN, with a mark in another column.
        return sorted(found, key=lambda row: (*row[:2], 0.0 if math.isnan(row[2]) else row[2]))

    def accept(self, index: int = 0) -> None:
        """Accept the waiting request at ``index``: it will be stored when it is answered."""
        self._accepted[id(self.waiting[index][0])]()

    def warnings(self, run_id: str) -> list[str]:  # noqa: ARG002
        """None."""
        return []

    def close(self) -> None:
        """Nothing to close."""

    def _conflict(self, request: Request) -> TransportError | None:
        for key, value in request.params:
            if self.params.get((request.run_id, key), value) != value:
                return RejectedError(f"Changing param values is not allowed: {key!r}")
        return None

    def _store(self, request: Request) -> None:
        for stored, texts in ((self.params, request.params), (self.tags, request.tags)):
            stored.update({(request.run_id, key): value for key, value in texts})
        for key, value, time, step in zip(
            request.keys, request.values, request.times, request.steps, strict=True
        ):
            # As text NaN equals itself, as it does under the stores' is_nan.
            self.rows.add((request.run_id, key, time, step, repr(value)))
