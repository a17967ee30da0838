"""The folders of a spool: who may use them, who is alive, how much they take.

A producer's folder appears whole, by a rename, with ``producer.lock`` held until its producer dies.
Whoever delivers what is in it holds ``reader.lock``, so that no two ever do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from flowbuffer.errors import SpoolError
from flowbuffer.notices import warn_once
from flowbuffer.spool import removed
from flowbuffer.spool.files import MOVE_IT, FileLock, check_private, file_system_of, write_file
from flowbuffer.spool.layout import is_own_file, is_producer_name
from flowbuffer.spool.mark import (
    check_outside,
    check_spool,
    foreign,
    is_marked,
    is_unfinished,
    mark,
    unfinished_marks,
)
from flowbuffer.spool.producer_info import ProducerInfo, read_info
from flowbuffer.spool.segment_files import Ending

#: Where flock, shared mappings or reserved blocks do not hold what the spool needs of them.
REMOTE_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "davfs", "gfs2", "glusterfs", "gpfs", "lustre"}
    | {"ncpfs", "nfs", "nfs4", "ocfs2", "smb3", "smbfs"}
)
#: A hidden folder that nobody holds is unfinished for good once it is this old, in s.
_UNFINISHED_FOR_S = 60.0


@dataclass(frozen=True)
class ProducerDirectory:
    """A folder as its producer has it; ``lock`` says that it lives."""

    path: Path
    info: ProducerInfo
    lock: FileLock


@dataclass
class Claim:
    """A folder as whoever delivers it has it."""

    path: Path
    info: ProducerInfo
    lock: FileLock

    @property
    def is_orphaned(self) -> bool:
        """Whether its producer is dead: nobody writes to the folder any more."""
        return not has_producer(self.path)

    def release(self) -> None:
        """Leave the folder to others."""
        self.lock.release()

    def remove(self, *, delivered: int | None) -> None:
        """Delete the folder, and the run's when it was the last one. What somebody put into it
        stays where it is, and so does the folder.

        Args:
            delivered: How many segments it had, if all points in them are delivered; None if some
                were rejected. That is recorded, so that a folder that was wiped is not taken for a
                delivered one (see ``outcomes``).
        """
        os.stat(self.path)  # what was wiped was not removed here
        recorded = self._record(delivered)
        others = foreign(self.path)
        if others:
            warn_once(f"{self.path} is kept for what is not flowbuffer's: {others[0]}")
            doomed = self.path
        else:
            doomed = self.path.with_name(f".{self.path.name}")
            self.path.rename(doomed)  # at once, so that nobody finds half a folder
        _delete_files(doomed)
        if not recorded:
            self._record(delivered)  # on a full disk, now that there is room
        _delete(doomed)
        self.release()

    def _record(self, delivered: int | None) -> bool:
        try:
            removed.write(self.path, delivered)
        except OSError:
            return False
        return True


class Spool:
    """The folder in which all producers of a user on one machine keep their points.

    Args:
        root: The folder.
        make: Make it, with mode 0700, where it does not exist, and mark it (see ``mark``). Else it
            has to be one, and nothing is changed: for whoever only looks.

    Raises:
        SpoolError: It is not a folder, holds other things, belongs to somebody else, is open to
            others, or lies on a network or FUSE file system.
    """

    def __init__(self, root: Path, *, make: bool = True) -> None:
        self.root = root
        if make:
            self.make()
        elif not self._check():
            raise SpoolError(f"there is no spool at {root}: the folder is empty")

    def make(self) -> None:
        """Make and mark it, if it is not there (any more).

        Raises:
            SpoolError: As the class says.
        """
        root = self.root
        try:
            check_outside(root)
            for folder in (*reversed(root.parents), root):
                if not folder.exists():
                    folder.mkdir(mode=0o700, exist_ok=True)
            self._check()
            if not is_marked(root):
                mark(root)
        except OSError as error:
            if isinstance(error, SpoolError):
                raise
            raise SpoolError(f"the spool {root} cannot be made ({error}); {MOVE_IT}") from error

    def _check(self) -> bool:
        """Whether it is a spool; False if it is an empty folder."""
        used = check_spool(self.root)
        kind = file_system_of(self.root)
        if kind in REMOTE_FILE_SYSTEMS or kind.startswith("fuse"):
            raise SpoolError(f"the spool {self.root} lies on a {kind} file system; {MOVE_IT}")
        return used

    def add_producer(
        self,
        info: ProducerInfo,
        after: Path | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> ProducerDirectory:
        """A new folder for one producer, its lock held.

        Args:
            info: Who the producer is.
            after: A folder of the same process and run, behind which it sorts, so that whoever
                delivers both comes to it second.
            files: What else is in it from the first moment, by name.

        Raises:
            SpoolError: It cannot be made.
        """
        try:
            return self._add_producer(info, after, files or {})
        except OSError as error:
            if isinstance(error, SpoolError):
                raise
            raise SpoolError(f"no producer's folder can be made in {self.root}: {error}") from error

    def _add_producer(
        self, info: ProducerInfo, after: Path | None, files: Mapping[str, bytes]
    ) -> ProducerDirectory:
        if not is_marked(self.root):
            self.make()  # it was wiped
        run = self.root / escaped(info.run_id)
        if after is None:
            serial = os.urandom(6).hex()
        else:
            serial = f"{int(after.name[-12:], 16) + 1:012x}"[-12:]
        name = f"{escaped(info.host)[:40]}-{info.pid}-{serial}"
        unborn = run / f".{name}"
        for _ in range(10):  # another process may remove the empty folder of the run meanwhile
            _private_directory(run)
            try:
                _private_directory(unborn)
                break
            except FileNotFoundError:
                continue
        lock = FileLock.take(unborn / "producer.lock", create=True)
        if lock is None:
            raise SpoolError(f"the new folder {unborn} is locked by another process")
        for file, content in files.items():
            write_file(unborn / file, content)
        write_file(unborn / "producer.json", info.to_json())
        unborn.rename(run / name)
        return ProducerDirectory(run / name, info, lock)

    def folders(self, run_id: str | None = None) -> Iterator[Path]:
        """Every producer's folder, dead or alive; or those of one run."""
        return folders(self.root, run_id)

    def claim(self, folder: Path, *, living: bool = False) -> Claim | None:
        """The right to deliver a folder.

        Args:
            folder: Of a producer.
            living: Claim it also if its producer lives.

        Returns:
            None if another collector has it, its producer lives, or it is gone.

        Raises:
            SpoolError: The folder is not this user's alone, or not of this format.
        """
        try:
            check_private(folder.parent)
            check_private(folder)
        except FileNotFoundError:
            return None
        try:
            read_info(folder)  # else there is nothing that is flowbuffer's to lock
        except SpoolError:
            if folder.exists():
                raise
            return None
        if not living and has_producer(folder):
            return None  # and its reader.lock is left to whoever has a right to it
        lock = FileLock.take(folder / "reader.lock", create=True)
        if lock is None:
            return None
        try:
            return Claim(folder, read_info(folder), lock)  # a dead producer stays dead
        except BaseException:
            lock.release()
            raise

    def sweep(self) -> None:
        """Delete the folders that a process was making, or deleting, when it died."""
        for run in _subfolders(self.root):
            for folder in _subfolders(run, hidden=True):
                try:
                    if _is_old(folder) and is_unfinished(folder):
                        # The first is held by who makes a folder, the second by who deletes one.
                        self._sweep(folder, ["producer.lock", "reader.lock"])
                except OSError:
                    continue  # another process was faster
        for path in unfinished_marks(self.root):
            if _is_old(path):
                path.unlink(missing_ok=True)

    def _sweep(self, folder: Path, locks: list[str]) -> None:
        if not locks:
            _delete(folder)
            return
        lock = FileLock.take(folder / locks[0], create=True)
        if lock is not None:
            try:
                self._sweep(folder, locks[1:])
            finally:
                lock.release()

    def used_bytes(self) -> int:
        """The bytes of all files in the spool, whoever wrote them."""
        total = 0
        for folder in self.folders():
            for entry in _entries(folder):
                try:
                    total += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue  # delivered and removed meanwhile
        return total


