"""Parameters, tags, and metrics about a model or a dataset, in the spool and on their way."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import mlflow
import pytest

from flowbuffer import DeliveryError, Handle, InvalidPoint, MetricLogger, Settings
from flowbuffer.backends.mlflow_transport import Request
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.policies import THREAD
from flowbuffer.commands import cli
from flowbuffer.errors import RejectedError, RetriableError, SpoolFull, TransportError
from flowbuffer.metric_key import MetricKey
from flowbuffer.spool import dead_letters, layout
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.layout import PARAM, TAG
from flowbuffer.spool.outcomes import Outcome as Became
from flowbuffer.spool.outcomes import slot_outcomes
from flowbuffer.spool.producer_info import this_producer
from flowbuffer.spool.tally import tally
from flowbuffer.spool.writing.places import Places
from flowbuffer.spool.writing.producer import Producer
from flowbuffer.testing import FakeTransport, ManualClock
from support.backends import client, history, make_run
from support.listening import listening
from support.small_spool import RUN, SmallSpool
from support.waiting import PATIENCE_S

URI = "https://my_host/mlflow"
ABOUT = MetricKey("loss", "m-0123", "", "")


def states(places: Places) -> list[Became]:
    """Of the slots of a call."""
    return [
        slot_outcomes(segment.path, [offset])[0]
        for segment, offset in zip(places[::2], places[1::2], strict=True)
    ]


def step(spool: SmallSpool, times: int = 4) -> None:
    for _ in range(times):
        spool.sender.step(hurry=True)


def of_run(texts: dict[tuple[str, str], str]) -> dict[str, str]:
    return {key: text for (run_id, key), text in texts.items() if run_id == RUN}


# The sender, step by step.


@pytest.mark.parametrize("together", [True, False], ids=["one backlog", "one by one"])
def test_the_first_value_of_a_parameter_stays(tmp_path: Path, together: bool) -> None:
    """Of a parameter's values the first one is stored, and each other one is a dead letter of its
    own, whose handle fails; the same value again is no conflict."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64)
    calls = []
    for value in ("first", "second", "first", "third"):
        calls.append(spool.producer.append_texts(PARAM, {"p": value}))
        if not together:
            spool.deliver()
    spool.deliver()
    assert of_run(spool.transport.params) == {"p": "first"}
    assert [states(places) for places in calls] == [
        [Became.DELIVERED],
        [Became.REJECTED],
        [Became.DELIVERED],
        [Became.REJECTED],
    ]
    letters = list(dead_letters.read(spool.directory.path))
    assert [(one.kind, one.key, one.value) for one in letters] == [
        ("param", "p", "second"),
        ("param", "p", "third"),
    ]
    error = Handle(calls[1]).exception(0)
    assert isinstance(error, DeliveryError)
    assert "Changing param values" in str(error)
    assert Handle(calls[0]).exception(0) is None


def test_a_conflict_rejects_nothing_else(tmp_path: Path) -> None:
    """A parameter that conflicts with what another process logged is one dead letter; the other
    parameters and tags of its request are stored."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=256)
    spool.transport.params[RUN, "p37"] = "of another process"
    spool.producer.append_texts(PARAM, {f"p{n}": str(n) for n in range(80)})
    spool.producer.append_texts(TAG, {f"t{n}": str(n) for n in range(80)})
    spool.deliver()
    expected = {f"p{n}": str(n) for n in range(80)} | {"p37": "of another process"}
    assert of_run(spool.transport.params) == expected
    assert of_run(spool.transport.tags) == {f"t{n}": str(n) for n in range(80)}
    assert [letter.key for letter in dead_letters.read(spool.directory.path)] == ["p37"]
    assert spool.stream.reader.rejected == 1
    assert len(spool.transport.requests) <= 2 + 2 * 7 + 2


def test_the_last_value_of_a_tag_stays(tmp_path: Path) -> None:
    """A tag has the last value that was set, whether its values go in one request or in several,
    and every call of them is delivered."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64)
    calls = [spool.producer.append_texts(TAG, {"t": str(value)}) for value in range(10)]
    spool.deliver()
    assert of_run(spool.transport.tags) == {"t": "9"}
    assert [list(request.tags) for request in spool.transport.requests] == [[("t", "9")]]
    assert all(states(places) == [Became.DELIVERED] for places in calls)
    for value in ("back", "0"):
        spool.producer.append_texts(TAG, {"t": value})
        spool.deliver()
    assert of_run(spool.transport.tags) == {"t": "0"}
    assert not list(dead_letters.read(spool.directory.path))


