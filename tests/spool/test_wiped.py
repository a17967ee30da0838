"""A spool that is wiped while a job logs, by `rm -rf` or a cleaner of /tmp, is noticed; the job
goes on in a new folder, and what is unknown is counted as unknown."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flowbuffer import MetricLogger, Settings
from flowbuffer.errors import SpoolError
from flowbuffer.logger.report import Report
from flowbuffer.spool import layout
from flowbuffer.spool.carry import Carry, carry_frame
from flowbuffer.spool.writing.producer import FIRST_SEGMENT_SLOTS, SEGMENT_SLOTS, Producer
from support.backends import history, make_run
from support.small_spool import SmallSpool
from support.waiting import wait_until

NOWHERE = "http://127.0.0.1:9"  # refuses connections


def open_logger(root: Path, *, offline: bool = True, **settings: object) -> MetricLogger:
    return MetricLogger(
        "run",
        tracking_uri=NOWHERE,
        settings=Settings(spool_dir=root / "spool", offline=offline, **settings),  # type: ignore[arg-type]
    )


def producer_of(logger: MetricLogger) -> Producer:
    assert logger._spooling is not None
    return logger._spooling.producer


def folder_of(logger: MetricLogger) -> Path:
    assert logger.folder is not None
    return logger.folder


def replace(folder: Path) -> None:
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    copy.rename(folder)


WIPES: dict[str, Callable[[Path], object]] = {
    "the spool": lambda folder: shutil.rmtree(folder.parent.parent),
    "the run": lambda folder: shutil.rmtree(folder.parent),
    "the folder": shutil.rmtree,
    "what is in the folder": lambda folder: [one.unlink() for one in folder.iterdir()],
    "another folder in its place": replace,
    "the segment": lambda folder: (folder / "00000000.slots").unlink(),
    "the keys": lambda folder: (folder / "keys").unlink(),
    "producer.json": lambda folder: (folder / "producer.json").unlink(),
    "producer.lock": lambda folder: (folder / "producer.lock").unlink(),
}


def total(report: Report) -> int:
    return report.delivered + report.rejected + report.pending + report.unknown


@pytest.mark.parametrize("what", WIPES)
def test_it_is_noticed_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """Whatever without which points are not delivered is gone, that is noticed, said once, a new
    folder is begun, and each point is counted once."""
    logger = open_logger(tmp_path)
    for step in range(5):
        logger.log_metric("loss", 0.5, step)
    old = folder_of(logger)
    WIPES[what](old)
    for _ in range(3):
        logger.stats()
    assert producer_of(logger).is_gone
    logger.log_metric("loss", 0.5)
    assert folder_of(logger) != old
    assert (folder_of(logger) / "00000000.slots").exists()
    logger.log_metric("accuracy", 0.5)
    report = logger.close(0)
    assert total(report) == 7
    assert report.delivered == report.rejected == 0
    assert sum("was wiped" in record.getMessage() for record in caplog.records) == 1


def test_reports_say_unknown(tmp_path: Path) -> None:
    """`flush()`, `stats()` and `close()` report what was wiped as unknown, and wait for none of
    it."""
    for tell in (MetricLogger.flush, MetricLogger.stats, MetricLogger.close):
        logger = open_logger(tmp_path)
        logger.log_metric("loss", 0.5)
        logger.log_series("loss", [0.5] * 10)
        logger.log_params({"a": 1, "b": 2})
        shutil.rmtree(tmp_path / "spool")
        for _ in range(2):
            report = tell(logger)
            assert (report.delivered, report.pending, report.unknown) == (0, 0, 13)
        logger.close(0)


@pytest.mark.parametrize("delivery", ["thread", "inline"])
def test_it_is_noticed_without_a_call(tmp_path: Path, delivery: str) -> None:
    """Who delivers notices it within seconds, though nobody logs or waits."""
    logger = open_logger(tmp_path, offline=False, delivery=delivery)
    logger.log_metric("loss", 0.5)
    shutil.rmtree(folder_of(logger))
    if delivery == "inline":
        assert logger._spooling is not None
        logger._spooling.delivery.tended()
    wait_until(lambda: producer_of(logger).is_gone)
    logger.close(0)


def test_calls_go_on_at_the_end_of_a_segment(tmp_path: Path) -> None:
    """A call that finds no folder for the next segment logs to a new one, and waits for nothing;
    the points of all wiped segments are counted."""
    logger = open_logger(tmp_path)
    points = FIRST_SEGMENT_SLOTS + 100
    for step in range(points):
        logger.log_metric("loss", 0.5, step)
    shutil.rmtree(folder_of(logger))
    for step in range(SEGMENT_SLOTS):
        logger.log_metric("loss", 0.5, step)
    report = logger.close(0)
    assert report.pending == 100
    assert report.unknown == points + SEGMENT_SLOTS - 100


NEW_FILES: dict[str, tuple[Callable[[MetricLogger], object], int]] = {
    "a new key": (lambda logger: logger.log_metric("new", 0.5), 1),
    "new and old keys": (lambda logger: logger.log_metrics({"loss": 0.5, "new": 1.5, "k": 2}), 3),
    "a series": (lambda logger: logger.log_series("loss", [1.0, 2.0]), 2),
    "a series of a new key": (lambda logger: logger.log_series("new", [1.0, 2.0]), 2),
    "parameters": (lambda logger: logger.log_params({"a": 1, "b": 2}), 2),
    "a tag": (lambda logger: logger.set_tag("a", 1), 1),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("what", NEW_FILES)
def test_a_call_that_meets_it_logs_to_a_new_folder(tmp_path: Path, what: str, strict: bool) -> None:
    """No call raises because the spool was wiped, and each point of it is counted once."""
    logger = open_logger(tmp_path, strict=strict)
    logger.log_metric("loss", 0.5)
    old = folder_of(logger)
    shutil.rmtree(tmp_path / "spool")
    call, points = NEW_FILES[what]
    call(logger)
    assert folder_of(logger) != old
    report = logger.close(0)
    assert report.pending + report.unknown == 1 + points
    assert report.pending >= 1


def test_the_rest_of_a_long_series_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a series that is stored in pieces, and meets the wipe between two, the rest keeps its
    steps."""
    monkeypatch.setattr(layout, "MAX_SERIES_POINTS", 4)
    logger = open_logger(tmp_path)
    logger.log_metric("loss", 0.5)
    write, wiped = Producer._append_frame, []

    def write_then_wipe(producer: Producer, *args: object) -> object:
        places = write(producer, *args)  # type: ignore[arg-type]
        if not wiped:
            wiped.append(shutil.rmtree(folder_of(logger)))
        return places

    monkeypatch.setattr(Producer, "_append_frame", write_then_wipe)
    series: list[tuple[object, ...]] = []
    again = Producer.append_series
    monkeypatch.setattr(
        Producer, "append_series", lambda one, *args: series.append(args) or again(one, *args)
    )
    logger._append_series = lambda *args: producer_of(logger).append_series(*args)
    logger.log_series("loss", range(10))
    (_, values, steps, times) = series[1]
    assert list(values) == list(steps) == list(range(4, 10))  # type: ignore[call-overload]
    assert times is None
    report = logger.close(0)
    assert (report.unknown, report.pending) == (5, 6)


