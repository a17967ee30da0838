"""Attacks on a spool (P8): what is planted in it is refused or reported, executed never, and harms
neither other producers nor anything outside the spool; and no credential is written to it.

Most attacks are on `Site`, a spool of three dead producers of which one is attacked, delivered by a
collector without threads or time. Real jobs and collector processes come after that.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flowbuffer import FlowbufferError, InvalidPoint, MetricLogger, Settings, WaitTimeout
from flowbuffer.backends.mlflow_transport import Request
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.handover import wake_collector
from flowbuffer.collector.policies import PROCESS, THREAD
from flowbuffer.errors import RejectedError, RunGoneError, SpoolError, TransportError
from flowbuffer.logger import job_end
from flowbuffer.spool import layout
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.producer_info import ProducerInfo, this_producer
from flowbuffer.spool.tally import tally
from flowbuffer.spool.writing.producer import Producer
from flowbuffer.testing import FakeTransport, ManualClock
from support.collectors import collector_pid, end_collector, is_empty
from support.listening import listening
from support.waiting import PATIENCE_S, wait_until

RUN = "0123456789abcdef0123456789abcdef"
OTHER_RUN = "f" * 32
ATTACKED_RUN = "e" * 32
URI = "https://my_host/mlflow"
MIB = 1 << 20

#: Every file that a producer's folder may hold.
FILES = (
    "producer.json",
    "producer.lock",
    "reader.lock",
    "keys",
    "00000000.slots",
    "00000000.journal",
    "carry",
    "delivery.json",
    "parked.json",
    "rejected.jsonl",
)

#: Those without which not all of its points can be delivered.
NEEDED = FILES[:6]


# What is planted.


def link(path: Path, outside: Path) -> None:
    """A link to a file with the content that was expected."""
    target = outside / path.name
    target.write_bytes(path.read_bytes() if path.is_file() else b"{}\n")
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def dangling_link(path: Path, outside: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "made")


def pipe(path: Path, outside: Path) -> None:  # noqa: ARG001
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)


def folder(path: Path, outside: Path) -> None:  # noqa: ARG001
    path.unlink(missing_ok=True)
    path.mkdir(mode=0o700)


def endpoint(path: Path, outside: Path) -> None:  # noqa: ARG001
    """A socket."""
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has about 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


def open_to_all(path: Path, outside: Path) -> None:  # noqa: ARG001
    path.touch()
    path.chmod(0o666)


def readable_by_all(path: Path, outside: Path) -> None:  # noqa: ARG001
    path.touch()
    path.chmod(0o644)


def somebody_elses(path: Path, outside: Path) -> None:  # noqa: ARG001
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path.touch(mode=0o600)
    os.chown(path, 12345, 12345)


KINDS = (
    link,
    dangling_link,
    pipe,
    folder,
    endpoint,
    open_to_all,
    readable_by_all,
    somebody_elses,
)

Plant = Callable[[Path, Path], None]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing may be done to, once a test has planted links to it."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "precious").write_bytes(b"precious\n")
    yield path
    assert (path / "precious").read_bytes() == b"precious\n"
    assert not (path / "made").exists()


@contextmanager
def untouched(outside: Path) -> Iterator[None]:
    """Nothing is made, removed or changed there."""

    def seen() -> dict[str, tuple[int, bytes]]:
        return {p.name: (p.stat().st_mode, p.read_bytes()) for p in outside.iterdir()}

    before = seen()
    yield
    assert seen() == before


# A spool without processes.


@dataclass
class Outcome:
    """The values that arrived, by producer; what was said; what was raised by the collector."""

    values: dict[str, list[float]]
    said: list[str]
    raised: list[Exception] = field(default_factory=list)


class Site:
    """A spool with three dead producers: `a` is attacked, `b` logged to the same run, `c` to
    another one. The key of each is its name."""

    POINTS = 11  # two segments of eight slots, a series among them

    def __init__(self, root: Path, uri: str = URI) -> None:
        self.root = root
        self.spool = Spool(root)
        self.attacked = self.add("a", RUN, uri)
        self.add("b", RUN, uri)
        self.add("c", OTHER_RUN, uri)

    def add(self, name: str, run_id: str, uri: str = URI) -> Path:
        """A producer that was killed."""
        clock = ManualClock()
        info = replace(this_producer(run_id, uri, 1_700_000_000_000), host=name)
        directory = self.spool.add_producer(info)
        settings = Settings(spool_dir=self.root)
        producer = Producer(
            directory, self.spool, settings, clock, lambda: None, segment_slots=(8, 8)
        )
        producer.append_series(name, [0.0, 1.0])
        for index in range(2, self.POINTS):
            clock.turn(0.01)
            producer.append(name, float(index))
        producer.close()
        directory.lock.release()
        for segment in directory.path.glob("*.slots"):  # killed: it was not closed
            with segment.open("r+b") as file:
                file.seek(layout.CLOSED_OFFSET)
                file.write(bytes(8))
        return directory.path

    @property
    def whole(self) -> list[float]:
        return [float(index) for index in range(self.POINTS)]

    def deliver(
        self, answer: Callable[[Request], TransportError | None] | None = None, rounds: int = 40
    ) -> Outcome:
        """What a collector does with it, as the collector process or thread calls it."""
        transport = FakeTransport(answer=answer)
        clock = ManualClock(1_700_000_100.0)
        outcome = Outcome({}, [])
        with listening() as outcome.said:
            collector = Collector(
                Spool(self.root),
                Settings(spool_dir=self.root, delivery="inline", linger_s=0),
                clock,
                PROCESS,
                lambda *_: transport,
            )
            for _ in range(rounds):
                try:
                    collector.step()
                except Exception as error:
                    outcome.raised.append(error)
                clock.turn(0.5)
            for stream in list(collector.streams):
                stream.hand_on()
        for run_id, key, _, _, _ in sorted(transport.rows, key=lambda row: row[1:3]):
            outcome.values[key] = [v for _, _, v in transport.history(run_id, key)]
        return outcome

    def assert_others_whole(self, outcome: Outcome) -> None:
        assert outcome.raised == [], "the collector process would have ended"
        assert outcome.values.get("c") == self.whole, outcome.said
        assert outcome.values.get("b") == self.whole, outcome.said


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


def test_without_an_attack_all_is_delivered(site: Site) -> None:
    """The spool of these tests is delivered whole, and nothing is said."""
    outcome = site.deliver()
    assert outcome.values == dict.fromkeys("abc", site.whole)
    assert outcome.said == []
    assert is_empty(site.root)


@pytest.mark.parametrize("plant", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_planted_file(site: Site, outside: Path, name: str, plant: Plant) -> None:
    """What stands in the place of a dead producer's file is not followed, does not hang, and holds
    up nobody else; what is not delivered because of it is reported."""
    plant(site.attacked / name, outside)
    with untouched(outside):
        outcome = site.deliver()
    site.assert_others_whole(outcome)
    if name in NEEDED:
        assert outcome.values.get("a") != site.whole, "it was used"
        assert outcome.said
    else:
        assert outcome.values.get("a") == site.whole or outcome.said


@pytest.mark.parametrize("plant", [link, pipe, folder, somebody_elses])
@pytest.mark.parametrize("name", ["carry", "rejected.jsonl", "parked.json", "delivery.json"])
@pytest.mark.parametrize("trouble", ["a point is rejected", "the run is gone"])
def test_a_planted_file_in_trouble(
    site: Site, outside: Path, name: str, plant: Plant, trouble: str
) -> None:
    """The same holds when there is a dead letter to be written, or a run to be parked."""

    def answer(request: Request) -> TransportError | None:
        if "a" not in request.keys:
            return None
        return RejectedError("no") if trouble == "a point is rejected" else RunGoneError("gone")

    plant(site.attacked / name, outside)
    with untouched(outside):
        outcome = site.deliver(answer)
    assert outcome.raised == []
    assert outcome.values.get("c") == site.whole
    if trouble == "a point is rejected":
        site.assert_others_whole(outcome)
    assert outcome.said


@pytest.mark.parametrize("plant", [link, open_to_all, somebody_elses, pipe])
@pytest.mark.parametrize("what", ["root", "run", "producer"])
def test_a_planted_folder(site: Site, tmp_path: Path, what: str, plant: Plant) -> None:
    """A spool, a run's folder or a producer's folder that is a link, somebody else's or open to
    others is refused, and left as it is."""
    place = {"root": site.root, "run": site.attacked.parent, "producer": site.attacked}[what]
    if plant is open_to_all:
        place.chmod(0o777)
    elif plant is somebody_elses:
        somebody_elses(place, tmp_path)
    else:
        moved = tmp_path / "moved"
        place.rename(moved)
        place.symlink_to(moved) if plant is link else os.mkfifo(place)
    before = sorted(tmp_path.rglob("*"))
    if what == "root":
        with pytest.raises(SpoolError):
            Spool(site.root)
        return
    outcome = site.deliver()
    assert outcome.raised == []
    assert outcome.values.get("c") == site.whole
    assert "a" not in outcome.values
    assert outcome.said or plant in (link, pipe), "a link is no folder of the spool, and ignored"
    kept = [path for path in before if path.is_relative_to(tmp_path / "moved")]
    assert all(path.exists() for path in kept)
    if what == "run":
        with pytest.raises(SpoolError):
            site.spool.add_producer(this_producer(RUN, URI, 0))


# producer.json under a checksum that matches.

NESTED: dict[str, Any] = {}
for _ in range(400):
    NESTED = {"deeper": NESTED}

CRAFTED: dict[str, dict[str, Any]] = {
    **{
        f"{name} {value!r}"[:40]: {name: value}
        for name in ("run_id", "tracking_uri", "host", "pid", "start_ms", "rank", "delivery")
        for value in (None, [], {"a": 1}, 1.5, "x" * 60000, 10**4000)
    },
    **{
        f"uri {uri!r}"[:40]: {"tracking_uri": uri}
        for uri in ("", "\0", "://", "http://[::1", "file:///\0", "\ud800", "a\nb", "$(touch x)")
    },
    **{
        f"run {run_id!r}"[:40]: {"run_id": run_id}
        for run_id in ("", "../../x", "\0", "\ud800", "a\nb", "$(touch x)")
    },
    **{
        f"settings {settings!r}"[:60]: {"settings": settings}
        for settings in (
            [],
            "linger_s",
            NESTED,
            {"linger_s": "0"},
            {"linger_s": float("nan")},
            {"linger_s": float("inf")},
            {"linger_s": -1},
            {"linger_s": []},
            {"max_batch_size": 0},
            {"max_batch_size": 10**4000},
            {"max_batch_size": True},
            {"max_in_flight": 10**9},
            {"max_in_flight": 1.5},
            {"request_timeout_s": 0},
            {"spool_dir": "/etc"},
            {"delivery": "inline"},
            {"unheard of": 1},
        )
    },
    "experiment": {"experiment": ["x"]},
    "rank -1": {"rank": -1, "local_rank": 10**30},
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_description(site: Site, case: str) -> None:
    """Whatever a producer.json says with a checksum that matches, it harms nobody else, and is
    delivered or reported."""
    path = site.attacked / "producer.json"
    said = json.loads(path.read_text())
    said.pop("checksum")
    path.write_bytes(ProducerInfo(**{**said, **CRAFTED[case]}).to_json())
    outcome = site.deliver()
    assert outcome.raised == []
    site.assert_others_whole(outcome)
    assert outcome.values.get("a") == site.whole or outcome.said


@pytest.mark.parametrize("seconds", [1e10, 1e300])
def test_no_description_makes_requests_impossible(seconds: float, tmp_path: Path) -> None:
    """A request_timeout_s that no socket takes is refused, or requests work with it: else one
    producer's description would hold up a whole run."""
    with HttpServer() as server:
        try:
            settings = Settings(
                spool_dir=tmp_path / "spool", request_timeout_s=seconds, delivery="thread"
            )
        except FlowbufferError:
            return
        logger = MetricLogger(RUN, tracking_uri=server.uri, settings=settings)
        try:
            logger.log_metric("loss", 1.0).wait(PATIENCE_S)
        finally:
            logger.close(0)