def test_a_hundred_in_a_request(tmp_path: Path) -> None:
    """Parameters and tags go 100 at a time, apart from metrics, and no request has a key twice."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=2000)
    for number in range(150):
        spool.producer.append_texts(PARAM, {f"k{number}": number, f"twice{number % 7}": "same"})
        spool.producer.append_texts(TAG, {f"k{number}": f"tag {number}"})
        spool.producer.append(f"k{number}", float(number))
    spool.deliver()
    texts = [request for request in spool.transport.requests if not request.keys]
    metrics = [request for request in spool.transport.requests if request.keys]
    assert all(not request.params and not request.tags for request in metrics)
    assert sum(len(request) for request in metrics) == 150
    for request in texts:
        assert 0 < len(request) <= 100
        for pairs in (request.params, request.tags):
            assert len({key for key, _ in pairs}) == len(pairs)
    expected = {f"k{number}": str(number) for number in range(150)}
    assert of_run(spool.transport.params) == expected | {f"twice{n}": "same" for n in range(7)}
    assert of_run(spool.transport.tags) == {f"k{n}": f"tag {n}" for n in range(150)}
    assert spool.values("k149") == [149.0]


def test_texts_and_metrics_of_one_name_are_apart(tmp_path: Path) -> None:
    """A parameter, a tag and a metric may have one name, and one model's metric, too."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64)
    spool.producer.append("loss", 1.0)
    spool.producer.append_texts(PARAM, {"loss": "a parameter"})
    spool.producer.append_texts(TAG, {"loss": "a tag"})
    spool.producer.append(ABOUT, 2.0)
    spool.producer.append_texts(PARAM, {"loss": "a parameter"})
    spool.deliver()
    assert of_run(spool.transport.params) == {"loss": "a parameter"}
    assert of_run(spool.transport.tags) == {"loss": "a tag"}
    assert spool.values("loss") == [1.0]
    assert spool.values("loss\0m-0123\0\0") == [2.0]


def test_two_producers_keep_their_order(tmp_path: Path) -> None:
    """P2: while a tag of one process is on its way, no later one of another process overtakes it,
    and each process's values go in the order of its calls."""
    transport = FakeTransport(max_in_flight=4, at_once=False)
    spool = SmallSpool(tmp_path / "spool", transport, segment_slots=64)
    directory = spool.spool.add_producer(this_producer(RUN, "fake://", 0))
    other = spool.new_producer(directory)
    spool.add(directory, alive=True)
    spool.producer.append_texts(TAG, {"t": "a1"})
    spool.producer.append_texts(PARAM, {"p": "a"})
    step(spool)
    assert len(transport.waiting) == 1
    other.append_texts(TAG, {"t": "b1"})
    other.append_texts(TAG, {"t": "b2"})
    other.append_texts(PARAM, {"p": "b"})
    other.append_texts(TAG, {"mine": "b"})
    step(spool)
    assert [dict(request.tags) for request, _ in transport.waiting] == [{"t": "a1"}, {"mine": "b"}]
    while transport.waiting:
        transport.answer(len(transport.waiting) - 1)  # the last one first
        step(spool)
    sent = [dict(request.tags)["t"] for request in transport.requests if "t" in dict(request.tags)]
    assert sent[0] == "a1"
    assert set(sent[1:]) == {"b2"}  # perhaps twice, because the request had a conflict as well
    assert of_run(transport.tags) == {"t": "b2", "mine": "b"}
    assert of_run(transport.params) == {"p": "a"}
    assert [one.value for one in dead_letters.read(directory.path)] == ["b"]
    assert not list(dead_letters.read(spool.directory.path))


def test_a_restart_sends_the_same(tmp_path: Path) -> None:
    """P4: wherever a collector died, the same parameters, tags and rows are there in the end, and
    what was stored already is no conflict."""
    spool = SmallSpool(tmp_path / "spool", FakeTransport(at_once=False), segment_slots=8)
    for value in range(20):
        spool.producer.append_texts(PARAM, {f"p{value % 5}": f"first {value % 5}"})
        spool.producer.append_texts(TAG, {f"t{value % 3}": str(value)})
        spool.producer.append(("loss", ABOUT)[value % 2], float(-value))
    for died_after in range(12):
        step(spool, 1)
        while spool.transport.waiting:
            spool.transport.answer(lose=died_after % 2 == 0)
        if died_after % 3:
            spool.sender.step()
        spool.new_sender(alive=True)
    spool.deliver()
    assert of_run(spool.transport.params) == {f"p{n}": f"first {n}" for n in range(5)}
    assert of_run(spool.transport.tags) == {"t0": "18", "t1": "19", "t2": "17"}
    rows = [*spool.history("loss"), *spool.history("loss\0m-0123\0\0")]
    assert [value for *_, value in sorted(rows)] == [float(-value) for value in range(20)]
    assert spool.stream.reader.rejected == 0


