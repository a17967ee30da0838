"""A person at the terminal: what the commands look like, and what they say of wrong turns."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flowbuffer import Settings
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.policies import THREAD
from flowbuffer.commands import cli
from flowbuffer.errors import RejectedError
from flowbuffer.settings.settings import kinds_of_settings
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.notes import park
from flowbuffer.spool.tally import tally
from flowbuffer.testing import FakeTransport, ManualClock
from flowbuffer.words import counted, duration, size
from support.left_over import leave
from support.waiting import wait_until

RUNS = ("3f9c1e7a5b2d4c88a1f0e9d7c6b5a493", "3f9c1e7b41c0de99b14f6fb2a7d1c3e5")
SERVER = "http://mlflow.example.com:5000"


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return Spool(tmp_path / "spool").root


class Terminal(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


class Shell:
    """Runs commands as on a terminal of 80 columns."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        for name, value in {"TTY_COMPATIBLE": "1", "COLUMNS": "80", "NO_COLOR": "1"}.items():
            monkeypatch.setenv(name, value)

    def run(self, *arguments: str, typed: str | None = None) -> tuple[int, str, str]:
        """The exit code, stdout and stderr. `typed` is what a person says, if any."""
        stdin = io.StringIO() if typed is None else Terminal(typed)
        self._monkeypatch.setattr(sys, "stdin", stdin)
        self._capsys.readouterr()
        code = cli.main(arguments)
        out, err = self._capsys.readouterr()
        return code, re.sub(r"\x1b\[[0-9;]*m", "", out), err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capsys, monkeypatch)


def ago_ms(seconds: float) -> int:
    return int((time.time() - seconds) * 1000)


def refuse(spool: Path, reason: str = "too large", **left: Any) -> Path:
    """Leave points that the server refuses; their folder."""
    folder = leave(spool, **left).path
    clock = ManualClock()
    transport = FakeTransport(answer=lambda _: RejectedError(reason))
    collector = Collector(
        Spool(spool),
        Settings(spool_dir=spool, linger_s=0),
        clock,
        THREAD,
        lambda *_: transport,
    )
    for _ in range(20):
        collector.step(hurry=True)
        clock.turn(1.0)
    return folder


def gone(spool: Path, run_id: str = RUNS[0], points: int = 1200) -> Path:
    """Leave points of a run that its server does not have."""
    folder = leave(spool, run_id, SERVER, range(points), delivery="process").path
    park(folder, f"Run '{run_id}' not found")
    return folder


# status


def test_status_at_80_columns(spool: Path, shell: Shell) -> None:
    """A job of 8 ranks is a line for each rank, of 80 columns at most: the run's id as short as it
    is clear, numbers below one another, ages for people; what all have in common is said once."""
    for rank in range(8):
        leave(
            spool, RUNS[0], SERVER, range(1000 * rank + 1), end="killed",
            start_ms=ago_ms(185), rank=rank, world_size=8, delivery="process",
        )  # fmt: skip
    leave(spool, RUNS[1], SERVER, range(3), start_ms=ago_ms(95_000), delivery="process")
    code, out, _ = shell.run("status")
    lines = out.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 80
    at = next(at for at, line in enumerate(lines) if line.startswith("run "))
    titles, rows, head = lines[at], lines[at + 1 :], "".join(lines[:at])
    assert str(spool) in head
    assert "MiB; no collector process runs" in head
    assert f"tracking URI: {SERVER}; host: " in head
    assert titles.split() == [
        "run",
        "started",
        "rank",
        "state",
        "pending",
        "delivered",
        "rejected",
        "oldest",
    ]
    assert [row.split()[:6] for row in rows[:8]] == [
        ["3f9c1e7a", "3", "min", "ago", str(rank), "dead"] for rank in range(8)
    ]
    assert rows[8].split()[:7] == ["3f9c1e7b", "1", "d", "2", "h", "ago", "closed"]
    ends = {found.end() for row in rows[:9] if (found := re.search(r"[\d,]+(?= +0 +0 )", row))}
    assert len(ends) == 1
    assert "7,001" in rows[7]
    assert out.count(SERVER) == 1
    assert lines[-1] == "9 producers: 28,011 pending, 0 delivered, 0 rejected"


def test_status_says_below_what_holds_a_run_up(spool: Path, shell: Shell) -> None:
    """A URI that differs, and an error, are below the rows of the run, each once; --wide has whole
    ids and every column; --run-id takes the beginning of an id."""
    gone(spool)
    leave(spool, RUNS[1], "sqlite:////data/mlflow.db", range(3), rank=1234567, world_size=9)
    leave(spool, RUNS[1], "sqlite:////data/mlflow.db", [], end="killed", rank=0, world_size=9)
    _, out, _ = shell.run("status")
    rows = [row.rstrip() for row in out.splitlines()]
    below = rows[next(at for at, row in enumerate(rows) if row.startswith("3f9c1e7a")) + 1 :]
    assert below[:2] == [f"  {SERVER}", f"  Run '{RUNS[0]}' not found"]
    assert max(map(len, rows)) <= 80
    _, out, _ = shell.run("status", "--wide", "--run-id", "3f9c1e7a")
    for word in (RUNS[0], SERVER, "not found", "pid", "delivery"):
        assert word in "".join(out.split("\n"))
    assert RUNS[1] not in out
    _, out, _ = shell.run("status", "--json", "--run-id", "3f9c1e7b")
    assert {row["run_id"] for row in json.loads(out)["producers"]} == {RUNS[1]}


