"""The folders of a spool: who owns what, who is alive, what is left over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from flowbuffer.errors import SpoolError, SpoolFormatError
from flowbuffer.spool.files import FileLock, file_system_of
from flowbuffer.spool.folders import Spool, escaped
from flowbuffer.spool.producer_info import read_info, this_producer


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def test_a_living_producer_is_not_adopted(spool: Spool) -> None:
    """Whoever can take the lock of a folder knows that its producer is dead."""
    info = this_producer("run", "sqlite:///x.db", 0, rank=3)
    directory = spool.add_producer(info)
    assert spool.claim(directory.path) is None
    directory.lock.release()
    claim = spool.claim(directory.path)
    assert claim is not None
    assert claim.info == info
    claim.remove(delivered=0)
    assert {path.name for path in spool.root.iterdir()} == {"removed", "spool.json"}


@pytest.mark.parametrize("run_id", ["..", "../../etc", "/etc", "", ".", "a/b", "a\0b", "ü" * 300])
def test_a_run_id_never_becomes_a_path(spool: Spool, run_id: str) -> None:
    """P8: whatever a run is called, its folder is one visible folder in the spool."""
    directory = spool.add_producer(this_producer(run_id, "sqlite:///x.db", 0))
    assert directory.path.parent.parent == spool.root
    assert not escaped(run_id).startswith(".")
    assert list(spool.folders()) == [directory.path]
    assert read_info(directory.path).run_id == run_id
    directory.lock.release()


def test_another_format_is_left_alone(spool: Spool) -> None:
    """A folder of another format version is refused with a message, and not touched."""
    info = this_producer("run", "sqlite:///x.db", 0)
    directory = spool.add_producer(info)
    path = directory.path / "producer.json"
    path.write_bytes(type(info)(**{**vars(info), "format": 99}).to_json())
    directory.lock.release()
    with pytest.raises(SpoolFormatError, match="format version 99"):
        spool.claim(directory.path)
    assert path.exists()


def test_what_was_never_finished_is_swept(spool: Spool) -> None:
    """A folder that a killed process was making is deleted; one in the making is not."""
    directory = spool.add_producer(this_producer("run", "sqlite:///x.db", 0))
    run = directory.path.parent
    old, young, held_one = (f".host-{pid}-{'ab' * 6}" for pid in (1, 2, 3))
    for name in (old, young, held_one):
        (run / name).mkdir()
        (run / name / "producer.lock").touch(mode=0o600)
        if name != young:
            os.utime(run / name, (time.time() - 100, time.time() - 100))
    held = FileLock.take(run / held_one / "producer.lock")
    assert held is not None
    spool.sweep()
    assert {path.name for path in run.iterdir()} == {directory.path.name, young, held_one}
    held.release()
    directory.lock.release()


def test_a_link_in_the_place_of_a_file_is_refused(spool: Spool, tmp_path: Path) -> None:
    """P8: a link is not followed, not even to a file of this user."""
    directory = spool.add_producer(this_producer("run", "sqlite:///x.db", 0))
    directory.lock.release()
    real = directory.path / "producer.json"
    real.rename(tmp_path / "moved")
    real.symlink_to(tmp_path / "moved")
    with pytest.raises(SpoolFormatError, match="is a link"):
        spool.claim(directory.path)


def test_a_spool_that_cannot_be_made(tmp_path: Path) -> None:
    """A spool that cannot be made says why, and which setting moves it."""
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match="FLOWBUFFER_SPOOL_DIR"):
        Spool(tmp_path / "file" / "spool")


def test_the_file_system_is_found(tmp_path: Path) -> None:
    """The type of the file system that holds a path is found where the system tells it."""
    if not Path("/proc/self/mountinfo").exists():
        assert file_system_of(tmp_path) == ""
    else:
        assert file_system_of(Path("/proc/self")) == "proc"
        assert file_system_of(tmp_path) not in ("", "proc")