def test_a_request_that_failed_is_sent_again(tmp_path: Path) -> None:
    """P4: what failed is sent again, the same to the bit, before a later value of its keys."""
    spool = SmallSpool(tmp_path / "spool")
    failures: Iterator[TransportError] = iter([RetriableError("503"), RetriableError("503")])
    spool.transport.decide = lambda _: next(failures, None)
    spool.producer.append_texts(PARAM, {"p": "1"})
    spool.producer.append_texts(TAG, {"t": "old"})
    step(spool)
    spool.producer.append_texts(TAG, {"t": "new"})
    spool.deliver()
    first, second, third, last = spool.transport.requests
    assert first == second == third
    assert (dict(last.params), dict(last.tags)) == ({}, {"t": "new"})
    assert of_run(spool.transport.tags) == {"t": "new"}


ABOUTS = [
    "loss",
    ABOUT,
    MetricKey("loss", "m-9", "", ""),
    MetricKey("loss", "", "data", "a1b2"),
    MetricKey("loss", "m-9", "data", "a1b2"),
]


def told(times: dict[str, list[tuple[int, int, float]]]) -> list[float]:
    """The values of all histories together, as MLflow sorts the history of one metric."""
    return [value for *_, value in sorted(row for rows in times.values() for row in rows)]


@pytest.mark.parametrize("restarts", [False, True], ids=["at once", "with restarts"])
def test_ties_of_one_metric_about_several_things(tmp_path: Path, restarts: bool) -> None:
    """P2: MLflow keeps one history of a metric, whatever model or dataset its points are about, so
    they come back in the order of the calls, also after a restart and deleted segments."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=4)
    for value in range(30):  # one step, one millisecond
        spool.producer.append(ABOUTS[value % len(ABOUTS)], float(-value))
        spool.producer.append_texts(TAG, {"loss": str(value)})
        if restarts and value % 4 == 3:
            spool.deliver()
            spool.sender.step()
            spool.new_sender(alive=True)
    spool.deliver()
    keys = {key for _, key, *_ in spool.transport.rows}
    assert len(keys) == len(ABOUTS)
    assert told({key: spool.history(key) for key in keys}) == [float(-value) for value in range(30)]


def test_other_metrics_do_not_tie(tmp_path: Path) -> None:
    """P3: points of different metrics, and texts between them, do not move one another."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64)
    spool.producer.append_texts(PARAM, {"loss": "text"})
    for key in ("loss", MetricKey("acc", "m-0123", "", ""), MetricKey("err", "m-0123", "", "")):
        spool.producer.append(key, 1.0)
        spool.producer.append_texts(TAG, {"loss": "text"})
    spool.deliver()
    assert len({time for _, _, time, *_ in spool.transport.rows}) == 1
    assert spool.stream.ties.moved == 0


# Dead letters.


def deliver(root: Path, transport: FakeTransport) -> None:
    """What a collector does with what dead producers left."""
    clock = ManualClock()
    collector = Collector(
        Spool(root),
        Settings(spool_dir=root, linger_s=0),
        clock,
        THREAD,
        lambda *_: transport,
    )
    for _ in range(20):
        collector.step(hurry=True)
        clock.turn(1.0)


def left(root: Path, log: Callable[[Producer], object], segment_slots: int = 8) -> Path:
    """The folder of a producer that was killed after `log`."""
    spool = Spool(root)
    directory = spool.add_producer(this_producer(RUN, URI, 0))
    slots = (segment_slots, segment_slots)
    producer = Producer(
        directory,
        spool,
        Settings(spool_dir=root),
        ManualClock(),
        lambda: None,
        segment_slots=slots,
    )
    log(producer)
    producer.close()
    directory.lock.release()
    return directory.path


def log_each_kind(producer: Producer) -> None:
    producer.append("loss", 0.5, 3)
    producer.append(MetricKey("loss", "m-0123", "däta", "a1b2"), float("nan"), 4)
    producer.append_texts(PARAM, {"p é": "ä value\nof 2 lines"})
    producer.append_texts(TAG, {"t": ""})


