"""What delivery knows of where batches go: one request, and who takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from flowbuffer.errors import TransportError


@dataclass(frozen=True)
class Request:
    """One batch for one run.

    Attributes:
        run_id: The run.
        keys, values, times, steps: Of the metrics, columns of one length. A key is as the key table
            of a spool has it (see ``spool.layout``). ``times`` are ms since the epoch.
        params, tags: Keys and values; no key twice.
    """

    run_id: str
    keys: Sequence[str] = ()
    values: Sequence[float] = ()
    times: Sequence[int] = ()
    steps: Sequence[int] = ()
    params: Sequence[tuple[str, str]] = ()
    tags: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.keys) + len(self.params) + len(self.tags)


#: Called once when a request is over: with None when it is stored, else with what went wrong.
Done = Callable[[TransportError | None], None]

#: Called before ``Done``, and at most once, by a service that takes a batch now and stores it
#: later: the next request with the same keys may be sent.
Accepted = Callable[[], None]


class Transport(Protocol):
    """Where batches go. ``flowbuffer.testing`` has one for tests.

    Attributes:
        max_in_flight: How many requests may be on their way at once.
        max_metrics: The most metrics in one request.
    """

    max_in_flight: int

    @property
    def max_metrics(self) -> int: ...

    def send(self, request: Request, done: Done, accepted: Accepted) -> None:
        """Send a request. Both may be called at once or later, in any thread."""

    def warnings(self, run_id: str) -> list[str]:
        """What whoever logs to a run should know, although all is well so far."""

    def close(self) -> None:
        """Take no more requests."""
