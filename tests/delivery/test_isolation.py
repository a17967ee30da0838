"""One point never stops a run: what it makes raise, at whatever step of its way, is a dead letter
of that point alone, and what only cannot be done now is no point's fault."""

from __future__ import annotations

import errno
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowbuffer.delivery.encoding import Encoder
from flowbuffer.delivery.key_numbers import RunKeys
from flowbuffer.delivery.ordering import Backlog, TieRule
from flowbuffer.delivery.stream import Stream
from flowbuffer.logger.handle import Handle
from flowbuffer.spool import dead_letters
from flowbuffer.spool.layout import PARAM
from flowbuffer.spool.outcomes import Outcome, slot_outcomes
from flowbuffer.spool.reading import blocks, key_table, reader
from flowbuffer.spool.tally import tally
from flowbuffer.spool.writing.places import Places
from flowbuffer.testing import FakeTransport
from support.small_spool import SmallSpool

#: The value of the point at fault.
BAD = 13.0

Plant = Callable[[pytest.MonkeyPatch, Callable[[], Exception | None]], None]


def plant(module: Any, name: str, is_bad: Callable[..., bool]) -> Plant:
    """Raises in a function whose arguments have the point at fault among them."""

    def planted(patch: pytest.MonkeyPatch, error: Callable[[], Exception | None]) -> None:
        original = getattr(module, name)

        def raises(*args: Any, **kwargs: Any) -> Any:
            if is_bad(*args, **kwargs):
                raised = error()
                if raised is not None:
                    raise raised
            return original(*args, **kwargs)

        patch.setattr(module, name, raises)

    return planted


def in_column(column: Any) -> bool:
    return bool(np.isin(BAD, column))


#: Each step of the way of a metric, of a series, and of a text.
STEPS: dict[str, tuple[str, Plant]] = {
    "key table": ("key", plant(key_table, "name_of", lambda key: key == "bad")),
    "columns": (
        "value",
        plant(blocks, "sound_slots", lambda _, rows, *_a: in_column(rows["value"])),
    ),
    "time": ("value", plant(blocks, "_columns", lambda _, rows: in_column(rows["value"]))),
    "series": ("series", plant(blocks, "series_columns", lambda _, slot: slot[4] == 3)),
    "text": ("text", plant(blocks, "text_at", lambda *_: True)),
    "numbers": ("key", plant(RunKeys, "_number", lambda _, _kind, key: key == "bad")),
    "ties": ("value", plant(TieRule, "_apply", lambda _, block, *_a: in_column(block.value))),
    "one tie": (
        "tie",
        plant(TieRule, "_follow", lambda _, _name, columns, *_a: in_column(columns[3])),
    ),
    "rows": ("value", plant(Stream, "_as_rows", lambda _, block: in_column(block.value))),
    "backlog": ("value", plant(Backlog, "add", lambda _, rows, *_a: in_column(rows["value"]))),
    "request": ("value", plant(Encoder, "request", lambda _, rows: in_column(rows["value"]))),
    "text again": ("text", plant(reader, "text_at", lambda *_: True)),
    "transport": ("value", plant(FakeTransport, "send", lambda _, r, *_a: BAD in r.values)),
}
ERRORS: list[Callable[[], Exception]] = [
    lambda: ValueError("planted"),
    lambda: OverflowError("planted"),
    lambda: struct.error("planted"),
    lambda: UnicodeDecodeError("utf-8", b"x", 0, 1, "planted"),
    lambda: KeyError("planted"),
]


@pytest.fixture(params=[4, 64])
def spool(tmp_path: Path, request: pytest.FixtureRequest) -> SmallSpool:
    return SmallSpool(tmp_path / "spool", FakeTransport(2), request.param, max_batch_size=7)


def bad_one(spool: SmallSpool, kind: str) -> Places:
    producer = spool.producer
    if kind == "series":
        return producer.append_series("bad", [BAD, 1.0, 2.0])
    if kind == "text":
        return producer.append_texts(PARAM, {"bad": "text"})
    if kind == "key":
        return producer.append("bad", BAD)
    if kind == "tie":  # the clock was set back, and the step falls
        spool.clock.set_wall(spool.clock.now_ns() / 1e9 - 1)
        return producer.append("k0", BAD, step=-1)
    return producer.append("k1", BAD)


def log(spool: SmallSpool, kind: str) -> Handle:
    """40 points of two keys, one at fault in their midst; its handle."""
    producer = spool.producer
    for value in range(20, 60):
        if value == 37:
            handle = Handle(bad_one(spool, kind))
        producer.append(f"k{value % 2}", float(value))
        spool.clock.turn(0.001)
    return handle


def check(spool: SmallSpool, handle: Handle, points: int = 1) -> None:
    """Everything else came in order, and the point at fault is the only dead letter, also for a
    sender that reads all of it again."""
    for key in (0, 1):
        assert spool.values(f"k{key}") == [float(v) for v in range(20, 60) if v % 2 == key]
    (letter,) = dead_letters.read(spool.directory.path)
    assert letter.points == points
    assert "planted" in letter.reason or "the slot is damaged" in letter.reason
    assert slot_outcomes(handle[0].path, [handle[1]]) == [Outcome.REJECTED]
    assert "planted" in str(handle.exception(0)) or "damaged" in str(handle.exception(0))
    found = tally(spool.directory.path)
    assert found is not None
    assert (found.delivered, found.rejected, found.pending) == (40, points, 0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error()).__name__)