def test_rejected_retry_sends_each_kind_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`flowbuffer rejected` lists what was refused with its kind, and --retry puts each of them
    into the spool again as it was: parameters, tags, and what a metric is about."""
    root = tmp_path / "spool"
    left(root, log_each_kind)
    deliver(root, FakeTransport(answer=lambda _: RejectedError("not today")))
    assert cli.main(["rejected", "--spool", str(root), "--json"]) == 0
    letters = json.loads(capsys.readouterr().out)
    assert {(one["kind"], one["key"], one["value"], one["reason"]) for one in letters} == {
        ("metric", "loss", 0.5, "not today"),
        ("metric", "loss", "nan", "not today"),
        ("param", "p é", "ä value\nof 2 lines", "not today"),
        ("tag", "t", "", "not today"),
    }
    assert len(letters) == 4
    assert cli.main(["rejected", "--spool", str(root), "--retry", "--json"]) == 0
    transport = FakeTransport()
    deliver(root, transport)
    assert of_run(transport.params) == {"p é": "ä value\nof 2 lines"}
    assert of_run(transport.tags) == {"t": ""}
    keys = {(key, step_, value) for _, key, _, step_, value in transport.rows}
    assert keys == {("loss", 3, "0.5"), ("loss\0m-0123\0däta\0a1b2", 4, "nan")}
    assert not list(root.glob("*/*"))


def test_a_conflict_that_is_tried_again_stays_a_conflict(tmp_path: Path) -> None:
    """A parameter that was refused for its value is refused again, with one dead letter."""
    root = tmp_path / "spool"
    left(root, lambda producer: producer.append_texts(PARAM, {"p": "mine"}))
    transport = FakeTransport()
    transport.params[RUN, "p"] = "theirs"
    for _ in range(2):
        deliver(root, transport)
        (folder,) = root.glob("*/*")
        assert [one.value for one in dead_letters.read(folder)] == ["mine"]
        assert cli.main(["rejected", "--spool", str(root), "--retry", "--json"]) == 0
    assert of_run(transport.params) == {"p": "theirs"}


# Damage.


@dataclass
class Outcome:
    """What came of a spool, and whether somebody was told of a loss."""

    params: dict[str, str]
    tags: dict[str, str]
    rows: set[tuple[str, int, str]]  # key, step, value
    said: list[str]
    letters: int

    @property
    def texts(self) -> set[tuple[str, str, str]]:
        return {("param", *item) for item in self.params.items()} | {
            ("tag", *item) for item in self.tags.items()
        }


@dataclass
class Sample:
    """The spool of a producer that was killed, of which damaged copies are delivered."""

    root: Path
    files: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folder = left(self.root / "made", self.log, segment_slots=16)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}

    @staticmethod
    def log(producer: Producer) -> None:
        producer.append_texts(PARAM, {"lr": "0.1", "näme": "välue"})
        producer.append("loss", 0.25, 1)
        producer.append(MetricKey("loss", "m-0123", "data", "a1b2"), 0.5, 2)
        producer.append_texts(TAG, {"note": "long " * 40, "empty": ""})
        producer.append_texts(PARAM, {"last": "one"})

    def deliver(self, **changed: bytes) -> Outcome:
        """Deliver a copy in which these files, by the last part of their names, are others."""
        work = self.root / "work"
        shutil.rmtree(work, ignore_errors=True)
        folder = work / RUN / "host-1-abcabcabcabc"
        for level in (work, folder.parent, folder):
            level.mkdir(mode=0o700)
        for name, content in self.files.items():
            (folder / name).write_bytes(changed.get(name.rpartition(".")[2], content))
        transport = FakeTransport()
        with listening() as said:
            deliver(work, transport)
        counted = tally(folder)
        assert counted is None or counted.pending == 0
        return Outcome(
            of_run(transport.params),
            of_run(transport.tags),
            {(key, step_, value) for _, key, _, step_, value in transport.rows},
            said,
            len(list(dead_letters.read(folder))) if folder.exists() else 0,
        )


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(tmp_path_factory.mktemp("texts"))


def flips(content: bytes, name: str) -> Iterator[tuple[int, bytes]]:
    """(position, content) with one seeded bit of each byte changed."""
    pick = Random(name)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << pick.randrange(8)
        yield position, bytes(changed)


WHOLE = Outcome(
    {"lr": "0.1", "näme": "välue", "last": "one"},
    {"note": "long " * 40, "empty": ""},
    {("loss", 1, "0.25"), ("loss\0m-0123\0data\0a1b2", 2, "0.5")},
    [],
    0,
)


def test_an_undamaged_sample_arrives(sample: Sample) -> None:
    """What a killed producer left arrives whole, and nothing is reported."""
    assert sample.deliver() == WHOLE


@pytest.mark.parametrize("name", ["keys", "journal"])
def test_a_damaged_text_is_a_dead_letter(sample: Sample, name: str) -> None:
    """No changed byte of the key table or of the journal, and no end of the journal that is cut
    off, makes a wrong text or metric or holds up the others, and each missing one is reported."""
    content = next(data for file, data in sample.files.items() if file.endswith(name))
    # A disk, or a crash, cuts off the end of a file; the cuts of a key table are metrics' too, and
    # in test_damage.
    cuts = [content[:length] for length in range(0, len(content), 7)]
    for changed in [*cuts, *(one for _, one in flips(content, name))]:
        outcome = sample.deliver(**{name: changed})
        assert outcome.texts <= WHOLE.texts
        assert outcome.rows <= WHOLE.rows
        if name == "journal":
            assert outcome.rows == WHOLE.rows
        arrived = len(outcome.texts) + len(outcome.rows)
        assert outcome.letters == len(WHOLE.texts) + len(WHOLE.rows) - arrived > 0
        assert outcome.said


def test_one_damaged_frame_harms_no_other(sample: Sample) -> None:
    """A byte that is changed in one text's frame costs that text alone."""
    content = next(data for file, data in sample.files.items() if file.endswith("journal"))
    at = content.index(b"0.1")
    outcome = sample.deliver(journal=content[:at] + b"\xff" + content[at + 1 :])
    assert outcome.texts == WHOLE.texts - {("param", "lr", "0.1")}
    assert outcome.rows == WHOLE.rows
    assert outcome.letters == 1


