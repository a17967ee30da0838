"""Jobs of several processes that log to one run through a collector process: torchrun and data
loaders, multiprocessing, MPI, and which of the processes log what.

The value of a point tells who logged it and in which place; all of them share keys.
"""

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowbuffer import SettingError, Settings
from support.backends import make_run
from support.collectors import end_collector, is_empty, is_free
from support.jobs import StartJob, Store, run_to_end
from support.many_processes import run
from support.waiting import wait_until

WHO = 100_000
POINTS = 400

#: What every process of these jobs has at hand.
BEGIN = f"""
    import json, multiprocessing, os, signal, sys
    from pathlib import Path
    import flowbuffer, mlflow
    from flowbuffer import MetricLogger, Settings

    def log(logger, who, points={POINTS}):
        for index in range(points):
            logger.log_metric(f"key{{index % 3}}", float({WHO} * who + index), step=0)
"""


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture(autouse=True)
def by_process(spool: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A collector process delivers, and does not outlive the test."""
    monkeypatch.setenv("FLOWBUFFER_DELIVERY", "process")
    yield
    end_collector(spool)


def launched(script: Path, code: str, launcher: list[str], uri: str, **environment: str) -> str:
    """Run a program under a launcher to its end; what it said."""
    script.write_text(textwrap.dedent(BEGIN) + textwrap.dedent(code))
    return run_to_end([*launcher, str(script)], uri, **environment)


def wait_for_delivery(spool: Path) -> None:
    """Until the collector process has delivered all and is gone."""
    wait_until(lambda: is_empty(spool) and is_free(spool))


def assert_whole(store: Store, points: dict[int, int]) -> None:
    """The store has all points of these processes and no others, those of each in its order."""
    found: dict[int, dict[int, list[int]]] = {who: {0: [], 1: [], 2: []} for who in points}
    for key in range(3):
        for value in store.values(f"key{key}"):
            who, index = divmod(int(value), WHO)
            found[who][key].append(index)
    for who, count in points.items():
        assert found[who] == {key: list(range(key, count, 3)) for key in range(3)}, who


# Launchers.


def test_torchrun_with_data_loaders(store: Store, sqlite_uri: str, tmp_path: Path) -> None:
    """Four ranks that train together, each with a data loader's worker, log to one run: all of
    their points arrive, in order for each, and each knows its rank."""
    pytest.importorskip("torch", reason="scripts/distributed has it")
    run_id = make_run(sqlite_uri)
    code = """
    import torch, torch.distributed
    from torch.utils.data import DataLoader, Dataset

    class Numbers(Dataset):
        def __len__(self):
            return 120

        def __getitem__(self, index):
            logger.log_metric(f"key{index % 3}", float(100_000 * (10 + rank) + index), step=0)
            return torch.tensor(float(index))

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    logger = MetricLogger(os.environ["RUN"])
    (folder,) = logger.settings.resolved_spool_dir().glob(f"*/*-{os.getpid()}-*")
    said = json.loads((folder / "producer.json").read_text())
    assert (said["rank"], said["local_rank"], said["world_size"]) == (rank, rank, 4)
    index = 0
    for batch in DataLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context="fork"):
        total = batch.sum()
        torch.distributed.all_reduce(total)
        for _ in range(5):
            logger.log_metric(f"key{index % 3}", float(100_000 * rank + index), step=0)
            index += 1
    torch.distributed.destroy_process_group()
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "4"]
    launched(tmp_path / "train.py", code, torchrun, sqlite_uri, RUN=run_id)
    wait_for_delivery(tmp_path / "spool")
    ranks = dict.fromkeys(range(4), 300)
    workers = dict.fromkeys(range(10, 14), 120)
    assert_whole(store, ranks | workers)


def test_mpi(store: Store, sqlite_uri: str, tmp_path: Path) -> None:
    """Three processes of an MPI job log to the run that the first of them started, and each knows
    its rank."""
    pytest.importorskip("mpi4py", reason="scripts/distributed has it")
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("there is no mpiexec beside this Python")
    code = """
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    run = mlflow.start_run() if world.rank == 0 else None
    logger = MetricLogger(world.bcast(run and run.info.run_id))
    (folder,) = logger.settings.resolved_spool_dir().glob(f"*/*-{os.getpid()}-*")
    said = json.loads((folder / "producer.json").read_text())
    assert (said["rank"], said["local_rank"], said["world_size"]) == (world.rank, world.rank, 3)
    log(logger, world.rank)
    logger.close()
    world.Barrier()
    """
    launcher = [str(mpiexec), "-n", "3", sys.executable]
    launched(tmp_path / "train.py", code, launcher, sqlite_uri)
    assert_whole(store, dict.fromkeys(range(3), POINTS))
    assert store.statuses() == ["FINISHED"]