def test_a_point_that_raises_is_the_only_dead_letter(
    spool: SmallSpool,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: Callable[[], Exception],
) -> None:
    """Whatever one point makes raise, the others are delivered, in order, before a restart and
    after one, and are moved as they were."""
    kind, planted = STEPS[step]
    planted(monkeypatch, error)
    handle = log(spool, kind)
    spool.deliver()
    check(spool, handle, 3 if step == "series" else 1)
    rows = set(spool.transport.rows)
    spool.new_sender(alive=True)
    spool.producer.append("k0", 0.5)
    spool.deliver()
    assert spool.values("k0")[-1] == 0.5
    assert rows < spool.transport.rows
    assert len(list(dead_letters.read(spool.directory.path))) == 1


PASSING: list[Callable[[], Exception]] = [
    lambda: OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    MemoryError,
]
#: Further steps at which a file is opened, or written.
FILES: dict[str, tuple[str, Plant]] = {
    **STEPS,
    "keys": ("key", plant(key_table, "read_file", lambda *_, **__: True)),
    "segment": ("value", plant(reader, "mapped_segment", lambda *_: True)),
    "journal": ("series", plant(blocks, "series_columns", lambda *_: True)),
    "carry": ("value", plant(reader, "write_carry", lambda *_: True)),
    "names": ("value", plant(os, "listdir", lambda *_: True)),
    "is there": ("value", plant(reader, "is_there", lambda *_: True)),
}


@pytest.mark.parametrize("step", FILES)
@pytest.mark.parametrize("error", PASSING, ids=lambda error: repr(error()))
def test_what_cannot_be_done_now_is_no_points_fault(
    spool: SmallSpool,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: Callable[[], Exception],
) -> None:
    """For want of descriptors, memory or permission nothing is rejected, buried or put aside: it is
    tried again, and everything is delivered, in order."""
    times = iter(range(6))
    kind, planted = FILES[step]
    planted(monkeypatch, lambda: None if next(times, None) is None else error())
    handle = log(spool, kind)
    for _ in range(60):
        try:
            spool.sender.step(hurry=True)
        except OSError:  # a look from outside, at which the test's own patch raises
            pass
        spool.clock.turn(1.0)
    for key in (0, 1):
        values = [float(v) for v in range(20, 60) if v % 2 == key]
        if kind == ("tie", "value")[key]:
            values.insert(values.index(38.0 - key), BAD)
        assert spool.values(f"k{key}") == values
    assert not list(dead_letters.read(spool.directory.path))
    assert not list(spool.directory.path.glob("*.damaged"))
    assert spool.stream.reader.problems == []
    assert slot_outcomes(handle[0].path, [handle[1]]) == [Outcome.DELIVERED]


@pytest.mark.parametrize("step", ["columns", "series", "ties", "backlog", "request"])
def test_a_dead_letter_that_cannot_be_written_now(
    spool: SmallSpool, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A full disk delays a dead letter, and nothing else: all other points are delivered meanwhile,
    and the point is pending until its letter is there."""
    kind, planted = STEPS[step]
    planted(monkeypatch, ERRORS[0])
    with monkeypatch.context() as disk:
        plant(dead_letters, "append", lambda *_: True)(
            disk, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        )
        handle = log(spool, kind)
        for _ in range(60):
            spool.sender.step(hurry=True)
            spool.clock.turn(0.5)
        assert slot_outcomes(handle[0].path, [handle[1]]) == [Outcome.PENDING]
        assert not handle.done()
        if step not in ("columns", "series"):  # what is behind bytes that cannot be read waits
            assert len(spool.history("k0")) == 20
    spool.deliver()
    check(spool, handle, 3 if step == "series" else 1)


def test_a_letter_that_cannot_be_made(spool: SmallSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even the letter of a point raises, a shorter one is written."""
    STEPS["request"][1](monkeypatch, ERRORS[0])
    monkeypatch.setattr(Stream, "_letter", lambda *_: 1 / 0)
    handle = log(spool, "value")
    spool.deliver()
    check(spool, handle)


def test_what_a_spool_may_hold_already(spool: SmallSpool) -> None:
    """Steps, times and values at the ends of their types, in a spool already, are delivered."""
    ends = [(2**63 - 1, 0), (-(2**63), 0), (0, 2**63 - 1), (0, 2**63 - 1), (1, 0), (-1, 2**63 - 1)]
    for step, time in ends:
        spool.producer.append("ends", 1.0, step, time)
    spool.producer.append_series("far", [1.0, 2.0], [-(2**63), 2**63 - 1], [2**63 - 1, 2**63 - 1])
    for value in (1e308, 5e-324, math.nan, math.inf, -math.inf, -0.0):
        spool.producer.append("values", value, 0, 2**63 - 1)
    spool.producer.append("after", 1.0)
    spool.deliver()
    assert spool.values("after") == [1.0]
    assert not list(dead_letters.read(spool.directory.path))
    found = tally(spool.directory.path)
    assert found is not None
    assert (found.delivered, found.pending) == (len(ends) + 9, 0)


def test_a_wiped_folder_ends_its_delivery(
    spool: SmallSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rejected point of a folder that was wiped is waited for by nobody for ever."""
    STEPS["request"][1](monkeypatch, ERRORS[0])
    log(spool, "value")
    spool.sender.step(hurry=True)
    spool.sender.step(hurry=True)
    shutil.rmtree(spool.directory.path)
    for _ in range(60):
        spool.sender.step(hurry=True)
        spool.clock.turn(1.0)
    assert spool.sender.idle