def test_a_missing_journal(sample: Sample) -> None:
    """Without its journal every text is a dead letter, and every metric arrives."""
    outcome = sample.deliver(journal=b"")
    assert (outcome.texts, outcome.rows) == (set(), WHOLE.rows)
    assert outcome.letters == len(WHOLE.texts)


def test_a_damaged_slot_of_a_text_harms_no_other(sample: Sample) -> None:
    """Damage to one slot changes no other text, and a text that it suppresses is reported."""
    content = next(data for file, data in sample.files.items() if file.endswith("slots"))
    head, slots = content[: layout.SEGMENT_HEADER_SIZE], content[layout.SEGMENT_HEADER_SIZE :]
    in_slots: list[set[tuple[str, str, str]]] = []
    for slot in range(7):
        changed = bytearray(slots)
        changed[slot * layout.SLOT_SIZE + layout.STATE_OFFSET] = layout.VOID
        in_slots.append(WHOLE.texts - sample.deliver(slots=head + changed).texts)
    assert sum(map(len, in_slots)) == len(WHOLE.texts)
    for position, changed_slots in flips(slots[: 7 * layout.SLOT_SIZE], "slots"):
        outcome = sample.deliver(slots=head + changed_slots + slots[7 * layout.SLOT_SIZE :])
        slot = position // layout.SLOT_SIZE
        assert outcome.texts >= WHOLE.texts - in_slots[slot], position
        assert len(outcome.texts - WHOLE.texts) <= len(in_slots[slot]), position
        if len(outcome.texts) + len(outcome.rows) < len(WHOLE.texts) + len(WHOLE.rows):
            assert outcome.said, position
            assert outcome.letters, position


def test_what_was_settled_stays_settled(tmp_path: Path) -> None:
    """A text that was delivered, or is a dead letter already, is no second dead letter when its
    journal is damaged afterwards."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64)
    spool.transport.params[RUN, "b"] = "taken"
    spool.producer.append_texts(PARAM, {"a": "1", "b": "2"})
    spool.deliver()
    assert len(list(dead_letters.read(spool.directory.path))) == 1
    (spool.directory.path / "00000000.journal").write_bytes(b"")
    spool.new_sender(alive=True)
    step(spool)
    assert len(list(dead_letters.read(spool.directory.path))) == 1
    assert (spool.stream.reader.delivered, spool.stream.reader.rejected) == (1, 1)


# A full disk.


@pytest.mark.parametrize("torn", [0, 5], ids=["nothing written", "half written"])
@pytest.mark.parametrize("file", ["keys", "journal"])
def test_no_room_for_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, torn: int
) -> None:
    """P6: a disk that fills up in the middle of a text raises at the call, leaves nothing half
    written, and takes the same text once there is room."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=64, when_full="raise")
    spool.producer.append_texts(PARAM, {"before": "1"})
    real = os.write
    written: list[int] = []

    def write(descriptor: int, data: bytes) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.endswith(file):
            return real(descriptor, data)
        written.append(descriptor)
        if torn and len(written) == 1:
            return real(descriptor, bytes(data)[:torn])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(SpoolFull, match="No space left"):
            spool.producer.append_texts(PARAM, {"p": "value"})
    assert written
    spool.clock.turn(1.0)
    places = spool.producer.append_texts(PARAM, {"p": "value"})
    spool.producer.append_texts(TAG, {"after": "2"})
    spool.deliver()
    assert of_run(spool.transport.params) == {"before": "1", "p": "value"}
    assert of_run(spool.transport.tags) == {"after": "2"}
    assert states(places) == [Became.DELIVERED]
    assert not list(dead_letters.read(spool.directory.path))
    assert spool.stream.reader.problems == []


