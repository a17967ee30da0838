"""The collector process: who starts it, when it ends, and what happens while it is not there."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flowbuffer import MetricLogger, Settings
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.collector import policies
from flowbuffer.collector.background import Background
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.deliverers import DeliveryByProcess
from flowbuffer.collector.handover import (
    collector_environment,
    collector_lock,
    collector_works,
    fingerprint,
    take_collector_lock,
)
from flowbuffer.collector.launcher import Launcher
from flowbuffer.collector.process import Shift, is_served
from flowbuffer.collector.stopgap import Stopgap
from flowbuffer.errors import RetriableError, RunGoneError, UnauthorisedError
from flowbuffer.spool.files import FileLock
from flowbuffer.spool.folders import ProducerDirectory, Spool
from flowbuffer.spool.notes import DeliveryNote, delivery_note, park
from flowbuffer.spool.producer_info import this_producer
from flowbuffer.spool.reading.reader import Reader
from flowbuffer.spool.waiting import hurry_to_end
from flowbuffer.spool.writing.producer import Producer
from flowbuffer.testing import FakeTransport, ManualClock
from support.backends import MlflowServer, history, make_run
from support.collectors import collector_pid, end_collector, is_free
from support.faults import FaultProxy, forward, reset
from support.jobs import StartJob, Store
from support.waiting import PATIENCE_S, wait_until


class Rig:
    """A collector as the process has it, stepped by hand, with a clock to turn."""

    def __init__(self, root: Path, max_folders: int = 100) -> None:
        self.clock = ManualClock()
        self.settings = Settings(spool_dir=root, linger_s=0)
        self.spool = Spool(root)
        self.transport = FakeTransport()
        self.collector = Collector(
            self.spool,
            self.settings,
            self.clock,
            replace(policies.PROCESS, environment="here", max_folders=max_folders),
            lambda *_: self.transport,
        )
        self.clock.turn(1.0)
        self.shift = Shift(
            self.collector,
            self.clock,
            drain_timeout_s=100.0,
            since_ms=self.now_ms(),
        )
        self.clock.turn(1.0)

    def producer(
        self, delivery: str = "process", run: str = "run", environment: str = "here"
    ) -> tuple[Producer, ProducerDirectory]:
        info = this_producer(
            run, "fake://", self.now_ms(), delivery=delivery, environment=environment
        )
        directory = self.spool.add_producer(info)
        producer = Producer(directory, self.spool, self.settings, self.clock, lambda: None)
        return producer, directory

    def now_ms(self) -> int:
        return self.clock.now_ns() // 1_000_000

    def work(self, rounds: int = 5) -> bool:
        """Step, as the process does; whether it would end."""
        for _ in range(rounds):
            self.collector.step()
            self.clock.turn(0.25)
        return self.shift.over


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "spool")


def test_it_stays_while_a_producer_lives(rig: Rig) -> None:
    """The collector serves living producers, and ends once they are gone and all is delivered."""
    producer, directory = rig.producer()
    producer.append("loss", 1.0)
    assert not rig.work()
    assert rig.transport.history("run", "loss") != []
    assert not rig.work(1000)
    producer.append("loss", 2.0)
    directory.lock.release()  # it is killed
    assert rig.work()
    assert [value for *_, value in rig.transport.history("run", "loss")] == [1.0, 2.0]
    assert list(rig.spool.folders()) == []


def test_it_goes_on_alone_for_a_while(rig: Rig) -> None:
    """With the server down it goes on for drain_timeout_s after the last producer, then leaves
    the points in the spool."""
    producer, directory = rig.producer()
    rig.transport.decide = lambda _: RetriableError("down")
    producer.append("loss", 1.0)
    producer.close()
    assert not rig.work()
    directory.lock.release()
    rig.clock.turn(90)
    assert not rig.work()
    rig.clock.turn(20)
    assert rig.work()
    assert list(rig.spool.folders()) == [directory.path]


def test_it_does_not_wait_for_a_run_that_is_gone(rig: Rig) -> None:
    """Points of a run that was deleted hold no collector, and stay."""
    producer, directory = rig.producer()
    rig.transport.decide = lambda _: RunGoneError("404")
    producer.append("loss", 1.0)
    assert not rig.work()
    directory.lock.release()
    assert rig.work()
    assert list(rig.spool.folders()) == [directory.path]


def test_others_folders_are_left_alone(rig: Rig) -> None:
    """A living producer with delivery="thread", and one that is offline, are not served, and hold
    no collector."""
    thread, thread_directory = rig.producer("thread")
    thread.append("thread", 1.0)
    offline, offline_directory = rig.producer("offline")
    offline.append("offline", 1.0)
    assert rig.work()
    offline_directory.lock.release()
    assert rig.work(50)
    assert rig.transport.rows == set()
    thread_directory.lock.release()
    assert rig.work()
    assert rig.transport.history("run", "thread") != []
    assert list(rig.spool.folders()) == [offline_directory.path]


def test_refused_credentials_make_room(rig: Rig) -> None:
    """A collector whose credentials are refused ends when a later producer, which may have others,
    has come; not before."""
    old, _old_directory = rig.producer()
    rig.transport.decide = lambda _: UnauthorisedError("401")
    old.append("loss", 1.0)
    shift = Shift(rig.collector, rig.clock, 100.0, rig.now_ms())  # started by this producer
    rig.work()
    assert not shift.over
    new, _new_directory = rig.producer()
    new.append("loss", 2.0)  # refused as well, and left to who logged it
    rig.work(100)
    assert rig.collector.streams == []
    assert shift.over


def test_what_is_refused_is_left_to_the_producer_that_lives(rig: Rig) -> None:
    """A collector whose credentials are refused lets go of living producers' folders, tells why,
    and takes them when their producers are dead."""
    producer, directory = rig.producer()
    rig.transport.decide = lambda _: UnauthorisedError("401")
    producer.append("loss", 1.0)
    rig.work(100)
    assert rig.collector.streams == []
    assert delivery_note(directory.path).unauthorised
    rig.transport.decide = lambda _: None
    directory.lock.release()
    assert rig.work()
    assert rig.transport.history("run", "loss") != []


def test_what_cannot_be_sent_is_left_to_whoever_waits(rig: Rig) -> None:
    """A collector that cannot send lets go of the folder of a producer that lives when somebody
    waits for it, and takes it again later; else it goes on trying."""
    producer, directory = rig.producer()
    rig.transport.decide = lambda _: RetriableError("no such plugin")
    producer.append("loss", 1.0)
    rig.work(100)
    assert len(rig.collector.streams) == 1
    hurry_to_end(directory.path)
    rig.work(5)
    assert rig.collector.streams == []
    rig.transport.decide = lambda _: None
    rig.work(100)
    assert rig.transport.history("run", "loss") != []


def test_each_environment_has_a_collector_of_its_own(rig: Rig) -> None:
    """A producer with another environment is left to the collector that has it; what it left when
    it died is adopted where there is no such collector."""
    producer, directory = rig.producer(environment="other")
    producer.append("loss", 1.0)
    assert rig.work(10)  # it holds nobody here
    assert rig.transport.rows == set()
    theirs = FileLock.take(collector_lock(rig.spool.root, "other"), create=True)
    assert theirs is not None
    directory.lock.release()
    rig.work(10)
    assert rig.transport.rows == set()
    theirs.release()
    rig.work(10)
    assert rig.transport.history("run", "loss") != []


def test_who_gets_which_lock(tmp_path: Path) -> None:
    """The first collector has collector.lock, whatever its environment is; another environment's
    has its own, and no environment has two."""
    root = Spool(tmp_path / "spool").root
    first = take_collector_lock(root, "a")
    assert first is not None
    assert FileLock.is_held(root / "collector.lock")
    assert take_collector_lock(root, "a") is None
    second = take_collector_lock(root, "b")
    assert second is not None
    assert take_collector_lock(root, "b") is None
    assert collector_works(root, "a")
    assert collector_works(root, "b")
    first.release()
    assert not collector_works(root, "a")
    assert take_collector_lock(root, "b") is None
    again = take_collector_lock(root, "a")
    assert again is not None
    assert FileLock.is_held(root / "collector.lock")
    second.release()
    assert not collector_works(root, "b")


def test_what_an_environment_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides whether a server can be reached makes another environment; of secrets only
    whether they are there (P8), and of what differs between the ranks of a job nothing."""
    plain = fingerprint()
    for name, value in {"RANK": "3", "MLFLOW_RUN_ID": "x", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert fingerprint() == plain
    found = {plain}
    for name, value in {
        "MLFLOW_TRACKING_INSECURE_TLS": "true",
        "REQUESTS_CA_BUNDLE": "/ca.pem",
        "https_proxy": "http://user:secret@proxy:3128",
        "PYTHONPATH": "/plugins",
        "MLFLOW_TRACKING_TOKEN": "secret",
        "AWS_PROFILE": "team",
    }.items():
        monkeypatch.setenv(name, value)
        found.add(fingerprint())
    assert len(found) == 7
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "renewed")
    monkeypatch.setenv("https_proxy", "http://user:renewed@proxy:3128")
    assert fingerprint() in found


