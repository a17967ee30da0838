"""Any number of runs may be logged to and never ended: loggers share what the process may have."""

import ast
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowbuffer import MetricLogger, Settings
from flowbuffer.logger import open_loggers
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.producer_info import this_producer
from support.backends import history, make_run
from support.jobs import run_to_end

NOWHERE = "http://127.0.0.1:9"  # refuses connections


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three loggers may be producers at once, and none is one yet."""
    open_loggers._open.clear()
    monkeypatch.setattr(open_loggers, "most_producers", lambda: 3)
    yield
    open_loggers._open.clear()


def open_ones(loggers: list[MetricLogger]) -> list[int]:
    return [number for number, logger in enumerate(loggers) if logger._is_open]


def test_many_runs_that_never_end(tmp_path: Path) -> None:
    """With 48 descriptors a process logs to 60 runs, again and again, and nothing is lost."""
    job = (
        tmp_path / "job.py"
    )  # a process of its own, whose descriptors are not those of other tests
    job.write_text(
        textwrap.dedent(
            f"""
            import os, resource
            from flowbuffer import MetricLogger

            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (48, hard))
            loggers = []
            for number in range(60):
                logger = MetricLogger(f"run{{number}}", tracking_uri="{NOWHERE}")
                logger.log_metric("loss", float(number), 0)
                loggers.append(logger)
            for step in (1, 2):
                for logger in loggers[::9]:
                    logger.log_metric("loss", 0.5, step)
            print([logger.close(0).pending for logger in loggers])
            """
        )
    )
    said = run_to_end(
        [sys.executable, str(job)],
        NOWHERE,
        FLOWBUFFER_OFFLINE="1",
        FLOWBUFFER_MAX_SPOOL_BYTES=str(1 << 30),
    )
    assert ast.literal_eval(said) == [3 if number % 9 == 0 else 1 for number in range(60)]


@pytest.mark.usefixtures("few")
def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    """A logger that is used stays a producer; of the others the one goes that was used last of
    all."""
    settings = Settings(spool_dir=tmp_path / "spool", offline=True)
    loggers = []
    for number in range(10):
        loggers.append(MetricLogger(f"run{number}", tracking_uri=NOWHERE, settings=settings))
        for used in (loggers[-1], loggers[0]):
            used.log_metric("loss", 0.5)
    assert open_ones(loggers) == [0, 8, 9]
    loggers[4].log_metric("loss", 0.5)
    assert 4 in open_ones(loggers)
    for logger in loggers:
        logger.close(0)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("delivery", ["thread", "inline"])
def test_counts_handles_and_order_are_as_of_one(sqlite_uri: str, delivery: str) -> None:
    """A logger that was several producers in turn counts, waits and reads back as one."""
    run_ids = [make_run(sqlite_uri) for _ in range(5)]
    settings = Settings(delivery=delivery, linger_s=0)  # type: ignore[arg-type]
    loggers = [MetricLogger(run, tracking_uri=sqlite_uri, settings=settings) for run in run_ids]
    handles = []
    for value in range(3):
        for logger in loggers:
            handles.append(logger.log_metric("loss", float(-value)))
            logger.log_param(f"p{value}", value)
        assert len(open_ones(loggers)) == 3
    for logger in loggers:
        assert logger.flush(30).delivered == 6
        assert logger.stats().delivered == 6
    for handle in handles:
        handle.wait(30)
    for logger, run_id in zip(loggers, run_ids, strict=True):
        report = logger.close(30)
        assert (report.delivered, report.pending, report.unknown) == (6, 0, 0)
        values = [metric.value for metric in history(sqlite_uri, run_id, "loss")]
        assert values == [0.0, -1.0, -2.0]


def test_order_holds_where_points_were_moved_ahead(sqlite_uri: str) -> None:
    """P2 across the producers of one logger: also if so many points of one step were logged in a
    moment that their times are ahead of the clock."""
    run_id = make_run(sqlite_uri)
    settings = Settings(delivery="thread", linger_s=0)
    points = 3000
    with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings) as logger:
        for part in range(3):
            for value in range(points):
                logger.log_metric("loss", -float(part * points + value))
                logger.log_metric(f"other{part}", 0.5)
            assert logger.let_go()
        logger.log_series("loss", [-float(3 * points)])
    values = [metric.value for metric in history(sqlite_uri, run_id, "loss")]
    assert values == [-float(value) for value in range(3 * points + 1)]


class Slow:
    """A value that takes its time to become a number, in the call that logs it."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __float__(self) -> float:
        self.begun.set()
        assert self.go_on.wait(60)
        return 0.25