def test_a_full_spool_takes_texts_again(tmp_path: Path) -> None:
    """P6: when_full="raise" raises while the spool is full, and no longer once it is delivered;
    what had returned arrives."""
    spool = SmallSpool(
        tmp_path / "spool", segment_slots=4096, max_spool_bytes=1 << 20, when_full="raise"
    )
    logged = 0
    error = None
    while error is None and logged < 1000:
        try:
            spool.producer.append_texts(TAG, {f"t{logged}": "x" * 8000})
            logged += 1
        except SpoolFull as full:
            error = full
    assert "max_spool_bytes" in str(error)
    assert 50 < logged < 150
    spool.deliver()
    spool.sender.step()
    spool.clock.turn(1.0)
    spool.producer.append_texts(TAG, {"more": "y"})
    spool.deliver()
    assert len(spool.transport.tags) == logged + 1


def test_texts_that_are_dropped_are_counted(tmp_path: Path) -> None:
    """P6: when_full="drop_newest" counts each parameter and tag that it drops, and their handles
    say so."""
    spool = SmallSpool(
        tmp_path / "spool", segment_slots=4096, max_spool_bytes=1 << 20, when_full="drop_newest"
    )
    handles = [
        Handle(spool.producer.append_texts(TAG, {f"t{number}": "x" * 8000}))
        for number in range(200)
    ]
    spool.deliver()
    failed = [handle for handle in handles if handle.exception(0) is not None]
    assert len(failed) == sum(spool.producer.dropped.values()) == 200 - len(spool.transport.tags)
    assert failed
    assert "full" in str(failed[0].exception(0))


def test_long_texts_free_the_disk(tmp_path: Path) -> None:
    """P6: texts that are delivered free the disk, however few slots they take."""
    spool = SmallSpool(tmp_path / "spool", segment_slots=4096, max_spool_bytes=1 << 20)
    for number in range(400):  # 3 MB in all
        spool.producer.append_texts(TAG, {"t": f"{number} " + "x" * 7900})
        if number % 10 == 0:
            spool.deliver()
            spool.sender.step()
    spool.deliver()
    assert of_run(spool.transport.tags)["t"].startswith("399 ")
    assert spool.spool.used_bytes() < 1 << 20


# MetricLogger, on real stores.