def test_a_run_id_that_is_none(spool: Path, shell: Shell) -> None:
    """An id, or the beginning of one, that is no run's or several runs' is told with what is
    there, and ends with 2."""
    leave(spool, RUNS[0])
    leave(spool, RUNS[1])
    for command in (("status", "--run-id"), ("sync", "--run-id"), ("clean", "--yes", "--pending")):
        code, _, err = shell.run(*command, "NOPE")
        assert code == 2
        assert "has nothing of run NOPE; it has 3f9c1e7a" in err
        code, _, err = shell.run(*command, "3f9")
        assert code == 2
        assert "3f9 is the beginning of several runs" in err


def test_status_tells_a_script_that_something_waits(spool: Path, shell: Shell) -> None:
    """With --exit-code status ends with 1 while something is pending, and with 0 otherwise."""
    code, out, err = shell.run("status", "--exit-code")
    assert (code, err) == (0, "")
    assert out.endswith("0 B; no collector process runs\nnothing is logged, and nothing waits\n")
    leave(spool, values=[1])
    assert shell.run("status", "--exit-code")[0] == 1
    assert shell.run("status")[0] == 0


# rejected


def test_rejected_at_80_columns(spool: Path, shell: Shell) -> None:
    """What was refused is below its run and reason, which are said once."""
    reason = "INVALID_PARAMETER_VALUE: the value is not to the taste of this server, or ever was"
    refuse(spool, reason, run_id=RUNS[0], values=[0.5, 1.5, 2.5])
    code, out, _ = shell.run("rejected")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "run 3f9c1e7a: 3 points rejected: INVALID" in out
    assert " ".join(out.split()).count(reason) == 1
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith("  loss")]
    assert rows == [["loss", "0.5", "0"], ["loss", "1.5", "1"], ["loss", "2.5", "2"]]
    assert "flowbuffer rejected --retry" in " ".join(out.split())
    assert shell.run("rejected", "--run-id", "nope")[0] == 0


# clean


def test_clean_refuses_to_delete_where_nobody_can_be_asked(spool: Path, shell: Shell) -> None:
    """Without a terminal and without --yes, what was rejected or is pending is not deleted: the
    command ends with 2 and says how to say yes."""
    rejected = refuse(spool, run_id="rejected", values=[1.0])
    pending = leave(spool, RUNS[0], values=[1.0]).path
    for arguments in (("--rejected",), ("--pending", RUNS[0])):
        code, _, err = shell.run("clean", *arguments)
        assert code == 2
        assert "There is no terminal to ask; give --yes" in err
        assert rejected.exists()
        assert pending.exists()


def test_clean_discards_what_can_never_be_delivered(spool: Path, shell: Shell) -> None:
    """--pending deletes what is left of one run, after it has said how much that is and was told
    yes; of a living process it deletes nothing."""
    folder = gone(spool)
    kept = leave(spool, RUNS[1], values=[1.0]).path
    alive = leave(spool, RUNS[0], SERVER, [1.0], end="alive")
    code, out, err = shell.run("clean", "--pending", "3f9c1e7a", typed="n\n")
    assert (code, out) == (0, "")
    assert f"Discard 1,201 points of run {RUNS[0]} that are pending?" in err
    assert folder.exists()
    code, out, _ = shell.run("clean", "--pending", "3f9c1e7a", typed="y\n")
    assert code == 0
    assert "removed 1 of 2 folders" in out
    assert "its process still runs" in out
    assert not folder.exists()
    assert kept.exists()
    found = tally(alive.path)
    assert found is not None
    assert found.pending == 1
    alive.lock.release()
    assert shell.run("clean", "--pending", RUNS[0], "--yes")[0] == 0
    assert not alive.path.exists()


def test_clean_says_what_to_do_once(spool: Path, shell: Shell) -> None:
    """What is kept is told in a line each, and what could be done once below them."""
    for number in range(3):
        leave(spool, RUNS[0], values=range(number + 1))
    _, out, _ = shell.run("clean")
    assert "1 point is pending\n" in out
    assert "3 points are pending\n" in out
    assert out.count("flowbuffer sync") == out.count("clean --pending RUN") == 1
    assert out.endswith("removed 0 of 3 folders\n")


# sync


def test_sync_says_what_it_would_do(spool: Path, shell: Shell) -> None:
    """--dry-run tells how many points of which run would go where; nothing is sent, or changed."""
    leave(spool, RUNS[0], "http://127.0.0.1:1", range(1500))
    leave(spool, RUNS[0], "http://127.0.0.1:1", [1])
    leave(spool, RUNS[1], values=[1], delivery="offline")
    code, out, _ = shell.run("sync", "--dry-run")
    assert code == 0
    assert f"run {RUNS[0]}: 1,501 points to http://127.0.0.1:1\n" in out
    assert f"run {RUNS[1]}: 1 point to fake:// (the run is created if the server does not" in out
    assert out.endswith("1,502 points would be delivered\n")
    code, out, _ = shell.run("sync", "--dry-run", "--json", "--tracking-uri", "http://u:pw@b")
    assert {one["tracking_uri"] for one in json.loads(out)} == {"http://b"}


