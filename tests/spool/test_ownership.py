"""Nothing is made, locked, changed or deleted that flowbuffer did not make."""

import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowbuffer import MetricLogger, Settings
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.policies import PROCESS, THREAD
from flowbuffer.commands.cli import main
from flowbuffer.errors import SpoolError, SpoolFormatError
from flowbuffer.spool.files import FileLock
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.layout import is_own_file, is_producer_name
from flowbuffer.spool.producer_info import this_producer
from flowbuffer.testing import FakeTransport, ManualClock

NOWHERE = "http://127.0.0.1:9"  # refuses connections
OLD_S = time.time() - 3600
PRODUCER = f"host-1-{'ab' * 6}"
COMMANDS = (
    ["status"],
    ["status", "--json"],
    ["rejected"],
    ["rejected", "--retry"],
    ["clean"],
    ["clean", "--rejected", "--yes"],
    ["sync", "--timeout", "0"],
    ["doctor"],
)

#: A file, by its path in the tree: its content.
Tree = dict[str, bytes]


def plant(root: Path, tree: Tree, *, mode: int = 0o600) -> None:
    """Make these files, and folders (whose path ends in a slash), an hour old."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, content in tree.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        else:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.write_bytes(content)
            path.chmod(mode)
    for path in [*root.rglob("*"), root]:
        os.utime(path, (OLD_S, OLD_S), follow_symlinks=False)


def look(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a folder, and the folder: mode, time of change, content."""
    found = {}
    for path in [root, *root.rglob("*")]:
        info = path.lstat()
        content = b""
        if stat.S_ISREG(info.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(info.st_mode):
            content = os.readlink(path).encode()
        found[str(path.relative_to(root))] = (info.st_mode, info.st_mtime_ns, content)
    return found


def settings_at(root: Path, **more: object) -> Settings:
    return Settings(spool_dir=root, delivery="thread", shutdown_timeout_s=0.1, **more)  # type: ignore[arg-type]


def use(root: Path) -> list[str]:
    """Use a folder as a spool in every way there is; what was said against it."""
    said = []
    for offline in (False, True):
        with pytest.raises(SpoolError) as refused:
            MetricLogger("run", tracking_uri=NOWHERE, settings=settings_at(root, offline=offline))
        said.append(str(refused.value))
    for delivery in ("process", "thread", "inline"):
        with pytest.raises(SpoolError):
            MetricLogger(
                "run", tracking_uri=NOWHERE, settings=Settings(spool_dir=root, delivery=delivery)
            )
    run_commands(root)
    return said


def run_commands(root: Path) -> None:
    for arguments in COMMANDS:
        main([*arguments, "--spool", str(root)])


def deliver(spool: Spool) -> FakeTransport:
    """What a collector does in a spool, for as long as there is anything to do."""
    transport, clock = FakeTransport(), ManualClock()
    collector = Collector(
        spool,
        Settings(spool_dir=spool.root),
        clock,
        PROCESS,
        lambda *_: transport,
    )
    for _ in range(20):
        collector.step(hurry=True)
        clock.turn(10)
    collector.leave()
    return transport


def log(root: Path, run_id: str = "run") -> None:
    """What a job that dies leaves in a spool."""
    directory = Spool(root).add_producer(this_producer(run_id, NOWHERE, 0))
    from flowbuffer.clock import SYSTEM_CLOCK
    from flowbuffer.spool.writing.producer import Producer

    producer = Producer(
        directory, Spool(root), Settings(spool_dir=root), SYSTEM_CLOCK, lambda: None
    )
    producer.append("loss", 0.5, 0)
    producer.stop()
    directory.lock.release()


HOME: Tree = {
    "project/.git/HEAD": b"ref: refs/heads/main",
    "project/.git/objects/ab": b"object",
    "project/.ssh/id_ed25519": b"precious",
    "project/train.py": b"print()",
    ".config/app/state": b"{}",
}
FOREIGN: dict[str, Tree] = {
    "a private home": HOME,
    "a git repository": {".git/config": b"[core]", "a.py": b"", "sub/.hidden/x": b"y"},
    "one file": {"notes.txt": b""},
    "one empty folder": {"a/": b""},
    "folders in folders": {"a/b/c": b"", "a/.b/producer.lock": b""},
    "a log of another program": {"collector.log": b"2026-01-01 started"},
    "locks of another program": {"collector.lock": b"host=a", "data/x/y": b""},
    "a producer of films": {"films/first/producer.json": b'{"name": "a person"}'},
    "another spool.json": {"spool.json": b'{"printer": 1}'},
    "a broken spool.json": {"spool.json": b"\0\0\0"},
    "an old spool, and a file": {"collector.lock": b"12", "mine.txt": b""},
    "unfinished, but not ours": {
        f"run/.{PRODUCER}/producer.lock": b"",
        f"run/.{PRODUCER}/id_rsa": b"",
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_holds_other_things_is_refused(tmp_path: Path, name: str) -> None:
    """A job, the collector and every command refuse a folder that is somebody's, say what would be
    right, and change nothing in it."""
    root = tmp_path / "theirs"
    plant(root, FOREIGN[name])
    before = look(root)
    for words in use(root):
        assert "FLOWBUFFER_SPOOL_DIR" in words
        assert "chmod" not in words
    assert look(root) == before


def test_the_words_name_what_is_there_and_a_better_place(tmp_path: Path) -> None:
    """Who reads the refusal knows what is in the way, and what to set; also of one that is open
    to others, like / and most homes: nobody is told to change the modes of what is in it."""
    plant(tmp_path / "home", HOME)
    (tmp_path / "home").chmod(0o755)
    with pytest.raises(
        SpoolError, match=r"holds other things \(.config, project\).*home/flowbuffer"
    ):
        Spool(tmp_path / "home")
    with pytest.raises(SpoolError) as refused:
        Spool(Path("/"))
    assert "chmod" not in str(refused.value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.dictionaries(
        st.lists(
            st.sampled_from(
                f"a .b run {PRODUCER} .{PRODUCER} producer.json producer.lock reader.lock keys "
                ".x.new collector.lock runs.json 00000000.slots".split()
            ),
            min_size=1,
            max_size=4,
        ).map("/".join),
        st.sampled_from([b"", b"1", b"{}", b'{"run_id": "r"}', b"FLOWSLOT"]),
        min_size=1,
        max_size=8,
    ),
    marked=st.booleans(),
)
def test_whatever_is_in_a_folder_stays_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, tree: Tree, marked: bool
) -> None:
    """Whatever names and contents a folder has, ours among them: what flowbuffer did not make
    stays, to the byte, the mode and the time, be the folder a spool or not."""
    root = tmp_path_factory.mktemp("random")
    if marked:
        Spool(root)
    files = {
        name: content
        for name, content in tree.items()
        if not any(other.startswith(f"{name}/") for other in tree)
        and not name.startswith(("collector.lock/", "runs.json/"))
    }
    # Without these all of a folder might be what an older version, or a process that died, left.
    hidden = {name.partition("/.host")[0] for name in files if f"/.{PRODUCER}/" in name}
    files |= {f"{run}/.{PRODUCER}/mine": b"mine" for run in hidden} if marked else {"mine": b""}
    plant(root, files)
    before = look(root)
    try:
        deliver(Spool(root))
    except SpoolError:
        assert not marked
    else:
        assert marked
    run_commands(root)
    after = look(root)
    for name in ("collector.lock", "runs.lock", "."):  # flowbuffer's own
        before.pop(name, None)
        after.pop(name, None)
    assert after == before
    shutil.rmtree(root)


def test_what_a_user_puts_into_a_spool_stays(tmp_path: Path) -> None:
    """In a spool that works, a user's folders, links, pipes, sockets and locks are not touched, and
    in nobody's way: what was logged is delivered and cleaned up beside them."""
    root = tmp_path / "spool"
    log(root, "before")
    plant(root, {**HOME, "notes": b"", "a/b/": b"", f"a/.{PRODUCER}/mine": b"", "run/x/y": b""})
    (root / "project" / f".{PRODUCER}").symlink_to(root / "project" / ".git")
    (root / "link").symlink_to(root / "project")
    os.mkfifo(root / "project" / "fifo")
    os.mkfifo(root / "fifo")
    held = FileLock.take(root / "project" / "train.py")
    assert held is not None
    log(root, "run")
    before = {name: entry for name, entry in look(root).items() if _is_theirs(name)}
    transport = deliver(Spool(root))
    run_commands(root)
    after = {name: entry for name, entry in look(root).items() if _is_theirs(name)}
    held.release()
    assert after == before
    assert len(transport.history("before", "loss")) == 1
    assert len(transport.history("run", "loss")) == 1
    assert not list(root.glob("before"))
    assert not list(root.glob(f"run/*-{os.getpid()}-*"))


def _is_theirs(name: str) -> bool:
    first = name.split("/")[0]
    return first in ("project", ".config", "notes", "a", "link", "fifo") or name.startswith("run/x")


def test_what_a_user_puts_into_a_producers_folder_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A producer's folder that is delivered stays as long as something of a user is in it; clean
    then deletes what is flowbuffer's, and the rest is nobody's any more."""
    root = tmp_path / "spool"
    log(root)
    (folder,) = Spool(root).folders()
    plant(folder, {"notes.txt": b"mine", "deep/er": b"mine", "keys.bak": b"mine"})
    before = look(folder)
    deliver(Spool(root))
    assert "notes" in caplog.text or "deep" in caplog.text
    assert main(["clean", "--spool", str(root)]) == 0
    after = look(folder)
    assert set(after) == {".", "notes.txt", "deep", "deep/er", "keys.bak"}
    assert all(after[name] == before[name] for name in after if name != ".")
    capsys.readouterr()
    assert main(["status", "--spool", str(root)]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert list(Spool(root).folders()) == []


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "link"])
@pytest.mark.parametrize("name", ["producer.json", "reader.lock", "00000001.slots", "carry"])
def test_what_is_no_file_under_our_names_stays(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a pipe, a socket or a link under a name that flowbuffer gives to files is kept, and
    nothing waits for its other end."""
    root = tmp_path / "spool"
    log(root, "other")
    log(root)
    folder = next(folder for folder in Spool(root).folders() if folder.parent.name == "run")
    path = folder / name
    path.unlink(missing_ok=True)
    monkeypatch.chdir(folder)  # the name of a socket is short
    make: dict[str, Callable[[], object]] = {
        "folder": lambda: plant(path, {"mine": b"mine"}),
        "fifo": lambda: os.mkfifo(name),
        "socket": lambda: bind(name),
        "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
    }
    (tmp_path / "elsewhere").write_text("mine")
    make[kind]()
    theirs = look(path)
    transport = deliver(Spool(root))
    run_commands(root)
    if name.endswith(".slots"):
        path = path.with_suffix(".damaged")  # it is out of the way, and kept
    assert look(path) == theirs
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert len(transport.history("other", "loss")) == 1


def test_a_spool_that_is_wiped_under_a_collector(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A collector whose folders are wiped while it delivers them lets go of them, and goes on."""
    root = tmp_path / "spool"
    log(root)
    transport, clock = FakeTransport(), ManualClock()
    collector = Collector(
        Spool(root), Settings(spool_dir=root), clock, THREAD, lambda *_: transport
    )
    collector.look()
    assert len(collector.streams) == 1
    shutil.rmtree(root)
    for _ in range(20):
        collector.step(hurry=True)
        clock.turn(10)
    assert collector.streams == []
    assert "Traceback" not in caplog.text


def bind(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)


def test_only_what_is_readable_is_locked(tmp_path: Path) -> None:
    """A folder without a producer.json of this format gets no reader.lock, whatever its name."""
    spool = Spool(tmp_path / "spool")
    for folder in (spool.root / "a" / "b", spool.root / "a" / PRODUCER):
        plant(folder, {"00000000.slots": b"mine"})
        before = look(folder)
        for living in (False, True):
            with pytest.raises(SpoolFormatError):
                spool.claim(folder, living=living)
        assert look(folder) == before


def test_hidden_folders_are_swept_if_all_of_it_is_ours(tmp_path: Path) -> None:
    """Of what looks like an unfinished producer only that is deleted of which name and files are
    all flowbuffer's."""
    spool = Spool(tmp_path / "spool")
    plant(
        spool.root,
        {
            f"run/.{PRODUCER}/producer.lock": b"",
            f"run/.{PRODUCER}/.producer.json.new": b"",
            f"run/.x{PRODUCER}/producer.lock": b"",
            f"run/.x{PRODUCER}/id_ed25519": b"precious",
            f"run/.y{PRODUCER}/keys/deep": b"precious",
            "run/.git/config": b"precious",
            "run/.ssh/keys": b"precious",
        },
    )
    spool.sweep()
    assert sorted(path.name for path in (spool.root / "run").iterdir()) == [
        ".git", ".ssh", f".x{PRODUCER}", f".y{PRODUCER}",
    ]  # fmt: skip


# The mark.


def test_a_new_spool_is_marked(tmp_path: Path) -> None:
    """A spool says what it is and of which version, in a file of this user alone."""
    Spool(tmp_path / "a" / "spool")
    path = tmp_path / "a" / "spool" / "spool.json"
    said = json.loads(path.read_bytes())
    assert said["format"] == 1
    assert "flowbuffer" in said["what"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("left", [[], [".spool.json.0123456789ab.new"]])
def test_a_death_between_making_and_marking_is_no_harm(tmp_path: Path, left: list[str]) -> None:
    """A process that dies while it makes a spool leaves one that the next makes whole."""
    root = tmp_path / "spool"
    plant(root, dict.fromkeys(left, b"{"))
    spool = Spool(root)
    spool.sweep()
    assert [path.name for path in root.iterdir()] == ["spool.json"]


def test_two_may_make_a_spool_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that makes, marks and uses the spool between any two steps of this one is no
    reason to refuse it."""
    root = tmp_path / "spool"
    real_scandir, real_replace = os.scandir, Path.replace
    made = []

    def meanwhile() -> None:
        if not made:
            made.append(True)
            log(root)

    def scandir(path: object) -> object:
        meanwhile()
        return real_scandir(path)  # type: ignore[call-overload]

    def replace(path: Path, target: Path) -> Path:
        meanwhile()
        return real_replace(path, target)

    for name, owner, slow in (("scandir", os, scandir), ("replace", Path, replace)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, slow)
            Spool(root)
        assert made
        made.clear()
        shutil.rmtree(root)


def test_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    """A spool of a later version is refused, by name and number, and not changed."""
    root = tmp_path / "spool"
    Spool(root)
    said = json.loads((root / "spool.json").read_bytes())
    plant(root, {"spool.json": json.dumps({**said, "format": 2}).encode(), "new/thing": b"x"})
    before = look(root)
    for words in use(root):
        assert "format version 2" in words
    assert look(root) == before


def test_an_older_spool_is_taken_in(tmp_path: Path) -> None:
    """A spool of a version that marked none is known by its content, and marked; commands that only
    look do not even do that."""
    root = tmp_path / "spool"
    log(root)
    (root / "spool.json").unlink()
    plant(
        root,
        {"collector.lock": b"4711", "collector.log": b"x", "runs.lock": b"", "runs.json": b"{}"},
    )
    before = look(root)
    assert main(["status", "--spool", str(root)]) == 0
    assert look(root) == before
    spool = Spool(root)
    assert (root / "spool.json").exists()
    assert len(deliver(spool).history("run", "loss")) == 1


@pytest.mark.parametrize("below", ["new", "run", "run/{producer}", "run/{producer}/new"])
def test_a_spool_within_a_spool_is_refused(tmp_path: Path, below: str) -> None:
    """FLOWBUFFER_SPOOL_DIR that points into a spool is refused, and the spool is named."""
    root = tmp_path / "spool"
    log(root)
    (folder,) = Spool(root).folders()
    before = look(root)
    with pytest.raises(SpoolError, match=f"within the spool {root}: name that one"):
        Spool(root / below.format(producer=folder.name))
    assert look(root) == before


def test_commands_make_no_spool_of_an_empty_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that is given an empty folder says that it is no spool, and leaves it empty."""
    for arguments in COMMANDS[:-1]:
        root = tmp_path / "empty"
        root.mkdir(exist_ok=True, mode=0o700)
        assert main([*arguments, "--spool", str(root)]) == 2
        assert "no spool" in capsys.readouterr().err
        assert list(root.iterdir()) == []


def test_the_names_are_all_of_the_layout(tmp_path: Path, sqlite_uri: str) -> None:
    """Everything that a job has in its folder while it works has a name by which it is deleted."""
    names: set[str] = set()
    settings = settings_at(tmp_path / "spool")
    with MetricLogger("gone", tracking_uri=sqlite_uri, settings=settings) as logger:
        logger.log_metric("a", 1.0)
        logger.log_param("b", "c")
        logger.flush(1.0)
        assert logger.folder is not None
        assert is_producer_name(logger.folder.name)
        names |= set(os.listdir(logger.folder))
    assert len(names) > 5
    assert [name for name in names if not is_own_file(name)] == []


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A spool on a disk that cannot be written."""
    import subprocess
    import sys

    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a disk can be mounted on Linux by root only")
    root = tmp_path / "spool"
    log(root)
    mounted = subprocess.run(["mount", "--bind", root, root], capture_output=True)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    subprocess.run(["mount", "-o", "remount,bind,ro", root, root], check=True)
    yield root
    subprocess.run(["umount", root], check=True)


def test_a_disk_that_cannot_be_written(read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a read-only disk a job is refused with words, and status still tells what is there."""
    with pytest.raises(SpoolError, match="Read-only"):
        MetricLogger("run", tracking_uri=NOWHERE, settings=settings_at(read_only))
    assert main(["status", "--spool", str(read_only), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["producers"]
    assert (row["state"], row["pending"]) == ("dead", 1)
    for arguments in COMMANDS:
        main([*arguments, "--spool", str(read_only)])
