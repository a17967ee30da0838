"""Whatever a test of this suite starts ends with it (support.marking)."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support import marks
from support.backends import free_port
from support.collectors import collector_pid
from support.jobs import StartJob
from support.waiting import PATIENCE_S, wait_until

TESTS = Path(__file__).parent
PLUGINS = ["-psupport.marking", "-pxdist", "-ppytest_timeout"]

#: A child in a session of its own, and its fork, which is nobody's child, as a collector process.
STARTS = """
import os, signal, subprocess, sys
from pathlib import Path

from support import marks

FORKS = "import os, signal; os.fork() or os.fork() or os.setsid(); signal.pause()"

def mine():
    return marks.processes(os.environ[marks.MARK])

def test_that_starts_processes(tmp_path):
    subprocess.Popen([sys.executable, "-S", "-c", FORKS], start_new_session=True)
    while len(mine()) < 3:
        pass
    Path(os.environ["SEEN"]).write_text(" ".join(map(str, mine())))
    ENDS

def test_that_comes_next():
    assert mine() == []
"""

#: How it ends; the arguments of pytest; what pytest says at the end.
ENDS = {
    "passes": ("pass", [], "2 passed"),
    "fails": ("raise ValueError", [], "1 failed, 1 passed"),
    "hangs": ("signal.raise_signal(signal.SIGALRM)", ["--timeout=300"], "1 failed, 1 passed"),
    "interrupted": ("os.kill(os.getpid(), signal.SIGINT)", [], "KeyboardInterrupt"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", [], ""),
    "worker killed": ("os.kill(os.getpid(), signal.SIGKILL)", ["-n1"], "1 failed, 1 passed"),
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left(tmp_path: Path, end: str) -> None:
    """A test that passes, fails, hangs, is interrupted or takes its process with it leaves no
    process: no child, no grandchild, none that is nobody's child. Those of others are let be."""
    code, options, said = ENDS[end]
    inner = tmp_path / "test_inner.py"
    inner.write_text(textwrap.dedent(STARTS).replace("ENDS", code))
    stranger = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    arguments = ["-c", os.devnull, f"--rootdir={tmp_path}", *options, str(inner)]
    played = subprocess.run(
        [sys.executable, "-m", "pytest", *PLUGINS, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "SEEN": str(tmp_path / "seen"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    assert said in played.stdout
    assert len((tmp_path / "seen").read_text().split()) >= 3, played.stdout
    # Of a pytest that was killed the watchdog has just begun.
    wait_until(lambda: marks.processes(os.environ[marks.MARK]) == [stranger.pid])
    stranger.communicate()
    assert stranger.returncode != -9


def test_a_mark_is_no_prefix_of_another() -> None:
    """The end of test 1 is not that of test 10."""
    mark = os.environ[marks.MARK]
    command = [sys.executable, "-S", "-c", "input()"]
    environment = {**os.environ, marks.MARK: f"{mark}/10"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        marks.end(f"{mark}/1")
        assert marks.processes(f"{mark}/10") == [process.pid]
        marks.end(f"{mark}/10")
    assert process.returncode == -9


def test_a_collector_process_carries_its_jobs_mark(start_job: StartJob, tmp_path: Path) -> None:
    """A collector process, which outlives its job, is found by the mark of the test."""
    code = "MetricLogger(RUN).log_metric('loss', 1.0); say('logged'); hear()"
    job = start_job(code, f"http://127.0.0.1:{free_port()}", FLOWBUFFER_DELIVERY="process")
    job.expect("logged")
    pid = wait_until(lambda: collector_pid(tmp_path / "spool"))
    job.kill()
    assert pid in marks.processes(os.environ[marks.MARK])
