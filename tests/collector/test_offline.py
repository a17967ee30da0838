"""Offline jobs, and syncs that bring what they logged, or any run, to a server."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flowbuffer.commands.sync
import flowbuffer.delivery.sender
from flowbuffer import MetricLogger
from flowbuffer.commands import cli
from flowbuffer.delivery.retry import RetryPolicy
from flowbuffer.spool import layout
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.producer_info import OFFLINE
from support.backends import MlflowServer, client, history, make_run
from support.faults import FaultProxy
from support.jobs import StartJob
from support.left_over import leave
from support.waiting import PATIENCE_S, wait_until

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between attempts that suit a test."""
    policy = functools.partial(RetryPolicy, first_s=0.02)
    monkeypatch.setattr(flowbuffer.delivery.sender, "RetryPolicy", policy)
    monkeypatch.setattr(flowbuffer.commands.sync, "RetryPolicy", policy)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def sync(capsys: pytest.CaptureFixture[str], spool: Path, *options: str) -> tuple[int, str]:
    """The exit code of `flowbuffer sync`, and the line with its counts."""
    capsys.readouterr()
    code = cli.main(["sync", "--spool", str(spool), "--timeout", "150", *options])
    return code, capsys.readouterr().out.splitlines()[-1]


def created(uri: str) -> list[str]:
    """The ids of the runs that syncs created."""
    mlflow = client(uri)
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    return [
        run.info.run_id
        for run in mlflow.search_runs(experiments)
        if "flowbuffer.run_id" in run.data.tags
    ]


def the_created(uri: str) -> str:
    (run_id,) = created(uri)
    return run_id


def values(uri: str, run_id: str) -> list[float]:
    return [metric.value for metric in history(uri, run_id, "loss")]


def test_nobody_is_waited_for_offline() -> None:
    """A flush and the end of a logger that is offline take no time, however long they may take."""
    with MetricLogger("run", tracking_uri=NOWHERE, offline=True, shutdown_timeout_s=3600) as logger:
        logger.log_metric("loss", 1.0)
        assert logger.flush(PATIENCE_S).pending == 1


