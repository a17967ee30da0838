"""Delivery of one run: read, batch, send, mark. One :meth:`Sender.step` does one round.

The sender never waits and has no thread of its own. Requests end on some thread of the transport,
which leaves the outcome for the next step; everything else happens in ``step``.
"""

from __future__ import annotations

import logging
import math
import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowbuffer.clock import Clock
from flowbuffer.errors import (
    DoubtfulError,
    RejectedError,
    RunGoneError,
    TooLargeError,
    TransportError,
    UnauthorisedError,
)
from flowbuffer.ordering import ROW, Backlog, Rows, TieRule, one_each
from flowbuffer.retry import RetryPolicy
from flowbuffer.settings import Settings
from flowbuffer.spool.columns import Block
from flowbuffer.spool.layout import COMMITTED, KEY_SEPARATOR, PARAM, TAG
from flowbuffer.spool.reader import Reader
from flowbuffer.spool.states import park
from flowbuffer.transport import Request, Transport

_log = logging.getLogger("flowbuffer")

#: The most points that are read ahead of their delivery; bounds the sender's memory (48 B each).
WINDOW_POINTS = 131072

#: The most parameters and tags in one request: MLflow takes 100 of each.
MAX_TEXTS = 100

#: How often a request is sent again after a doubtful error before its content is to blame, and how
#: often one of its parts is then.
DOUBTS = 8
DOUBTS_OF_A_PART = 3

_KINDS = {0: "metric", PARAM: "param", TAG: "tag"}


@dataclass
class Source:
    """One producer of the run: its reader and its rule for ties.

    ``paused``: nothing more is read of it; what was read goes on its way. ``key_numbers``: from its
    kinds and key ids to the run's numbers of keys.
    """

    reader: Reader
    ties: TieRule
    paused: bool = False
    key_numbers: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass(eq=False)
class _Part:
    """Points that go in one request.

    ``blamed``: they are the second half of what the server rejected. Once the first half is stored
    the fault must be in them, and sending them as a whole would be a request for nothing.
    """

    rows: Rows
    blamed: bool = False


