"""P7: however a job ends, what is pending is delivered before its run is marked ended, in bounded
time. Each job is a real process."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support.backends import free_port
from support.jobs import StartJob, Store
from support.waiting import PATIENCE_S, slack_s, wait_until

POINTS = 3000  # three batches
LOG = f"""
for step in range({POINTS}):
    logger.log_metric("loss", -float(step), step=step)
"""


ALL = [-float(step) for step in range(POINTS)]

#: Ways to end that reach the end of the interpreter: the code after the points, the exit status.
ENDS = {
    "return": ("", 0),
    "close": ("logger.close()", 0),
    "exception": ("raise ValueError('of the job')", 1),
    "sys.exit": ("sys.exit(7)", 7),
    "SystemExit in a thread's join": (
        "t = threading.Thread(target=sys.exit); t.start(); t.join(); sys.exit('bye')",
        1,
    ),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", -signal.SIGINT),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_normal_end_delivers(start_job: StartJob, store: Store, tmp_path: Path, end: str) -> None:
    """Return, close, an exception, sys.exit and Ctrl-C deliver every point, keep their exit
    status, and leave nothing in the spool."""
    code, status = ENDS[end]
    job = start_job(f"logger = MetricLogger(RUN)\n{LOG}\n{code}")
    ended = job.end()
    assert ended.status == status, ended.err
    assert store.values() == ALL
    assert list((tmp_path / "spool").glob("*/*")) == []
    assert "flowbuffer:" not in ended.err


def test_a_with_block_delivers(start_job: StartJob, store: Store) -> None:
    """At the end of a with block, by an exception too, every point is in the store."""
    job = start_job(
        f"""
        try:
            with MetricLogger(RUN) as logger:
                {textwrap.indent(LOG, " " * 16).strip()}
                raise ValueError
        except ValueError:
            say("left")
        hear()
        """
    )
    job.expect("left")
    assert store.values() == ALL
    job.tell("end")
    assert job.end().status == 0


def test_sigterm_delivers(start_job: StartJob, store: Store) -> None:
    """SIGTERM delivers what is pending of every logger, and ends the process as SIGTERM does."""
    job = start_job(
        f"""
        logger = MetricLogger(RUN, settings=Settings.from_env(linger_s=3600))
        {LOG}
        other = MetricLogger(RUN, settings=Settings.from_env(linger_s=3000))
        other.log_metric("other", 1.0)
        third = MetricLogger(RUN, settings=Settings.from_env(linger_s=3000))
        third.log_metric("third", 1.0)
        say("logged")
        hear()
        """.replace(LOG, textwrap.indent(LOG, " " * 8).strip())
    )
    job.expect("logged")
    job.process.send_signal(signal.SIGTERM)
    ended = job.end()
    assert ended.status == -signal.SIGTERM, ended.err
    assert store.values() == ALL
    assert store.values("other") == store.values("third") == [1.0]


def test_sigterm_during_close_delivers(start_job: StartJob, store: Store) -> None:
    """A SIGTERM that comes while the job is closing its logger does not cut delivery short."""
    store.connection.execute("BEGIN EXCLUSIVE")  # nothing can be stored
    job = start_job(
        f"logger = MetricLogger(RUN)\n{LOG}\n"
        "threading.Timer(0.3, say, ['closing']).start()\nlogger.close()"
    )
    job.expect("closing")
    job.process.send_signal(signal.SIGTERM)
    store.connection.rollback()
    ended = job.end()
    assert ended.status == -signal.SIGTERM, ended.err
    assert store.values() == ALL


def test_a_handler_of_the_job_stays(start_job: StartJob, store: Store) -> None:
    """A SIGTERM handler that was there before is left in place, is called, and may end the job."""
    job = start_job(
        f"""
        import signal
        def handler(number, frame):
            say("handled")
            sys.exit(3)
        signal.signal(signal.SIGTERM, handler)
        logger = MetricLogger(RUN)
        assert signal.getsignal(signal.SIGTERM) is handler
        {textwrap.indent(LOG, " " * 8).strip()}
        say("logged")
        hear()
        """
    )
    job.expect("logged")
    job.process.send_signal(signal.SIGTERM)
    ended = job.end()
    assert ended.status == 3, ended.err
    assert "handled" in ended.out
    assert store.values() == ALL


@pytest.mark.parametrize("before", ["SIG_DFL", "SIG_IGN"])
def test_no_handler_from_another_thread(start_job: StartJob, before: str) -> None:
    """A logger made in another thread installs no handler, and one that ignores SIGTERM is left
    to ignore it."""
    job = start_job(
        f"""
        import signal
        signal.signal(signal.SIGTERM, signal.{before})
        def work():
            with MetricLogger(RUN) as logger:
                logger.log_metric("loss", 1.0)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) is signal.{before}
        if signal.{before} is signal.SIG_IGN:
            MetricLogger(RUN)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        say("fine")
        """
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    assert "fine" in ended.out


#: Ways to end a run; `logger` logs to the active run.
RUN_ENDS = {
    "end_run": ("mlflow.end_run()", "FINISHED"),
    "end_run of a failed run": ("mlflow.end_run('FAILED')", "FAILED"),
    "end of the with block": ("active.__exit__(None, None, None)", "FINISHED"),
    "set_terminated": ("mlflow.MlflowClient().set_terminated(RUN)", "FINISHED"),
    "end of the process": ("", "FINISHED"),
}


@pytest.mark.parametrize("end", RUN_ENDS)
def test_a_run_ends_after_its_points(start_job: StartJob, store: Store, end: str) -> None:
    """When the store sees a run end, every point that was logged to it is there; here nothing
    would leave by itself."""
    store.note_points_at_end()
    code, status = RUN_ENDS[end]
    job = start_job(
        f"active = mlflow.start_run(run_id=RUN)\nlogger = MetricLogger()\n{LOG}\n{code}",
        FLOWBUFFER_LINGER_S="3600",
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    assert store.points_at_end() == [(status, POINTS)]
    assert store.values() == ALL


@pytest.mark.parametrize("fails", [False, True])
def test_a_logger_ends_the_run_that_it_started(
    start_job: StartJob, store: Store, fails: bool
) -> None:
    """A logger that started its run ends it in close(), after its points: FINISHED, or FAILED if
    the with block raised."""
    store.note_points_at_end()
    job = start_job(
        f"""
        with MetricLogger() as logger:
            assert mlflow.active_run().info.run_id == logger.run_id != RUN
            {textwrap.indent(LOG, " " * 12).strip()}
            if {fails}:
                raise ValueError
        assert mlflow.active_run() is None
        """,
        FLOWBUFFER_LINGER_S="3600",
    )
    assert job.end().status == int(fails)
    assert store.points_at_end() == [("FAILED" if fails else "FINISHED", POINTS)]


def test_a_logger_leaves_the_run_of_others_open(start_job: StartJob, store: Store) -> None:
    """A logger that was given its run, or found it active, does not end it."""
    job = start_job(
        """
        with MetricLogger(RUN) as logger:
            logger.log_metric("loss", 1.0)
        """
    )
    assert job.end().status == 0
    assert store.statuses() == ["RUNNING"]


def test_threads_that_outlive_the_main_thread(start_job: StartJob, store: Store) -> None:
    """Points of non-daemon threads and of executors that log after the main thread is done
    arrive."""
    job = start_job(
        f"""
        from concurrent.futures import ThreadPoolExecutor
        logger = MetricLogger(RUN)
        gate = threading.Event()
        def work(key):
            gate.wait()
            {textwrap.indent(LOG, " " * 12).strip().replace('"loss"', "key")}
        def open_gate():
            hear()
            gate.set()
        threading.Thread(target=open_gate).start()
        threading.Thread(target=work, args=("loss",)).start()
        ThreadPoolExecutor().submit(work, "pool")
        say("main is done")
        """
    )
    job.expect("main is done")
    job.tell("go")
    ended = job.end()
    assert ended.status == 0, ended.err
    assert store.values() == ALL
    assert store.values("pool") == ALL


def test_a_first_logger_after_the_main_thread(start_job: StartJob, store: Store) -> None:
    """A thread that makes the process's first logger after the main thread is done delivers."""
    job = start_job(
        """
        def work():
            threading.main_thread().join()
            with MetricLogger(RUN) as logger:
                logger.log_metric("loss", 1.0)
        threading.Thread(target=work).start()
        """
    )
    ended = job.end()
    assert "Traceback" not in ended.err, ended.err
    assert store.values() == [1.0]


