"""The rule for ties, and how batches are made: pure functions on arrays."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbuffer.delivery.ordering import ROW, Backlog, TieRule
from flowbuffer.spool.reading.columns import Block

# (key, time in ms, step, explicit, value): few of each, so that ties are the rule.
Point = tuple[int, int, int, bool, float]
VALUES = st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf, -math.inf])
POINTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(-1, 3), st.booleans(), VALUES),
    max_size=40,
)


def block(points: list[Point]) -> Block:
    keys, times, steps, explicit, values = zip(*points, strict=True) if points else ((),) * 5
    n = len(points)
    return Block(
        segment=0,
        ends_segment=False,
        slot=np.arange(n, dtype=np.int32),
        key=np.array(keys, np.uint32),
        time=np.array(times, np.int64),
        explicit=np.array(explicit, np.bool_),
        value=np.array(values, np.float64),
        step=np.array(steps, np.int64),
        state=np.ones(n, np.uint8),
        kind=np.zeros(n, np.uint8),
    )


def applied(rule: TieRule, points: list[Point]) -> list[int]:
    return rule.apply(block(points)).tolist()


def runs_backwards(points: list[Point]) -> bool:
    """Whether a time that the caller gave is before the last one of its key."""
    last: dict[int, int] = {}
    clock = 0
    for key, time, _, explicit, _ in points:
        if not explicit:
            clock = time = max(clock, time)
        if explicit and time < last.get(key, 0):
            return True
        last[key] = time
    return False


def stored(value: float) -> float:
    """As MLflow's SQL stores have it, NaN being a column of its own."""
    most = sys.float_info.max
    return 0.0 if math.isnan(value) else min(max(value, -most), most)


@given(POINTS)
def test_a_key_reads_back_as_logged(points: list[Point]) -> None:
    """P2: sorted by (time, step, value), as MLflow sorts, each key's points are in the order
    of the calls, none equal, but that the same given point twice in a row is one point."""
    times = applied(TieRule(), points)
    if runs_backwards(points):
        return  # the promise does not cover it
    for key in {point[0] for point in points}:
        own = [
            (repr(point[4]), point[3], (time, point[2], stored(point[4])))
            for time, point in zip(times, points, strict=True)
            if point[0] == key
        ]
        sent = [
            row
            for (before, _, row_before), (value, explicit, row) in itertools.pairwise(
                [("", False, ()), *own]
            )
            if not explicit or (value, row) != (before, row_before)
        ]
        assert sent == sorted(set(sent))


@given(POINTS)
def test_nothing_moves_back(points: list[Point]) -> None:
    """P3: a point only ever moves forward in time."""
    times = applied(TieRule(), points)
    assert all(time >= point[1] for time, point in zip(times, points, strict=True))


@given(POINTS)
def test_implicit_points_never_collide(points: list[Point]) -> None:
    """P2: a point whose time the caller did not give equals no other one of its key before it."""
    times = applied(TieRule(), points)
    seen: set[tuple[int, int, int, float]] = set()
    for time, (key, _, step, explicit, value) in zip(times, points, strict=True):
        row = (key, time, step, stored(value))
        assert explicit or row not in seen
        seen.add(row)


