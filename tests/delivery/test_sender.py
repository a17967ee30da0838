"""Delivery of a run, step by step: batches, retries, splits, the window; no thread, no time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowbuffer.backends.mlflow_transport import Request
from flowbuffer.delivery.sender import Sender
from flowbuffer.errors import (
    DoubtfulError,
    RejectedError,
    RetriableError,
    RunGoneError,
    SpoolFull,
    TooLargeError,
    TransportError,
    UnauthorisedError,
)
from flowbuffer.spool import dead_letters
from flowbuffer.spool.layout import COMMITTED, PARAM
from flowbuffer.spool.notes import delivery_note, parked_reason
from flowbuffer.spool.outcomes import Outcome, slot_outcomes
from flowbuffer.spool.waiting import want
from flowbuffer.testing import FakeTransport
from support.small_spool import RUN, SmallSpool


def unless(bad: Callable[[Request], bool], error: TransportError) -> Callable[[Request], object]:
    return lambda request: error if bad(request) else None


def fill(spool: SmallSpool, values: Iterator[int]) -> None:
    for value in itertools.islice(values, 100_000):
        spool.producer.append("k", float(value))


def test_a_batch_lingers_until_it_is_full_or_old(tmp_path: Path) -> None:
    """A batch leaves when it is full or its first point is linger_s old, not before."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64, max_batch_size=10, linger_s=5.0)
    for value in range(9):
        spool.producer.append("k", float(value))
    for _ in range(3):
        spool.sender.step()
    assert spool.transport.requests == []
    spool.producer.append("k", 9.0)
    for _ in range(3):
        spool.sender.step()
    assert [len(request) for request in spool.transport.requests] == [10]
    spool.producer.append("k", 10.0)
    for _ in range(3):
        spool.sender.step()
    assert len(spool.transport.requests) == 1
    spool.clock.turn(5.0)
    spool.sender.step()
    assert [len(request) for request in spool.transport.requests] == [10, 1]


def test_a_window_holds_whole_batches_however_small_it_is(tmp_path: Path) -> None:
    """Who reads little ahead sends full batches all the same, and at once."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64, max_batch_size=10, linger_s=100.0)
    spool.sender = sender = Sender(
        RUN, spool.transport, spool.settings, spool.clock, lambda: None, window_points=4
    )
    spool.add(spool.directory, alive=True)
    for step in range(30):
        spool.producer.append("a", 1.0, step)
    for _ in range(4):
        sender.step()
    assert [len(request) for request in spool.transport.requests] == [10, 10, 10]


def test_someone_who_waits_ends_the_linger(tmp_path: Path) -> None:
    """Waiting for a point makes its batch leave at once."""
    spool = SmallSpool(tmp_path / "spool", linger_s=100.0)
    segment, offset = spool.producer.append("k", 1.0)
    spool.sender.step()
    spool.sender.step()
    assert spool.transport.requests == []
    want(segment.path, offset)
    spool.sender.step()
    assert spool.values("k") == [1.0]


def test_a_point_is_marked_only_when_it_is_stored(tmp_path: Path) -> None:
    """P1: until the backend has it, a point is pending on the disk."""
    spool = SmallSpool(tmp_path / "spool", FakeTransport(at_once=False))
    segment, offset = spool.producer.append("k", 1.0)
    for _ in range(3):
        spool.sender.step(hurry=True)
    assert len(spool.transport.waiting) == 1
    assert slot_outcomes(segment.path, [offset]) == [Outcome.PENDING]
    spool.transport.answer()
    spool.sender.step()
    assert slot_outcomes(segment.path, [offset]) == [Outcome.DELIVERED]


def test_a_key_is_in_one_request_at_a_time(tmp_path: Path) -> None:
    """P2: while a key's batch is on its way, no later point of that key is sent."""
    transport = FakeTransport(max_in_flight=4, at_once=False)
    spool = SmallSpool(tmp_path / "spool", transport, segment_slots=64, max_batch_size=4)
    for value in range(20):
        spool.producer.append("a", float(value))
        spool.producer.append("b", float(value))
    for _ in range(5):
        spool.sender.step(hurry=True)
    on_their_way = [set(request.keys) for request, _ in transport.waiting]
    assert on_their_way == [{"a"}, {"b"}]
    while transport.waiting:
        transport.answer(len(transport.waiting) - 1)  # the last one first
        spool.sender.step(hurry=True)
    sent = [
        value for request in transport.requests if "a" in request.keys for value in request.values
    ]
    assert sent == [float(value) for value in range(20)]