def test_where_there_are_too_many_they_take_turns(tmp_path: Path) -> None:
    """With more folders than descriptors for them, all are delivered, and none is forgotten."""
    rig = Rig(tmp_path / "spool", max_folders=3)
    producers = [rig.producer(run=f"run{number}") for number in range(10)]
    for value in (1.0, 2.0):
        for producer, _ in producers:
            producer.append("loss", value)
        for _ in range(100):
            rig.work(1)
            assert len(rig.collector.streams) <= 3
        for number in range(10):
            assert rig.transport.history(f"run{number}", "loss")[-1][-1] == value
    assert len(list(rig.spool.folders())) == 10


def test_a_folder_that_is_delivered_elsewhere_holds_it(rig: Rig) -> None:
    """While a process that waits delivers its own points, the collector stays for what follows."""
    producer, directory = rig.producer()
    producer.append("loss", 1.0)
    claim = rig.spool.claim(directory.path, living=True)
    assert claim is not None
    assert not rig.work()
    assert rig.collector.streams == []
    claim.release()
    assert not rig.work()
    assert rig.transport.history("run", "loss") != []


def test_who_is_interrupted_while_a_folder_ends_holds_it_no_longer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between any two lines that hand a folder on leaves no lock once the collector is
    closed, though something still refers to the stream."""
    producer, directory = rig.producer()
    producer.append("loss", 1.0)
    assert not rig.work()
    (stream,) = rig.collector.streams

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(stream.reader), "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rig.collector.hand_on(stream)
    rig.collector.close()
    claim = rig.spool.claim(directory.path, living=True)
    assert claim is not None
    claim.release()
    assert stream.path == directory.path


def test_a_folder_that_is_handed_on_holds_up_no_other_of_its_run(rig: Rig) -> None:
    """A folder can be handed on while its points are in one batch with another producer's, and
    both go on."""
    (mine, _), (others, directory) = rig.producer(), rig.producer()
    rig.transport.decide = lambda _: RetriableError("down")
    mine.append("mine", 1.0)
    others.append("others", 1.0)
    assert not rig.work()
    (stream,) = (stream for stream in rig.collector.streams if stream.path == directory.path)
    rig.collector.hand_on(stream)
    claim = rig.spool.claim(directory.path, living=True)
    assert claim is not None
    rig.transport.decide = lambda _: None
    mine.append("mine", 2.0)
    assert not rig.work(400)
    assert [value for *_, value in rig.transport.history("run", "mine")] == [1.0, 2.0]
    claim.release()
    assert not rig.work()
    assert [value for *_, value in rig.transport.history("run", "others")] == [1.0]


def test_what_travels_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials and settings reach the collector by its environment; MLflow's retries and
    batching, which would multiply ours, are off there."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.setenv("AZUREML_RUN_ID", "job")
    monkeypatch.setenv("MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS", "5")
    monkeypatch.setenv("FLOWBUFFER_LINGER_S", "7")
    settings = Settings(spool_dir=tmp_path, linger_s=0.25, request_timeout_s=3)
    environment = collector_environment(settings, "http://user:pw@host", 0)
    assert environment["MLFLOW_TRACKING_TOKEN"] == "secret"
    assert environment["AZUREML_RUN_ID"] == "job"
    assert environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS" not in environment
    assert "http://user:pw@host" in environment.values()
    flowbuffers = {k: v for k, v in environment.items() if k.startswith("FLOWBUFFER_")}
    assert Settings.from_env(flowbuffers) == settings


# Real processes.

PROCESS = {"FLOWBUFFER_DELIVERY": "process"}


def test_one_for_all_that_log(start_job: StartJob, store: Store, tmp_path: Path) -> None:
    """Four processes that begin at once have one collector, which is nobody's child and in a
    session of its own; it delivers while they log, and is gone when they are."""
    code = """
    logger = MetricLogger(RUN)
    say("ready")
    key = hear()
    for step in range(100):
        logger.log_metric(key, -float(step), step=step)
    say("logged")
    hear()
    """
    jobs = [start_job(code, **PROCESS) for _ in range(4)]
    for job in jobs:
        job.expect("ready")
    pid = wait_until(lambda: collector_pid(tmp_path / "spool"))
    assert pid is not None
    assert os.getsid(pid) not in {os.getsid(job.process.pid) for job in jobs}
    for number, job in enumerate(jobs):
        job.tell(f"job{number}")
    for job in jobs:
        job.expect("logged")
    expected = [-float(step) for step in range(100)]
    for number in range(4):
        wait_until(lambda: store.values(f"job{number}") == expected)  # noqa: B023
    assert collector_pid(tmp_path / "spool") == pid
    status = subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True)
    assert int(status.stdout) not in {job.process.pid for job in jobs}
    for job in jobs:
        job.tell("end")
        ended = job.end()
        assert ended.status == 0, ended.err
        assert ended.err == ""
    wait_until(lambda: is_free(tmp_path / "spool"))


def test_a_dead_collector_is_replaced(start_job: StartJob, store: Store, tmp_path: Path) -> None:
    """A job that only logs, and never waits, gets a new collector when its own is killed."""
    job = start_job(
        """
        logger = MetricLogger(RUN)
        logger.log_metric("before", 1.0)
        say("first")
        hear()
        logger.log_metric("after", 1.0)
        say("second")
        hear()
        """,
        **PROCESS,
    )
    job.expect("first")
    wait_until(lambda: store.values("before"))
    pid = wait_until(lambda: collector_pid(tmp_path / "spool"))
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    job.tell("go on")
    job.expect("second")
    wait_until(lambda: store.values("after"))
    assert wait_until(lambda: collector_pid(tmp_path / "spool")) != pid
    job.tell("end")
    assert job.end().status == 0


def test_whoever_waits_needs_no_collector(
    sqlite_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no process can be started, that is said once, and waiting delivers all the same."""
    monkeypatch.setattr("flowbuffer.collector.launcher.interpreter", lambda: None)
    run_id = make_run(sqlite_uri)
    settings = Settings.from_env(delivery="process")
    logger = MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings)
    for step in range(10):
        logger.log_metric("loss", -float(step), step).wait(PATIENCE_S)
    assert logger.flush(PATIENCE_S).pending == 0
    assert logger.close().delivered == 10
    assert [m.value for m in history(sqlite_uri, run_id, "loss")] == [-float(s) for s in range(10)]
    assert len([r for r in caplog.records if "no collector process" in r.getMessage()]) == 1


