"""Delivery of one run: read, batch, send, mark. One :meth:`Sender.step` does one round.

The sender never waits and has no thread of its own. Requests end on some thread of the transport,
which leaves the outcome for the next step; everything else happens in ``step``.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import struct
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from flowbuffer.backends.base import Transport
from flowbuffer.clock import Clock
from flowbuffer.delivery.batches import Batch, Part
from flowbuffer.delivery.encoding import Encoder
from flowbuffer.delivery.intake import WINDOW_POINTS, Intake
from flowbuffer.delivery.key_numbers import RunKeys
from flowbuffer.delivery.ordering import Rows
from flowbuffer.delivery.rejections import Rejections
from flowbuffer.delivery.retry import RetryPolicy
from flowbuffer.delivery.stream import Stream
from flowbuffer.errors import (
    DoubtfulError,
    RejectedError,
    RetriableError,
    RunGoneError,
    SpoolError,
    TooLargeError,
    TransportError,
    UnauthorisedError,
    is_passing,
)
from flowbuffer.notices import tell_outage, warn_once
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.folders import Claim
from flowbuffer.spool.notes import DeliveryNote, is_parked, park

_log = logging.getLogger("flowbuffer")

#: The most parameters and tags in one request: MLflow takes 100 of each.
MAX_TEXTS = 100

#: What our own code raises for the content of a point.
CONTENT_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error),
    *(SpoolError, FileNotFoundError, RecursionError),
)

#: How soon after the last try a run that is gone is tried again when someone waits for it, in s.
LOOK_AGAIN_S = 1.0


class Sender:
    """Delivers the points of one run.

    Args:
        run_id: The run.
        transport: Where batches go.
        settings: ``linger_s`` and ``max_batch_size``.
        clock: Decides when things are due.
        wake: Called from any thread when :meth:`step` has something to do at once.
        policy: When to send again.
        window_points: The most points that are read ahead of their delivery; None means
            :data:`WINDOW_POINTS`.

    Attributes:
        retries: Requests that were sent again.
        failure: What the last request failed with; None after a success.
        gone: The run does not exist on the server, or is deleted; ``parked.json`` says so.
        keys: The run's, by the rows' numbers.
        streams: What it delivers, by the rows' numbers. A stream that ends takes itself out.
    """

    def __init__(
        self,
        run_id: str,
        transport: Transport,
        settings: Settings,
        clock: Clock,
        wake: Callable[[], None],
        policy: RetryPolicy | None = None,
        window_points: int | None = None,
    ) -> None:
        self.run_id = run_id
        self.retries = 0
        self.failure: TransportError | None = None
        self.gone = False
        self.transport = transport
        self.clock = clock
        self.keys = RunKeys()
        self.streams: dict[int, Stream] = {}
        self._settings = settings
        self._wake = wake
        self._policy = policy or RetryPolicy()
        self._batches: list[Batch] = []
        self._busy: set[int] = set()
        self._outcomes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._accepted: list[Part] = []  # the service has them, and does not have them stored yet
        self._encoder = Encoder(run_id, self.keys, self.streams)
        self._rejections = Rejections(clock)
        window = window_points or WINDOW_POINTS
        self._intake = Intake(run_id, self.streams, self._rejections, window)
        self._numbers = itertools.count()
        self._stored_requests = 0
        self._not_before_s = self._failed_at_s = -math.inf

    def add(self, claim: Claim) -> Stream:
        """Deliver what is, and will be, in a folder, too. The stream has the claim from then on."""
        stream = Stream(self, next(self._numbers), claim)
        self.streams[stream.number] = stream
        return stream

    @property
    def idle(self) -> bool:
        """Nothing is on its way or waiting in memory."""
        return not (self._intake or self._batches or self._accepted or self._rejections)

    @property
    def in_flight(self) -> bool:
        """A request is on its way, or what it brought is not stored yet."""
        return bool(self._accepted) or any(batch.sending for batch in self._batches)

    def step(self, *, hurry: bool = False) -> float:
        """One round. Returns the seconds until something is due; infinity if nothing is known.

        Args:
            hurry: Send what is there even if it is little and young.
        """
        while not self._outcomes.empty():
            self._outcomes.get()()
        now_s = self.clock.monotonic_s()
        if self.gone:
            self._look_again()
        self._send(now_s, hurry)  # what is there already, so that no backend waits for the reading
        read = self._intake.read(now_s, self._accepted, 4 * self._batch_size())
        hurry = hurry or any(stream.reader.hurried() for stream in self.streams.values())
        next_s = min(self._send(now_s, hurry), self._rejections.due_s())
        self._note()
        if read or not self._outcomes.empty():
            return 0.0
        hurry = hurry or any(stream.reader.finished for stream in self.streams.values())
        if hurry and any(stream.reader.has_unripe for stream in self.streams.values()):
            return 0.001
        return next_s

    # Sending.

    def _send(self, now_s: float, hurry: bool) -> float:
        if now_s < self._not_before_s:
            return self._not_before_s - now_s
        next_s = math.inf
        for batch in self._batches:
            if not batch.sending:
                if batch.due_s <= now_s:
                    self._request(batch)
                else:
                    next_s = min(next_s, batch.due_s - now_s)
        for backlog, size in (
            (self._intake.texts, MAX_TEXTS),
            (self._intake.metrics, self._batch_size()),
        ):
            while self._places_taken() < self.transport.max_in_flight:
                count, since_s = backlog.ready(self._busy)
                due_s = since_s + self._settings.linger_s
                if not count:
                    break
                if count < size and not hurry and due_s > now_s:
                    next_s = min(next_s, due_s - now_s)
                    break
                self._begin(backlog.take(size, self._busy))
        return next_s

    def _batch_size(self) -> int:
        return min(self._settings.max_batch_size, self.transport.max_metrics)

    def _places_taken(self) -> int:
        return sum(batch.sending or not batch.aside for batch in self._batches)

    def _begin(self, rows: Rows) -> None:
        """Send these points, which are all metrics, or all parameters and tags."""
        parts = self._encoder.parts(rows)
        keys = set(np.unique(rows["key"]).tolist())
        batch = Batch(deque(parts), keys, in_order=self.keys.kind(rows["key"][0]) != 0)
        self._batches.append(batch)
        self._busy |= batch.keys
        self._request(batch)

    def _request(self, batch: Batch) -> None:
        part = batch.parts[0]

        def done(error: TransportError | None) -> None:
            self._outcomes.put(lambda: self._settle(batch, part, error))
            self._wake()

        def accepted() -> None:
            self._outcomes.put(lambda: self._accept(batch))
            self._wake()

        batch.sending = True
        self.retries += batch.attempt > 0
        try:
            self.transport.send(self._encoder.request(part.rows), done, accepted)
        except Exception as error:
            at_fault = isinstance(error, CONTENT_ERRORS) and not is_passing(error)
            found = RejectedError if at_fault else RetriableError
            done(found(f"it cannot be sent: {error!r}"))

    # What became of a request.

    def _accept(self, batch: Batch) -> None:
        """The next request with these keys may go: what it brings sorts after this, whenever the
        service has stored it."""
        batch.sending = False
        self._went_well(batch)
        self._accepted.append(batch.parts.popleft())
        self._next_part(batch)

    def _settle(self, batch: Batch, part: Part, error: TransportError | None) -> None:
        if part in self._accepted:
            self._accepted.remove(part)
            if error is None:
                self._mark(part.rows)
            else:  # once more, and in nobody's way
                again = Batch(deque([part]), set(), attempt=1, due_s=self.clock.monotonic_s())
                self._batches.append(again)
            return
        batch.sending = False
        if error is None:
            self._stored(batch)
        elif self._is_refusal(batch, error):
            self._refused(batch, error)
        else:
            self._failed(batch, error)

    def _went_well(self, batch: Batch) -> None:
        self.failure = None
        batch.attempt = 0
        if not any(other.attempt and not other.aside for other in self._batches):
            tell_outage(self.run_id, "")
        if self.gone:
            self._park(None)
        self._note()  # before the marks, so that whoever waits for them finds it

    def _stored(self, batch: Batch) -> None:
        self._went_well(batch)
        self._stored_requests += 1
        for other in self._batches:
            if other.aside and not other.parts[0].beside_others:
                # The store takes points: whether it takes this one, will now be known.
                other.due_s = self.clock.monotonic_s()
        self._mark(batch.parts.popleft().rows)
        self._next_part(batch)

    def _is_refusal(self, batch: Batch, error: TransportError) -> bool:
        """Whether the request must not be sent again as it is."""
        several = len(batch.parts[0].rows) > 1
        if isinstance(error, TooLargeError):  # no fault of any point: one alone is tried again
            return several
        if not isinstance(error, RetriableError) or error.retry_after_s:
            return isinstance(error, RejectedError)
        if not batch.is_at_fault(self._stored_requests):
            return False
        if several or isinstance(error, DoubtfulError):
            return True
        # A server that fails for one point, and stores others. But only MLflow can refuse it.
        batch.step_aside()
        warn_once(
            f"run {self.run_id}: the server fails for some points while it stores others; these "
            f"wait, and are tried again: {error.reason}"
        )
        return False

    def _refused(self, batch: Batch, error: TransportError) -> None:
        """Split down to the point at fault; it alone is a dead letter."""
        at_fault = batch.take_apart(blame=not isinstance(error, TooLargeError))
        if at_fault is not None:
            self.failure = error
            self._note()
            row: Any = at_fault[0]
            stream = self.streams[int(row["stream"])]
            self._rejections.add(stream, partial(stream.letter, row, error.reason))
        self._next_part(batch)

    def _next_part(self, batch: Batch) -> None:
        if not batch.parts:
            self._batches.remove(batch)
            self._busy -= batch.keys
            return
        batch.make_ready()
        batch.due_s = self.clock.monotonic_s()

    def _failed(self, batch: Batch, error: TransportError) -> None:
        now_s = self._failed_at_s = self.clock.monotonic_s()
        batch.attempt += 1
        wait_s = self._policy.wait_s(error, batch.attempt)
        batch.due_s = now_s + wait_s
        if batch.aside and not batch.in_order:
            self._busy -= batch.keys  # wherever it is stored later, it sorts before what follows
            batch.keys = set()
        if error.retry_after_s or isinstance(error, (UnauthorisedError, RunGoneError)):
            self._not_before_s = max(self._not_before_s, batch.due_s)
        if not batch.aside:
            tell_outage(self.run_id, error.reason)
        self.failure = error
        if isinstance(error, RunGoneError):
            self._note()  # before the folder is parked, so that whoever stops waiting finds it
            self._park(error.reason)

    def _look_again(self) -> None:
        """Whoever waits for a run that is gone takes its note away, because it may be restored: it
        is tried then, but not sooner than a second after the last try."""
        if all(is_parked(stream.path) for stream in self.streams.values()):
            return
        due_s = self._failed_at_s + LOOK_AGAIN_S
        self._not_before_s = min(self._not_before_s, due_s)
        for batch in self._batches:
            batch.due_s = min(batch.due_s, due_s)

    def _park(self, reason: str | None) -> None:
        """Tell whoever looks at the spool that the run takes no points, or does so again."""
        self.gone = reason is not None
        for stream in self.streams.values():
            try:
                park(stream.path, reason)
            except OSError as error:  # a full disk; no point depends on it
                _log.warning("run %s: the note for who waits: %s", self.run_id, error)

    def _note(self) -> None:
        for stream in self.streams.values():
            stream.reader.note(
                DeliveryNote(
                    retries=self.retries,
                    last_error=self.failure.reason if self.failure else self._intake.trouble,
                    unauthorised=isinstance(self.failure, UnauthorisedError),
                    ties_moved=stream.ties.moved,
                    ties_moved_most_ms=stream.ties.moved_most_ms,
                    warnings=tuple(self.transport.warnings(self.run_id)),
                )
            )

    def _mark(self, rows: Rows) -> None:
        for number in np.unique(rows["stream"]).tolist():
            self.streams[number].mark(rows)