def test_an_offline_job_is_delivered_elsewhere(
    start_job: StartJob, sqlite_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a job logged offline, without any server, is copied to another machine and delivered
    there: to a run in the experiment that the job named, complete and ended, and only once."""
    job = start_job(
        """
        with MetricLogger() as logger:
            for step in range(500):
                logger.log_metric("loss", step % 7)
            print(logger.run_id)
        """,
        NOWHERE,
        FLOWBUFFER_OFFLINE="1",
        MLFLOW_EXPERIMENT_NAME="far away",
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "spool", copy)

    code, counts = sync(capsys, copy, "--tracking-uri", sqlite_uri)

    assert (code, counts) == (0, "delivered 500, rejected 0, pending 0")
    run = client(sqlite_uri).get_run(the_created(sqlite_uri))
    assert run.data.tags["flowbuffer.run_id"] == ended.out.strip()
    assert run.info.status == "FINISHED"
    assert client(sqlite_uri).get_experiment(run.info.experiment_id).name == "far away"
    assert values(sqlite_uri, run.info.run_id) == [step % 7 for step in range(500)]
    assert not [path for path in copy.iterdir() if path.is_dir()]
    counts_again = (0, "delivered 0, rejected 0, pending 0")
    assert sync(capsys, copy, "--tracking-uri", sqlite_uri) == counts_again


@pytest.mark.parametrize("lost", [False, True])
def test_more_points_go_to_the_same_run(
    spool: Path, sqlite_uri: str, capsys: pytest.CaptureFixture[str], lost: bool
) -> None:
    """What comes later of a run goes to the run that was created for it, which is found by its tag
    even if the file that remembers it is lost."""
    leave(spool, "far", NOWHERE, [1, 2], delivery=OFFLINE)
    assert sync(capsys, spool, "--tracking-uri", sqlite_uri, "--experiment", "named")[0] == 0
    if lost:
        (spool / "runs.json").unlink()
    else:
        client(sqlite_uri).set_tag(the_created(sqlite_uri), "flowbuffer.run_id", "lost")
    leave(spool, "far", NOWHERE, [3, 4], delivery=OFFLINE)
    assert sync(capsys, spool, "--tracking-uri", sqlite_uri)[0] == 0
    assert sorted(values(sqlite_uri, the_created(sqlite_uri))) == [1, 2, 3, 4]
    assert (spool / "runs.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (["finished", "finished"], "FINISHED"),
        (["finished", "failed"], "FAILED"),
        (["killed", "finished"], "FAILED"),
    ],
)
def test_a_created_run_ends_as_its_producers_did(
    spool: Path, sqlite_uri: str, capsys: pytest.CaptureFixture[str], ends: list[str], status: str
) -> None:
    """A run that sync created is marked ended once all of it is delivered, and as failed if one of
    its processes failed or was killed; later points do not make it well."""
    for number, end in enumerate(ends):
        leave(spool, "far", sqlite_uri, end=end, delivery=OFFLINE, start_ms=5000 + number)
    assert sync(capsys, spool)[0] == 0
    leave(spool, "far", sqlite_uri, delivery=OFFLINE)
    assert sync(capsys, spool)[0] == 0
    run = client(sqlite_uri).get_run(the_created(sqlite_uri))
    assert (run.info.status, run.info.start_time) == (status, 5000)


def test_a_failure_is_remembered(
    spool: Path, sqlite_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A created run of which the failed part was delivered first, beside a process that still
    runs, ends as failed when the rest comes."""
    leave(spool, "far", NOWHERE, end="killed", delivery=OFFLINE)
    living = leave(spool, "far", NOWHERE, end="alive", delivery=OFFLINE, start_ms=5)
    code, counts = sync(capsys, spool, "--tracking-uri", sqlite_uri)
    assert (code, counts) == (1, "delivered 100, rejected 0, pending 100")
    run_id = the_created(sqlite_uri)
    assert client(sqlite_uri).get_run(run_id).info.status == "RUNNING"
    with (living.path / "00000000.slots").open("r+b") as segment:
        segment.seek(layout.CLOSED_OFFSET)
        segment.write(layout.closed_fields(100, layout.FINISHED))
    assert sync(capsys, spool, "--tracking-uri", sqlite_uri)[0] == 0
    assert client(sqlite_uri).get_run(run_id).info.status == "FAILED"
    living.lock.release()


def test_a_run_that_is_there_is_used_and_left_running(
    spool: Path, sqlite_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An offline job on a run that the server knows is delivered to it; sync never ends it."""
    run_id = make_run(sqlite_uri)
    leave(spool, run_id, sqlite_uri, delivery=OFFLINE)
    assert sync(capsys, spool) == (0, "delivered 100, rejected 0, pending 0")
    assert values(sqlite_uri, run_id) == list(range(100))
    assert client(sqlite_uri).get_run(run_id).info.status == "RUNNING"
    assert created(sqlite_uri) == []


def test_a_server_that_is_down_costs_nothing(
    server_sqlite: MlflowServer, spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sync to a server that is down keeps all, says why and ends with 1; the next one delivers
    all of it, the one after it nothing; the URI's credentials are never shown or stored."""
    leave(spool, "far-" + spool.parent.name, NOWHERE, delivery=OFFLINE)
    with FaultProxy(server_sqlite.uri) as proxy:
        uri = proxy.uri.replace("://", "://user:hushhush@")
        proxy.down()
        code = cli.main(["sync", "--spool", str(spool), "--tracking-uri", uri, "--timeout", "0.3"])
        printed = capsys.readouterr()
        assert (code, printed.out) == (1, "delivered 0, rejected 0, pending 100\n")
        assert "refused" in printed.err
        proxy.up()
        code = cli.main(["sync", "--spool", str(spool), "--tracking-uri", uri])
        more = capsys.readouterr()
        assert (code, more.out.splitlines()[-1]) == (0, "delivered 100, rejected 0, pending 0")
        assert sync(capsys, spool) == (0, "delivered 0, rejected 0, pending 0")
    said = printed.out + printed.err + more.out + more.err
    assert "hushhush" not in said
    for path in spool.rglob("*"):
        assert path.is_dir() or b"hushhush" not in path.read_bytes()
    run_id = the_created_of(server_sqlite.uri, "far-" + spool.parent.name)
    assert values(server_sqlite.uri, run_id) == list(range(100))
    assert client(server_sqlite.uri).get_run(run_id).info.status == "FINISHED"


def the_created_of(uri: str, run_id: str) -> str:
    tags = {new: client(uri).get_run(new).data.tags["flowbuffer.run_id"] for new in created(uri)}
    (found,) = [new for new, old in tags.items() if old == run_id]
    return found


def start_sync(spool: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "flowbuffer", "sync", "--spool", str(spool), "--timeout", "150"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_syncs_and_a_collector_at_once(
    spool: Path, sqlite_uri: str, start_job: StartJob
) -> None:
    """Two syncs and a collector process on one spool deliver everything once, create one run for
    an offline one, and both syncs end with 0."""
    run_id = make_run(sqlite_uri)
    for _ in range(3):
        leave(spool, run_id, sqlite_uri, range(3000), delivery="process")
        leave(spool, "far", sqlite_uri, range(1000), delivery=OFFLINE)
    job = start_job(
        """
        from flowbuffer.collector.launcher import Launcher

        settings = Settings.from_env()
        Launcher(settings.spool_dir, settings, os.environ["MLFLOW_TRACKING_URI"], "").ensure()
        """
    )
    assert job.end().status == 0
    syncs = [start_sync(spool) for _ in range(2)]
    for process in syncs:
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
    assert sorted(values(sqlite_uri, run_id)) == sorted([*range(3000)] * 3)
    there = the_created(sqlite_uri)
    assert sorted(values(sqlite_uri, there)) == sorted([*range(1000)] * 3)
    assert client(sqlite_uri).get_run(there).info.status == "FINISHED"


def test_a_folder_is_taken_over(spool: Path, sqlite_uri: str) -> None:
    """A sync tells whoever has a folder to hurry, waits for it, and takes the folder over when
    that process is gone."""
    run_id = make_run(sqlite_uri)
    left = leave(spool, run_id, sqlite_uri)
    claim = Spool(spool).claim(left.path)
    assert claim is not None
    process = start_sync(spool)
    segment = left.path / "00000000.slots"

    def wanted() -> int:
        (slots,) = layout.WANTED.unpack_from(segment.read_bytes(), layout.WANTED_OFFSET)
        return int(slots)

    assert wait_until(wanted) >= 100
    assert process.poll() is None
    claim.release()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (0, "delivered 100, rejected 0, pending 0\n"), err
    assert values(sqlite_uri, run_id) == list(range(100))


def test_one_run_only(spool: Path, sqlite_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With --run-id nothing of another run is touched."""
    one, other = make_run(sqlite_uri), make_run(sqlite_uri)
    leave(spool, one, sqlite_uri)
    kept = leave(spool, other, sqlite_uri)
    assert sync(capsys, spool, "--run-id", one) == (0, "delivered 100, rejected 0, pending 0")
    assert list(Spool(spool).folders()) == [kept.path]
    assert values(sqlite_uri, other) == []
