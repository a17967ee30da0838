"""Forks, other processes and threads: each process is a producer of its own, and all arrives."""

import asyncio
import sys
import threading
from collections.abc import Iterator

import pytest

from flowbuffer import Handle, MetricLogger, Settings
from support.backends import history, make_run
from support.jobs import StartJob, Store
from support.waiting import PATIENCE_S


def test_a_forked_child_is_a_producer_of_its_own(start_job: StartJob, store: Store) -> None:
    """Children made by os.fork while threads log never touch the parent's slots, and all points of
    all of them arrive, also of a child that ends without a word."""
    job = start_job(
        """
        from pathlib import Path

        # Less than a batch is logged, so that no state changes while the bytes are compared.
        logger = MetricLogger(RUN, settings=Settings.from_env(linger_s=3600))
        spool = logger.settings.resolved_spool_dir()

        def log(key):
            for step in range(200):
                logger.log_metric(key, -float(step), step=step)

        log("before")
        (own,) = spool.glob("*/*")
        segment = own / "00000000.slots"
        written = segment.read_bytes()[: 64 + 40 * 200]
        threads = [threading.Thread(target=log, args=(f"thread{n}",)) for n in range(2)]
        for thread in threads:
            thread.start()
        children = []
        for number in range(3):
            pid = os.fork()
            if pid == 0:
                log(f"child{number}")
                (handle,) = [logger.log_metric("last", number)]
                assert own.name not in repr(handle)
                if number == 0:
                    logger.close()
                os._exit(0)
            children.append(pid)
        for pid in children:
            assert os.waitpid(pid, 0)[1] == 0
        for thread in threads:
            thread.join()
        log("after")
        assert segment.read_bytes()[: len(written)] == written
        logger.close()
        """
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    with MetricLogger(store.run_id()) as logger:  # delivers what the silent children left
        logger.log_metric("next", 1.0)
    keys = ["before", "after", "thread0", "thread1", "child0", "child1", "child2"]
    for key in keys:
        assert store.values(key) == [-float(step) for step in range(200)], key
    assert sorted(store.values("last")) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("delivery", ["thread", "process"])
def test_a_child_waits_for_a_point_of_its_parent(start_job: StartJob, delivery: str) -> None:
    """A handle that the parent made can be waited for in a forked child, which leaves delivery to
    its parent's collector."""
    job = start_job(
        f"""
        settings = Settings.from_env(linger_s=3600, delivery={delivery!r})
        logger = MetricLogger(RUN, settings=settings)
        handle = logger.log_metric("loss", 1.0)
        pid = os.fork()
        if pid == 0:
            handle.wait({PATIENCE_S})
            os._exit(17 if handle.done() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17
        assert handle.done()
        """
    )
    ended = job.end()
    assert ended.status == 0, ended.err


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(start_job: StartJob, store: Store, method: str) -> None:
    """A logger that is passed to a multiprocessing child logs there, to the same run, and the
    child's end delivers its points."""
    job = start_job(
        f"""
        import multiprocessing

        def work(logger, key):
            for step in range(200):
                logger.log_metric(key, -float(step), step=step)

        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            logger = MetricLogger(RUN, settings=Settings.from_env(linger_s=3600))
            work(logger, "parent")
            children = [
                context.Process(target=work, args=(logger, f"child{{n}}")) for n in range(2)
            ]
            for child in children:
                child.start()
            for child in children:
                child.join()
                assert child.exitcode == 0
            say("joined")
            hear()
            logger.close()
        """
    )
    job.expect("joined")
    expected = [-float(step) for step in range(200)]
    assert store.values("child0") == store.values("child1") == expected
    job.tell("end")
    ended = job.end()
    assert ended.status == 0, ended.err
    assert store.values("parent") == expected


def test_a_fork_of_a_thread(start_job: StartJob, store: Store) -> None:
    """A child forked by a thread, of a process whose logger was made in that thread, logs, and
    ends by SIGTERM as if nobody handled it, with its points delivered later."""
    job = start_job(
        """
        def work():
            logger = MetricLogger(RUN)
            logger.log_metric("parent", 1.0)
            pid = os.fork()
            if pid == 0:
                logger.log_metric("child", 1.0)
                os.kill(os.getpid(), 15)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -15
            logger.close()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        say("fine")
        """
    )
    ended = job.end()
    assert "fine" in ended.out, ended.err
    with MetricLogger(store.run_id()) as logger:
        logger.log_metric("next", 1.0)
    assert store.values("parent") == store.values("child") == [1.0]


@pytest.fixture
def logger(sqlite_uri: str) -> Iterator[MetricLogger]:
    run_id = make_run(sqlite_uri)
    settings = Settings.from_env(linger_s=3600)
    with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings) as made:
        yield made


def test_threads_of_one_logger(logger: MetricLogger, sqlite_uri: str) -> None:
    """Points of several threads arrive, those of each thread in its order."""

    def log(name: str) -> None:
        for step in range(1500):
            logger.log_metrics({f"{name}/a": -float(step), f"{name}/b": 1.0}, step=step)

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=log, args=(f"t{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch_s)
    assert logger.flush(PATIENCE_S).pending == 0
    for number in range(4):
        values = [m.value for m in history(sqlite_uri, logger.run_id, f"t{number}/a")]
        assert values == [-float(step) for step in range(1500)]


def test_wait_in_another_thread_and_after_close(logger: MetricLogger) -> None:
    """A handle can be waited for in any thread, and after close()."""
    handle = logger.log_metric("loss", 1.0)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(handle.exception(PATIENCE_S)))
    thread.start()
    thread.join()
    assert results == [None]
    series = logger.log_series("series", range(3000))
    logger.close()
    series.wait(PATIENCE_S)
    handle.wait(0)
    assert series.done()
    assert handle.done()


def test_await(logger: MetricLogger) -> None:
    """`await handle` waits for delivery and leaves the event loop running meanwhile."""

    async def wait(handle: Handle) -> None:
        await handle

    async def main() -> int:
        turns = 0
        handle = logger.log_metrics({"a": 1.0, "b": 2.0})
        waiting = asyncio.ensure_future(wait(handle))
        while not waiting.done():
            turns += 1
            await asyncio.sleep(0)
        await waiting
        await handle
        assert handle.done()
        return turns

    assert asyncio.run(main()) > 1
