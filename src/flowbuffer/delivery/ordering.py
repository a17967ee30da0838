"""Order within a run: the rule for ties, and which points make a batch.

MLflow's SQL stores keep a point under (run, key, timestamp, step, value, is_nan) and read a
history back sorted by (timestamp, step, value). So that a history reads back as it was logged, the
points of one key that one producer logged are made strictly rising in (timestamp, step, value).
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowbuffer.spool.reading.columns import Block

_NEVER: Final = -(1 << 62)
#: The largest timestamp that MLflow's stores take, in ms.
_LATEST: Final = (1 << 63) - 1
_LARGEST: Final = sys.float_info.max

#: Of each key: of its last point the time that was given or is its own, the time it was sent with,
#: step and value. Of each name, at the first of its keys: the highest point that was sent.
_KEY_STATE: Final = np.dtype(
    [
        *[("given", "<i8"), ("time", "<i8"), ("step", "<i8"), ("value", "<f8")],
        *[("top_time", "<i8"), ("top_step", "<i8"), ("top_value", "<f8")],
    ]
)
_LAST: Final = ("given", "time", "step", "value")
_TOP: Final = ("top_time", "top_step", "top_value")


class TieRule:
    """Moves the points of one producer forward in time where they would collapse or reorder.

    A point whose time its caller did not give is never earlier than one before it (the wall clock
    may be set back). If it does not rise above all before it in (time, step, value), it gets the
    time of the highest, and one ms more if it still does not.

    A point with a given time is compared only with the one before it of its own key, which is of
    one name about one model or dataset: MLflow's ``log_model`` reads a history back and logs it
    again about the new model, and these rows have to stay the ones that are there. If its time is
    earlier than the last one given, it is left alone. If it is the last one again (time, step and
    value) it is the same point, as it is for MLflow, and goes with the same time. Else it rises
    above the last one in the same way. So given points of one time that are not equal, like
    1, 2, 1, all come back, in their order.

    No point is moved beyond the largest timestamp. The rule depends on the sequence of points and
    on ``state`` only, so that it does the same after a restart. What raises changes nothing.

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

    def copy(self) -> TieRule:
        """Another one that goes on from here."""
        other = TieRule(self.state())
        other.moved, other.moved_most_ms = self.moved, self.moved_most_ms
        return other

    def apply(self, block: Block, names: NDArray[np.uint32] | None = None) -> NDArray[np.int64]:
        """The times in ms with which the points of a block are to be sent.

        Args:
            block: Points; parameters and tags keep their times.
            names: For each point the id of the first key with its name, so of its history; by
                default each key is a name of its own.
        """
        names = block.key if names is None else names
        metrics = block.kind == 0
        if not metrics.all():
            time = block.time.copy()
            time[metrics] = self._apply(block.only(metrics), names[metrics])
            return time
        return self._apply(block, names)

    def _apply(self, block: Block, names: NDArray[np.uint32]) -> NDArray[np.int64]:
        if not len(block.time):
            return block.time
        clock, time = self._risen(block)
        # A name's first id may be higher than its others: threads may add one name at once.
        self._grow(max(int(block.key.max()), int(names.max())) + 1)
        by_name = np.argsort(names, kind="stable")
        name, key, step = names[by_name], block.key[by_name], block.step[by_name]
        raw, sorted_time = block.value[by_name], time[by_name]
        value = _as_sorted(raw)
        starts = np.flatnonzero(np.r_[True, name[1:] != name[:-1]])
        ends = np.r_[starts[1:], len(name)]
        points = (sorted_time, step, value)
        rises = np.r_[True, _above([c[1:] for c in points], [c[:-1] for c in points])]
        tops = [self._keys[name[starts]][field] for field in _TOP]
        rises[starts] = _above([c[starts] for c in points], tops)
        plain = np.logical_and.reduceat(rises, starts)
        # Where each point of a name rises above all before it, nothing moves. Else, one by one.
        followed = []
        for start, end in zip(starts[~plain].tolist(), ends[~plain].tolist(), strict=True):
            part = slice(start, end)
            columns = (key[part], sorted_time[part], step[part], raw[part])
            found = self._follow(int(name[start]), columns, block.explicit[by_name[part]])
            sorted_time[part] = found.times
            followed.append(found)
        time[by_name] = sorted_time
        moved = time - block.time
        # From here on nothing raises.
        self._clock = clock
        by_key = np.argsort(key, kind="stable")
        last = by_key[np.r_[key[by_key][1:] != key[by_key][:-1], True]]
        last = last[np.repeat(plain, ends - starts)[last]]
        for field, column in zip(_LAST, (sorted_time, sorted_time, step, raw), strict=True):
            self._keys[field][key[last]] = column[last]
        last = ends[plain] - 1
        for field, column in zip(_TOP, points, strict=True):
            self._keys[field][name[last]] = column[last]
        for found in followed:
            for identity, of_key in found.last.items():
                for field, number in zip(_LAST, of_key, strict=True):
                    self._keys[field][identity] = number
            for field, number in zip(_TOP, found.top, strict=True):
                self._keys[field][found.name] = number
        self.moved += int(np.count_nonzero(moved))
        self.moved_most_ms = max(self.moved_most_ms, int(moved.max()))
        return time

    def _risen(self, block: Block) -> tuple[int, NDArray[np.int64]]:
        """The times of the block; those that the caller did not give never run backwards. And the
        last of these."""
        own = np.where(block.explicit, self._clock, block.time)
        clock = np.maximum.accumulate(np.maximum(own, self._clock))
        return int(clock[-1]), np.where(block.explicit, block.time, clock)

    def _follow(
        self, name: int, columns: Sequence[NDArray[Any]], explicit: NDArray[np.bool_]
    ) -> _Followed:
        """The rule itself, point by point, for the points of one name: columns (key, time, step,
        value)."""
        last: dict[int, tuple[int, int, int, float]] = {}
        top = tuple(self._keys[field][name].item() for field in _TOP)
        times = []
        lists = (column.tolist() for column in (*columns, explicit))
        for key, time, step, raw, is_given in zip(*lists, strict=True):
            value = _sorted_as(raw)
            before = top
            is_alone = is_same = False
            if is_given:
                given, last_time, last_step, last_raw = last.get(key) or tuple(
                    self._keys[field][key].item() for field in _LAST
                )
                before = (last_time, last_step, _sorted_as(last_raw))
                is_alone = time < given
                is_same = (time, step) == (given, last_step) and repr(raw) == repr(last_raw)
            moved = time if is_alone else max(time, before[0])
            if not (is_alone or is_same) and (moved, step, value) <= before:
                moved = min(moved + 1, _LATEST)
            times.append(moved)
            last[key] = (time, moved, step, raw)
            top = max(top, (moved, step, value))
        return _Followed(name, times, last, top)

    def _grow(self, size: int) -> None:
        if size > len(self._keys):
            fresh = np.zeros(max(size, 2 * len(self._keys)), _KEY_STATE)
            for field in ("given", "time", "top_time"):
                fresh[field] = _NEVER
            fresh[: len(self._keys)] = self._keys
            self._keys = fresh


