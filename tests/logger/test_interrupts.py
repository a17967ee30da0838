"""P7 for a person: one Ctrl-C ends all waiting at the end of a job, the last line is printed, the
run has its true status, and the process ends as by an interrupt. Each job is a real process."""

import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flowbuffer.clock import Clock
from flowbuffer.logger.patience import Patience
from support.backends import free_port
from support.jobs import Ended, Job, StartJob, Store

#: A server that is down for metrics alone; the job says "waiting" once it waits for delivery.
DOWN = """
import signal
from flowbuffer.clock import Clock
from flowbuffer.errors import RetriableError
from flowbuffer.backends.mlflow_transport import MlflowTransport

real_log_batch, real_sleep, ending = MlflowTransport._log_batch, Clock.sleep, []

def down(self, request):
    raise RetriableError("503 there is no server")

def sleep(self, seconds):
    if ending and threading.current_thread() is threading.main_thread():
        ending.clear()
        say("waiting")
    real_sleep(self, seconds)

MlflowTransport._log_batch, Clock.sleep = down, sleep
"""
#: Ways to end: the code, and the status of the run that the job started.
ENDS = {
    "with": (
        """
        with MetricLogger() as logger:
            logger.log_metric("loss", 1.0)
            ending.append(True)
        """,
        "KILLED",
    ),
    "close": ("logger = MetricLogger()\n{log}\nlogger.close()", "KILLED"),
    "flush": ("logger = MetricLogger()\n{log}\nlogger.flush()", "FAILED"),
    "the end of the process": ("logger = MetricLogger()\n{log}", "KILLED"),
    "sys.exit": ("logger = MetricLogger()\n{log}\nsys.exit(3)", "KILLED"),
    "an active run": (
        """
        with mlflow.start_run():
            flowbuffer.log_metric("loss", 1.0)
            ending.append(True)
        """,
        "KILLED",
    ),
    "an active run that nobody ends": (
        """
        flowbuffer.enable()
        mlflow.start_run()
        mlflow.log_metric("loss", 1.0)
        ending.append(True)
        """,
        "KILLED",
    ),
    "asyncio": (
        """
        import asyncio
        async def main():
            logger = MetricLogger()
            logger.log_metric("loss", 1.0)
            ending.append(True)
            logger.close()
        asyncio.run(main())
        """,
        "KILLED",
    ),
    "a handler that sets a flag": (
        """
        signal.signal(signal.SIGINT, lambda *_: say("flag"))
        logger = MetricLogger()
        logger.log_metric("loss", 1.0)
        ending.append(True)
        logger.close()
        os._exit(5)
        """,
        "KILLED",
    ),
}
LOG = 'logger.log_metric("loss", 1.0)\nending.append(True)'


def interrupted(job: Job) -> Ended:
    """Press Ctrl-C once the job waits."""
    job.expect("waiting")
    job.process.send_signal(signal.SIGINT)
    return job.end()


@pytest.mark.parametrize("end", ENDS)
def test_one_ctrl_c_ends_all_waiting(start_job: StartJob, store: Store, end: str) -> None:
    """However a job ends, one Ctrl-C ends the wait: what is left is told in one line, the run that
    it started is not FINISHED and not RUNNING, and the status is that of an interrupt."""
    code, run_status = ENDS[end]
    job = start_job(
        DOWN + textwrap.dedent(code).replace("{log}", LOG), FLOWBUFFER_SHUTDOWN_TIMEOUT_S="600"
    )
    ended = interrupted(job)
    assert ended.status == (5 if "flag" in end else -signal.SIGINT), ended.err
    assert ended.err.count("not delivered yet") == 1, ended.err
    assert "flowbuffer sync --spool" in ended.err
    assert "Exception ignored" not in ended.err
    assert store.statuses()[-1] == run_status


