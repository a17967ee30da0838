"""The threads of a process that logs: there while there is something to do, and in nobody's way."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from flowbuffer import MetricLogger, Settings
from flowbuffer.collector.background import Background, Wake
from support.backends import history, make_run
from support.jobs import StartJob, Store
from support.waiting import wait_until


class Counter:
    """Work that is asked for by number, and done in a thread."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.done: list[int] = []
        self.threads: set[int] = set()
        self.background = Background("counter", self.work, lambda: not self.asked.empty())

    def work(self) -> None:
        self.threads.add(threading.get_ident())
        while not self.asked.empty():
            self.done.append(self.asked.get())

    def ask(self, number: int) -> None:
        self.asked.put(number)
        assert self.background.begin()


def test_nothing_that_was_asked_for_is_forgotten() -> None:
    """Who asks at the moment at which the thread ends is heard all the same, and one at a time."""
    counter = Counter()
    for number in range(2000):
        counter.ask(number)
    wait_until(lambda: len(counter.done) == 2000)
    assert counter.done == list(range(2000))
    wait_until(lambda: not counter.background.at_work)


def test_whoever_interrupts_is_not_let_in() -> None:
    """Where no thread can be started, who interrupts whoever stands in for it does nothing."""
    background = Background("none", lambda: None, lambda: False)
    done: list[str] = []

    def outer() -> None:
        background.stand_in(lambda: done.append("inner"))
        done.append("outer")

    background.stand_in(outer)
    assert done == ["outer"]
    assert not background.at_work


def at_every_line_of(
    function: Callable[[], object], interrupt: Callable[[], object], *modules: str
) -> int:
    """Call a function once for each line of these modules that it executes in this thread, and
    interrupt it before that line, as a signal handler would; the number of lines."""
    lines = 0
    while True:
        left = [lines]

        def trace(frame: FrameType, event: str, _: Any, left: list[int] = left) -> Any:
            if Path(frame.f_code.co_filename).stem not in modules:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == -1:
                    sys.settrace(None)
                    interrupt()
            return trace

        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(None)
        if left[0] >= 0:
            return lines
        lines += 1


def test_a_wake_may_be_set_while_it_is_set() -> None:
    """A handler that sets what its thread is setting, clearing or waiting for blocks nobody."""
    wake = Wake()

    def use() -> None:
        wake.set()
        wake.wait(10)
        wake.clear()

    assert at_every_line_of(use, wake.set, "background") > 5
    wake.clear()
    assert not wake.wait(0)


@pytest.mark.parametrize("delivery", ["process", "thread"])
def test_a_handler_that_waits_interrupts_one_that_waits(sqlite_uri: str, delivery: Any) -> None:
    """At whatever line of delivery's, in the thread that logs, a handler logs and waits: it gets
    what it waits for, and so does who was interrupted (P1, P5)."""
    run_id = make_run(sqlite_uri)
    settings = Settings.from_env(delivery=delivery)
    logger = MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings)
    values = iter(range(10_000))

    def log_and_wait() -> None:
        logger.log_metric("loss", float(next(values)))
        assert logger.flush(30).pending == 0

    lines = at_every_line_of(log_and_wait, log_and_wait, "background", "thread", "deliverers")
    assert lines > 10
    logger.close()
    stored = [metric.value for metric in history(sqlite_uri, run_id, "loss")]
    assert stored == [float(n) for n in range(len(stored))]
    assert len(stored) == 2 * lines + 1


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("flowbuffer")}


def open_files(part: str) -> list[str]:
    here = Path("/proc/self/fd")
    links = [os.readlink(path) for path in here.iterdir() if path.is_symlink()]
    return [link for link in links if part in link]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("delivery", ["process", "thread"])
def test_nothing_is_left_of_a_run_that_has_ended(
    sqlite_uri: str, delivery: Any, tmp_path: Path
) -> None:
    """When the last logger is closed, its threads and files are gone, and come back when they are
    wanted; nobody that polices threads has anything to say."""
    before = set(threading.enumerate())
    settings = Settings.from_env(delivery=delivery)
    for value in (1.0, 2.0):
        run_id = make_run(sqlite_uri)
        with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings) as logger:
            logger.log_metric("loss", value)
            assert logger.flush(30).pending == 0
            assert threads()
        wait_until(lambda: set(threading.enumerate()) <= before, timeout_s=2)
        assert open_files(str(tmp_path / "spool")) == []
        assert [metric.value for metric in history(sqlite_uri, run_id, "loss")] == [value]