@pytest.mark.parametrize("strict", [True, False])
def test_a_call_that_is_under_way_keeps_the_producer(tmp_path: Path, strict: bool) -> None:
    """While a thread is in a call that logs, its logger does not let go, and loses nothing."""
    settings = Settings(spool_dir=tmp_path / "spool", offline=True, strict=strict)
    logger = MetricLogger("run", tracking_uri=NOWHERE, settings=settings)
    slow = Slow()
    thread = threading.Thread(target=lambda: logger.log_metric("loss", slow))
    thread.start()
    assert slow.begun.wait(60)
    assert not logger.let_go()
    slow.go_on.set()
    thread.join()
    assert logger.let_go()
    assert not logger._is_open
    logger.log_metric("loss", 0.5)
    assert logger.close(0).pending == 2


def test_a_call_may_let_go_of_others_but_not_of_its_own(tmp_path: Path) -> None:
    """What a signal handler does in the middle of a call cannot take the call's producer away."""
    settings = Settings(spool_dir=tmp_path / "spool", offline=True)
    one, other = (
        MetricLogger(run, tracking_uri=NOWHERE, settings=settings) for run in ("one", "other")
    )
    went = []

    class Interrupted:
        def __float__(self) -> float:
            went.extend([one.let_go(), other.let_go()])
            return 0.25

    one.log_metric("loss", Interrupted())
    assert went == [False, True]
    assert one.close(0).pending == 1
    assert other.close(0).pending == 0


@pytest.mark.usefixtures("few")
def test_threads_lose_nothing_while_loggers_take_turns(tmp_path: Path) -> None:
    """Whatever the moment in which a producer is let go, no point of any thread is lost."""
    settings = Settings(spool_dir=tmp_path / "spool", offline=True, max_spool_bytes=1 << 30)
    loggers = [
        MetricLogger(f"run{number}", tracking_uri=NOWHERE, settings=settings) for number in range(5)
    ]
    threads = [
        threading.Thread(
            target=lambda: [
                loggers[number // 20 % 5].log_metric(f"k{number % 13}", 0.5)
                for number in range(300)
            ]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(logger.close(0).pending for logger in loggers) == 4 * 300


def test_a_closed_logger_stays_closed(tmp_path: Path) -> None:
    """A logger that has let its producer go and is closed refuses points, as every closed one."""
    settings = Settings(spool_dir=tmp_path / "spool", offline=True)
    logger = MetricLogger("run", tracking_uri=NOWHERE, settings=settings)
    logger.log_metric("loss", 0.5)
    assert logger.let_go()
    assert logger.close(0).pending == 1
    with pytest.raises(Exception, match="closed"):
        logger.log_metric("loss", 0.5)
    assert logger.close(0).pending == 1


def test_the_next_folder_sorts_behind(tmp_path: Path) -> None:
    """Whoever takes the folders of a run in their order takes those of one logger in theirs, so
    that of a tag's values the last one stays."""
    spool = Spool(tmp_path / "spool")
    before = spool.add_producer(this_producer("run", NOWHERE, 0))
    for _ in range(3):
        after = spool.add_producer(this_producer("run", NOWHERE, 0), before.path, {"carry": b"x"})
        assert before.path < after.path
        assert (after.path / "carry").read_bytes() == b"x"
        before.lock.release()
        before = after
    before.lock.release()


def test_key_ids_go_on(tmp_path: Path) -> None:
    """The second producer of a logger uses the first one's key table, and writes no key again."""
    settings = Settings(spool_dir=tmp_path / "spool", offline=True)
    logger = MetricLogger("run", tracking_uri=NOWHERE, settings=settings)
    for key in ("a", "b"):
        logger.log_metric(key, 0.5)
    logger.log_param("a", "b")
    assert logger.let_go()
    logger.log_metric("b", 0.5)
    logger.log_metric("c", 0.5)
    assert logger._spooling is not None
    producer = logger._spooling.producer
    ids = producer._keys.metrics
    assert (ids["a"], ids["b"]) == (0, 1)
    assert len({*ids.values(), *producer._keys.texts.values()}) == 4
    assert (producer.directory.path / "keys").read_bytes().count(b"FLOW") == 4
    logger.close(0)
