"""What became of a point: absence never means success, and what cannot be looked at is pending."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowbuffer import MetricLogger, Settings
from flowbuffer.backends.mlflow_transport import Request
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.policies import THREAD
from flowbuffer.commands.clean import clean
from flowbuffer.commands.rejected import retry
from flowbuffer.errors import DeliveryError, RejectedError, WaitTimeout
from flowbuffer.logger.handle import Handle
from flowbuffer.spool import dead_letters, removed
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.outcomes import Outcome, folder_outcome, slot_outcomes
from flowbuffer.spool.tally import Tally, tally, tally_since
from flowbuffer.spool.waiting import Waiting
from flowbuffer.testing import FakeTransport
from support.backends import make_run
from support.small_spool import SmallSpool


def refuse_13(request: Request) -> RejectedError | None:
    return RejectedError("400 unlucky") if 13.0 in request.values else None


def said(handle: Handle) -> str:
    """The error of a handle; done() agrees, and wait() raises it."""
    assert handle.done()
    with pytest.raises(DeliveryError):
        handle.wait(0)
    return str(handle.exception(0))


def is_pending(handle: Handle) -> bool:
    try:
        handle.exception(0)
    except WaitTimeout:
        assert not handle.done()
        return True
    assert handle.done()
    return False


@pytest.fixture
def spool(tmp_path: Path) -> SmallSpool:
    """Segments of four slots, and a server that refuses 13."""
    return SmallSpool(tmp_path / "spool", FakeTransport(answer=refuse_13), segment_slots=4)


def logged(spool: SmallSpool, values: list[float]) -> list[Handle]:
    return [Handle(spool.producer.append("k", value)) for value in values]


def let_go(spool: SmallSpool) -> None:
    """The producer ends, and its folder is removed as a collector does."""
    spool.producer.close()
    spool.directory.lock.release()
    spool.new_sender(alive=False)
    spool.deliver()
    spool.sender.step()
    claim = spool.spool.claim(spool.directory.path)
    assert claim is not None
    assert spool.stream.reader.settled
    claim.remove(delivered=spool.stream.reader.delivered_segments)


def test_a_rejected_point_stays_rejected_without_its_segment(spool: SmallSpool) -> None:
    """A handle says why its point was rejected for as long as its folder is there, and the points
    beside it are delivered."""
    handles = logged(spool, [1.0, 13.0, 2.0, 3.0, *map(float, range(20, 30))])
    spool.deliver()
    spool.sender.step()
    assert not (spool.directory.path / "00000000.slots").exists()
    assert "unlucky" in said(handles[1])
    assert [handle.exception(0) for handle in (handles[0], *handles[2:])] == [None] * 13
    assert tally(spool.directory.path) == Tally(delivered=13, rejected=1, last=3)


def test_a_segment_without_rejected_points_leaves_nothing(spool: SmallSpool) -> None:
    """P6: only of a segment with rejected points is anything kept."""
    logged(spool, [1.0, 13.0, *map(float, range(20, 40))])
    spool.deliver()
    spool.sender.step()
    assert [path.name for path in spool.directory.path.glob("*.states")] == ["00000000.states"]
    assert (spool.directory.path / "00000000.states").stat().st_size < 64


def test_states_are_kept_on_a_full_disk(spool: SmallSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the room of the segment itself is taken, and nothing is forgotten."""
    handles = logged(spool, [1.0, 13.0, *map(float, range(20, 30))])

    def no_room(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("flowbuffer.spool.carry.write_file", no_room)
    spool.deliver()  # there is room for the states only, so the rest of it is tried again
    assert "unlucky" in said(handles[1])
    assert handles[0].exception(0) is None
    monkeypatch.undo()
    spool.deliver()
    spool.sender.step()
    assert "unlucky" in said(handles[1])
    assert [handle.exception(0) for handle in handles[2:]] == [None] * 10
    assert spool.stream.reader.problems == []


def test_a_damaged_segment_is_no_success(spool: SmallSpool) -> None:
    """The points of a segment that was put aside as damaged are not delivered; they are counted as
    unknown."""
    handles = logged(spool, [float(value) for value in range(6)])
    path = spool.directory.path / "00000001.slots"
    path.write_bytes(b"x" * 64 + path.read_bytes()[64:])
    spool.new_sender(alive=True)
    spool.deliver()
    assert "damaged" in said(handles[5])
    assert handles[0].exception(0) is None
    found = tally(spool.directory.path)
    assert found is not None
    assert (found.delivered, found.unknown, found.pending) == (4, 2, 0)


def test_a_segment_that_was_cut_off_is_no_success(spool: SmallSpool) -> None:
    """A slot that was cut off its segment is unknown, also once the segment is retired."""
    handles = logged(spool, [float(value) for value in range(8)])
    os.truncate(spool.directory.path / "00000000.slots", 64 + 2 * 40)
    spool.producer.append("k", 8.0)
    spool.new_sender(alive=True)
    assert "not known" in said(handles[3])
    spool.deliver()
    spool.sender.step()
    assert not (spool.directory.path / "00000000.slots").exists()
    assert "not known" in said(handles[3])
    assert handles[1].exception(0) is None


def test_a_segment_that_was_wiped_is_no_success(spool: SmallSpool) -> None:
    """A segment that is gone without a record is unknown, also after those behind it are retired;
    its points are counted as unknown, and no more as pending."""
    handles = logged(spool, [float(value) for value in range(12)])
    before = tally(spool.directory.path)
    assert before is not None
    (spool.directory.path / "00000001.slots").unlink()
    assert "wiped" in said(handles[5])
    now = tally_since(spool.directory.path, before)
    assert (now.pending, now.unknown) == (8, 4)
    spool.new_sender(alive=True)
    spool.deliver()
    spool.sender.step()
    assert "wiped" in said(handles[5])
    assert handles[0].exception(0) is handles[9].exception(0) is None
    now = tally_since(spool.directory.path, now)
    assert (now.delivered, now.pending, now.unknown) == (8, 0, 4)


def test_a_folder_that_was_delivered_and_removed(spool: SmallSpool) -> None:
    """A handle knows that all is well when its folder was removed by whoever delivered it."""
    handles = logged(spool, [float(value) for value in range(6)])
    before = tally(spool.directory.path)
    assert before is not None
    let_go(spool)
    assert [handle.exception(0) for handle in handles] == [None] * 6
    assert tally_since(spool.directory.path, before).delivered == 6


@pytest.mark.parametrize("gone", ["spool", "run", "producer"])
def test_a_folder_that_was_wiped_is_no_success(spool: SmallSpool, gone: str) -> None:
    """Whatever part of a spool is wiped: its points are unknown, delivered or not, and who waits is
    told in words."""
    handles = logged(spool, [float(value) for value in range(3)])
    before = tally(spool.directory.path)
    assert before is not None
    folder = spool.directory.path
    waiting = Waiting(folder, spool.producer.barrier())
    shutil.rmtree({"spool": spool.spool.root, "run": folder.parent, "producer": folder}[gone])
    assert waiting.is_over()
    assert all("the spool was wiped" in said(handle) for handle in handles)
    assert folder_outcome(folder) is Outcome.UNKNOWN
    now = tally_since(folder, before)
    assert (now.delivered, now.pending, now.unknown) == (0, 0, 3)


def test_a_wiped_folder_is_not_recorded_as_removed(spool: SmallSpool) -> None:
    """A collector that has a folder when it is wiped does not say that it delivered it."""
    claim = spool.spool.claim(spool.directory.path, living=True)
    assert claim is not None
    shutil.rmtree(spool.directory.path)
    with pytest.raises(FileNotFoundError):
        claim.remove(delivered=1)
    assert removed.find(spool.directory.path) is None


def test_a_segment_behind_those_delivered(spool: SmallSpool) -> None:
    """A folder is delivered up to the segment that its deliverer knew: one that was wiped before it
    was seen is unknown."""
    handles = logged(spool, [float(value) for value in range(6)])
    (spool.directory.path / "00000001.slots").unlink()
    let_go(spool)
    assert handles[0].exception(0) is None
    assert "wiped" in said(handles[5])


def test_a_folder_that_is_kept_for_what_somebody_put_there(spool: SmallSpool) -> None:
    """A delivered folder in which another file stays is a delivered one."""
    handles = logged(spool, [float(value) for value in range(6)])
    (spool.directory.path / "notes.txt").touch()
    let_go(spool)
    assert (spool.directory.path / "notes.txt").exists()
    assert [handle.exception(0) for handle in handles] == [None] * 6


def test_a_damaged_segment_is_kept(spool: SmallSpool) -> None:
    """No collector after the one that put a damaged segment aside takes its folder for a delivered
    one."""
    handles = logged(spool, [float(value) for value in range(6)])
    path = spool.directory.path / "00000001.slots"
    path.write_bytes(b"x" * 64 + path.read_bytes()[64:])
    spool.producer.close()
    spool.directory.lock.release()
    settings = Settings(spool_dir=spool.spool.root, delivery="inline", linger_s=0)
    for _ in range(3):
        collector = Collector(
            Spool(spool.spool.root),
            settings,
            spool.clock,
            THREAD,
            lambda *_: spool.transport,
        )
        for _ in range(5):
            collector.step(hurry=True)
        assert not collector.streams
        assert path.with_suffix(".damaged").exists()
        assert "damaged" in said(handles[5])
        assert handles[0].exception(0) is None


def test_points_whose_record_was_deleted(spool: SmallSpool) -> None:
    """After clean --rejected deletes the record of what was rejected nobody says delivered."""
    (handle,) = logged(spool, [13.0])
    spool.deliver()
    spool.producer.close()
    spool.directory.lock.release()
    spool.new_sender(alive=False)
    spool.deliver()
    assert clean(Spool(spool.spool.root))[0].removed is False
    assert "unlucky" in said(handle)
    assert clean(Spool(spool.spool.root), with_rejected=True)[0].removed
    assert "not known any more" in said(handle)


def test_points_that_were_tried_again(spool: SmallSpool) -> None:
    """rejected --retry makes no handle of the old point say delivered, and the old producer's
    counts do not say so either."""
    (handle, _) = logged(spool, [13.0, 1.0])
    spool.deliver()
    spool.producer.close()
    spool.directory.lock.release()
    (retried,) = retry(Spool(spool.spool.root), Settings(spool_dir=spool.spool.root))
    assert retried.points == 1
    assert "unlucky" in said(handle)
    found = tally(spool.directory.path)
    assert found is not None
    assert (found.delivered, found.rejected, found.retried) == (1, 0, 1)
    claim = spool.spool.claim(spool.directory.path)
    assert claim is not None
    spool.new_sender(alive=False)
    spool.deliver()
    claim.remove(delivered=spool.stream.reader.delivered_segments)
    assert "not known any more" in said(handle)


def test_letters_that_are_gone_make_nothing_delivered(spool: SmallSpool) -> None:
    """A rejected point counts as rejected though somebody deleted its dead letter."""
    logged(spool, [1.0, 13.0, 2.0])
    spool.deliver()
    (spool.directory.path / "rejected.jsonl").unlink()
    assert tally(spool.directory.path) == Tally(delivered=2, rejected=1, last=0)


def exhausted(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    "look", ["os.open", "os.listdir", "os.lstat", "flowbuffer.spool.outcomes.read_file"]
)
@pytest.mark.parametrize("state", ["there", "retired", "rejected", "removed", "wiped"])
def test_what_cannot_be_looked_at_is_pending(
    spool: SmallSpool, monkeypatch: pytest.MonkeyPatch, look: str, state: str
) -> None:
    """Without a descriptor, or permission, to look nobody says delivered, rejected or wiped: it is
    asked again, and the answer then is the right one."""
    handles = logged(spool, [13.0 if state == "rejected" else 1.0, *map(float, range(20, 27))])
    if state == "removed":
        let_go(spool)
    elif state == "wiped":
        shutil.rmtree(spool.spool.root)
    elif state != "there":
        spool.deliver()
        spool.sender.step()
    before = is_pending(handles[0])
    with monkeypatch.context() as patched:
        patched.setattr(look, exhausted)
        try:
            now = slot_outcomes(handles[0][0].path, [handles[0][1]])
            waiting = Waiting(spool.directory.path, (1, 64))
            over = waiting.is_over()
        finally:
            patched.undo()
    right = {"there": Outcome.PENDING, "rejected": Outcome.REJECTED, "wiped": Outcome.UNKNOWN}
    assert now in ([Outcome.PENDING], [right.get(state, Outcome.DELIVERED)])
    if look in ("os.open", "os.lstat") and state not in ("there",):
        assert now == [Outcome.PENDING]
    if look == "os.listdir":
        assert not over
    assert is_pending(handles[0]) == before


def test_the_record_of_removed_folders_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P6: of a spool with very many producers the newest are remembered, in bounded room; a torn
    record harms no other."""
    monkeypatch.setattr(removed, "MAX_BYTES", 160)
    folders = [tmp_path / "run" / f"host-{number}" for number in range(40)]
    for number, folder in enumerate(folders):
        removed.write(folder, None if number % 2 else number)
        if number % 7 == 0:
            with (tmp_path / "removed").open("ab") as file:
                file.write(b"torn"[: 1 + number % 4])
        assert removed.find(folder) == (-1 if number % 2 else number)
    assert removed.find(folders[0]) is None
    files = list(tmp_path.glob("removed*"))
    assert sum(path.stat().st_size for path in files) < 400
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert all(removed.find(folder) is not None for folder in folders[-9:])


def test_a_removal_on_a_full_disk(spool: SmallSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the folder makes room for the record of its removal."""
    (handle,) = logged(spool, [1.0])
    write = removed.write
    seen: list[Outcome] = []

    def once_there_is_room(folder: Path, delivered: int | None) -> None:
        if folder.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seen.append(slot_outcomes(handle[0].path, [handle[1]])[0])
        write(folder, delivered)

    monkeypatch.setattr(removed, "write", once_there_is_room)
    let_go(spool)
    assert handle.exception(0) is None
    assert seen == [Outcome.PENDING]
    assert not spool.directory.path.parent.exists()


def test_a_dead_letter_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A letter for which the disk has room in part is taken back."""
    letter = dead_letters.DeadLetter(reason="no", segment=0, slot=1, run_id="run")
    dead_letters.append(tmp_path, letter)
    write, rest = os.write, [10]

    def until_full(descriptor: int, content: Any) -> int:
        if not rest:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, bytes(content)[: rest.pop()])

    with monkeypatch.context() as patched:
        patched.setattr("flowbuffer.spool.dead_letters.os.write", until_full)
        with pytest.raises(OSError, match="No space"):
            dead_letters.append(tmp_path, letter)
    assert (tmp_path / "rejected.jsonl").read_bytes() == letter.line() + b"\n"
    dead_letters.append(tmp_path, dead_letters.DeadLetter(reason="yes", points=3))
    assert [one.reason for one in dead_letters.read(tmp_path)] == ["no", "yes"]
    assert dead_letters.count(tmp_path) == (4, 0)


@pytest.mark.parametrize("ask", [Handle.wait, lambda handle, timeout: handle.exception(timeout)])
def test_a_handle_of_a_real_logger(sqlite_uri: str, ask: Callable[..., Any]) -> None:
    """Through the public calls: a conflicting parameter is rejected for its handle after its
    segment is deleted, and after the logger is closed; all others are delivered."""
    run_id = make_run(sqlite_uri)
    settings = Settings.from_env(max_spool_bytes=1 << 20)  # so segments are small
    with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings) as logger:
        logger.log_param("lr", "1").wait(30)
        handle = logger.log_param("lr", "2")
        assert handle.exception(30) is not None
        for step in range(6600):
            logger.log_metric("loss", 0.5, step)
        last = logger.log_metric("loss", 1.0, 9999)
        last.wait(60)
        assert "lr" in said(handle)
        report = logger.close(60)
        assert (report.rejected, report.unknown, report.pending) == (1, 0, 0)
        assert "lr" in said(handle)
        assert ask(last, 0) is None