def test_what_is_known_to_be_settled_stays_so(tmp_path: Path) -> None:
    """What was delivered or rejected until the end is, also if that came after the last look."""
    logger = open_logger(tmp_path)
    for step in range(6):
        logger.log_metric("loss", 0.5, step)
    with (folder_of(logger) / "00000000.slots").open("r+b") as segment:
        shutil.rmtree(folder_of(logger))
        for slot, state in enumerate([layout.DELIVERED] * 3 + [layout.REJECTED]):
            at = layout.segment_size(slot) + layout.STATE_OFFSET
            os.pwrite(segment.fileno(), bytes([state]), at)
    report = logger.flush(0)
    assert (report.delivered, report.rejected, report.unknown) == (3, 1, 2)
    logger.close(0)


def test_deleted_segments_are_remembered(tmp_path: Path) -> None:
    """What was delivered of segments that were deleted before the wipe counts as delivered."""
    logger = open_logger(tmp_path)
    for step in range(FIRST_SEGMENT_SLOTS + 10):
        logger.log_metric("loss", 0.5, step)
    folder = folder_of(logger)
    (folder / "carry").write_bytes(carry_frame(Carry(1, FIRST_SEGMENT_SLOTS, 0)))
    os.chmod(folder / "carry", 0o600)
    (folder / "00000000.slots").unlink()
    assert logger._spooling is not None
    assert not logger._spooling.is_wiped()
    shutil.rmtree(folder)
    report = logger.flush(0)
    assert (report.delivered, report.unknown) == (FIRST_SEGMENT_SLOTS, 10)
    logger.close(0)