@pytest.fixture(params=["sqlite_uri", "server_sqlite"], ids=["sqlite", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    found = request.getfixturevalue(request.param)
    return str(getattr(found, "uri", found))


PARAMS: dict[str, Any] = {
    "lr": 0.1,
    "layers": [3, 4],
    "none": None,
    "yes": True,
    "näme with spaces/and.dots": "välue ✓\n",
    "long": "x" * 6000,
    "empty": "",
}
TAGS: dict[str, Any] = {"data": "v7", "mlflow.note.content": "a *note*", "n": 3, "long": "é" * 5000}


def test_what_is_logged_arrives(uri: str) -> None:
    """Parameters and tags arrive as their text, of every length and alphabet that MLflow takes,
    with every call waited for; what is there is what MLflow's own client stores."""
    run_id, own_id = make_run(uri), make_run(uri)
    with MetricLogger(run_id, tracking_uri=uri) as logger:
        logger.log_params(PARAMS).wait(PATIENCE_S)
        handle = logger.log_param("one", 1)
        logger.set_tag("data", "v6")
        logger.set_tags(TAGS).wait(PATIENCE_S)
        logger.set_tag("n", 4)
        handle.wait(PATIENCE_S)
        assert handle.done()
        report = logger.flush(PATIENCE_S)
        assert (report.delivered, report.rejected) == (len(PARAMS) + len(TAGS) + 3, 0)
    own = client(uri)
    for key, value in [*PARAMS.items(), ("one", 1)]:
        own.log_param(own_id, key, value)
    for key, value in [*TAGS.items(), ("n", 4)]:
        own.set_tag(own_id, key, value)
    found, expected = own.get_run(run_id).data, own.get_run(own_id).data
    assert found.params == expected.params
    assert found.params["layers"] == "[3, 4]"
    assert {key: found.tags[key] for key in TAGS} == {key: expected.tags[key] for key in TAGS}


def test_a_conflict_is_on_the_handle(uri: str) -> None:
    """Another value for a parameter is refused by the store: its handle fails with the reason, it
    is counted and logged, and what was logged around it is there."""
    run_id = make_run(uri)
    client(uri).log_param(run_id, "p", "theirs")
    with listening() as said, MetricLogger(run_id, tracking_uri=uri) as logger:
        around = logger.log_params({"a": 1, "b": 2})
        handle = logger.log_param("p", "mine")
        tag = logger.set_tag("t", "x")
        with pytest.raises(DeliveryError, match=r"'p'.*Changing param values"):
            handle.wait(PATIENCE_S)
        around.wait(PATIENCE_S)
        tag.wait(PATIENCE_S)
        assert logger.flush(PATIENCE_S).rejected == 1
    assert client(uri).get_run(run_id).data.params == {"a": "1", "b": "2", "p": "theirs"}
    assert "".join(said).count("the param 'p' was rejected") == 1


@pytest.fixture
def run_id(sqlite_uri: str) -> str:
    mlflow.set_tracking_uri(sqlite_uri)
    return make_run(sqlite_uri)


BAD_TEXTS: list[tuple[str, str, dict[Any, Any]]] = [
    ("key", "log_params", {"good": 1, "bad key?": 1}),
    ("no text as key", "log_params", {1: "x"}),
    ("path", "set_tags", {"a/../b": "x"}),
    ("no key", "set_tags", {"": "x"}),
    ("long key", "log_params", {"k" * 251: "x"}),
    ("long param", "log_params", {"long": "x" * 6001}),
    ("long tag", "set_tags", {"good": 1, "long": "x" * 8001}),
    ("no UTF-8", "log_params", {"k": "\ud800"}),
]


@pytest.mark.parametrize(
    ("method", "texts"), [case[1:] for case in BAD_TEXTS], ids=[case[0] for case in BAD_TEXTS]
)
def test_an_invalid_text_raises(
    sqlite_uri: str, run_id: str, method: str, texts: dict[Any, Any]
) -> None:
    """P5: a parameter or tag that cannot be logged raises at the call, and none of the call is."""
    with MetricLogger(run_id) as logger:
        with pytest.raises(InvalidPoint):
            getattr(logger, method)(texts)
        logger.set_tag("after", 1).wait(PATIENCE_S)
    data = client(sqlite_uri).get_run(run_id).data
    assert data.params == {}
    assert "good" not in data.tags
    assert data.tags["after"] == "1"


def test_not_strict_counts_and_goes_on(run_id: str, caplog: pytest.LogCaptureFixture) -> None:
    """strict=False: invalid parameters and tags are counted, every one that was not logged, and
    their handles say why; the program goes on."""
    with MetricLogger(run_id, settings=Settings.from_env(strict=False)) as logger:
        for _ in range(3):
            handle = logger.log_param("bad key?", 1)
        assert caplog.text.count("'bad key?'") == 1
        with pytest.raises(DeliveryError, match="bad key"):
            handle.wait(0)
        logger.log_param("good", 1).wait(PATIENCE_S)
        assert logger.stats().dropped == {"invalid": 3}
        both = logger.log_params({"fine": 1, "worse?": 2})
        assert both.exception(0) is not None
    params = mlflow.get_run(run_id).data.params
    assert params == {"good": "1"}
    # MLflow has neither of the two of the last call.
    assert logger.stats().dropped == {"invalid": 5}


def test_not_strict_warns_once_per_key(run_id: str, caplog: pytest.LogCaptureFixture) -> None:
    """strict=False: each key that cannot be logged is warned of, once."""
    with MetricLogger(run_id, settings=Settings.from_env(strict=False)) as logger:
        for _ in range(2):
            logger.log_param("bad param?", 1)
            logger.log_param("another?", 1)
            logger.set_tag("bad tag?", 1)
    for key in ("bad param?", "another?", "bad tag?"):
        assert caplog.text.count(repr(key)) == 1


def test_the_template_is_for_metrics_alone(
    sqlite_uri: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """key_template makes keys of metrics, also of one with the same name as a parameter and a tag,
    which keep theirs."""
    monkeypatch.setenv("RANK", "3")
    settings = Settings.from_env(key_template="{key}/rank{rank}")
    with MetricLogger(run_id, settings=settings) as logger:
        logger.log_param("name", "a")
        logger.log_metric("name", 1.0)
        logger.set_tag("name", "b")
        logger._append(MetricKey("about", "", "data", "a1b2"), 2.0, 0, None)
    data = client(sqlite_uri).get_run(run_id).data
    assert (data.params, data.tags["name"]) == ({"name": "a"}, "b")
    assert data.metrics == {"name/rank3": 1.0, "about/rank3": 2.0}


def test_what_a_metric_is_about_arrives(sqlite_uri: str, run_id: str) -> None:
    """A metric about a model and a dataset is in the model, with the dataset, and in the history of
    its name in the run, in the order of the calls."""
    own = client(sqlite_uri)
    model_id = own.create_logged_model("0", "net", run_id).model_id
    about = MetricKey("loss", model_id, "data", "a1b2")
    with MetricLogger(run_id) as logger:
        for value in range(6):
            logger._append(("loss", about)[value % 2], -value, 0)
    found = history(sqlite_uri, run_id, "loss")
    assert [metric.value for metric in found] == [-0.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    metrics = own.get_logged_model(model_id).metrics
    assert {(m.key, m.dataset_name, m.dataset_digest) for m in metrics} == {
        ("loss", "data", "a1b2")
    }


LONG_ABOUTS: list[tuple[Sequence[str], bool]] = [
    (("m" * 500, "d" * 500, "a" * 500), True),
    (("é" * 500, "é" * 500, "é" * 500), True),
    (("m\0", "", ""), False),
    (("", "d" * 501, ""), False),
]


@pytest.mark.parametrize(("about", "valid"), LONG_ABOUTS, ids=["long", "wide", "NUL", "too long"])
def test_what_a_key_can_be_about(tmp_path: Path, about: Sequence[str], valid: bool) -> None:
    """A key that is about something is read as it was logged, however long, or refused at the
    call; it never comes back as another one."""
    spool = SmallSpool(tmp_path / "spool")
    key = MetricKey("k" * 250, *about)
    if valid:
        spool.producer.append(key, 1.0)
        spool.deliver()
        assert spool.values("\0".join((key.key, *about))) == [1.0]
        assert not list(dead_letters.read(spool.directory.path))
    else:
        with pytest.raises(InvalidPoint):
            spool.producer.append(key, 1.0)


@pytest.mark.parametrize("settings", [{"delivery": "inline"}, {"durability": "power"}], ids=str)
def test_texts_with_seldom_used_settings(
    sqlite_uri: str, run_id: str, settings: dict[str, Any]
) -> None:
    """delivery="inline" has a parameter in the store when the call returns; durability="power"
    changes nothing but the cost."""
    with MetricLogger(run_id, settings=Settings.from_env(**settings)) as logger:
        handle = logger.log_param("p", 1)
        logger.set_tag("t", 2)
        if "delivery" in settings:
            assert handle.done()
            assert client(sqlite_uri).get_run(run_id).data.params == {"p": "1"}
    data = client(sqlite_uri).get_run(run_id).data
    assert (data.params, data.tags["t"]) == ({"p": "1"}, "2")


def test_disabled_is_plain_mlflow(sqlite_uri: str, run_id: str, tmp_path: Path) -> None:
    """FLOWBUFFER_ENABLED=0: parameters and tags go straight to MLflow, which raises its own errors,
    and no spool is made."""
    with MetricLogger(run_id, settings=Settings.from_env(enabled=False)) as logger:
        assert logger.log_param("p", 1).done()
        logger.set_tags({"t": 2, "u": None})
        data = client(sqlite_uri).get_run(run_id).data
        assert (data.params, data.tags["t"]) == ({"p": "1"}, "2")
        with pytest.raises(mlflow.MlflowException, match="Changing param values"):
            logger.log_param("p", 2)
        assert logger.flush().delivered == 3
    assert not (tmp_path / "spool").exists()


def test_offline_texts_are_synced(sqlite_uri: str, tmp_path: Path) -> None:
    """Parameters and tags of an offline job are in the run that `flowbuffer sync` creates."""
    with MetricLogger(
        tracking_uri="http://127.0.0.1:1", settings=Settings.from_env(offline=True)
    ) as (logger):
        logger.log_params({"lr": 0.1, "name": "é"})
        logger.set_tag("t", "old")
        logger.log_metric("loss", 1.0)
        logger.set_tag("t", "new")
    spool = str(tmp_path / "spool")
    assert (
        cli.main(["sync", "--spool", spool, "--timeout", "150", "--tracking-uri", sqlite_uri]) == 0
    )
    runs = [run for run in client(sqlite_uri).search_runs(["0"]) if run.data.params]
    (data,) = [run.data for run in runs]
    assert (data.params, data.tags["t"]) == ({"lr": "0.1", "name": "é"}, "new")
    assert data.metrics == {"loss": 1.0}


def test_pending_texts_are_counted(tmp_path: Path) -> None:
    """Each parameter and tag counts as one, pending, then delivered or rejected."""
    spool = SmallSpool(tmp_path / "spool", FakeTransport(at_once=False), segment_slots=64)
    spool.transport.params[RUN, "p"] = "taken"
    spool.producer.append_texts(PARAM, {"p": 1, "q": 2})
    places = spool.producer.append_texts(TAG, {"t": "3"})
    step(spool)
    found = tally(spool.directory.path)
    assert found is not None
    assert (found.delivered, found.rejected, found.pending) == (0, 0, 3)
    assert states(places) == [Became.PENDING]
    spool.deliver()
    found = tally(spool.directory.path)
    assert found is not None
    assert (found.delivered, found.rejected, found.pending) == (2, 1, 0)


def test_a_request_counts_its_texts() -> None:
    """The length of a request is all that is in it."""
    assert len(Request(RUN, ["k"], [1.0], [0], [0], [("p", "1")], [("t", "1"), ("u", "2")])) == 4