# multiprocessing.


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing(start_job: StartJob, store: Store, method: str) -> None:
    """Children that are given a logger log to its run, and do not wait at their end. What they
    logged is there when the run ends, also that of one that was killed and one that ended by
    os._exit."""
    store.note_points_at_end()
    job = start_job(
        textwrap.dedent(BEGIN)
        + textwrap.dedent(
            f"""
            def work(logger, who, said):
                log(logger, who)
                said.send(who)
                if who == 2:
                    os._exit(7)
                if who == 3:
                    signal.pause()

            if __name__ == "__main__":
                mlflow.start_run(run_id=os.environ["RUN"])
                context = multiprocessing.get_context({method!r})
                logger = MetricLogger()
                log(logger, 0)
                children = []
                for who in (1, 2, 3):
                    heard, said = context.Pipe(duplex=False)
                    child = context.Process(target=work, args=(logger, who, said))
                    child.start()
                    children.append((child, heard))
                for child, heard in children:
                    assert heard.recv()
                children[2][0].kill()
                for child, _ in children:
                    child.join()
                assert [child.exitcode for child, _ in children] == [0, 7, -9]
                mlflow.end_run()
            """
        )
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    assert store.points_at_end() == [("FINISHED", 4 * POINTS)]
    assert_whole(store, dict.fromkeys(range(4), POINTS))


def test_a_child_does_not_wait(start_job: StartJob, tmp_path: Path) -> None:
    """With a server that is gone a child's end takes no time, and what it logged is kept."""
    job = start_job(
        textwrap.dedent(BEGIN)
        + textwrap.dedent(
            """
            import time

            if __name__ == "__main__":
                logger = MetricLogger(os.environ["RUN"])
                child = multiprocessing.get_context("fork").Process(target=log, args=(logger, 1))
                start_s = time.monotonic()
                child.start()
                child.join()
                assert child.exitcode == 0
                assert time.monotonic() - start_s < 50
                say("did not wait")
                hear()
            """
        ),
        "http://127.0.0.1:9",
        FLOWBUFFER_SHUTDOWN_TIMEOUT_S="100",
    )
    job.expect("did not wait")
    job.kill()
    end_collector(tmp_path / "spool")
    left = sum(path.read_bytes().count(b"\x17") for path in tmp_path.glob("spool/*/*/*.slots"))
    assert left >= POINTS


# Several jobs and one run.


def test_one_rank_ends_the_run(start_job: StartJob, store: Store) -> None:
    """Nothing is lost of a process that goes on logging when another one ends the run."""
    code = textwrap.dedent(BEGIN) + textwrap.dedent(
        """
        rank = int(os.environ["RANK"])
        mlflow.start_run(run_id=os.environ["RUN"])
        logger = MetricLogger()
        log(logger, rank)
        say("logged")
        hear()
        if rank == 0:
            mlflow.end_run()
        else:
            for index in range(400, 900):
                logger.log_metric(f"key{index % 3}", float(100_000 * rank + index), step=0)
        """
    )
    ending, going_on = (start_job(code, RANK=str(rank)) for rank in range(2))
    for job in (ending, going_on):
        job.expect("logged")
    ending.tell("end")
    ended = ending.end()
    assert ended.status == 0, ended.err
    assert store.statuses() == ["FINISHED"]
    going_on.tell("go on")
    ended = going_on.end()
    assert ended.status == 0, ended.err
    assert_whole(store, {0: POINTS, 1: 900})


def test_many_processes(sqlite_uri: str, tmp_path: Path) -> None:
    """Four processes that log 2000 points each as fast as they can: each comes back once, in
    order."""
    verdicts, _ = run(sqlite_uri, 4, 2000, tmp_path / "spool")
    assert all(verdict.good for verdict in verdicts), verdicts


# Which processes log, and under which key.


@pytest.mark.parametrize(("ranks", "logging"), [("0", {0}), ("0,1", {0, 1}), ("all", {0, 1, 2})])
def test_ranks(start_job: StartJob, store: Store, ranks: str, logging: set[int]) -> None:
    """FLOWBUFFER_RANKS chooses the ranks whose points are stored. In the others a call returns at
    once with a handle that is done, and nothing is spooled."""
    code = textwrap.dedent(BEGIN) + textwrap.dedent(
        """
        spool = Settings.from_env().resolved_spool_dir()
        for rank in range(3):
            os.environ["RANK"] = str(rank)
            with MetricLogger(os.environ["RUN"]) as logger:
                log(logger, rank)
                for handle in (
                    logger.log_metrics({"more": float(rank)}),
                    logger.log_series("series", [float(rank)]),
                ):
                    if f"{rank}" not in sys.argv[1:] and LOGGING != "all":
                        assert handle.done()
                        handle.wait(0)
                        assert not list(spool.glob(f"*/*-{os.getpid()}-*"))
        """
    ).replace("LOGGING", repr(ranks)).replace("sys.argv[1:]", repr(ranks.split(",")))
    ended = start_job(code, FLOWBUFFER_RANKS=ranks).end()
    assert ended.status == 0, ended.err
    assert_whole(store, dict.fromkeys(logging, POINTS))
    assert store.values("more") == store.values("series") == sorted(map(float, logging))


@pytest.mark.parametrize("way", ["MetricLogger()", "flowbuffer"])
def test_a_rank_that_does_not_log_starts_no_run(
    start_job: StartJob, store: Store, way: str
) -> None:
    """With FLOWBUFFER_RANKS=0 rank 1 makes no run, neither by a logger nor by the functions."""
    code = f"""
    logger = {way}
    logger.log_metric("loss", 1.0)
    logger.log_metrics({{"loss": 1.0}})
    logger.log_series("loss", [1.0])
    logger.flush()
    """
    ended = start_job(code, FLOWBUFFER_RANKS="0", RANK="1").end()
    assert ended.status == 0, ended.err
    assert store.statuses() == ["RUNNING"], "the run of the fixture is the only one"


@pytest.mark.parametrize("text", ["none", "-1", "0,-1", "0,,1", "0;1", "1.5", "all,0", ",", " "])
def test_bad_ranks(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no list of ranks is an error that names the setting."""
    monkeypatch.setenv("FLOWBUFFER_RANKS", text)
    with pytest.raises(SettingError, match="FLOWBUFFER_RANKS"):
        Settings.from_env()


def test_key_template(start_job: StartJob, store: Store) -> None:
    """FLOWBUFFER_KEY_TEMPLATE gives each rank keys of its own, whichever way it logs."""
    code = """
    for rank in range(2):
        os.environ["RANK"] = str(rank)
        with MetricLogger(RUN) as logger:
            logger.log_metric("loss", float(rank))
            logger.log_metrics({"acc": float(rank)})
            logger.log_series("series", [float(rank), 2.0])
    """
    ended = start_job(code, FLOWBUFFER_KEY_TEMPLATE="{key}/rank{rank}").end()
    assert ended.status == 0, ended.err
    for rank in range(2):
        assert store.values(f"loss/rank{rank}") == store.values(f"acc/rank{rank}") == [float(rank)]
        assert store.values(f"series/rank{rank}") == [float(rank), 2.0]
    assert store.values("loss") == []


@pytest.mark.parametrize(
    "text", ["rank{rank}", "{key}{node}", "{key", "{key}{}", "{key}{0}", "{{key}}", "{key:d}"]
)
def test_bad_key_templates(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template without the key, or with what nobody knows, is an error that names the
    setting."""
    monkeypatch.setenv("FLOWBUFFER_KEY_TEMPLATE", text)
    with pytest.raises(SettingError, match="FLOWBUFFER_KEY_TEMPLATE"):
        Settings.from_env()


def test_places_are_recorded(start_job: StartJob) -> None:
    """The rank, local rank and world size that a launcher tells are in producer.json; torchrun's
    go before those of what torchrun runs under, and outside a job there are none."""
    torchrun = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    launchers = [
        (torchrun, [5, 1, 8]),
        (
            {
                "OMPI_COMM_WORLD_RANK": "6",
                "OMPI_COMM_WORLD_LOCAL_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "9",
            },
            [6, 2, 9],
        ),
        ({"PMI_RANK": "0", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2"}, [0, 0, 2]),
        (slurm, [3, 0, 4]),
        (slurm | torchrun, [5, 1, 8]),
        ({"RANK": "2"}, [2, None, None]),
        ({}, [None, None, None]),
        ({"RANK": "many", "LOCAL_RANK": "-1"}, [None, None, None]),
    ]
    job = start_job(
        textwrap.dedent(BEGIN)
        + textwrap.dedent(
            """
            for variables in json.loads(os.environ["LAUNCHERS"]):
                os.environ.update(variables)
                logger = MetricLogger(os.environ["RUN"])
                (folder,) = logger.settings.resolved_spool_dir().glob("*/*")
                said = json.loads((folder / "producer.json").read_text())
                print(json.dumps([said[n] for n in ("rank", "local_rank", "world_size")]))
                logger.close()
                for name in variables:
                    del os.environ[name]
            """
        ),
        LAUNCHERS=json.dumps([variables for variables, _ in launchers]),
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    assert [json.loads(line) for line in ended.out.splitlines()] == [p for _, p in launchers]