@dataclass(eq=False)
class _Batch:
    """Points on their way: one part or, once it was refused, several after one another."""

    parts: deque[_Part]
    keys: set[int]
    attempt: int = 0
    due_s: float = 0.0
    sending: bool = False
    is_split: bool = False


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
        self.sources: list[Source | None] = []
        self.transport = transport
        self._settings = settings
        self._clock = clock
        self._wake = wake
        self._policy = policy or RetryPolicy()
        self._window_points = window_points or WINDOW_POINTS
        self._keys: list[str] = []
        self._kinds: list[int] = []  # of the keys: 0 for metrics, PARAM or TAG
        self._key_numbers: dict[tuple[int, str], int] = {}
        self._backlog = Backlog()
        self._texts = Backlog()
        self._batches: list[_Batch] = []
        self._busy: set[int] = set()
        self._outcomes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._accepted: list[_Part] = []  # the service has them, and does not have them stored yet
        self._held_up: type[TransportError] | None = None  # what was told last
        self._not_before_s = -math.inf

    def add(self, reader: Reader) -> Source:
        """Deliver what ``reader`` reads, too."""
        try:
            ties = TieRule(reader.carry)
        except ValueError as error:
            reader.problems.append(f"{reader.folder / 'carry'} is not used: {error}")
            ties = TieRule()
        source = Source(reader, ties)
        self.sources.append(source)
        return source

    def remove(self, source: Source) -> None:
        """Forget a source of which everything is settled."""
        self.sources[self.sources.index(source)] = None

    @property
    def idle(self) -> bool:
        """Nothing is on its way or waiting in memory."""
        return not (self._batches or self._accepted or self._backlog.count or self._texts.count)

    def step(self, *, hurry: bool = False) -> float:
        """One round. Returns the seconds until something is due; infinity if nothing is known.

        Args:
            hurry: Send what is there even if it is little and young.
        """
        while not self._outcomes.empty():
            self._outcomes.get()()
        now_s = self._clock.monotonic_s()
        self._send(now_s, hurry)  # what is there already, so that no backend waits for the reading
        read = self._read(now_s)
        hurry = hurry or any(source.reader.hurried() for source in self._live())
        next_s = self._send(now_s, hurry)
        self._note()
        if read or not self._outcomes.empty():
            return 0.0
        hurry = hurry or any(source.reader.finished for source in self._live())
        if hurry and any(source.reader.has_unripe for source in self._live()):
            return 0.001
        return next_s

    # Reading.

    def _live(self) -> list[Source]:
        return [source for source in self.sources if source is not None]

    def _read(self, now_s: float) -> bool:
        """Read from each source while the window has room; True if anything came."""
        any_read = False
        # What is accepted holds up nothing; it only takes memory.
        window = self._window_points + sum(len(part.rows) for part in self._accepted)
        window = min(window, max(self._window_points, WINDOW_POINTS))
        for number, source in enumerate(self.sources):
            if source is None:
                continue
            room = window - sum(s.reader.on_their_way for s in self._live())
            if room > 0 and not source.paused:
                block = source.reader.read(room)
                if block is not None:
                    any_read = True
                    self._take(number, source, block, now_s)
            source.reader.retire()
        return any_read

    def _take(self, number: int, source: Source, block: Block, now_s: float) -> None:
        time = source.ties.apply(block, source.reader.tie_keys(block.key))
        if block.ends_segment:
            source.reader.keep(block.segment, source.ties.state())
        pending = np.flatnonzero(block.state == COMMITTED)
        rows = np.empty(len(pending), ROW)
        rows["source"], rows["segment"] = number, block.segment
        rows["slot"], rows["time"] = block.slot[pending], time[pending]
        rows["identity"] = block.key[pending]
        rows["step"], rows["value"] = block.step[pending], block.value[pending]
        kind = block.kind[pending]
        rows["key"] = self._numbers(source, kind, block.key[pending])
        self._backlog.add(rows[kind == 0], now_s)
        self._texts.add(rows[kind != 0], now_s)

    def _numbers(
        self, source: Source, kinds: NDArray[np.uint8], identities: NDArray[np.uint32]
    ) -> NDArray[np.int32]:
        """The run's numbers of these keys."""
        both = identities.astype(np.int64) << 8 | kinds
        found, inverse = np.unique(both, return_inverse=True)
        numbers = [self._number(source, one & 0xFF, one >> 8) for one in found.tolist()]
        return np.array(numbers, np.int32)[inverse]

    def _number(self, source: Source, kind: int, identity: int) -> int:
        known = source.key_numbers.get((kind, identity))
        if known is None:
            key = source.reader.key(identity)
            known = self._key_numbers.setdefault((kind, key), len(self._keys))
            if known == len(self._keys):
                self._keys.append(key)
                self._kinds.append(kind)
            source.key_numbers[kind, identity] = known
        return known

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
            (self._texts, MAX_TEXTS),
            (self._backlog, min(self._settings.max_batch_size, self.transport.max_metrics)),
        ):
            while len(self._batches) < self.transport.max_in_flight:
                count, since_s = backlog.ready(self._busy)
                due_s = since_s + self._settings.linger_s
                if not count:
                    break
                if count < size and not hurry and due_s > now_s:
                    next_s = min(next_s, due_s - now_s)
                    break
                self._begin(backlog.take(size, self._busy))
        return next_s

    def _begin(self, rows: Rows) -> None:
        """Send these points, which are all metrics, or all parameters and tags."""
        parts = [rows]
        if self._kinds[rows["key"][0]] != 0:
            # The first value of a parameter is the one that counts, and one request has it once.
            params = np.array([self._kinds[number] == PARAM for number in rows["key"].tolist()])
            parts = one_each(rows, params)
        batch = _Batch(deque(map(_Part, parts)), set(np.unique(rows["key"]).tolist()))
        self._batches.append(batch)
        self._busy |= batch.keys
        self._request(batch)

    def _as_request(self, rows: Rows) -> Request:
        numbers = rows["key"].tolist()
        keys = [self._keys[number] for number in numbers]
        if self._kinds[numbers[0]] == 0:
            columns = (rows[name].tolist() for name in ("value", "time", "step"))
            return Request(self.run_id, keys, *columns)
        texts: dict[int, dict[str, str]] = {PARAM: {}, TAG: {}}
        for number, key, row in zip(numbers, keys, rows, strict=True):
            texts[self._kinds[number]][key] = self._text(row)  # of a tag's values the last one
        return Request(self.run_id, params=[*texts[PARAM].items()], tags=[*texts[TAG].items()])

    def _text(self, row: Any) -> str:
        source = self.sources[int(row["source"])]
        assert source is not None
        return source.reader.text(int(row["segment"]), int(row["step"]), int(row["identity"]))

    def _request(self, batch: _Batch) -> None:
        part = batch.parts[0]
        request = self._as_request(part.rows)
        batch.sending = True
        self.retries += batch.attempt > 0

        def done(error: TransportError | None) -> None:
            self._outcomes.put(lambda: self._settle(batch, part, error))
            self._wake()

        def accepted() -> None:
            self._outcomes.put(lambda: self._accept(batch))
            self._wake()

        self.transport.send(request, done, accepted)

    # What became of a request.

    def _accept(self, batch: _Batch) -> None:
        """The next request with these keys may go: what it brings sorts after this, whenever the
        service has stored it."""
        batch.sending = False
        self._went_well(batch)
        self._accepted.append(batch.parts.popleft())
        self._next_part(batch)

    def _settle(self, batch: _Batch, part: _Part, error: TransportError | None) -> None:
        if part in self._accepted:
            self._accepted.remove(part)
            if error is None:
                self._mark(part.rows)
            else:  # once more, and in nobody's way
                again = _Batch(deque([part]), set(), attempt=1, due_s=self._clock.monotonic_s())
                self._batches.append(again)
            return
        batch.sending = False
        if error is None:
            self._stored(batch)
        elif isinstance(error, (RejectedError, TooLargeError)) or self._is_final(batch, error):
            self._refused(batch, error)
        else:
            self._failed(batch, error)

    def _went_well(self, batch: _Batch) -> None:
        self.failure = None
        batch.attempt = 0
        if self._held_up and not any(other.attempt for other in self._batches):
            self._held_up = None
            _log.warning("run %s: delivery goes on", self.run_id)
        if self.gone:
            self._park(None)
        self._note()  # before the marks, so that whoever waits for them finds it

    def _stored(self, batch: _Batch) -> None:
        self._went_well(batch)
        self._mark(batch.parts.popleft().rows)
        self._next_part(batch)

    def _is_final(self, batch: _Batch, error: TransportError) -> bool:
        """Whether a doubtful error has come so often that the content must be at fault."""
        most = DOUBTS_OF_A_PART if batch.is_split else DOUBTS
        return isinstance(error, DoubtfulError) and batch.attempt >= most

    def _refused(self, batch: _Batch, error: TransportError) -> None:
        """Split down to the point at fault; it alone is a dead letter."""
        batch.attempt = 0
        for part in batch.parts:
            part.blamed = False  # the fault is in the first part; in others there need be none
        rows = batch.parts[0].rows
        if len(rows) > 1:
            self._split(batch, blame=not isinstance(error, TooLargeError))
        else:
            self._reject(rows, error)
            batch.parts.popleft()
        self._next_part(batch)

    def _split(self, batch: _Batch, *, blame: bool) -> None:
        batch.is_split = True
        rows = batch.parts.popleft().rows
        half = (len(rows) + 1) // 2
        batch.parts.extendleft([_Part(rows[half:], blamed=blame), _Part(rows[:half])])

    def _next_part(self, batch: _Batch) -> None:
        if not batch.parts:
            self._batches.remove(batch)
            self._busy -= batch.keys
            return
        while batch.parts[0].blamed and len(batch.parts[0].rows) > 1:
            self._split(batch, blame=True)  # as a whole it would be refused
        batch.due_s = self._clock.monotonic_s()

    def _failed(self, batch: _Batch, error: TransportError) -> None:
        now_s = self._clock.monotonic_s()
        batch.attempt += 1
        wait_s = self._policy.wait_s(error, batch.attempt)
        batch.due_s = now_s + wait_s
        if error.retry_after_s or isinstance(error, (UnauthorisedError, RunGoneError)):
            self._not_before_s = max(self._not_before_s, batch.due_s)
        if self._held_up is not type(error):
            self._held_up = type(error)
            _log.warning(
                "run %s: delivery is held up and goes on trying; the points are safe in the spool: "
                "%s", self.run_id, error.reason,
            )  # fmt: skip
        self.failure = error
        if isinstance(error, RunGoneError):
            self._park(error.reason)

    def _park(self, reason: str | None) -> None:
        """Tell whoever looks at the spool that the run takes no points, or does so again."""
        self.gone = reason is not None
        for source in self._live():
            park(source.reader.folder, reason)

    def _note(self) -> None:
        for source in self._live():
            source.reader.note(
                {
                    "retries": self.retries,
                    "last_error": "" if self.failure is None else self.failure.reason,
                    "unauthorised": isinstance(self.failure, UnauthorisedError),
                    "ties_moved": source.ties.moved,
                    "ties_moved_most_ms": source.ties.moved_most_ms,
                    "warnings": self.transport.warnings(self.run_id),
                }
            )

    def _mark(self, rows: Rows, *, rejected: bool = False) -> None:
        for number in np.unique(rows["source"]).tolist():
            source = self.sources[number]
            assert source is not None
            own = rows[rows["source"] == number]
            for segment in np.unique(own["segment"]).tolist():
                slots = own["slot"][own["segment"] == segment]
                source.reader.mark(segment, slots, rejected=rejected)

    def _reject(self, rows: Rows, error: TransportError) -> None:
        row: Any = rows[0]
        source = self.sources[int(row["source"])]
        assert source is not None
        number = int(row["key"])
        key, *about = self._keys[number].split(KEY_SEPARATOR)
        letter: dict[str, Any] = {
            "run_id": self.run_id,
            "kind": _KINDS[self._kinds[number]],
            "key": key,
        }
        if self._kinds[number]:
            letter["value"] = self._text(row)
        else:
            value = float(row["value"])
            letter["value"] = value if math.isfinite(value) else str(value)
            letter["step"] = int(row["step"])
        if about:
            letter["about"] = about
        letter |= {
            "timestamp": int(row["time"]),
            "reason": error.reason,
            "segment": int(row["segment"]),
            "slot": int(row["slot"]),
        }
        self.failure = error
        self._note()
        try:
            source.reader.dead_letter(letter)
        except OSError as problem:
            # Not marked, so that it stays; whoever delivers the folder next tries it again.
            _log.warning("run %s: a rejected point cannot be kept: %s", self.run_id, problem)
            return
        self._mark(rows, rejected=True)
        _log.warning(
            "run %s: the %s %r was rejected: %s", self.run_id, letter["kind"], key, error.reason
        )