def test_sync_that_is_interrupted_tells_what_it_did(spool: Path) -> None:
    """Ctrl-C ends a sync with a tally, and 130."""
    leave(spool, RUNS[0], "http://127.0.0.1:1", range(7))
    process = subprocess.Popen(
        [sys.executable, "-m", "flowbuffer", "sync"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    folder = next(Spool(spool).folders(RUNS[0]))
    try:
        wait_until(lambda: (folder / "delivery.json").exists())  # it is at work
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == "interrupted: delivered 0, rejected 0, pending 7\n"
    assert "Traceback" not in err


# doctor, settings, and the command itself


def test_doctor_goes_on_after_a_bad_setting(
    spool: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch, sqlite_uri: str
) -> None:
    """Each setting that is wrong is a line of its own, and spool and server are looked at all the
    same; a run that is gone is told with what helps."""
    gone(spool)
    monkeypatch.setenv("FLOWBUFFER_LINGER_S", "soon")
    monkeypatch.setenv("FLOWBUFFER_MAX_IN_FLIGHT", "0")
    monkeypatch.setenv("FLOWBUFFER_ENABLE", "1")
    code, out, _ = shell.run("doctor", "--tracking-uri", sqlite_uri)
    assert code == 1
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    for words in (
        "FLOWBUFFER_LINGER_S='soon': it must be a number",
        "max_in_flight (FLOWBUFFER_MAX_IN_FLIGHT) = 0: it must be at least 1",
        "FLOWBUFFER_ENABLE is ignored: did you mean FLOWBUFFER_ENABLED?",
        f"run {RUNS[0]} cannot be delivered: Run '{RUNS[0]}' not found",
        f"restore it on {SERVER}",
        "flowbuffer sync --run-id 3f9c1e7a --tracking-uri URI",
        "flowbuffer clean --pending 3f9c1e7a",
        "answers",
    ):
        assert words in text


def test_settings_tells_where_each_comes_from(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`flowbuffer settings` has every setting with its value and its origin, and says which
    variable is wrong or none; it needs no spool."""
    monkeypatch.setenv("FLOWBUFFER_LINGER_S", "7")
    code, out, err = shell.run("settings")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["linger_s"] == ["7.0", "FLOWBUFFER_LINGER_S"]
    assert rows["strict"] == ["True", "default"]
    assert rows["enabled"] == ["None", "default"]
    assert not (tmp_path / "spool").exists()
    monkeypatch.setenv("FLOWBUFFER_LINGER_S", "soon")
    monkeypatch.setenv("FLOWBUFFER_API_TOKEN", "hushhush")
    code, out, err = shell.run("settings")
    assert code == 1
    assert "FLOWBUFFER_LINGER_S='soon': it must be a number" in " ".join(out.split())
    assert "FLOWBUFFER_API_TOKEN is ignored" in err
    assert "hushhush" not in out + err
    said = json.loads(shell.run("settings", "--json")[1])
    assert {one["name"] for one in said} == set(kinds_of_settings())


def test_help_names_exit_codes_and_completion(shell: Shell) -> None:
    """--help fits into 80 columns, and says what exit codes mean and how the shell completes;
    --version tells the version."""
    code, out, _ = shell.run("--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "130 on Ctrl-C" in out
    assert "_FLOWBUFFER_COMPLETE=bash_source" in out
    assert "..." not in out.split("Commands:")[1]
    assert re.fullmatch(r"flowbuffer \d+\.\d+\.\d+.*\n", shell.run("--version")[1])


def test_words() -> None:
    """Counts, ages and sizes read as people say them."""
    assert [counted(count) for count in (0, 1, 2, 12345)] == [
        "0 points", "1 point", "2 points", "12,345 points",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 59, 60, 3599, 3600, 7260, 90_000, 864_000)] == [
        "0 s", "59 s", "1 min", "59 min", "1 h", "2 h 1 min", "1 d 1 h", "10 d",
    ]  # fmt: skip
    assert [size(count) for count in (0, 1023, 2048, 3 << 20, 5 << 30)] == [
        "0 B", "1023 B", "2.0 KiB", "3.0 MiB", "5.0 GiB",
    ]  # fmt: skip


def test_a_misspelt_variable_is_a_line(spool: Path) -> None:
    """A command tells a variable that is no setting in one line, without any code."""
    asked = subprocess.run(
        [sys.executable, "-m", "flowbuffer", "status", "--spool", str(spool)],
        env={**os.environ, "FLOWBUFFER_LINGER": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stderr == (
        "flowbuffer: FLOWBUFFER_LINGER is ignored: did you mean FLOWBUFFER_LINGER_S?\n"
    )
