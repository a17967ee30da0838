"""Order within a run: the rule for ties, and which points make a batch.

MLflow's SQL stores keep a point under (run, key, timestamp, step, value, is_nan) and read a
history back sorted by (timestamp, step, value). So that a history reads back as it was logged, the
points of one key that one producer logged are made strictly rising in (timestamp, step, value).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flowbuffer.spool.columns import Block

_NEVER: Final = -(1 << 62)

_KEY_STATE: Final = np.dtype(
    [
        *[("given", "<i8"), ("time", "<i8"), ("step", "<i8"), ("value", "<f8")],
        *[("top_time", "<i8"), ("top_step", "<i8"), ("top_value", "<f8")],
    ]
)


class TieRule:
    """Moves the points of one producer forward in time where they would collapse or reorder.

    A point whose time its caller did not give is never earlier than one before it (the wall clock
    may be set back). A point that does not rise above the one before it in (time, step, value) gets
    that one's time, and one ms more if it still does not. A time that the caller gave and that is
    before the last one given for that key is left alone.

    The rule depends on the sequence of points and on ``state`` only, so that it does the same
    after a restart.

    Args:
        state: What :meth:`state` returned; empty for a new producer.
    """

    def __init__(self, state: bytes = b"") -> None:
        self.moved = 0
        self.moved_most_ms = 0
        self._clock = _NEVER
        self._keys = np.zeros(0, _KEY_STATE)
        if state:
            self._clock = int(np.frombuffer(state, "<i8", 1)[0])
            self._keys = np.frombuffer(state, _KEY_STATE, offset=8).copy()

    def state(self) -> bytes:
        """All that the next points depend on, as bytes."""
        return np.array([self._clock], "<i8").tobytes() + self._keys.tobytes()

    def apply(self, block: Block, keys: NDArray[np.uint32] | None = None) -> NDArray[np.int64]:
        """The times in ms with which the points of a block are to be sent.

        Args:
            block: Points; parameters and tags keep their times.
            keys: For each point a number of its key's history; by default the block's key ids.
        """
        if keys is not None:
            block = replace(block, key=keys)
        metrics = block.kind == 0
        if not metrics.all():
            time = block.time.copy()
            time[metrics] = self.apply(block.only(metrics))
            return time
        if not len(block.time):
            return block.time
        time = self._risen(block)
        self._grow(int(block.key.max()) + 1)
        by_key = np.argsort(block.key, kind="stable")
        key, sorted_time, step = block.key[by_key], time[by_key], block.step[by_key]
        value = _as_sorted(block.value[by_key])
        starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        ends = np.r_[starts[1:], len(key)]
        known = self._keys[key[starts]]
        points = (sorted_time, step, value)
        rises = np.r_[True, _above([c[1:] for c in points], [c[:-1] for c in points])]
        tops = [known[name] for name in ("top_time", "top_step", "top_value")]
        rises[starts] = _above([c[starts] for c in points], tops)
        plain = np.logical_and.reduceat(rises, starts)
        last = ends[plain] - 1
        rows = np.zeros(len(last), _KEY_STATE)
        rows["given"] = rows["time"] = rows["top_time"] = sorted_time[last]
        rows["step"] = rows["top_step"] = step[last]
        rows["value"] = rows["top_value"] = value[last]
        self._keys[key[last]] = rows
        for start, end in zip(starts[~plain].tolist(), ends[~plain].tolist(), strict=True):
            explicit = block.explicit[by_key[start:end]]
            part = slice(start, end)
            sorted_time[start:end] = self._follow(
                int(key[start]), sorted_time[part], step[part], value[part], explicit
            )
        time[by_key] = sorted_time
        moved = time - block.time
        self.moved += int(np.count_nonzero(moved))
        self.moved_most_ms = max(self.moved_most_ms, int(moved.max()))
        return time

    def _risen(self, block: Block) -> NDArray[np.int64]:
        """The times of the block; those that the caller did not give never run backwards."""
        own = np.where(block.explicit, self._clock, block.time)
        clock = np.maximum.accumulate(np.maximum(own, self._clock))
        self._clock = int(clock[-1])
        return np.where(block.explicit, block.time, clock)

    def _follow(
        self,
        key: int,
        times: NDArray[np.int64],
        steps: NDArray[np.int64],
        values: NDArray[np.float64],
        explicit: NDArray[np.bool_],
    ) -> list[int]:
        """The rule itself, point by point."""
        given, *rest = self._keys[key].tolist()
        last, top = tuple(rest[:3]), tuple(rest[3:])  # (time, step, value)
        result = []
        columns = (column.tolist() for column in (times, steps, values, explicit))
        for time, step, value, is_explicit in zip(*columns, strict=True):
            if is_explicit and time < given:
                moved = time
            else:
                before = last if is_explicit else top
                moved = max(time, before[0])
                if (moved, step, value) <= before:
                    moved += 1
            result.append(moved)
            given, last = time, (moved, step, value)
            top = max(top, last)
        self._keys[key] = (given, *last, *top)
        return result

    def _grow(self, size: int) -> None:
        if size > len(self._keys):
            fresh = np.zeros(max(size, 2 * len(self._keys)), _KEY_STATE)
            for name in ("given", "time", "top_time"):
                fresh[name] = _NEVER
            fresh[: len(self._keys)] = self._keys
            self._keys = fresh


def _as_sorted(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a store sorts by: it has 0 for NaN, and its largest numbers for infinities."""
    return np.nan_to_num(values)


