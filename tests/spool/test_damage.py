"""Damage: a spool whose bytes were cut off or changed is read to its end, and the loss is reported.

One small spool is made by a real producer, its lock let go as a killed one does. Each case damages
one file of a copy, delivers the copy with a collector as the next process would, and once more
with another one, and compares with what an undamaged copy delivers.
"""

import json
import logging
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from flowbuffer import Settings
from flowbuffer.backends.mlflow_transport import Request
from flowbuffer.collector.collector import POLL_S, Collector
from flowbuffer.collector.policies import THREAD
from flowbuffer.errors import RejectedError, TransportError
from flowbuffer.spool import layout
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.producer_info import this_producer
from flowbuffer.spool.reading.reader import Reader
from flowbuffer.spool.writing.producer import Producer
from flowbuffer.testing import FakeTransport, ManualClock
from support.listening import listening
from support.sampling import part_of

RUN = "0123456789abcdef0123456789abcdef"
URI = "https://my_host/mlflow"
SLOTS = 8
SERIES_SLOT = 2  # of segment 1, as is
EXPLICIT_SLOT = 4
HEADER = layout.SEGMENT_HEADER_SIZE
CHECKED_HEADER = layout.CHECKSUM_OFFSET + 4

#: (run, key, time, step, value), and the server that it went to.
Row = tuple[tuple[str, str, int, int, str], str]


@dataclass
class Outcome:
    """What came of a spool: rows by server, what was said, and what is left of the folder."""

    rows: set[Row]
    said: list[str]
    files: dict[str, bytes]

    @property
    def letters(self) -> int:
        return self.files.get("rejected.jsonl", b"").count(b"\n")