@given(POINTS, st.lists(st.integers(0, 40), max_size=4))
def test_a_restart_moves_points_identically(points: list[Point], cuts: list[int]) -> None:
    """P4: cut into blocks, with the state taken to bytes and back between them, nothing differs."""
    whole = applied(TieRule(), points)
    pieces: list[int] = []
    rule = TieRule()
    bounds = [0, *sorted(min(cut, len(points)) for cut in cuts), len(points)]
    for first, last in itertools.pairwise(bounds):
        pieces += applied(rule, points[first:last])
        rule = TieRule(rule.state())
    assert pieces == whole


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        pytest.param([(0, 5, 0, False, 0.0)] * 3, [5, 6, 7], id="a tie moves by the fewest ms"),
        pytest.param(
            [(0, 5, 0, False, 0.0), (0, 5, 1, False, 0.0)], [5, 5], id="a rising step moves nothing"
        ),
        pytest.param(
            [(0, 5, 0, False, 0.0), (0, 5, 0, False, 0.5)],
            [5, 5],
            id="a rising value moves nothing",
        ),
        pytest.param(
            [(0, 5, 0, True, 1.0), (0, 5, 0, True, 0.5)], [5, 6], id="a falling value moves"
        ),
        pytest.param([(0, 5, 0, False, math.nan), (0, 5, 0, False, 0.0)], [5, 6], id="NaN is as 0"),
        pytest.param(
            [(0, 5, 1, False, 0.0), (0, 5, 0, False, 0.0)], [5, 6], id="a falling step moves"
        ),
        pytest.param(
            [(0, 5, 0, False, 0.0), (0, 3, 1, False, 0.0)], [5, 5], id="the clock was set back"
        ),
        pytest.param([(0, 5, 0, False, 0.0), (1, 3, 0, False, 0.0)], [5, 5], id="for every key"),
        pytest.param(
            [(0, 5, 0, True, 0.0), (0, 3, 0, True, 0.0)], [5, 3], id="a given time may run back"
        ),
        pytest.param(
            [(0, 5, 0, True, value) for value in (1.0, 2.0, 3.0, 2.0, 1.0, 2.0, 3.0, 2.0, 1.0)]
            + [(0, 6, 0, True, 0.0)],
            [5, 5, 5, 6, 7, 7, 7, 8, 9, 10],
            id="given ties move",
        ),
        pytest.param(
            [(0, 5, 0, True, 1.0)] * 2 + [(0, 5, 0, True, 0.5)] * 2 + [(0, 5, 1, True, 0.5)],
            [5, 5, 6, 6, 6],
            id="a given point that is the last one again is the same point",
        ),
        pytest.param(
            [(0, 5, 0, True, math.nan)] * 2 + [(0, 5, 0, True, 0.0)], [5, 5, 6], id="NaN, too"
        ),
        pytest.param([(0, 5, 0, True, 0.0), (1, 3, 0, True, 0.0)], [5, 3], id="keys do not mix"),
        pytest.param(
            [(0, 9, 0, True, 0.0), (0, 2, 0, False, 0.0)], [9, 10], id="after a given one"
        ),
    ],
)
def test_the_rule_by_example(points: list[Point], expected: list[int]) -> None:
    """P3: only a point that would come back out of order or collapse moves."""
    rule = TieRule()
    assert applied(rule, points) == expected
    moves = [sent - point[1] for sent, point in zip(expected, points, strict=True)]
    assert (rule.moved, rule.moved_most_ms) == (sum(move > 0 for move in moves), max(moves))


def rows(keys: list[int]) -> np.ndarray:
    made = np.zeros(len(keys), ROW)
    made["key"] = keys
    made["slot"] = np.arange(len(keys))
    return made


def test_a_batch_takes_consecutive_points_of_few_keys() -> None:
    """Under backlog a batch holds few distinct keys, because that halves the server's cost."""
    backlog = Backlog()
    backlog.add(rows([0, 1, 2, 3] * 10), 0.0)
    batch = backlog.take(20, set())
    assert batch["key"].tolist() == [0] * 10 + [1] * 10
    assert backlog.count == 20


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 7), st.sets(st.integers(0, 5)))
def test_batches_keep_the_order_of_each_key(keys: list[int], size: int, busy: set[int]) -> None:
    """P2: taken batch by batch, each key's points come in order, and no busy key is taken."""
    backlog = Backlog()
    half = len(keys) // 2
    backlog.add(rows(keys)[:half], 0.0)
    backlog.add(rows(keys)[half:], 0.0)
    free, _ = backlog.ready(busy)
    taken = []
    while len(batch := backlog.take(size, busy)):
        assert len(batch) <= size
        taken.append(batch)
    everything = np.concatenate([rows([]), *taken])
    assert len(everything) == free == sum(key not in busy for key in keys)
    for key in set(keys) - busy:
        slots = everything["slot"][everything["key"] == key].tolist()
        assert slots == [slot for slot, own in enumerate(keys) if own == key]


