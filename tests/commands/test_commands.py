"""The commands that look after a spool: status, rejected, clean, doctor (sync: test_offline.py)."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from flowbuffer import Settings
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.handover import collector_lock
from flowbuffer.collector.policies import THREAD
from flowbuffer.commands import cli
from flowbuffer.errors import RejectedError
from flowbuffer.spool.files import FileLock
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.tally import tally
from flowbuffer.testing import FakeTransport, ManualClock
from support.left_over import leave
from support.waiting import PATIENCE_S

OF_SPOOL = ("status", "sync", "rejected", "clean")
COMMANDS = (*OF_SPOOL, "doctor", "settings")


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return Spool(tmp_path / "spool").root


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], sqlite_uri: str, monkeypatch: Any) -> Any:
    """Calls a command with --json; its exit code and its answer."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri)

    def call(*arguments: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = cli.main([*arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


Ask = Callable[..., tuple[int, Any]]


def deliver(spool: Path, transport: FakeTransport) -> None:
    """What a collector does with what dead producers left."""
    clock = ManualClock()
    settings = Settings(spool_dir=spool, linger_s=0)
    collector = Collector(Spool(spool), settings, clock, THREAD, lambda *_: transport)
    for _ in range(20):
        collector.step(hurry=True)
        clock.turn(1.0)


def refuse(spool: Path, *values: float) -> Path:
    """Leave points that the server refuses; their folder."""
    left = leave(spool, values=values)
    deliver(spool, FakeTransport(answer=lambda _: RejectedError("too large")))
    return left.path


# All of them.


@pytest.mark.usefixtures("spool")
@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_document(ask: Ask, command: str) -> None:
    """With --json every command prints one JSON document, and ends with 0 on an empty spool."""
    code, answer = ask(command)
    assert code == 0
    assert isinstance(answer, (dict, list))


@pytest.mark.parametrize("command", OF_SPOOL)
def test_no_spool_is_misuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Without a spool, or with one that is open to others, a command says so in one line and ends
    with 2; it makes none."""
    assert cli.main([command, "--spool", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("flowbuffer: there is no spool")
    assert not (tmp_path / "none").exists()
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    assert cli.main([command, "--spool", str(tmp_path / "open")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("spool")
@pytest.mark.parametrize(
    "arguments", [[], ["unknown"], ["sync", "--timeout", "-1"], ["status", "--watch", "--json"]]
)
def test_misuse(arguments: list[str]) -> None:
    """What is no command, or no value, ends with 2."""
    assert cli.main(arguments) == 2


@pytest.mark.usefixtures("spool")
def test_a_setting_out_of_range_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of the settings is one line, and 2."""
    monkeypatch.setenv("FLOWBUFFER_LINGER_S", "-1")
    assert cli.main(["status"]) == 2
    assert "linger_s" in capsys.readouterr().err


def test_help_and_status_are_light(spool: Path) -> None:
    """Neither --help nor status imports MLflow; --help does without NumPy and rich as well."""
    leave(spool)
    code = """
import sys
from flowbuffer.commands.cli import main
assert main(["--help"]) == 0 and main(["sync", "--help"]) == 0
assert not {"mlflow", "numpy", "rich"} & set(sys.modules)
assert main(["status"]) == 0
assert "mlflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# status


def test_status_tells_every_producer(spool: Path, ask: Ask) -> None:
    """Each producer is a row with its state and counts; one whose folder is damaged or refused is
    a row with the reason, and what it holds."""
    refused = refuse(spool, 9.0)
    alive = leave(spool, "alive", end="alive", values=[1], rank=3, world_size=8)
    leave(spool, "closed", values=[1, 2])
    leave(spool, "dead", end="killed", values=[1, 2, 3])
    damaged = leave(spool, "torn", values=[1, 2, 3, 4])
    (damaged.path / "producer.json").write_text("{")
    leave(spool, "open", values=[1]).path.chmod(0o755)
    code, answer = ask("status")
    rows = {row["run_id"]: row for row in answer["producers"]}
    assert code == 0
    assert {run: (row["state"], row["pending"]) for run, row in rows.items()} == {
        "alive": ("alive", 1),
        "closed": ("closed", 2),
        "dead": ("dead", 3),
        "torn": ("damaged", 4),
        "open": ("damaged", 1),
        "run": ("dead", 0),
    }
    assert (rows["alive"]["rank"], rows["alive"]["world_size"]) == (3, 8)
    assert rows["alive"]["pid"] == os.getpid()
    assert 0 <= rows["dead"]["oldest_s"] < 60
    assert "producer.json" in rows["torn"]["last_error"]
    assert "open to other users" in rows["open"]["last_error"]
    assert (rows["run"]["rejected"], rows["run"]["last_error"]) == (1, "too large")
    assert rows["run"]["folder"] == str(refused)
    assert (answer["collector_runs"], answer["collector_pid"]) == (False, None)
    assert not collector_lock(spool).exists()
    alive.lock.release()


def test_status_finds_the_collector(spool: Path, ask: Ask) -> None:
    """The collector process is told by its lock, not by what a dead one left in the file."""
    lock = FileLock.take(collector_lock(spool), create=True)
    assert lock is not None
    os.write(lock.descriptor, b"4711")
    assert ask("status")[1]["collector_pid"] == 4711
    lock.release()
    assert ask("status")[1]["collector_runs"] is False


def test_status_is_watched_until_ctrl_c(spool: Path) -> None:
    """--watch shows the table, and Ctrl-C ends it with 130; what jobs and servers said cannot play
    tricks with the terminal."""
    leave(spool, "a[red]run\x1b[2J")
    command = [sys.executable, "-m", "flowbuffer", "status", "--watch"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "400", "TTY_COMPATIBLE": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    shown = ""
    while "a[red]run" not in shown:
        line = process.stdout.readline()
        assert line, shown
        shown += line
    process.send_signal(signal.SIGINT)
    try:
        rest, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "\x1b[2J" not in shown + rest


# rejected


def test_rejected_points_are_listed(
    spool: Path, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each dead letter is told with its point and the server's reason."""
    folder = refuse(spool, 1.5, float("nan"))
    code, letters = ask("rejected")
    assert code == 0
    assert [(x["key"], x["value"], x["step"], x["reason"]) for x in letters] == [
        ("loss", 1.5, 0, "too large"),
        ("loss", "nan", 1, "too large"),
    ]
    assert {letter["producer"] for letter in letters} == {str(folder)}
    assert ask("rejected", "--run-id", "other") == (0, [])
    assert cli.main(["rejected"]) == 0
    assert "too large" in capsys.readouterr().out


def test_rejected_points_are_tried_again(spool: Path, ask: Ask) -> None:
    """--retry puts dead letters back with their own times, once; what was damaged stays."""
    folder = refuse(spool, 1.5, float("nan"), float("-inf"))
    times = [letter["timestamp"] for letter in ask("rejected")[1]]
    with (folder / "rejected.jsonl").open("ab") as file:
        file.write(b'{"segment": 0, "slot": 9, "reason": "the slot is damaged", "bytes": "00"}\n')
    code, (retried,) = ask("rejected", "--retry")
    assert (code, retried["points"], retried["kept"]) == (0, 3, 1)
    assert [letter["key"] for letter in ask("rejected")[1]] == [None]
    assert ask("rejected", "--retry")[1][0]["points"] == 0
    transport = FakeTransport()
    deliver(spool, transport)
    found = transport.history("run", "loss")
    assert [(time, step) for time, step, _ in found] == list(zip(times, range(3), strict=True))
    assert [repr(value) for _, _, value in found] == ["1.5", "nan", "-inf"]


def test_rejected_points_of_others_stay(spool: Path, ask: Ask) -> None:
    """--retry leaves folders alone that a living producer or another process has."""
    folder = refuse(spool, 1.5)
    claim = Spool(spool).claim(folder)
    assert claim is not None
    assert ask("rejected", "--retry")[1][0]["reason"] == "another process delivers it"
    claim.release()
    assert ask("rejected", "--retry")[1][0]["points"] == 1


# clean


def test_clean_deletes_only_what_nobody_needs(spool: Path, ask: Ask) -> None:
    """Deleted are folders in which all is settled; never what is pending, rejected, alive, or
    cannot be read."""
    refuse(spool, 1.0)
    leave(spool, "empty", values=[])
    alive = leave(spool, "alive", values=[], end="alive")
    leave(spool, "pending", values=[1])
    unreadable = leave(spool, "unreadable", values=[1])
    (unreadable.path / "00000000.slots").chmod(0o644)
    header = leave(spool, "header", values=[])
    (header.path / "00000003.slots").write_bytes(b"no segment")
    damaged = leave(spool, "damaged", values=[])
    (damaged.path / "00000000.damaged").touch()
    code, answer = ask("clean")
    assert code == 0
    assert [one["run_id"] for one in answer if one["removed"]] == ["empty"]
    reasons = {one["run_id"]: one["reason"] for one in answer}
    assert "1 point is pending" in reasons["pending"]
    assert "1 point was rejected" in reasons["run"]
    assert reasons["alive"] == "its process still runs"
    kept = {row["run_id"] for row in ask("status")[1]["producers"]}
    assert kept == {"alive", "run", "pending", "unreadable", "header", "damaged"}

    code, answer = ask("clean", "--rejected", "--yes")
    assert [one["run_id"] for one in answer if one["removed"]] == ["run"]
    assert tally(Path(next(o["folder"] for o in answer if o["run_id"] == "pending"))).pending == 1
    alive.lock.release()


@pytest.mark.parametrize(("said", "kept"), [("n\n", True), ("y\n", False)])
def test_clean_asks_before_it_deletes_rejected_points(
    spool: Path, monkeypatch: pytest.MonkeyPatch, said: str, kept: bool
) -> None:
    """On a terminal, --rejected deletes only after a yes."""
    folder = refuse(spool, 1.0)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(said))
    assert cli.main(["clean", "--rejected"]) == 0
    assert folder.exists() == kept


# doctor


class Strange(BaseHTTPRequestHandler):
    """A server that refuses everybody, in the year 2001."""

    def do_GET(self) -> None:
        self.send_error(401)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(401)

    def date_time_string(self, _timestamp: float | None = None) -> str:
        return "Mon, 01 Jan 2001 00:00:00 GMT"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def strange_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Strange) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def results(checks: list[dict[str, str]]) -> dict[str, str]:
    return {check["name"]: check["result"] for check in checks}


def test_doctor_finds_nothing_wrong(spool: Path, ask: Ask, sqlite_uri: str) -> None:
    """Where all is well every check is ok and the exit code 0; nothing is made."""
    code, checks = ask("doctor", "--spool", str(spool / "new"))
    assert code == 0, checks
    assert set(results(checks).values()) <= {"ok", "warn"}
    assert results(checks)["server"] == "ok"
    assert not (spool / "new").exists()
    other = sqlite_uri + ".other"
    assert "will be made" in str(ask("doctor", "--tracking-uri", other)[1])
    assert not Path(other.removeprefix("sqlite:///")).exists()


@pytest.mark.usefixtures("spool")
def test_doctor_says_how_a_database_is_written(
    ask: Ask, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doctor tells that a database is written in bulk; if not, the reason. It is no fault."""
    code, checks = ask("doctor", "--tracking-uri", sqlite_uri)
    assert (code, results(checks)["database"]) == (0, "ok")
    assert "metrics are written in bulk" in str(checks)
    monkeypatch.setattr("flowbuffer.sql.known._REVISIONS", frozenset())
    code, checks = ask("doctor", "--tracking-uri", sqlite_uri)
    assert (code, results(checks)["database"]) == (0, "ok")
    assert "MLflow's own way" in str(checks)
    assert "which is not known" in str(checks)


@pytest.mark.usefixtures("spool")
def test_doctor_finds_faults_of_the_settings(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is no setting is a warning, a value out of range a failure."""
    monkeypatch.setenv("FLOWBUFFER_LINGERS", "1")
    code, checks = ask("doctor")
    assert (code, results(checks)["settings"]) == (0, "warn")
    assert "FLOWBUFFER_LINGERS" in str(checks)
    monkeypatch.delenv("FLOWBUFFER_LINGERS")
    monkeypatch.setenv("FLOWBUFFER_LINGER_S", "soon")
    code, checks = ask("doctor")
    assert (code, results(checks)["settings"]) == (1, "fail")


def test_doctor_finds_faults_of_the_spool(
    spool: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left-over, rejected and unreadable points are warnings; a spool that is open to others, on a
    network file system, or without room is a failure."""
    refuse(spool, 1.0)
    damaged = leave(spool, "torn")
    (damaged.path / "producer.json").write_text("{")
    leave(spool, "left")
    code, checks = ask("doctor")
    assert code == 0
    found = results(checks)
    assert (found["left over"], found["rejected"], found["damaged"]) == ("warn",) * 3
    assert "200 points" in str(checks)

    damaged.path.chmod(0o750)
    assert results(ask("doctor")[1])["spool"] == "fail"
    damaged.path.chmod(0o700)
    spool.chmod(0o755)
    code, checks = ask("doctor")
    assert (code, results(checks)["spool"]) == (1, "fail")
    spool.chmod(0o700)
    monkeypatch.setattr("flowbuffer.commands.doctor.file_system_of", lambda _: "nfs4")
    code, checks = ask("doctor")
    assert (code, results(checks)["file system"]) == (1, "fail")
    full = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    assert results(ask("doctor")[1])["room"] == "fail"
    full.free = 1 << 30
    assert results(ask("doctor")[1])["room"] == "warn"


@pytest.mark.usefixtures("spool")
def test_doctor_finds_faults_of_the_server(ask: Ask, strange_server: str) -> None:
    """A server that refuses the credentials, or does not answer, is a failure, told without the
    credentials; a clock that differs is a warning."""
    uri = strange_server.replace("://", "://user:hushhush@")
    code, checks = ask("doctor", "--tracking-uri", uri)
    assert code == 1
    assert (results(checks)["server"], results(checks)["clock"]) == ("fail", "warn")
    assert "refuses the credentials" in str(checks)
    assert "hushhush" not in str(checks)
    code, checks = ask("doctor", "--tracking-uri", "http://user:hushhush@127.0.0.1:1")
    assert (code, results(checks)["server"]) == (1, "fail")
    assert "hushhush" not in str(checks)