class Sample:
    """The spool that the cases damage copies of."""

    def __init__(self, folder: Path) -> None:
        self.files = made(folder / "made")
        self.work = folder / "work"
        self.logged = logging.getLogger("flowbuffer")
        self.rows = self.deliver(self.files).rows
        self.slot_of_row = self._slots()

    def deliver(self, files: dict[str, bytes]) -> Outcome:
        """Deliver a spool of these files, twice; the second time nothing may come any more."""
        shutil.rmtree(self.work, ignore_errors=True)
        folder = self.work / RUN / "host-1-abcabcabcabc"
        for level in (self.work, folder.parent, folder):
            level.mkdir(mode=0o700)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        rows, said = collected(self.work)
        again, _ = collected(self.work)
        assert again <= rows
        left = (
            {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
        )
        return Outcome(rows, said, left)

    def with_bytes(self, name: str, content: bytes) -> Outcome:
        return self.deliver({**self.files, name: content})

    def reported(self, outcome: Outcome) -> bool:
        """Whether somebody is told: a warning, or one more dead letter."""
        letters = self.files["rejected.jsonl"].count(b"\n")
        return bool(outcome.said) or outcome.letters > letters

    def _slots(self) -> dict[Row, tuple[int, int]]:
        """The segment and slot that each row is from: its row is gone when the slot is void."""
        found: dict[Row, tuple[int, int]] = {}
        for segment in (1, 2):
            for slot in range(SLOTS):
                content = bytearray(self.files[f"{segment:08d}.slots"])
                content[HEADER + slot * layout.SLOT_SIZE + layout.STATE_OFFSET] = layout.VOID
                rows = self.with_bytes(f"{segment:08d}.slots", bytes(content)).rows
                found.update(dict.fromkeys(self.rows - rows, (segment, slot)))
        assert found.keys() == self.rows
        return found


def made(root: Path) -> dict[str, bytes]:
    """The files of a producer that was killed: a carry and a dead letter of its first segment,
    which is delivered, and 2 segments of 8 slots with 14 pending points."""
    clock = ManualClock()
    settings = Settings(spool_dir=root, delivery="inline", linger_s=0)
    spool = Spool(root)
    directory = spool.add_producer(this_producer(RUN, URI, 1_700_000_000_000))
    producer = Producer(
        directory, spool, settings, clock, lambda: None, segment_slots=(SLOTS, SLOTS)
    )

    def refuse(request: Request) -> TransportError | None:
        return RejectedError("no") if -1.0 in request.values else None

    collector = Collector(spool, settings, clock, THREAD, lambda *_: FakeTransport(answer=refuse))
    stream = collector.add(directory.path, URI)
    assert stream is not None
    for index in range(SLOTS):
        producer.append("loss", -1.0 if index == 5 else index / 3)
        clock.turn(0.01)
    while (next_s := collector.step(hurry=True)) < POLL_S:
        clock.sleep(next_s)
    assert stream.reader.rejected == 1
    for index in range(SLOTS + 3):
        if index == SERIES_SLOT:
            producer.append_series("a/series", [0.5, -0.5, 1e300], steps=[7, 8, 9])
        elif index == EXPLICIT_SLOT:
            producer.append("loss", 4.25, step=3, timestamp=1_699_999_999_777)
        else:
            producer.append(("loss", "acc é")[index % 2], index / 7, step=100 + index)
        clock.turn(0.01)
    files = {path.name: path.read_bytes() for path in directory.path.iterdir()}
    stream.hand_on()
    producer.close()
    directory.lock.release()
    return files


def collected(root: Path) -> tuple[set[Row], list[str]]:
    """What a collector delivers of a spool, and what it says."""
    transports: dict[str, FakeTransport] = {}

    def connect(uri: str, *_: object) -> FakeTransport:
        return transports.setdefault(uri, FakeTransport())

    settings = Settings(spool_dir=root, delivery="inline", linger_s=0)
    clock = ManualClock(1_700_000_100.0)
    collector = Collector(Spool(root), settings, clock, THREAD, connect)
    with listening() as said:
        for _ in range(20):
            collector.step(hurry=True)
            clock.turn(0.1)
            if not collector.streams:
                break
    assert not collector.streams, "the spool was not read to its end"
    rows = {(row, uri) for uri, transport in transports.items() for row in transport.rows}
    return rows, said


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(tmp_path_factory.mktemp("damage"))


def flips(content: bytes, name: str, *, every: bool = False) -> Iterator[tuple[int, bytes]]:
    """(position, content) with one bit of one byte changed: a seeded bit, or each of the eight."""
    pick = Random(name)
    for position in range(len(content)):
        bits = part_of(range(8), 4, (name, position)) if every else [pick.randrange(8)]
        for bit in bits:
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            yield position, bytes(changed)


def cuts(content: bytes) -> Iterator[bytes]:
    """The content, cut off at every length."""
    for length in part_of(range(len(content)), 3):
        yield content[:length]


def test_the_sample_is_what_it_should_be(sample: Sample) -> None:
    """An undamaged spool is delivered whole, and nothing is reported but the old dead letter."""
    segments = {"00000001.journal", "00000001.slots", "00000002.slots"}
    others = {"carry", "keys", "producer.json", "rejected.jsonl", "delivery.json"} | {
        "producer.lock",
        "reader.lock",
        "00000000.states",
    }
    assert sample.files.keys() == segments | others
    outcome = sample.deliver(sample.files)
    assert len(outcome.rows) == 13
    assert outcome.said == []
    assert outcome.files["rejected.jsonl"] == sample.files["rejected.jsonl"]


@pytest.mark.parametrize("name", ["keys", "00000001.journal"])
def test_what_a_checksum_covers_is_never_wrong(sample: Sample, name: str) -> None:
    """No damage to keys or series makes a wrong point, and each missing one is reported."""
    content = sample.files[name]
    damaged = [*cuts(content), *(changed for _, changed in flips(content, name, every=True))]
    for changed in damaged:
        outcome = sample.with_bytes(name, changed)
        assert outcome.rows < sample.rows
        assert sample.reported(outcome)


def test_a_damaged_carry_loses_no_point(sample: Sample) -> None:
    """Without what outlives a deleted segment every point still comes, and the damage is
    reported."""
    content = sample.files["carry"]
    damaged = [*cuts(content), *(changed for _, changed in flips(content, "carry", every=True))]
    for changed in damaged:
        outcome = sample.with_bytes("carry", changed)
        assert outcome.rows == sample.rows
        assert sample.reported(outcome)


@pytest.mark.parametrize("segment", [1, 2])
def test_a_segment_that_is_cut_off(sample: Sample, segment: int) -> None:
    """Every point before the cut comes, and those behind it are reported missing."""
    name = f"{segment:08d}.slots"
    for changed in cuts(sample.files[name]):
        outcome = sample.with_bytes(name, changed)
        whole = (len(changed) - HEADER) // layout.SLOT_SIZE
        expected = {
            r for r, (s, slot) in sample.slot_of_row.items() if s != segment or slot < whole
        }
        assert outcome.rows == expected, len(changed)
        assert sample.reported(outcome), len(changed)


@pytest.mark.parametrize("segment", [1, 2])
def test_a_damaged_segment_header(sample: Sample, segment: int) -> None:
    """A segment whose header is damaged is reported and kept as it is; the other is delivered."""
    name = f"{segment:08d}.slots"
    content = sample.files[name]
    others = {row for row, (number, _) in sample.slot_of_row.items() if number != segment}
    for position, changed in flips(content[:HEADER], name, every=True):
        outcome = sample.with_bytes(name, changed + content[HEADER:])
        if position < CHECKED_HEADER:
            assert outcome.rows == others
            assert sample.reported(outcome)
            assert changed + content[HEADER:] in outcome.files.values()
        else:
            assert outcome.rows == sample.rows
            assert outcome.said == []


@pytest.mark.parametrize("segment", [1, 2])
def test_a_damaged_slot_harms_no_other(sample: Sample, segment: int) -> None:
    """Damage to one slot changes no other point, and a point that it suppresses is reported.

    A slot has no checksum: a changed value, step or time is not seen. A later time in one slot
    moves the points behind it, because the times of a producer never run backwards (P3).
    """
    name = f"{segment:08d}.slots"
    content = sample.files[name]
    for position, changed in flips(content[HEADER:], name):
        slot, within = divmod(position, layout.SLOT_SIZE)
        outcome = sample.with_bytes(name, content[:HEADER] + changed)
        rows, before = outcome.rows, sample.rows
        harmed = {row for row, place in sample.slot_of_row.items() if place == (segment, slot)}
        if within < 8 or 32 <= within < 34:  # the time, or the flag that says what it counts
            rows, before, harmed = timeless(rows), timeless(before), timeless(harmed)
        assert before - harmed <= rows, position
        assert len(rows - before) <= len(harmed), position
        if len(outcome.rows) < len(sample.rows):
            assert sample.reported(outcome), position


def timeless(rows: set[Row]) -> set[Row]:
    return {((run, key, 0, step, value), uri) for (run, key, _, step, value), uri in rows}


def test_a_changed_state_is_seen(sample: Sample) -> None:
    """No single changed bit turns a committed point into one that is taken for settled."""
    name = "00000001.slots"
    content = bytearray(sample.files[name])
    for bit in range(8):
        changed = content.copy()
        changed[HEADER + layout.STATE_OFFSET] ^= 1 << bit
        outcome = sample.with_bytes(name, bytes(changed))
        assert len(outcome.rows) == len(sample.rows) - 1
        assert sample.reported(outcome), bit


def test_a_damaged_description_sends_nothing_elsewhere(sample: Sample) -> None:
    """A producer.json that is not what was written is left alone with a warning, or names the same
    run and server."""
    name = "producer.json"
    content = sample.files[name]
    damaged = [*cuts(content), *(changed for _, changed in flips(content, name, every=True))]
    for changed in damaged:
        outcome = sample.with_bytes(name, changed)
        if outcome.rows:
            assert outcome.rows == sample.rows, changed
        else:
            assert sample.reported(outcome), changed
            assert outcome.files["00000001.slots"] == sample.files["00000001.slots"]


def test_damaged_dead_letters_are_kept(sample: Sample) -> None:
    """Dead letters that cannot be read any more are neither deleted nor in the way."""
    name = "rejected.jsonl"
    content = sample.files[name]
    damaged = [*cuts(content), *(changed for _, changed in flips(content, name))]
    for changed in damaged:
        outcome = sample.with_bytes(name, changed)
        assert outcome.rows == sample.rows
        assert outcome.files.get(name, b"") == changed


def test_a_dead_letter_after_a_torn_one(sample: Sample) -> None:
    """A dead letter is readable though the one before it was cut off by a kill."""
    torn = sample.files["rejected.jsonl"][:20]
    outcome = sample.deliver({**sample.files, "rejected.jsonl": torn, "00000001.journal": b""})
    lines = outcome.files["rejected.jsonl"].splitlines()
    assert json.loads(lines[-1])["slot"] == SERIES_SLOT


#: Files that claim more than there is, or what no producer writes, under checksums that match.
FRAME = layout.FRAME_HEADER
CRAFTED = {
    "key of 4 GiB": ("keys", FRAME.pack(b"FLOW", 0xFFFFFFFF, 0, 0)),
    "many keys of 1 MiB": ("keys", FRAME.pack(b"FLOW", 1 << 20, 0, 0) * (1 << 18)),
    "key number 4 Gi": ("keys", layout.frame(0xFFFFFFFF, b"loss")),
    "carry of 64 MiB": ("carry", FRAME.pack(b"FLOW", layout.MAX_FRAME_PAYLOAD, 1, 0)),
    "carry of no clock": ("carry", layout.frame(1, bytes(20) + b"odd")),
    "carry of half a key": ("carry", layout.frame(1, bytes(20) + bytes(8 + 39))),
    "series of 4 GiB": ("00000001.journal", FRAME.pack(b"FLOW", 0xFFFFFFFF, 3, 0)),
    "series of 64 MiB": ("00000001.journal", FRAME.pack(b"FLOW", layout.MAX_FRAME_PAYLOAD, 3, 0)),
    "series of 4 Gi points": ("00000001.journal", layout.frame(0xFFFFFFFF, bytes(40))),
    "series of nothing": ("00000001.journal", layout.frame(3, b"")),
    "segment of 4 Gi slots": (
        "00000001.slots",
        layout.segment_header(1, 0xFFFFFFFF) + b"\1" * 400,
    ),
    "segment of 1 Mi slots": (
        "00000001.slots",
        layout.segment_header(1, layout.MAX_SEGMENT_SLOTS) + b"\1" * 400,
    ),
    "nested description": ("producer.json", b"[" * 65536),
    "description of one number": ("producer.json", b"1" * 65536),
    "nested dead letter": ("rejected.jsonl", b"[" * (1 << 20) + b"\n"),
    "nested parking": ("parked.json", b"[" * (1 << 20)),
}


def test_a_segment_that_is_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that looks while the next segment is created does not take it for a damaged one."""
    clock = ManualClock()
    settings = Settings(spool_dir=tmp_path / "spool")
    spool = Spool(tmp_path / "spool")
    directory = spool.add_producer(this_producer(RUN, URI, 0))
    producer = Producer(
        directory, spool, settings, clock, lambda: None, segment_slots=(SLOTS, SLOTS)
    )
    reader = Reader(directory.path, clock, alive=True)
    read: list[float] = []

    def look() -> None:
        for _ in range(3):
            if (block := reader.read(100)) is not None:
                read.extend(block.value.tolist())
                if block.ends_segment:
                    reader.keep(block.segment, b"")

    fallocate = os.posix_fallocate

    def look_and_reserve(descriptor: int, offset: int, size: int) -> None:
        look()
        fallocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", look_and_reserve)
    for index in range(3 * SLOTS):
        producer.append("loss", float(index))
    look()
    assert reader.problems == []
    assert read == [float(index) for index in range(3 * SLOTS)]
    reader.close()
    producer.close()
    directory.lock.release()


@pytest.mark.parametrize("claim", CRAFTED)
def test_crafted_lengths(sample: Sample, claim: str) -> None:
    """Whatever a file says of its own size, memory and time are bounded by what there is."""
    name, content = CRAFTED[claim]
    files = {**sample.files, name: content}
    if claim == "key number 4 Gi":
        slots = bytearray(sample.files["00000001.slots"])
        slots[HEADER + 28 : HEADER + 32] = b"\xff" * 4  # a point of that key
        files["00000001.slots"] = bytes(slots)
    tracemalloc.start()
    try:
        outcome = sample.deliver(files)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert outcome.rows <= sample.rows
    assert outcome.rows == sample.rows or sample.reported(outcome)
    assert peak < 32 << 20


def test_one_damaged_folder_keeps_no_other(sample: Sample) -> None:
    """A folder that cannot be delivered is no obstacle for the folders behind it."""
    first, second = (f"host-{pid}-abcabcabcabc" for pid in (1, 2))
    for number, (name, content) in enumerate(
        [("producer.json", b"[" * 65536), ("carry", layout.frame(1, bytes(20) + b"odd"))]
    ):
        shutil.rmtree(sample.work, ignore_errors=True)
        for producer in (first, second):
            folder = sample.work / RUN / producer
            for level in (sample.work, folder.parent, folder):
                level.mkdir(mode=0o700, exist_ok=True)
            for file, undamaged in sample.files.items():
                (folder / file).write_bytes(undamaged)
        (sample.work / RUN / first / name).write_bytes(content)
        rows, said = collected(sample.work)
        assert rows == sample.rows, number
        assert said