def test_what_the_thread_imports_until_it_stops_changes_no_status(start_job: StartJob) -> None:
    """A job that Ctrl-C ends has the status of an interrupt, though CPython forgets that where
    anything is executed from text meanwhile, as modules do that the thread imports."""
    job = start_job(
        DOWN
        + textwrap.dedent(
            """
            from flowbuffer.collector.thread import CollectorThread
            stop = CollectorThread.stop

            def import_and_stop(self):
                exec("imported = True")
                stop(self)

            CollectorThread.stop = import_and_stop
            logger = MetricLogger(shutdown_timeout_s=600)
            logger.log_metric("loss", 1.0)
            ending.append(True)
            logger.flush()
            """
        ),
    )
    ended = interrupted(job)
    assert ended.status == -signal.SIGINT, ended.err


def test_a_server_that_is_gone_holds_up_no_interrupt(start_job: StartJob) -> None:
    """A run whose server is gone is not marked as ended: that is told, and not tried for long."""
    job = start_job(
        DOWN
        + textwrap.dedent(
            f"""
            flowbuffer.enable()
            with mlflow.start_run():
                mlflow.log_metric("loss", 1.0)
                from mlflow.tracking._tracking_service.client import TrackingServiceClient
                from mlflow.store.tracking.rest_store import RestStore
                store = RestStore(lambda: None)
                gone = "http://127.0.0.1:{free_port()}"
                TrackingServiceClient.store = property(lambda self: store)
                TrackingServiceClient.tracking_uri = property(
                    lambda self: gone, lambda self, uri: None
                )
                ending.append(True)
            """
        ),
        FLOWBUFFER_SHUTDOWN_TIMEOUT_S="600",
    )
    ended = interrupted(job)
    assert ended.status == -signal.SIGINT, ended.err
    assert "could not be marked KILLED" in ended.err


def test_an_interrupted_flush_breaks_nothing(start_job: StartJob, store: Store) -> None:
    """Ctrl-C in flush(), as a notebook's stop button has it, raises at once; what comes after that
    works, and the end of the job delivers all."""
    job = start_job(
        DOWN
        + textwrap.dedent(
            """
            logger = MetricLogger(RUN)
            logger.log_metric("loss", 1.0)
            ending.append(True)
            try:
                logger.flush()
            except KeyboardInterrupt:
                say("interrupted")
            MlflowTransport._log_batch = real_log_batch
            logger.log_metric("loss", 2.0)
            assert logger.flush().pending == 0
            logger.log_metric("loss", 3.0)
            """
        )
    )
    ended = interrupted(job)
    assert ended.status == 0, ended.err
    assert "interrupted" in ended.out
    assert store.values() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("enabled", ["0", "1"])
def test_ctrl_c_in_the_program_is_its_status(
    start_job: StartJob, store: Store, enabled: str
) -> None:
    """A KeyboardInterrupt that nobody catches ends the process by SIGINT, as without flowbuffer,
    whatever is imported at the end; and its run is not FINISHED."""
    job = start_job(
        """
        mlflow.start_run()
        mlflow.log_metric("loss", 1.0)
        say("logged")
        hear()
        """,
        FLOWBUFFER_ENABLED=enabled,
    )
    job.expect("logged")
    job.process.send_signal(signal.SIGINT)
    ended = job.end()
    assert ended.status == -signal.SIGINT, ended.err
    assert store.values() == [1.0]
    assert store.statuses()[-1] == ("KILLED" if enabled == "1" else "FINISHED")