def test_the_failed_batch_goes_first(tmp_path: Path) -> None:
    """P2, P4: what failed is sent again, the same to the bit, before later points of its keys."""
    transport = FakeTransport(max_in_flight=3)
    spool = SmallSpool(tmp_path / "spool", transport, segment_slots=64, max_batch_size=4)
    failures = iter([RetriableError("503"), RetriableError("503")])
    spool.transport.decide = lambda _: next(failures, None)
    for value in range(8):
        spool.producer.append("k", float(value))
    spool.deliver()
    first, second, third, fourth = spool.transport.requests
    assert first == second == third
    assert list(fourth.values) == [4.0, 5.0, 6.0, 7.0]
    assert spool.sender.retries == 2


def test_nothing_is_sent_before_retry_after(tmp_path: Path) -> None:
    """P5: when the server asks to be left alone, no request of any key goes out."""
    spool = SmallSpool(tmp_path / "spool", FakeTransport(max_in_flight=4), linger_s=0.0)
    spool.transport.decide = lambda _: RetriableError("429", 60.0)
    spool.producer.append("a", 1.0)
    for _ in range(4):
        spool.sender.step(hurry=True)
    spool.transport.decide = lambda _: None
    spool.producer.append("b", 1.0)
    spool.clock.turn(59.0)
    for _ in range(4):
        spool.sender.step(hurry=True)
    assert len(spool.transport.requests) == 1
    spool.deliver()
    assert spool.values("a") == spool.values("b") == [1.0]


@pytest.mark.parametrize("poison", [0, 1, 499, 500, 997, 998, 999])
def test_a_poison_point_is_the_only_dead_letter(tmp_path: Path, poison: int) -> None:
    """P5: one bad point among 1000 is found within 24 requests, and the others are stored."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=2000)
    spool.transport.decide = unless(
        lambda request: float(poison) in request.values, RejectedError("400 bad point")
    )
    for value in range(1000):
        spool.producer.append("k", float(value))
    spool.deliver()
    assert spool.values("k") == [float(value) for value in range(1000) if value != poison]
    assert len(spool.transport.requests) <= 24
    (letter,) = dead_letters.read(spool.directory.path)
    assert (letter.key, letter.value, letter.reason) == ("k", poison, "400 bad point")
    assert spool.stream.reader.rejected == 1


def test_several_poison_points(tmp_path: Path) -> None:
    """P5: every bad point becomes a dead letter, in order, and nothing else does."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=2000)
    bad = {3.0, 4.0, 77.0, 99.0}
    spool.transport.decide = unless(
        lambda request: not bad.isdisjoint(request.values), RejectedError("400")
    )
    for value in range(100):
        spool.producer.append(f"k{value % 3}", float(value))
    spool.deliver()
    stored = sorted(value for key in ("k0", "k1", "k2") for value in spool.values(key))
    assert stored == [float(value) for value in range(100) if value not in bad]
    assert {letter.value for letter in dead_letters.read(spool.directory.path)} == bad