#: What is tried on a dead server: the code after "ending", and the exit status.
DEAD_ENDS = {
    "return": ("", 0),
    "close": ("logger.close()", 0),
    "exception": ("raise ValueError", 1),
    "sys.exit": ("sys.exit(7)", 7),
    "SIGTERM": ("os.kill(os.getpid(), 15); hear()", -signal.SIGTERM),
}


@pytest.mark.parametrize("end", DEAD_ENDS)
def test_a_dead_server_holds_up_no_exit(start_job: StartJob, tmp_path: Path, end: str) -> None:
    """With the server gone the process ends within shutdown_timeout_s, and one line says how many
    points are left, where, and which command delivers them."""
    code, status = DEAD_ENDS[end]
    timeout_s = 1.0
    job = start_job(
        f"logger = MetricLogger(RUN)\n{LOG}\nsay('ending')\n{code}",
        uri=f"http://127.0.0.1:{free_port()}",
        FLOWBUFFER_SHUTDOWN_TIMEOUT_S=str(timeout_s),
    )
    job.expect("ending")
    ended = job.end()
    assert ended.status == status, ended.err
    assert ended.seconds < timeout_s + 2 + slack_s()
    lines = [line for line in ended.err.splitlines() if line.startswith("flowbuffer:")]
    assert len(lines) == 1, ended.err
    assert f"{POINTS:,} points" in lines[0]
    assert f"flowbuffer sync --spool {tmp_path / 'spool'}" in lines[0]