@pytest.mark.parametrize("when", ["after the first logger's hook", "after every hook"])
def test_what_an_exit_handler_logs_arrives(start_job: StartJob, store: Store, when: str) -> None:
    """What is logged by an atexit handler that was registered before the first logger was made, or
    before MLflow was imported, arrives."""
    job = start_job(
        f"""
        import atexit
        import flowbuffer.dropin.plugin
        if {when == "after every hook"}:
            atexit.unregister(flowbuffer.dropin.plugin._at_the_very_end)
        def late():
            logger.log_metric("loss", 2.0)
            flowbuffer.log_metric("late", 3.0)
        atexit.register(late)
        atexit.register(flowbuffer.dropin.plugin._at_the_very_end)
        mlflow.start_run(run_id=RUN)
        logger = MetricLogger(RUN)
        logger.log_metric("loss", 1.0)
        """
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    assert "Traceback" not in ended.err, ended.err
    assert store.values() == [1.0, 2.0]
    assert store.values("late") == [3.0]


def test_a_late_point_that_cannot_be_delivered_is_told(start_job: StartJob) -> None:
    """What is logged after everything was closed, and cannot be delivered, is told."""
    job = start_job(
        """
        import atexit
        import flowbuffer.dropin.plugin
        atexit.unregister(flowbuffer.dropin.plugin._at_the_very_end)
        atexit.register(lambda: [logger.log_metric("loss", 2.0) for _ in range(3)])
        atexit.register(flowbuffer.dropin.plugin._at_the_very_end)
        logger = MetricLogger(RUN)
        """,
        uri=f"http://127.0.0.1:{free_port()}",
        FLOWBUFFER_SHUTDOWN_TIMEOUT_S="1",
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    assert ended.err.count("not delivered yet") == 1, ended.err


def test_sigterm_marks_a_run_killed(start_job: StartJob, store: Store) -> None:
    """A run that a logger started is KILLED by SIGTERM, after its points."""
    store.note_points_at_end()
    job = start_job(
        """
        logger = MetricLogger()
        logger.log_metric("loss", 1.0)
        say("logged")
        hear()
        """
    )
    job.expect("logged")
    job.process.send_signal(signal.SIGTERM)
    assert job.end().status == -signal.SIGTERM
    assert store.points_at_end() == [("KILLED", 1)]


def test_a_handler_that_exits_while_the_end_waits(start_job: StartJob, store: Store) -> None:
    """A SIGTERM handler of the program's that calls sys.exit() while close() waits ends close();
    the end of the process goes on waiting, and delivers."""
    job = start_job(
        DOWN
        + textwrap.dedent(
            """
            def handler(*_):
                MlflowTransport._log_batch = real_log_batch
                sys.exit(3)
            signal.signal(signal.SIGTERM, handler)
            logger = MetricLogger()
            logger.log_metric("loss", 1.0)
            ending.append(True)
            logger.close()
            """
        )
    )
    job.expect("waiting")
    job.process.send_signal(signal.SIGTERM)
    ended = job.end()
    assert ended.status == 3, ended.err
    assert store.values() == [1.0]
    assert store.statuses()[-1] == "FINISHED"


SIGTERM_AT_LINES = """
import random, shutil, signal
root = os.path.dirname(flowbuffer.__file__)

def work():
    logger = MetricLogger(RUN)
    for step in range(3):
        logger.log_metric("loss", float(step), step)
    logger.flush()
    logger.log_metric("loss", 3.0, 3)
    logger.close()

def in_child(number):
    \"\"\"Work with SIGTERM at a line; how many lines there were, or how it ended.\"\"\"
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    lines = 0
    def trace(frame, event, _):
        nonlocal lines
        lines += event == "line"
        if event == "line" and lines == number:
            sys.settrace(None)
            signal.raise_signal(signal.SIGTERM)
        return trace
    def trace_ours(frame, *_):
        file = frame.f_code.co_filename
        return trace if file.startswith(root) and "job_end" not in file else None
    sys.settrace(trace_ours)
    work()
    sys.settrace(None)
    with open("lines", "w") as counted:
        counted.write(str(lines))
    os._exit(0)

with MetricLogger(RUN) as logger:
    logger.log_metric("warm", 1.0)
assert in_child(-1) == 0
total = int(open("lines").read())
for number in random.Random(5).sample(range(1, total), 6):
    status = in_child(number)
    assert status in (0, signal.SIGTERM), (number, total, status)  # there may be fewer lines
say("done")
"""


def test_sigterm_at_any_line(start_job: StartJob, store: Store) -> None:
    """SIGTERM at any line of opening a logger, logging, flushing and closing ends the process by
    SIGTERM, and not after a wait in vain."""
    job = start_job(SIGTERM_AT_LINES, FLOWBUFFER_SHUTDOWN_TIMEOUT_S="600")
    job.expect("done")
    assert job.end().status == 0
    assert set(store.values()) == {0.0, 1.0, 2.0, 3.0}


def test_the_start_is_told_once(start_job: StartJob, store: Store) -> None:
    """With the switch on one line says what is buffered, of which run and where; once in a process,
    and not with progress=off."""
    code = """
        for _ in range(2):
            with mlflow.start_run(run_id=RUN):
                mlflow.log_metric("loss", 1.0)
        """
    for progress, times in (("auto", 1), ("off", 0)):
        job = start_job(code, FLOWBUFFER_ENABLED="1", FLOWBUFFER_PROGRESS=progress)
        ended = job.end()
        assert ended.err.count("MLflow's calls are buffered") == times, ended.err
        assert ended.err.count(store.run_id()) >= times


def _first_of_a_container(*command: str) -> list[str]:
    unshare = shutil.which("unshare")
    found = [unshare, "--pid", "--fork", "--kill-child", *command] if unshare else []
    if not found or subprocess.run([*found[: -len(command)], "true"], check=False).returncode:
        pytest.skip("no process namespace can be made here")
    return [str(part) for part in found]


def test_the_first_process_of_a_container_goes_on(sqlite_uri: str, tmp_path: Path) -> None:
    """PID 1 ignores a SIGTERM that it does not handle, and goes on: with flowbuffer, too, and its
    loggers take points."""
    script = tmp_path / "first.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, flowbuffer
            logger = flowbuffer.MetricLogger(tracking_uri={sqlite_uri!r})
            assert os.getpid() == 1
            logger.log_metric("loss", 1.0)
            for _ in range(2):
                os.kill(1, signal.SIGTERM)
                logger.log_metric("loss", 2.0)
            assert logger.flush().pending == 0
            print("went on", flush=True)
            """
        )
    )
    command = _first_of_a_container(sys.executable, str(script))
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "went on" in done.stdout


# One bound for all waits of an end.


class TurnedClock(Clock):
    def __init__(self) -> None:
        self.now_s = 0.0
        self.monotonic_s = lambda: self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class End:
    """The end of a job, as a test makes it."""

    def __init__(self) -> None:
        self.clock = TurnedClock()
        self.points = {1: 10, 2: 10}
        self.patience = Patience(lambda: dict(self.points), self.clock)

    def wait(self, bound_s: float = 60.0, delivered_s: float | None = None) -> float:
        """Wait for what is delivered after so many seconds, or never; how long that took."""
        start_s = self.clock.now_s
        over = self.patience.wait(
            lambda: delivered_s is not None and self.clock.now_s >= start_s + delivered_s,
            self.patience.deadline_s(bound_s),
            lambda _: None,
            ends=True,
        )
        if over:
            self.patience.succeed()
        return self.clock.now_s - start_s


def test_waits_in_vain_share_one_bound() -> None:
    """Waits with nothing logged between them have one bound together."""
    end = End()
    assert end.wait() == pytest.approx(60)
    assert end.wait() == end.wait() == 0


def test_what_is_logged_begins_another_end() -> None:
    """After something was logged, or delivered, the next end has its whole bound."""
    end = End()
    end.wait()
    end.points[2] += 1
    assert end.wait() == pytest.approx(60)
    assert end.wait() == 0
    del end.points[1]  # a logger was closed: nothing was logged by that
    assert end.wait() == 0
    end.patience.begin()
    assert end.wait(delivered_s=10) == pytest.approx(10, abs=1)
    assert end.wait() == pytest.approx(60)


def test_the_last_end_is_the_last() -> None:
    """While the process ends, whatever is logged meanwhile adds no time."""
    end = End()
    end.patience.final = True
    end.wait(bound_s=30)
    end.points[1] += 1
    assert end.wait(bound_s=30) == 0


def test_an_interrupt_holds_while_it_is_under_way() -> None:
    """Nobody waits in what a KeyboardInterrupt that came in a wait passes through, whatever is
    logged there; who has caught it waits again."""
    end = End()

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    try:
        end.patience.wait(lambda: False, None, interrupt, ends=False)
    except KeyboardInterrupt:
        end.points[1] += 1
        assert end.wait() == 0
    end.points[1] += 1
    assert end.wait() == pytest.approx(60)
