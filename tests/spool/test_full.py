"""P6: a full spool, and a full disk. Nothing crashes, every drop is counted, and room is used."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowbuffer import MetricLogger, Settings
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.policies import THREAD
from flowbuffer.errors import DeliveryError, RetriableError, SpoolFull
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.producer_info import this_producer
from flowbuffer.spool.tally import tally
from flowbuffer.spool.writing.producer import Producer
from flowbuffer.testing import FakeTransport, ManualClock
from support.backends import history, make_run

POLICIES = ("block", "drop_newest", "raise")
NOWHERE = "http://127.0.0.1:9"  # refuses connections
SMALLEST = 1 << 20  # the least that max_spool_bytes may be
BLOCK_TIMEOUT_S = 3.0


class Rig:
    """A producer with small segments, and a collector whose server is down until told."""

    def __init__(self, root: Path, when_full: str, *, max_spool_bytes: int = SMALLEST) -> None:
        self.clock = ManualClock()
        self.up = False
        self.served_when_full = False
        self.transport = FakeTransport(answer=lambda _: None if self.up else RetriableError("down"))
        self.settings = Settings(
            spool_dir=root,
            delivery="inline",
            max_spool_bytes=max_spool_bytes,
            when_full=when_full,
            block_timeout_s=BLOCK_TIMEOUT_S,
        )
        self.spool = Spool(root)
        self.directory = self.spool.add_producer(this_producer("run", NOWHERE, 0))
        self.producer = Producer(
            self.directory,
            self.spool,
            self.settings,
            self.clock,
            self.hurry,
            segment_slots=(256, 256),
        )
        self.collector = Collector(
            self.spool, self.settings, self.clock, THREAD, lambda *_: self.transport
        )
        stream = self.collector.add(self.directory.path, NOWHERE)
        assert stream is not None
        self.stream = stream
        self.stored: dict[str, list[float]] = {}
        self.count = 0

    def hurry(self) -> None:
        """What a full spool does to a collector that runs: it looks now."""
        if self.served_when_full:
            self.up = True
            self.deliver()

    def deliver(self) -> None:
        """Let the collector work until nothing is left to deliver."""
        for _ in range(1000):
            self.collector.step(hurry=True)
            self.clock.turn(0.1)
            if (found := tally(self.directory.path)) is None or not found.pending:
                break
        for _ in range(5):  # to see the end of the last segments, and to delete them
            self.collector.step(hurry=True)
            self.clock.turn(0.1)

    def log(self, kind: str = "metric", key: str = "loss") -> bool:
        """Log one call of a kind; False if it was dropped. What is stored is remembered."""
        self.count += 1
        values = [float(self.count)]
        if kind == "metric":
            places = self.producer.append(key, values[0])
        elif kind == "metrics":
            places = self.producer.append_many({key: values[0]})
        else:
            values = [self.count + index / 1024 for index in range(512)]
            places = self.producer.append_series(key, values)
        if any(isinstance(place, str) for place in places):  # the reason
            return False
        self.stored.setdefault(key, []).extend(values)
        return True

    def fill(self, kind: str = "metric") -> None:
        """Log until the spool is full."""
        for _ in range(100_000):
            try:
                if not self.log(kind):
                    return
            except SpoolFull:
                return
        raise AssertionError("the spool never became full")

    def check(self) -> None:
        """All that was stored arrives, in order."""
        self.up = True
        self.clock.turn(60)
        self.deliver()
        for key, values in self.stored.items():
            assert [value for *_, value in self.transport.history("run", key)] == values
        self.close()

    def close(self) -> None:
        self.stream.hand_on()
        self.producer.close()
        self.directory.lock.release()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Callable[[str], Rig]]:
    made: list[Rig] = []

    def make(when_full: str) -> Rig:
        made.append(Rig(tmp_path / f"spool{len(made)}", when_full))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("kind", ["metric", "metrics", "series"])
def test_block_waits_for_its_time_and_then_raises(rig: Callable[[str], Rig], kind: str) -> None:
    """With `block` a call waits for block_timeout_s, then says that the spool is full, where and
    why."""
    full = rig("block")
    full.fill(kind)
    before_s = full.clock.monotonic_s()
    with pytest.raises(SpoolFull, match=r"max_spool_bytes.*waited 3 s, block_timeout_s"):
        full.log(kind)
    waited_s = full.clock.monotonic_s() - before_s
    assert BLOCK_TIMEOUT_S <= waited_s < BLOCK_TIMEOUT_S + 0.1
    assert full.spool.used_bytes() <= SMALLEST
    assert not full.producer.dropped


@pytest.mark.parametrize("kind", ["metric", "metrics", "series"])
def test_raise_raises_at_once(rig: Callable[[str], Rig], kind: str) -> None:
    """With `raise` a call on a full spool says so without waiting."""
    full = rig("raise")
    full.fill(kind)
    before_s = full.clock.monotonic_s()
    with pytest.raises(SpoolFull, match="max_spool_bytes"):
        full.log(kind)
    assert full.clock.monotonic_s() == before_s
    assert full.spool.used_bytes() <= SMALLEST


@pytest.mark.parametrize(("kind", "points"), [("metric", 1), ("metrics", 1), ("series", 512)])
def test_drop_newest_counts(rig: Callable[[str], Rig], kind: str, points: int) -> None:
    """With `drop_newest` a call on a full spool returns at once and every point of it is
    counted."""
    full = rig("drop_newest")
    full.fill(kind)
    before_s, before = full.clock.monotonic_s(), full.producer.dropped["spool_full"]
    assert before == points
    for _ in range(10):
        assert not full.log(kind)
    assert full.clock.monotonic_s() == before_s
    assert full.producer.dropped["spool_full"] == before + 10 * points


@pytest.mark.parametrize("kind", ["metric", "metrics", "series"])
@pytest.mark.parametrize("when_full", POLICIES)
def test_room_that_is_made_is_used(rig: Callable[[str], Rig], when_full: str, kind: str) -> None:
    """Once delivery has made room logging goes on, and all that was stored arrives in order."""
    full = rig(when_full)
    full.fill(kind)
    full.up = True
    full.clock.turn(60)  # the collector waits longer after each failure
    full.deliver()
    for _ in range(100):
        assert full.log(kind)
    full.check()


def test_block_goes_on_when_there_is_room(rig: Callable[[str], Rig]) -> None:
    """A call that waits in a full spool goes on as soon as delivery has made room."""
    full = rig("block")
    full.fill()
    full.served_when_full = True
    before_s = full.clock.monotonic_s()
    full.log()
    assert full.up
    assert full.clock.monotonic_s() - before_s < 60
    full.check()


def test_drops_are_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """flush, stats, the handle and the last line tell how many points a full spool dropped."""
    settings = Settings(
        spool_dir=tmp_path / "spool",
        max_spool_bytes=SMALLEST,
        when_full="drop_newest",
        shutdown_timeout_s=0.1,
    )
    logger = MetricLogger("run", tracking_uri=NOWHERE, settings=settings)
    logger.log_series("series", range(60_000))
    logger.log_series("series", range(60_000))
    handle = logger.log_series("series", range(60_000))
    error = handle.exception(1)
    assert isinstance(error, DeliveryError)
    assert "full" in str(error)
    assert handle.done()
    dropped = 60_000 * 2
    assert logger.flush(0).dropped == {"spool_full": dropped}
    assert logger.stats().dropped == {"spool_full": dropped}
    report = logger.close()
    assert report.dropped == {"spool_full": dropped}
    assert report.pending == 60_000
    said = capfd.readouterr().err
    assert f"{dropped:,} dropped (spool_full)" in said
    assert "60,000 points" in said


def test_the_smallest_spool_is_enough(tmp_path: Path, sqlite_uri: str) -> None:
    """However small max_spool_bytes may be, a run of any length gets through it."""
    settings = Settings(spool_dir=tmp_path / "spool", max_spool_bytes=SMALLEST, block_timeout_s=20)
    run_id = make_run(sqlite_uri)
    points = 30_000
    with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings) as logger:
        for step in range(points):
            logger.log_metric("loss", -float(step), step=step)
    assert [metric.value for metric in history(sqlite_uri, run_id, "loss")] == [
        -float(step) for step in range(points)
    ]


# A full disk. A SIGBUS would end the whole test run, and so show.

DISK_BYTES = 256 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes small disks."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small disk can be mounted on Linux by root only")
    mounted: list[Path] = []

    def mount(options: str = "") -> Path:
        point = tmp_path / f"disk{len(mounted)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}{options}", "tmpfs", str(point)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
        mounted.append(point)
        return point

    yield mount
    for point in mounted:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def take_all_but(folder: Path, pages: int) -> Path:
    """Take the disk's room but for some pages, by a file that is somebody else's."""
    ballast = folder / "ballast"
    disk = os.statvfs(folder)
    size = (disk.f_bavail - pages) * disk.f_frsize
    with ballast.open("wb") as file:
        if size > 0:
            os.posix_fallocate(file.fileno(), 0, size)
    return ballast


@pytest.mark.parametrize("kind", ["metric", "metrics", "series"])
@pytest.mark.parametrize("when_full", POLICIES)
def test_a_full_disk_is_a_full_spool(disk: Callable[..., Path], when_full: str, kind: str) -> None:
    """A disk without room is treated as when_full says, and what was stored before arrives."""
    full = Rig(disk() / "spool", when_full)
    full.fill(kind)
    assert full.stored
    if when_full == "drop_newest":
        assert not full.log(kind)
        assert full.producer.dropped["spool_full"] > 0
    else:
        with pytest.raises(SpoolFull, match="No space left"):
            full.log(kind)
    full.check()


@pytest.mark.parametrize("kind", ["metric", "series"])
def test_a_disk_that_its_own_points_filled_is_emptied(disk: Callable[..., Path], kind: str) -> None:
    """Delivery needs no room: it empties a disk on which nothing more can be written."""
    full = Rig(disk() / "spool", "raise")
    full.fill(kind)
    take_all_but(full.spool.root.parent, 0)
    full.up = True
    full.clock.turn(60)
    full.deliver()
    for _ in range(10):
        full.log(kind)
    full.check()


@pytest.mark.parametrize("pages", range(4))
def test_the_last_pages_of_a_disk(disk: Callable[..., Path], pages: int) -> None:
    """Wherever the disk ends, in a segment, a journal or the keys, a call that returned is kept
    and the others raise SpoolFull."""
    full = Rig(disk() / "spool", "raise")
    for kind in ("metric", "series"):
        full.log(kind, kind)
    ballast = take_all_but(full.spool.root.parent, pages)
    refused = 0
    for number in range(200):
        for kind in ("metric", "series"):
            try:
                full.log(kind, f"{kind}/{number:0200d}")
            except SpoolFull:
                refused += 1
    assert refused
    ballast.unlink()
    full.clock.turn(1)
    for kind in ("metric", "series"):
        full.log(kind, kind)
    full.check()


def test_a_disk_without_inodes(disk: Callable[..., Path]) -> None:
    """A disk that takes no more files is a full one."""
    full = Rig(disk(",nr_inodes=16") / "spool", "raise")
    full.fill()
    full.clock.turn(1)
    with pytest.raises(SpoolFull, match="No space left"):
        full.log()
    full.check()


def test_no_room_for_a_first_segment(disk: Callable[..., Path]) -> None:
    """A logger that finds no room at all says so at its first point: what is full, and where."""
    folder = disk()
    settings = Settings(spool_dir=folder / "spool", when_full="raise", shutdown_timeout_s=0)
    Spool(folder / "spool")
    take_all_but(folder, 12)
    with (
        MetricLogger("run", tracking_uri=NOWHERE, settings=settings) as logger,
        pytest.raises(SpoolFull, match=str(folder)),
    ):
        logger.log_metric("loss", 1.0)