def test_what_holds_it_up_is_told_where_it_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process that logs says once what holds up the collector process, and what to do where
    the credentials are refused; and that it goes on."""
    monkeypatch.setattr(Launcher, "_start", lambda _, lock: lock.release())
    delivery = DeliveryByProcess(Settings(spool_dir=tmp_path / "spool"), "http://host")
    directory = delivery.spool.add_producer(this_producer("run", "http://host", 0))
    delivery.begin(directory.path)
    reader = Reader(directory.path, ManualClock(), alive=True)
    for note in [DeliveryNote(), *[DeliveryNote(last_error="401 no", unauthorised=True)] * 3]:
        reader.note(note)
        delivery.tend()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "401 no" in said
    reader.note(DeliveryNote())
    delivery.tend()
    assert "delivery goes on" in caplog.records[-1].getMessage()
    delivery.end()
    directory.lock.release()


class Standing:
    """A stopgap whose thread is this test, with a collector process that is there on paper."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = ManualClock()
        self.ready = False
        monkeypatch.setattr(Launcher, "ensure", lambda _: None)
        monkeypatch.setattr("flowbuffer.collector.stopgap.wake_collector", lambda *_: self.ready)
        monkeypatch.setattr("flowbuffer.collector.stopgap.SYSTEM_CLOCK", self.clock)
        monkeypatch.setattr(Background, "begin", lambda _: True)
        settings = Settings(spool_dir=root)
        self.stopgap = Stopgap(settings, "http://127.0.0.1:9", "")
        self.directory = self.stopgap.spool.add_producer(this_producer("run", "fake://", 0))
        self.user = DeliveryByProcess(settings, "http://127.0.0.1:9")
        self.stopgap.join(self.user, self.directory.path, "http://127.0.0.1:9")

    def passes(self, seconds: float, *, waits: bool) -> bool:
        """Some time, in which somebody waits or does not; whether the folder is delivered here."""
        for _ in range(round(seconds / 0.05)):
            if waits:
                self.stopgap.hurry(self.directory.path)
            self.stopgap._round()
            self.clock.turn(0.05)
        return FileLock.is_held(self.directory.path / "reader.lock")

    def refuse(self) -> None:
        """What a collector process notes whose credentials are refused."""
        reader = Reader(self.directory.path, self.clock, alive=True)
        reader.note(DeliveryNote(last_error="401 no", unauthorised=True))