def test_no_key_starves() -> None:
    """A key with an endless backlog does not keep the others from being sent."""
    backlog = Backlog()
    backlog.add(rows([0] * 100 + [1]), 0.0)
    backlog.take(10, set())
    assert 1 in backlog.take(10, set())["key"]


def about(points: list[tuple[int, Point]]) -> tuple[Block, np.ndarray]:
    """Points of one name, each about a model or none: with its key id, which is not 0 if it is."""
    made = block([point for _, point in points])
    keys = np.array([key for key, _ in points], np.uint32)
    return replace(made, key=keys), np.zeros(len(points), np.uint32)


def test_a_name_whose_first_key_is_not_the_lowest() -> None:
    """Threads that add one name at once give it several ids, which may be in any order in the file
    of keys: the points are of one history, whichever id they have, and after a restart."""
    rule = TieRule()
    lower = block([(0, 5, 0, False, 1.0)])
    assert rule.apply(lower, np.array([2], np.uint32)).tolist() == [5]
    rule = TieRule(rule.state())
    both = block([(2, 5, 0, False, 0.5), (0, 5, 0, False, 0.25)])
    assert rule.apply(both, np.array([2, 2], np.uint32)).tolist() == [6, 7]


@pytest.mark.parametrize("models", [1, 2, 6])
@pytest.mark.parametrize("values", [[0.9], [0.8, 0.9], [0.9, 0.8], [1.0, 2.0, 3.0, 2.0, 1.0]])
@pytest.mark.parametrize("same_ms", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_a_history_that_is_logged_again(
    models: int, values: list[float], same_ms: bool, cut: int
) -> None:
    """What log_model reads and logs again about each model are the rows that are there; the next
    point comes behind them. The same if a restart is in between."""
    rule = TieRule()
    first = [(0, (0, 5 if same_ms else 5 + n, 0, False, v)) for n, v in enumerate(values)]
    times = rule.apply(*about(first)).tolist()
    history = sorted({(time, value) for time, value in zip(times, values, strict=True)})
    assert [value for _, value in history] == values
    again = [
        (model + 1, (0, time, 0, True, value)) for model in range(models) for time, value in history
    ]
    sent = rule.apply(*about(again[:cut])).tolist()
    rule = TieRule(rule.state())
    sent += rule.apply(*about(again[cut:])).tolist()
    assert sent == [time for _ in range(models) for time, _ in history]
    (last,) = rule.apply(*about([(0, (0, 5, 0, False, 0.1))])).tolist()
    assert (last, 0.1) > history[-1]


@pytest.mark.parametrize("given", [True, False])
def test_no_time_is_beyond_the_last(given: bool) -> None:
    """At the end of int64 points that would be moved beyond the largest timestamp stay there; those
    of other keys are not affected, and a restart moves them in the same way."""
    latest = 2**63 - 1
    points = [(0, latest, 0, True, 1.0), (1, 5, -(2**63), given, 1.0)]
    points += [
        (0, latest, 0, True, 0.5),
        (0, 5, 2**63 - 1, False, 2.0),
        (1, 5, 2**63 - 1, given, 0),
    ]
    whole = applied(TieRule(), points)
    assert whole == [latest, 5, latest, latest, 5]
    for cut in range(len(points)):
        rule = TieRule()
        pieces = applied(rule, points[:cut])
        assert pieces + applied(TieRule(rule.state()), points[cut:]) == whole


def test_a_block_that_raises_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that cannot be ordered can be given again in parts."""
    rule = TieRule()
    applied(rule, [(0, 5, 0, False, 1.0)])
    before = rule.state()
    with monkeypatch.context() as patched:
        patched.setattr(TieRule, "_follow", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            applied(rule, [(1, 5, 0, False, 1.0), (0, 5, 0, False, 0.5)])
    assert TieRule(rule.state()).state().startswith(before)
    assert applied(rule, [(1, 5, 0, False, 1.0), (0, 5, 0, False, 0.5)]) == [5, 6]