def test_too_large_is_split(tmp_path: Path) -> None:
    """413: the same points go in smaller requests, in order, and none is lost."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=200)
    spool.transport.decide = unless(lambda request: len(request) > 30, TooLargeError("413"))
    for value in range(100):
        spool.producer.append("k", float(value))
    spool.deliver()
    assert spool.values("k") == [float(value) for value in range(100)]
    assert spool.stream.reader.rejected == 0


def test_a_parked_folder_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stops waiting because the folder is parked finds the error that is in the way."""
    spool = SmallSpool(tmp_path / "spool")
    found: list[object] = []
    monkeypatch.setattr(
        "flowbuffer.delivery.sender.park",
        lambda folder, _: found.append(delivery_note(folder).last_error),
    )
    spool.transport.decide = lambda _: RunGoneError("404 no such run")
    spool.producer.append("k", 1.0)
    for _ in range(4):
        spool.sender.step(hurry=True)
    assert found == ["404 no such run"]


def test_a_run_that_is_gone_is_parked(tmp_path: Path) -> None:
    """A deleted run keeps its points, says why, and gets them once it is restored."""
    spool = SmallSpool(tmp_path / "spool")
    spool.transport.decide = lambda _: RunGoneError("404 no such run")
    segment, offset = spool.producer.append("k", 1.0)
    for _ in range(4):
        spool.sender.step(hurry=True)
    assert spool.sender.gone
    assert parked_reason(spool.directory.path) == "404 no such run"
    assert slot_outcomes(segment.path, [offset]) == [Outcome.PENDING]
    spool.transport.decide = lambda _: None
    spool.deliver()
    assert spool.values("k") == [1.0]
    assert parked_reason(spool.directory.path) is None


def test_refused_credentials_pause_everything(tmp_path: Path, caplog: object) -> None:
    """401: said once, tried slowly, and nothing is lost."""
    spool = SmallSpool(tmp_path / "spool")
    spool.transport.decide = lambda _: UnauthorisedError("401")
    spool.producer.append("k", 1.0)
    for _ in range(200):
        spool.sender.step(hurry=True)
        spool.clock.turn(0.5)
    assert len(spool.transport.requests) == 8  # in 100 s: after 0, 1, 3, 7, 15, 31, 61 and 91
    assert caplog.text.count("held up") == 1  # type: ignore[attr-defined]
    spool.transport.decide = lambda _: None
    spool.deliver()
    assert spool.values("k") == [1.0]


def test_a_restart_sends_the_same_rows(tmp_path: Path) -> None:
    """P4: whatever was marked, and wherever a collector died, the rows are the same to the bit."""
    spool = SmallSpool(tmp_path / "spool", FakeTransport(at_once=False), segment_slots=8)
    for value in range(40):
        spool.producer.append(f"k{value % 2}", float(-value))  # ties: one step, one ms
    for died_after in range(12):
        spool.sender.step(hurry=True)
        while spool.transport.waiting:
            spool.transport.answer(lose=died_after % 2 == 0)
        if died_after % 3:
            spool.sender.step()
        spool.new_sender(alive=True)
    spool.deliver()
    for key in (0, 1):
        assert spool.values(f"k{key}") == [float(-v) for v in range(40) if v % 2 == key]
    times = [time for time, _, _ in spool.history("k0")]
    assert times == list(range(times[0], times[0] + 20))


def test_ties_go_on_after_a_segment_is_gone(tmp_path: Path) -> None:
    """P2, P4: a restart knows of points whose segment is deleted, and ties go on behind them."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=4)
    for value in range(10):
        spool.producer.append("k", float(-value))
    spool.deliver()
    spool.sender.step()
    assert len(list(spool.directory.path.glob("*.slots"))) == 1
    spool.new_sender(alive=True)
    for value in range(10, 20):  # still in the same millisecond, still without a step
        spool.producer.append("k", float(-value))
    spool.deliver()
    assert spool.values("k") == [float(-value) for value in range(20)]
    assert (spool.stream.reader.delivered, spool.stream.reader.rejected) == (20, 0)


def test_delivered_segments_are_deleted(tmp_path: Path) -> None:
    """P6: the disk holds what is pending, not what was."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=8)
    for value in range(100):
        spool.producer.append("k", float(value))
    assert len(list(spool.directory.path.glob("*.slots"))) == 13
    spool.deliver()
    spool.sender.step()
    assert len(list(spool.directory.path.glob("*.slots"))) == 1