@pytest.fixture
def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standing]:
    found = Standing(tmp_path / "spool", monkeypatch)
    yield found
    found.stopgap._close()
    found.directory.lock.release()


def test_who_waits_delivers_at_once(standing: Standing) -> None:
    """Who waits for a folder that nobody delivers does it, and leaves it when nobody waits."""
    assert not standing.passes(5, waits=False)
    assert standing.passes(0.1, waits=True)
    assert standing.passes(0.5, waits=False)
    assert not standing.passes(1, waits=False)


def test_a_stopgap_hands_over(standing: Standing) -> None:
    """Who waits hands its folder over to a collector process that is ready, and takes it back from
    one that does not claim it in its time."""
    assert standing.passes(5, waits=True)
    standing.ready = True
    assert not standing.passes(1, waits=True)
    assert not standing.passes(0.9, waits=True)
    assert standing.passes(5, waits=True)
    assert not standing.passes(2, waits=False)


def test_a_folder_that_the_collector_has_is_left_to_it(standing: Standing) -> None:
    """Whoever waits takes a folder from nobody."""
    claim = standing.stopgap.spool.claim(standing.directory.path, living=True)
    assert claim is not None
    standing.passes(3, waits=True)
    assert standing.stopgap.streams == []
    claim.release()
    assert standing.passes(0.2, waits=True)
    assert len(standing.stopgap.streams) == 1