# Sizes.


def sparse(path: Path) -> None:
    """Make it 1 GiB of nothing, after what is there."""
    with path.open("ab") as file:
        file.truncate(1 << 30)


@pytest.mark.parametrize("name", FILES)
def test_a_sparse_file_of_1_gib(site: Site, name: str) -> None:
    """Memory is bounded whatever the size of a file in the spool, for the collector and for
    whoever looks."""
    (site.attacked / name).touch(mode=0o600)
    sparse(site.attacked / name)
    tracemalloc.start()
    try:
        outcome = site.deliver()
        if site.attacked.exists():
            tally(site.attacked)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    site.assert_others_whole(outcome)
    assert peak < 320 * MIB, f"{peak // MIB} MiB; of keys 256 MiB are allowed"


@pytest.mark.parametrize("name", ["delivery.json", "parked.json", "rejected.jsonl"])
@pytest.mark.parametrize("content", [b"[" * MIB, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe"])
def test_nested_json(site: Site, name: str, content: bytes) -> None:
    """JSON that no parser likes is no obstacle, neither to delivery nor to whoever looks."""
    (site.attacked / name).write_bytes(content)
    tally(site.attacked)
    outcome = site.deliver()
    site.assert_others_whole(outcome)
    assert outcome.values["a"] == site.whole


# Header fields of a living producer.


@pytest.mark.parametrize(
    ("offset", "number"),
    [
        (layout.WANTED_OFFSET, 0xFFFFFFFF),
        (layout.CLOSED_OFFSET, 0xFFFFFFFF),
        (layout.CLOSED_OFFSET, 1),
        (layout.CLOSED_OFFSET + 4, 0xFFFFFFFF),
    ],
    ids=["wanted", "closed", "closed at 0", "outcome"],
)
def test_header_fields_of_a_living_producer(tmp_path: Path, offset: int, number: int) -> None:
    """No header field that changes while a producer lives makes the collector lose one of its
    later points, or keep it busy when nothing comes."""
    clock, transport = ManualClock(), FakeTransport()
    settings = Settings(spool_dir=tmp_path / "site", delivery="inline", linger_s=0)
    spool = Spool(tmp_path / "site")
    directory = spool.add_producer(this_producer(RUN, URI, 0))
    producer = Producer(directory, spool, settings, clock, lambda: None, segment_slots=(8, 8))
    collector = Collector(spool, settings, clock, THREAD, lambda *_: transport)
    collector.add(directory.path, URI)
    producer.append("loss", 0.0)
    with (directory.path / "00000000.slots").open("r+b") as file:
        file.seek(offset)
        file.write(number.to_bytes(4, "little"))
    busy = 0
    with listening() as said:
        for index in range(1, 30):
            for _ in range(4):
                busy += collector.step() == 0.0
                clock.turn(0.1)
            producer.append("loss", float(index))
        producer.close()
        for _ in range(200):
            collector.step()
            clock.turn(0.5)
    directory.lock.release()
    arrived = [value for _, _, value in transport.history(RUN, "loss")]
    assert arrived == [float(index) for index in range(30)] or said
    assert busy < 100


# Names.

RUN_IDS = [
    "../../x",
    "..",
    "/etc/x",
    "$(touch x)",
    "a\nb",
    "a\0b",
    "x" * 10_000,
    "ü\u202e",
    ".",
    "",
]


@pytest.mark.parametrize("run_id", [*RUN_IDS, "\ud800"], ids=lambda run_id: repr(run_id)[:20])
def test_hostile_run_ids(run_id: str, tmp_path: Path) -> None:
    """A run id is never a path or a command: it is refused, or its folder is in the spool and its
    points are delivered to a run of that name."""
    with HttpServer() as server:
        before = set(tmp_path.iterdir())
        settings = Settings(spool_dir=tmp_path / "spool", delivery="thread", linger_s=0)
        try:
            logger = MetricLogger(run_id, tracking_uri=server.uri, settings=settings)
        except (FlowbufferError, ValueError):
            assert run_id == "\ud800", "only this is no text"
            return
        with logger:
            assert len(list(tmp_path.glob("spool/*/*"))) == 1
            logger.log_metric("loss", 1.0).wait(PATIENCE_S)
        assert {batch["run_id"] for batch in server.batches} == {run_id}
        assert set(tmp_path.iterdir()) - before <= {tmp_path / "spool"}


@pytest.mark.parametrize(
    "key",
    ["../../x", "..", "/etc/x", "$(touch x)", "a\nb", "a\0b", "x" * 10_000, "", "a//b", "\ud800"],
    ids=lambda key: repr(key)[:20],
)
def test_hostile_keys(key: str, tmp_path: Path) -> None:
    """A key that MLflow would refuse is refused at the call, and nothing of it is stored."""
    settings = Settings(spool_dir=tmp_path / "spool", offline=True)
    with MetricLogger(RUN, settings=settings, tracking_uri=URI) as logger:
        for log in (
            lambda: logger.log_metric(key, 1.0),
            lambda: logger.log_metrics({key: 1.0}),
            lambda: logger.log_series(key, [1.0]),
        ):
            with pytest.raises(InvalidPoint):
                log()
        logger.log_metric("größe/μ", 1.0)
        (keys,) = tmp_path.glob("spool/*/*/keys")
        assert list(layout.key_frames(keys.read_bytes())) == [(0, "größe/μ".encode())]


# Noise.


def test_a_fuzzed_spool(tmp_path: Path, outside: Path) -> None:
    """300 times, random bytes in random places of random files of one producer: nothing is raised,
    memory is bounded, and all points of the other producers arrive."""
    random = Random(20)
    pristine = Site(tmp_path / "pristine")
    for name in ("carry", "delivery.json", "parked.json", "rejected.jsonl"):
        (pristine.attacked / name).touch(mode=0o600)
    pristine.attacked.joinpath("carry").write_bytes(layout.frame(1, bytes(20)))
    site = Site.__new__(Site)
    site.root = tmp_path / "fuzzed"
    tracemalloc.start()
    try:
        for number in range(300):
            shutil.rmtree(site.root, ignore_errors=True)
            shutil.copytree(pristine.root, site.root)
            attacked = site.root / pristine.attacked.relative_to(pristine.root)
            for path in random.sample(sorted(attacked.iterdir()), random.choice([1, 1, 2, 5])):
                path.write_bytes(fuzzed(random, path.read_bytes()))
            with untouched(outside):
                outcome = site.deliver(rounds=25)
            assert outcome.raised == [], (number, outcome.raised)
            assert outcome.values.get("b") == site.whole, (number, outcome.said)
            assert outcome.values.get("c") == site.whole, (number, outcome.said)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * MIB


def fuzzed(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice([1, 3, 30])):
        at = random.randrange(len(changed) + 1)
        noise = random.choice([random.randbytes(random.randrange(1, 40)), b"\xff" * 8, bytes(8)])
        match random.randrange(3):
            case 0:
                changed[at : at + len(noise)] = noise
            case 1:
                changed[at:at] = noise
            case _:
                del changed[at : at + len(noise)]
    return bytes(changed)


# A logger that lives.


@pytest.mark.parametrize("plant", [link, pipe, folder])
@pytest.mark.parametrize(
    "name",
    ["parked.json", "delivery.json", "rejected.jsonl", "carry", "00000001.slots", "00000000.slots"],
)
def test_a_logger_whose_files_are_replaced(
    name: str, plant: Plant, tmp_path: Path, outside: Path
) -> None:
    """In thread delivery a logger whose files are replaced under it goes on logging. What only
    tells how delivery is doing is done without; without a segment, who waits is told, with an
    error of flowbuffer; and its end neither fails nor hangs."""
    needed = name.endswith(".slots")
    with HttpServer(lambda _: (503, "later")) as server:
        settings = Settings(
            spool_dir=tmp_path / "spool", delivery="thread", linger_s=0, max_spool_bytes=1 << 20
        )
        logger = MetricLogger(RUN, tracking_uri=server.uri, settings=settings)
        try:
            handle = logger.log_metric("loss", 1.0)
            (own,) = tmp_path.glob("spool/*/*")
            plant(own / name, outside)
            with untouched(outside):
                for index in range(100):
                    logger.log_metric("loss", float(index))
                for look in (
                    logger.stats,
                    lambda: logger.flush(0.2),
                    lambda: handle.exception(0.2),
                    handle.done,
                ):
                    try:
                        look()
                    except WaitTimeout:
                        pass
                    except FlowbufferError:
                        if not needed:
                            raise
                server.answer = lambda _: (200, "{}")
                logger.close(0.5)
        finally:
            job_end.unwatch(logger)  # a test that fails is no reason for pytest's end to wait


# Real processes.


@dataclass
class HttpServer:
    """A tracking server that takes batches; `answer` decides, by the request's headers."""

    answer: Callable[[Any], tuple[int, str]] = lambda _: (200, "{}")
    batches: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)

    def __enter__(self) -> HttpServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, text = outer.answer(self.headers)
                outer.authorizations.append(self.headers["Authorization"])
                if status == 200:
                    outer.batches.append(body)
                content = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self.send_error(404)

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.uri = f"http://{self.host}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def values(self, key: str) -> list[float]:
        """Of one key, in the order of their times."""
        points = {
            (m["timestamp"], m["step"], m["value"])
            for batch in self.batches
            for m in batch["metrics"]
            if m["key"] == key
        }
        return [value for _, _, value in sorted(points)]


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer() as started:
        yield started


@dataclass
class Program:
    """A job of these tests: a process with a spool, and a collector process beside it."""

    folder: Path
    spool: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, code: str, uri: str, *arguments: str, **environment: str) -> Any:
        """`arguments`: of Python; by default the script, with the code in it."""
        self.folder.mkdir(exist_ok=True)
        script = self.folder / f"job{len(self.processes)}.py"
        script.write_text(
            "import os, sys\nfrom flowbuffer import MetricLogger\n" + textwrap.dedent(code)
        )
        process = subprocess.Popen(
            [sys.executable, *(arguments or [str(script)])],
            env={
                **os.environ,
                "MLFLOW_TRACKING_URI": uri,
                "FLOWBUFFER_SPOOL_DIR": str(self.spool),
                "RUN": RUN,
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def end(self, process: Any, timeout_s: float = PATIENCE_S) -> str:
        """Let it end; what it said."""
        out, err = process.communicate("end\n", timeout=timeout_s)
        assert process.returncode == 0, err
        return out + err


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Starts jobs with delivery="process"; none of them, and no collector, outlives the test."""
    monkeypatch.setenv("FLOWBUFFER_DELIVERY", "process")
    made = Program(tmp_path / "jobs", tmp_path / "spool")
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
    end_collector(made.spool)


def grep(spool: Path, *secrets: str) -> list[Path]:
    """The files under a spool with one of these in it, in any of the ways to write it."""
    written = [*secrets, *(b64encode(secret.encode()).decode().rstrip("=") for secret in secrets)]
    found = []
    for path in spool.rglob("*"):
        try:
            content = path.read_bytes() if path.is_file() else b""
        except FileNotFoundError:
            continue
        if any(secret.encode() in content for secret in written):
            found.append(path)
    return found


LOGS = """
    logger = MetricLogger(os.environ["RUN"])
    for index in range(100):
        logger.log_metric("loss", float(index))
    print("logged", flush=True)
    sys.stdin.readline()
"""

MARK = """
import os, sys
with open(os.environ["MARK"], "a") as file:
    file.write(f"{__file__} {sys.argv}\\n")
"""


def test_a_collector_process_and_a_spool_full_of_attacks(
    program: Program, server: HttpServer, tmp_path: Path, outside: Path
) -> None:
    """A collector process that meets all planted files and crafted descriptions at once lives on,
    delivers its job and every other producer, executes nothing, and leaves what is outside."""
    site = Site(program.spool, server.uri)
    for number, plant in enumerate([link, pipe, folder, open_to_all]):
        for name in FILES:
            path = site.add(f"p{number}", ATTACKED_RUN, server.uri)
            target = tmp_path / f"outside{number}"
            target.mkdir(exist_ok=True)
            plant(path / name, target)
    for case in ("run_id None", "uri '\\x00'", "uri '://'", "settings {'linger_s': '0'}"):
        path = site.add("p9", OTHER_RUN, server.uri) / "producer.json"
        said = json.loads(path.read_text())
        said.pop("checksum")
        path.write_bytes(ProducerInfo(**{**said, **CRAFTED[case]}).to_json())
    for place in (program.spool, site.attacked.parent):
        for module in ("flowbuffer", "mlflow", "sitecustomize", "numpy"):
            (place / f"{module}.py").write_text(MARK)
    job = program.start(LOGS, server.uri, MARK=str(outside / "made"))
    job.stdout.readline()
    pid = wait_until(lambda: collector_pid(program.spool))
    expected = [float(index) for index in range(100)]
    wait_until(lambda: server.values("loss") == expected)
    wait_until(lambda: server.values("b") == server.values("c") == site.whole)
    with Path(f"/proc/{pid}/status").open() as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak < 600 * 1024, f"{peak // 1024} MiB"
    assert collector_pid(program.spool) == pid, (program.spool / "collector.log").read_text()
    program.end(job)


@pytest.mark.parametrize("way", ["script", "-m", "-c"])
def test_no_module_beside_the_job_is_imported(
    way: str, program: Program, server: HttpServer, tmp_path: Path
) -> None:
    """The collector process imports nothing from the job's working directory that the job itself
    does not import."""
    here = tmp_path / "here"
    here.mkdir()
    mark = tmp_path / "mark"
    modules = ["sitecustomize", "usercustomize"]
    if way == "script":
        modules += ["flowbuffer", "mlflow", "numpy"]  # the job is elsewhere, and has its own
    for module in modules:
        (here / f"{module}.py").write_text(MARK)
    code = "import os, sys\nfrom flowbuffer import MetricLogger\n" + textwrap.dedent(LOGS)
    (here / "job_module.py").write_text(code)
    arguments = {"script": [], "-m": ["-m", "job_module"], "-c": ["-c", code]}[way]
    os.chdir(here)
    job = program.start(LOGS, server.uri, *arguments, MARK=str(mark))
    job.stdout.readline()
    wait_until(lambda: collector_pid(program.spool))
    wait_until(lambda: len(server.values("loss")) == 100)
    program.end(job)
    assert not mark.exists(), mark.read_text()


@pytest.mark.parametrize("plant", [link, pipe, open_to_all])
def test_a_planted_lock_of_the_collector_process(
    plant: Plant, program: Program, server: HttpServer, outside: Path
) -> None:
    """Without a collector process, because of what stands in the place of its lock, a job says so
    and delivers its points itself; once that is gone a collector process starts."""
    Spool(program.spool)
    plant(program.spool / "collector.lock", outside)
    with untouched(outside):
        job = program.start(
            LOGS + "    logger.flush()\n    print('flushed', flush=True)\n"
            "    sys.stdin.readline()\n",
            server.uri,
        )
        job.stdout.readline()
        job.stdin.write("flush\n")
        job.stdin.flush()
        assert job.stdout.readline() == "flushed\n"
        assert len(server.values("loss")) == 100
        assert collector_pid(program.spool) is None
        (program.spool / "collector.lock").unlink()
        wait_until(lambda: collector_pid(program.spool))
        assert "no collector process can be started" in program.end(job)


@pytest.mark.parametrize("plant", [link, pipe, open_to_all])
def test_a_planted_log_of_the_collector_process(
    plant: Plant, program: Program, server: HttpServer, outside: Path
) -> None:
    """What stands in the place of its log is not written to, and keeps no collector from work."""
    Spool(program.spool)
    plant(program.spool / "collector.log", outside)
    with untouched(outside):
        job = program.start(LOGS + "    sys.stdin.readline()\n", server.uri)
        job.stdout.readline()
        wait_until(lambda: len(server.values("loss")) == 100)
        assert collector_pid(program.spool) is not None
        program.end(job)


@pytest.mark.parametrize("content", ["0", "-1", "9" * 18, "9" * 30, "x", "1e3", ""])
def test_a_planted_pid(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever collector.lock says, waking the collector process raises nothing, and signals no
    group of processes."""
    signalled: list[int] = []

    def kill(pid: int, _: int) -> None:
        if pid >= 1 << 31:
            raise OverflowError("signed integer is greater than maximum")  # as os.kill does
        signalled.append(pid)

    monkeypatch.setattr(os, "kill", kill)
    Spool(tmp_path / "spool")
    (tmp_path / "spool" / "collector.lock").write_text(content)
    wake_collector(tmp_path / "spool")
    assert all(pid > 0 for pid in signalled)


def test_everything_is_private_with_umask_0(tmp_path: Path) -> None:
    """All files that flowbuffer makes in a spool are 0600 and all folders 0700, whatever the
    umask."""
    before = os.umask(0)
    try:
        made = Site(tmp_path / "state" / "flowbuffer" / "spool")
        made.deliver(lambda request: RejectedError("no") if 3.0 in request.values else None)
        other = Site(tmp_path / "gone")
        other.deliver(lambda _: RunGoneError("gone"), rounds=3)
    finally:
        os.umask(before)
    names = {path.name for path in tmp_path.rglob("*")}
    assert names >= {"rejected.jsonl", "parked.json", "delivery.json", "reader.lock", "keys"}
    assert_private(tmp_path / "gone")
    assert_private(tmp_path / "state" / "flowbuffer" / "spool")


def test_folders_above_the_spool_are_private(tmp_path: Path) -> None:
    """The folders that are made for a spool to be in are 0700, too: who may write to them could
    put another spool in its place."""
    before = os.umask(0)
    try:
        Spool(tmp_path / "state" / "flowbuffer" / "spool")
    finally:
        os.umask(before)
    assert_private(tmp_path / "state")


def assert_private(root: Path) -> None:
    for path in [root, *root.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path} has {mode:04o}"


def test_a_job_with_umask_0(program: Program) -> None:
    """The same for a job and its collector process, while nothing can be delivered."""
    job = program.start(
        "    os.umask(0)\n" + LOGS, "http://127.0.0.1:9", FLOWBUFFER_SHUTDOWN_TIMEOUT_S="0"
    )
    job.stdout.readline()
    wait_until(lambda: list(program.spool.glob("*/*/delivery.json")))
    assert (program.spool / "collector.log").exists()
    assert_private(program.spool)
    program.end(job)


# Credentials.

USER, PASSWORD, TOKEN = "somebody", "pA55w0rd-never-written", "t0ken-never-written"
BASIC = "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.mark.parametrize("way", ["password", "token", "uri"])
def test_credentials_are_not_written(way: str, program: Program, server: HttpServer) -> None:
    """Points arrive with the job's credentials, and nothing in the spool has a part of them: not
    while they wait for a server that is gone or echoes what it was sent, and not on the command
    line of the collector process."""
    environment = {
        "password": {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD},
        "token": {"MLFLOW_TRACKING_TOKEN": TOKEN},
        "uri": {},
    }[way]
    secrets = (TOKEN,) if way == "token" else (PASSWORD, BASIC.removeprefix("Basic "))
    uri = server.uri if way != "uri" else f"http://{USER}:{PASSWORD}@{server.host}"
    port = server._server.server_address[1]
    server.__exit__()  # gone at first
    job = program.start(LOGS, uri, **environment)
    job.stdout.readline()
    note = wait_until(lambda: next(program.spool.glob("*/*/delivery.json"), None))
    wait_until(lambda: json.loads(note.read_text())["last_error"])
    while_gone = grep(program.spool, *secrets)
    pid = wait_until(lambda: collector_pid(program.spool))
    command = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True)
    assert not any(secret.encode() in command.stdout for secret in secrets)
    restarted = HttpServer(
        lambda headers: (500, f"not with {headers['Authorization']}, that is {secrets[0]}")
    )
    with at_port(restarted, port):
        wait_until(lambda: len(restarted.authorizations) >= 2)
        wait_until(lambda: "500" in json.loads(note.read_text())["last_error"])
        while_echoed = grep(program.spool, *secrets)
        restarted.answer = lambda _: (200, "{}")
        program.end(job)
        assert len(restarted.values("loss")) == 100
        expected = f"Bearer {TOKEN}" if way == "token" else BASIC
        assert set(restarted.authorizations) == {expected}
    assert grep(program.spool, *secrets) == while_gone == while_echoed == []


@contextmanager
def at_port(server: HttpServer, port: int) -> Iterator[None]:
    """Start it on a port that was another one's."""
    original = ThreadingHTTPServer.server_bind

    def bind(self: Any) -> None:
        self.server_address = ("127.0.0.1", port)
        original(self)

    ThreadingHTTPServer.server_bind = bind  # type: ignore[method-assign]
    try:
        server.__enter__()
    finally:
        ThreadingHTTPServer.server_bind = original  # type: ignore[method-assign]
    try:
        yield
    finally:
        server.__exit__()


@pytest.mark.parametrize(
    "uri",
    [
        f"http://{USER}:{PASSWORD}@127.0.0.1:1/mlflow",
        f"postgresql://{USER}:{PASSWORD}@127.0.0.1:1/db?connect_timeout=1",
        f"postgresql://{USER}:a/{PASSWORD}@127.0.0.1:1/db",
        f"postgresql+psycopg2://{USER}:a?{PASSWORD}@127.0.0.1:1/db",
        f"mysql+pymysql://{USER}:a#{PASSWORD}@127.0.0.1:1/db",
        f"postgresql://127.0.0.1:1/db?user={USER}&password={PASSWORD}",
        f"mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BUID%3D{USER}%3BPWD%3D{PASSWORD}",
    ],
)
def test_no_uri_is_written_with_its_password(uri: str, tmp_path: Path) -> None:
    """Whichever way a tracking URI that MLflow takes has a password, the spool has none."""
    settings = Settings(spool_dir=tmp_path / "spool", offline=True)
    with MetricLogger(RUN, tracking_uri=uri, settings=settings) as logger:
        logger.log_metric("loss", 1.0)
        assert grep(tmp_path, PASSWORD) == []


def test_a_fresh_token_takes_over(program: Program, server: HttpServer) -> None:
    """A collector process whose token has expired makes room for that of a later job, which
    delivers the points of both; what the server echoes of the tokens is not written."""
    fresh, expired = f"fresh-{TOKEN}", f"expired-{TOKEN}"

    def answer(headers: Any) -> tuple[int, str]:
        said = headers["Authorization"]
        return (200, "{}") if said == f"Bearer {fresh}" else (401, f"refused: {said}")

    server.answer = answer
    first = program.start(LOGS, server.uri, MLFLOW_TRACKING_TOKEN=expired)
    first.stdout.readline()
    wait_until(lambda: f"Bearer {expired}" in server.authorizations)
    old = wait_until(lambda: collector_pid(program.spool))
    second = program.start(
        LOGS.replace("loss", "second"), server.uri, MLFLOW_TRACKING_TOKEN=fresh, RUN=OTHER_RUN
    )
    second.stdout.readline()
    expected = [float(index) for index in range(100)]
    wait_until(lambda: server.values("second") == expected)
    wait_until(lambda: server.values("loss") == expected)
    assert collector_pid(program.spool) != old
    assert grep(program.spool, TOKEN) == []
    for job in (first, second):
        program.end(job)