def test_the_window_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: with the server down, the sender holds a window of the spool and no more."""
    monkeypatch.setattr("flowbuffer.delivery.sender.WINDOW_POINTS", 20)
    monkeypatch.setattr("flowbuffer.delivery.intake.WINDOW_POINTS", 20)
    spool = SmallSpool(
        tmp_path / "spool", FakeTransport(at_once=False), segment_slots=8, max_batch_size=5
    )
    for value in range(200):
        spool.producer.append("k", float(value))
    for _ in range(100):
        spool.sender.step(hurry=True)
    assert spool.stream.reader.on_their_way <= 20 + 8
    spool.deliver()
    assert spool.values("k") == [float(value) for value in range(200)]


def test_a_full_spool_takes_points_again(tmp_path: Path) -> None:
    """P6: when_full="raise" raises while the spool is full, and no longer once it is delivered."""
    spool = SmallSpool(
        tmp_path / "spool", segment_slots=8192, max_spool_bytes=1 << 20, when_full="raise"
    )
    logged = itertools.count()
    with pytest.raises(SpoolFull, match="max_spool_bytes"):
        fill(spool, logged)
    spool.deliver()
    spool.clock.turn(1.0)
    spool.producer.append("k", -1.0)
    spool.deliver()
    assert len(spool.history("k")) == next(logged)


def test_a_slot_left_empty_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    """A call interrupted between reservation and store delays delivery for seconds, not long."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64)
    spool.producer.append("k", 1.0)
    reserve, buffer, segment = spool.producer._current
    hole = reserve()
    spool.producer.append("k", 2.0)
    for _ in range(5):
        spool.sender.step(hurry=True)
    assert spool.values("k") == [1.0]
    spool.clock.turn(6.0)
    for _ in range(5):
        spool.sender.step(hurry=True)
    assert spool.values("k") == [1.0, 2.0]
    # The interrupted call goes on after all: late, but not lost.
    at = spool.clock.now_ns()
    from flowbuffer.spool.layout import SLOT

    SLOT.pack_into(buffer, hole, at, 3.0, 0, hole, 0, 0, COMMITTED)
    for _ in range(5):
        spool.sender.step(hurry=True)
    assert sorted(spool.values("k")) == [1.0, 2.0, 3.0]
    assert slot_outcomes(segment.path, [hole]) == [Outcome.DELIVERED]


def test_a_rejected_series_point(tmp_path: Path) -> None:
    """Of a series, too, only the point at fault is a dead letter; its slot says rejected."""
    spool = SmallSpool(tmp_path / "spool")
    spool.transport.decide = unless(lambda request: 5.0 in request.values, RejectedError("400"))
    segment, offset = spool.producer.append_series("k", [float(v) for v in range(10)])
    spool.deliver()
    assert spool.values("k") == [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0]
    assert slot_outcomes(segment.path, [offset]) == [Outcome.REJECTED]
    assert spool.sender.run_id == RUN


def test_a_long_journal_ends_its_segment(tmp_path: Path) -> None:
    """P6: series that are delivered free the disk, however few slots they take."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=4096, max_spool_bytes=1 << 20)
    for value in range(100):  # 5 MB in all, in 100 slots
        spool.producer.append_series("k", [float(value)] * 6000)
        spool.producer.append("j", float(value))
        spool.deliver()
        spool.sender.step()
    assert len(spool.history("j")) == 100
    assert spool.stream.reader.delivered == 100 * 6001
    assert spool.spool.used_bytes() < 1 << 20


def test_a_doubtful_error_is_tried_again_before_it_is_believed(tmp_path: Path) -> None:
    """MLflow's BAD_REQUEST is what an exhausted connection pool says, too: it passes, and no point
    is rejected for it."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64, max_batch_size=8)
    answers = [DoubtfulError("400 BAD_REQUEST: QueuePool limit")] * 5
    spool.transport.decide = lambda _: answers.pop() if answers else None
    for value in range(20):
        spool.producer.append("k", float(value))
    spool.deliver()
    assert spool.values("k") == [float(value) for value in range(20)]
    assert list(dead_letters.read(spool.directory.path)) == []