def test_refused_credentials_bring_a_folder_home(standing: Standing) -> None:
    """What the collector process gave up because its credentials were refused is delivered, from
    then on, by the process that logs, whose own may have been renewed since; nobody need wait."""
    standing.ready = True
    standing.refuse()
    assert standing.passes(3, waits=False)
    assert standing.passes(60, waits=False)


def test_the_server_is_down_at_the_end(
    start_job: StartJob, server_sqlite: MlflowServer, tmp_path: Path
) -> None:
    """A job whose server is down ends within shutdown_timeout_s, says what is left, and the
    collector delivers it once the server is there (P7)."""
    run_id = make_run(server_sqlite.uri)
    with FaultProxy(server_sqlite.uri, reset) as proxy:
        job = start_job(
            f"""
            logger = MetricLogger({run_id!r})
            for step in range(1000):
                logger.log_metric("loss", -float(step), step)
            """,
            proxy.uri,
            FLOWBUFFER_SHUTDOWN_TIMEOUT_S="1",
            **PROCESS,
        )
        ended = job.end()
        assert ended.status == 0
        assert "1,000 points" in ended.err
        assert "flowbuffer sync --spool" in ended.err
        assert "the collector process goes on" in ended.err
        proxy.always(forward)
        wait_until(lambda: is_free(tmp_path / "spool"))
    assert [m.value for m in history(server_sqlite.uri, run_id, "loss")] == [
        -float(step) for step in range(1000)
    ]


def test_it_imports_no_training_framework(
    start_job: StartJob, store: Store, tmp_path: Path
) -> None:
    """What the training code has imported, or has beside it, is not imported by the collector."""
    (tmp_path / "torch.py").write_text("open('imported', 'w').close()")
    job = start_job(
        """
        import torch
        os.unlink("imported")
        logger = MetricLogger(RUN)
        logger.log_metric("loss", 1.0)
        say("logged")
        hear()
        """,
        **PROCESS,
    )
    job.expect("logged")
    wait_until(lambda: store.values())
    assert not list(tmp_path.rglob("imported"))
    end_collector(tmp_path / "spool")
    job.tell("end")
    assert job.end().status == 0


def test_the_command_that_starts_it() -> None:
    """Started by hand and without a spool, the module says how it is used."""
    done = subprocess.run(
        [sys.executable, "-m", "flowbuffer.collector.process"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "flowbuffer sync" in done.stderr


def test_a_closed_producer_relies_on_it_until_its_run_is_gone(tmp_path: Path) -> None:
    """The collector stays for what a process that lives on has closed and not delivered (P7), but
    not where the run is gone: it would take the folder up and let it go again and again."""
    spool = Spool(tmp_path / "spool")
    info = this_producer("run", "http://127.0.0.1:9", 0, delivery="process")
    directory = spool.add_producer(info)
    producer = Producer(directory, spool, Settings(), SYSTEM_CLOCK, lambda: None)
    producer.append("k", 1.0)
    assert is_served(directory.path)
    producer.close()
    assert is_served(directory.path)
    park(directory.path, "run run is deleted")
    assert not is_served(directory.path)
    directory.lock.release()