def test_the_second_run_of_a_database_needs_no_second_look_at_its_tables(
    sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MLflow looks at when a store is made is looked at once, not for every short run."""
    import mlflow.store.db.utils as utils

    runs = [make_run(sqlite_uri) for _ in range(3)]
    looks: list[object] = []
    real = utils._verify_schema
    monkeypatch.setattr(utils, "_verify_schema", lambda engine: (looks.append(1), real(engine)))
    for run_id in runs:
        settings = Settings.from_env(delivery="thread")
        with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings) as logger:
            logger.log_metric("loss", 1.0)
    assert len(looks) == 1


# What a program does with its children.


PROCESS = {"FLOWBUFFER_DELIVERY": "process"}


def test_the_program_meets_no_child_of_ours(start_job: StartJob, store: Store) -> None:
    """Who waits for any child meets its own: what starts the collector process is none of them."""
    job = start_job(
        """
        import os
        logger = MetricLogger(RUN)
        logger.log_metric("loss", 1.0)
        try:
            say(f"child {os.waitpid(-1, 0)}")
        except ChildProcessError:
            say("none")
        logger.flush()
        """,
        **PROCESS,
    )
    job.expect("none")
    assert job.end().status == 0
    assert store.values("loss") == [1.0]


def test_a_program_that_ignores_its_children(start_job: StartJob, store: Store) -> None:
    """With SIGCHLD ignored, the system reaps what starts the collector process: it starts."""
    job = start_job(
        """
        import signal
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        logger = MetricLogger(RUN)
        logger.log_metric("loss", 1.0)
        say("logged")
        hear()
        """,
        **PROCESS,
    )
    job.expect("logged")
    wait_until(lambda: store.values("loss"))
    job.tell("end")
    ended = job.end()
    assert (ended.status, ended.err) == (0, "")


def test_a_frozen_program_is_not_started_again(start_job: StartJob, store: Store) -> None:
    """Where sys.executable is the program, a thread delivers."""
    job = start_job(
        """
        import sys, threading
        sys.frozen = True
        logger = MetricLogger(RUN)
        logger.log_metric("loss", 1.0)
        assert logger.settings.delivery == "thread"
        logger.flush()
        """,
        **PROCESS,
    )
    assert job.end().status == 0
    assert store.values("loss") == [1.0]


@pytest.mark.parametrize(
    ("program", "is_one"),
    [
        ("python3.11", True),
        ("python", True),
        ("Python", True),
        ("python3.13t", True),
        ("python3-dbg", True),
        ("pypy3", True),
        ("uwsgi", False),
        ("blender", False),
        ("train", False),
        ("pythonista-app", False),
    ],
)
def test_what_is_an_interpreter(
    program: str, is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is called as interpreters are is started as one."""
    from flowbuffer.collector.handover import interpreter

    path = tmp_path / program
    path.touch(mode=0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    assert interpreter() == (str(path) if is_one else None)
    monkeypatch.setattr(sys, "executable", None)
    assert interpreter() is None
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert interpreter() == (str(path) if program == "python" else None)


def test_a_program_that_was_taken_for_an_interpreter_ends() -> None:
    """What is started as a collector process and is none ends before it does its work again."""
    code = "import flowbuffer; print('work')"
    environment = {**os.environ, "_FLOWBUFFER_PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 70
    assert done.stdout == ""


def test_a_fork_while_a_thread_imports(start_job: StartJob, store: Store) -> None:
    """A child that is forked in the moment at which delivery's thread imports what it needs has no
    half of a module: it logs and delivers."""
    job = start_job(
        """
        import importlib.abc, os, sys, threading
        imports = threading.Event()

        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, *_):
                if name == "flowbuffer.delivery.sender":
                    sys.meta_path.remove(self)
                    imports.set()

        sys.meta_path.insert(0, Finder())
        logger = MetricLogger(RUN)
        logger.log_metric("parent", 1.0)
        assert imports.wait(60)
        pid = os.fork()
        if pid == 0:
            logger.log_metric("child", 1.0)
            os._exit(logger.flush(60).pending)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        """,
        FLOWBUFFER_DELIVERY="thread",
    )
    assert job.end().status == 0
    assert store.values("parent") == [1.0]
    assert store.values("child") == [1.0]