def test_delivery_is_not_taken_for_a_wipe(tmp_path: Path) -> None:
    """A producer whose segments are delivered and deleted as it goes was not wiped, and neither
    was one that is closed and removed."""
    spool = SmallSpool(tmp_path)
    for step in range(100):
        spool.producer.append("loss", 0.5, step)
        if step % 7 == 0:
            spool.deliver()
        assert not spool.producer.is_wiped()
    spool.producer.close()
    shutil.rmtree(spool.directory.path)
    assert not spool.producer.is_wiped()


def test_a_new_folder_that_cannot_be_made_is_tried_again(tmp_path: Path) -> None:
    """Where there is no room for a new folder the call raises with words; a later one goes on."""
    logger = open_logger(tmp_path)
    logger.log_metric("loss", 0.5)
    root = tmp_path / "spool"
    shutil.rmtree(root)
    root.touch()
    for _ in range(2):
        with pytest.raises(SpoolError, match="is not a folder"):
            logger.log_metric("new", 0.5)
    root.unlink()
    logger.log_metric("new", 0.5)
    report = logger.close(0)
    assert (report.unknown, report.pending) == (1, 1)


def test_threads_lose_the_count_of_nothing(tmp_path: Path) -> None:
    """Whatever the moment of the wipe, every point that any thread logged is counted once."""
    logger = open_logger(tmp_path)
    logged, begun = 6000, threading.Event()

    def log(thread: int) -> None:
        for step in range(logged):
            logger.log_metric(f"k{thread}", 0.5, step)
            if step == 100:
                begun.set()

    threads = [threading.Thread(target=log, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    shutil.rmtree(folder_of(logger), ignore_errors=True)
    while any(thread.is_alive() for thread in threads):
        logger.stats()
    report = logger.close(0)
    assert total(report) == 4 * logged


def test_the_job_goes_on(sqlite_uri: str, tmp_path: Path) -> None:
    """What is logged after a wipe was noticed is delivered, in order, once, and so is what was
    delivered before."""
    run_id = make_run(sqlite_uri)
    settings = Settings(delivery="thread", linger_s=0, spool_dir=tmp_path / "spool")
    logger = MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings)
    logger.log_series("loss", range(100))
    assert logger.flush(60).delivered == 100
    shutil.rmtree(tmp_path / "spool")
    logger.log_metric("loss", 100.0)
    logger.flush(60)
    assert producer_of(logger).is_gone
    logger.log_series("loss", range(101, 200))
    report = logger.close(60)
    assert report.pending == 0
    assert report.delivered + report.unknown == 200
    stored = [metric.value for metric in history(sqlite_uri, run_id, "loss")]
    assert stored[:100] == list(range(100))
    assert stored[-99:] == list(range(101, 200))
    assert report.delivered <= len(stored) <= 200