def _above(points: Sequence[NDArray[Any]], others: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Which of these points, columns (time, step, value), sort after the others."""
    (time, step, value), (other_time, other_step, other_value) = points, others
    above: NDArray[np.bool_] = (time > other_time) | (
        (time == other_time)
        & ((step > other_step) | ((step == other_step) & (value > other_value)))
    )
    return above


#: A point on its way: which source (producer) it came from, its segment, slot and key id there, the
#: number of its key in the run, and what is sent.
ROW: Final = np.dtype(
    [
        ("source", "<i4"),
        ("segment", "<i4"),
        ("slot", "<i4"),
        ("key", "<i4"),
        ("identity", "<u4"),
        ("time", "<i8"),
        ("step", "<i8"),
        ("value", "<f8"),
    ]
)
Rows = NDArray[np.void]


def one_each(rows: Rows, once: NDArray[np.bool_]) -> list[Rows]:
    """``rows`` in parts, in none of which a key of the rows that are ``once`` is twice.

    The rows of such a key are in successive parts, in their order.
    """
    seen: dict[int, int] = {}
    part = np.zeros(len(rows), np.int32)
    for at in np.flatnonzero(once).tolist():
        key = int(rows["key"][at])
        part[at] = seen[key] = seen.get(key, -1) + 1
    return [rows[part == number] for number in range(int(part.max()) + 1)]


@dataclass
class _Waiting:
    """The points of one key that wait for a batch, in order."""

    parts: deque[Rows]
    count: int
    since_s: float


class Backlog:
    """The points of one run that were read and are in no batch yet, by key.

    A batch takes whole keys in turn, as many points of each as there are, so that under backlog it
    holds few distinct keys: the server's cost per metric is half of what it is with many. A key
    that is in a batch on its way (its lane) is passed over until that batch is settled.
    """

    def __init__(self) -> None:
        self.count = 0
        self._keys: OrderedDict[int, _Waiting] = OrderedDict()

    def add(self, rows: Rows, now_s: float) -> None:
        """Add points; those of one key come after the ones that are there."""
        if not len(rows):
            return
        self.count += len(rows)
        rows = rows[np.argsort(rows["key"], kind="stable")]
        key = rows["key"]
        starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]).tolist()
        ends = [*starts[1:], len(rows)]
        for identity, start, end in zip(key[starts].tolist(), starts, ends, strict=True):
            waiting = self._keys.get(identity)
            if waiting is None:
                waiting = self._keys[identity] = _Waiting(deque(), 0, now_s)
            waiting.parts.append(rows[start:end])
            waiting.count += end - start

    def ready(self, busy: set[int]) -> tuple[int, float]:
        """The points whose keys are not ``busy``, and when the first of them was added (s).

        With no such points the time is infinity.
        """
        free = [w for key, w in self._keys.items() if key not in busy]
        return sum(w.count for w in free), min((w.since_s for w in free), default=float("inf"))

    def take(self, size: int, busy: set[int]) -> Rows:
        """At most ``size`` points of keys that are not ``busy``, each key's consecutive."""
        parts: list[Rows] = []
        room = size
        for key in list(self._keys):
            if key in busy:
                continue
            waiting = self._keys[key]
            while room and waiting.parts:
                part = waiting.parts.popleft()
                if len(part) > room:
                    waiting.parts.appendleft(part[room:])
                    part = part[:room]
                parts.append(part)
                room -= len(part)
                waiting.count -= len(part)
            if waiting.parts:
                self._keys.move_to_end(key)
            else:
                del self._keys[key]
            if not room:
                break
        self.count -= size - room
        return np.concatenate(parts) if parts else np.zeros(0, ROW)