def test_a_doubtful_error_that_stays_is_believed(tmp_path: Path) -> None:
    """A point that MLflow's database never takes is a dead letter in the end, and it alone."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64, max_batch_size=8)
    spool.transport.decide = unless(
        lambda request: 7.0 in request.values, DoubtfulError("400 BAD_REQUEST: out of range")
    )
    for value in range(20):
        spool.producer.append("k", float(value))
    spool.deliver(3600)
    assert spool.values("k") == [float(value) for value in range(20) if value != 7]
    assert [letter.value for letter in dead_letters.read(spool.directory.path)] == [7.0]
    assert len(spool.transport.requests) < 40


def test_a_server_that_fails_for_one_point_stores_all_others(tmp_path: Path) -> None:
    """P5: where a server answers 5xx for what one point is, for ever, that point alone waits; it is
    no dead letter, as MLflow has not refused it, and it is stored once the server takes it."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64, max_batch_size=50)
    spool.transport.decide = unless(lambda request: 7.0 in request.values, RetriableError("500"))
    for value in range(40):
        spool.producer.append(f"k{value % 3}", float(value))
    spool.deliver(120)
    stored = sorted(value for key in ("k0", "k1", "k2") for value in spool.values(key))
    assert stored == [float(value) for value in range(40) if value != 7]
    assert list(dead_letters.read(spool.directory.path)) == []
    before = len(spool.transport.requests)
    for value in range(40, 140):
        spool.producer.append(f"k{value % 3}", float(value))
        spool.deliver(1)
    assert sum(len(spool.values(key)) for key in ("k0", "k1", "k2")) == 139
    assert len(spool.transport.requests) - before < 120, "it is tried again seldom"
    spool.transport.decide = lambda _: None
    spool.deliver()
    assert sum(len(spool.values(key)) for key in ("k0", "k1", "k2")) == 140
    assert spool.values("k1") == [float(value) for value in range(140) if value % 3 == 1]


def test_several_points_for_which_a_server_fails(tmp_path: Path) -> None:
    """P5: so it is for several points, and for parameters and tags."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64)
    bad = {0.0, 1.0, 20.0, 39.0}
    spool.transport.decide = unless(
        lambda request: not bad.isdisjoint(request.values) or ("p3", "3") in request.params,
        RetriableError("502 from a gateway"),
    )
    spool.producer.append_texts(PARAM, {f"p{number}": str(number) for number in range(9)})
    for value in range(40):
        spool.producer.append(f"k{value % 5}", float(value))
    spool.deliver(600)
    stored = {value for key in range(5) for value in spool.values(f"k{key}")}
    assert stored == {float(value) for value in range(40)} - bad
    assert {key for _, key in spool.transport.params} == {f"p{n}" for n in range(9) if n != 3}
    assert list(dead_letters.read(spool.directory.path)) == []


def test_an_outage_takes_no_batch_apart_for_good(tmp_path: Path) -> None:
    """P5: a long outage rejects nothing, and after it a batch goes in few requests."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=2048)
    spool.transport.decide = lambda _: RetriableError("connection refused")
    for value in range(1000):
        spool.producer.append("k", float(value))
    spool.deliver(8 * 3600)
    spool.transport.decide = lambda _: None
    before = len(spool.transport.requests)
    spool.deliver()
    assert spool.values("k") == [float(value) for value in range(1000)]
    assert len(spool.transport.requests) - before <= 16
    assert list(dead_letters.read(spool.directory.path)) == []