def folders(root: Path, run_id: str | None = None) -> Iterator[Path]:
    """:meth:`Spool.folders` of a spool that need not exist."""
    runs = _subfolders(root)
    if run_id is not None:
        runs = [run for run in runs if run.name == escaped(run_id)]
    for run in runs:
        yield from filter(_is_producers, _subfolders(run))


def _is_producers(folder: Path) -> bool:
    """Whether a folder is a producer's, and not somebody else's, or what is left of one."""
    if os.path.lexists(folder / "producer.json"):
        return True
    return is_producer_name(folder.name) and any(
        entry.name.endswith(Ending.SLOTS) for entry in _entries(folder)
    )


def has_producer(folder: Path) -> bool:
    """Whether the producer of a folder lives."""
    return FileLock.is_held(folder / "producer.lock")


def escaped(name: str) -> str:
    """``name`` as one component of a path: never empty, hidden, or a way out of the folder."""
    return quote(name, safe="").replace(".", "%2E")[:200] or "%"


def _private_directory(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    check_private(folder)


def _delete(folder: Path) -> None:
    """Delete a producer's folder, and the run's when it was the last one."""
    _delete_files(folder)
    for emptied in (folder, folder.parent):
        try:
            emptied.rmdir()
        except OSError:
            return  # something else is in it, like another producer of the run


def _delete_files(folder: Path) -> None:
    """Delete what is in a producer's folder, but for what is not flowbuffer's."""
    own = [
        entry.path
        for entry in _entries(folder)
        if is_own_file(entry.name) and entry.is_file(follow_symlinks=False)
    ]
    # Until the last moment it can be read, and is locked.
    for path in sorted(own, key=lambda path: path.endswith((".json", ".lock"))):
        os.unlink(path)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat(follow_symlinks=False).st_mtime >= _UNFINISHED_FOR_S


def _subfolders(folder: Path, *, hidden: bool = False) -> list[Path]:
    return sorted(
        Path(entry.path)
        for entry in _entries(folder)
        if entry.is_dir(follow_symlinks=False) and entry.name.startswith(".") == hidden
    )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing if it is gone, or somebody's who lets nobody look."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, PermissionError):
        return []