class _Followed(NamedTuple):
    """Points of one name: the times to send them with, and the state after them: of each key the
    fields ``_LAST``, and of the name the fields ``_TOP``."""

    name: int
    times: list[int]
    last: dict[int, tuple[int, int, int, float]]
    top: tuple[Any, ...]


def _as_sorted(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a store sorts by: it has 0 for NaN, and its largest numbers for infinities."""
    return np.nan_to_num(values)


def _sorted_as(value: float) -> float:
    """:func:`_as_sorted` of one value."""
    return 0.0 if math.isnan(value) else min(max(value, -_LARGEST), _LARGEST)


def _above(points: Sequence[NDArray[Any]], others: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Which of these points, columns (time, step, value), sort after the others."""
    (time, step, value), (other_time, other_step, other_value) = points, others
    above: NDArray[np.bool_] = (time > other_time) | (
        (time == other_time)
        & ((step > other_step) | ((step == other_step) & (value > other_value)))
    )
    return above


#: A point on its way: which stream (producer) it came from, its segment, slot and key id there, the
#: number of its key in the run, and what is sent.
ROW: Final = np.dtype(
    [
        ("stream", "<i4"),
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
        """Add points; those of one key come after the ones that are there. Points that raise change
        nothing."""
        if not len(rows):
            return
        rows = rows[np.argsort(rows["key"], kind="stable")]
        key = rows["key"]
        starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]).tolist()
        ends = [*starts[1:], len(rows)]
        self.count += len(rows)
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