#: The thread of a process that looks after delivery, by the setting.
DELIVERS = {"thread": "flowbuffer-collector", "process": "flowbuffer-watch"}


@pytest.mark.parametrize("delivery", DELIVERS)
def test_no_thread_works_at_the_very_end(start_job: StartJob, delivery: str) -> None:
    """With points left, the thread that delivers has stopped before the interpreter ends: CPython
    before 3.14 aborts if it ends a thread that is in C++, as parts of NumPy are. Who logs even
    later is told what becomes of it all the same."""
    job = start_job(
        f"""
        from flowbuffer.logger import job_end

        at_the_very_end = job_end.at_the_very_end

        def and_say_who_works():
            say("{DELIVERS[delivery]}" in [thread.name for thread in threading.enumerate()])
            at_the_very_end()
            say("{DELIVERS[delivery]}" in [thread.name for thread in threading.enumerate()])
            MetricLogger(RUN, shutdown_timeout_s=0).log_metric("late", 1.0)

        job_end.at_the_very_end = and_say_who_works
        MetricLogger(RUN).log_metric("loss", 1.0)
        """,
        uri=f"http://127.0.0.1:{free_port()}",
        FLOWBUFFER_SHUTDOWN_TIMEOUT_S="0.2",
        FLOWBUFFER_DELIVERY=delivery,
    )
    ended = job.end()
    assert ended.out == "True\nFalse\n", ended.err
    assert ended.err.count("1 point of run") == 2, ended.err


def test_many_loggers_share_the_time_at_the_end(start_job: StartJob) -> None:
    """With the server gone, several loggers together take no longer than one."""
    job = start_job(
        """
        loggers = [MetricLogger(RUN) for _ in range(10)]
        for logger in loggers:
            logger.log_metric("loss", 1.0)
        say("ending")
        """,
        uri=f"http://127.0.0.1:{free_port()}",
        FLOWBUFFER_SHUTDOWN_TIMEOUT_S="1.5",
    )
    job.expect("ending")
    ended = job.end()
    assert ended.seconds < 1.5 + 2 + slack_s()
    assert ended.err.count("1 point of run") == 10


def test_what_was_left_is_delivered_by_the_command(
    start_job: StartJob, store: Store, tmp_path: Path
) -> None:
    """The command that the last line names delivers what was left, once the server is back."""
    store.connection.execute("BEGIN EXCLUSIVE")
    job = start_job(
        f"logger = MetricLogger(RUN)\n{LOG}\nlogger.close(0)\n",
    )
    ended = job.end()
    store.connection.rollback()
    (line,) = [text for text in ended.err.splitlines() if text.startswith("flowbuffer:")]
    assert f"{POINTS:,} points" in line
    command = line.partition("with: flowbuffer ")[2].split()
    subprocess.run([sys.executable, "-m", "flowbuffer", *command], check=True, timeout=PATIENCE_S)
    assert store.values() == ALL
    wait_until(lambda: list((tmp_path / "spool").glob("*/*")) == [])
