"""The folders of a spool: who may use them, who is alive, how much they take.

A producer's folder appears whole, by a rename, with its lock already held; whoever can take the
lock of a folder knows that its producer is dead and may deliver what it left.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import stat
import time
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from flowbuffer.errors import SpoolError, SpoolFormatError
from flowbuffer.spool.layout import FORMAT_VERSION

#: Where flock, shared mappings or reserved blocks do not hold what the spool needs of them.
REMOTE_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "davfs", "gfs2", "glusterfs", "gpfs", "lustre"}
    | {"ncpfs", "nfs", "nfs4", "ocfs2", "smb3", "smbfs"}
)
#: A hidden folder that nobody holds is unfinished for good once it is this old, in s.
_UNFINISHED_FOR_S = 60.0
_MOVE_IT = "set FLOWBUFFER_SPOOL_DIR (spool_dir) to a folder on a local disk or tmpfs"


class FileLock:
    """An exclusive flock on a file, held until :meth:`release` or the death of the process.

    A forked child does not keep it: there the descriptor is closed at once, so that the lock goes
    with the parent.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _held_locks.add(self)

    @classmethod
    def take(cls, path: Path, *, create: bool = False) -> FileLock | None:
        """The lock of the file at ``path``, or None if another process holds it or it is gone."""
        try:
            descriptor = open_file(path, os.O_RDWR | (os.O_CREAT if create else 0))
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return cls(descriptor)
        except BlockingIOError:
            pass
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Let go; doing so again does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        _held_locks.discard(self)
        if descriptor >= 0:
            os.close(descriptor)


_held_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _close_inherited_locks() -> None:
    for lock in list(_held_locks):
        lock.release()


os.register_at_fork(after_in_child=_close_inherited_locks)


@dataclass(frozen=True)
class ProducerInfo:
    """Who wrote a folder, and where its points belong (``producer.json``).

    ``tracking_uri`` is without credentials; ``start_ms`` is in ms since the epoch.
    """

    run_id: str
    tracking_uri: str
    host: str
    pid: int
    rank: int | None
    start_ms: int
    format: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """As JSON, with the CRC-32 of the rest in ``checksum``."""
        fields = asdict(self)
        return json.dumps({**fields, "checksum": _checksum(fields)}).encode()


@dataclass(frozen=True)
class ProducerDirectory:
    """One producer's folder, with its lock held by this process."""

    path: Path
    info: ProducerInfo
    lock: FileLock

    def remove(self) -> None:
        """Delete the folder, and the run's when it was the last one."""
        doomed = self.path.with_name(f".{self.path.name}")
        self.path.rename(doomed)  # at once, so that nobody finds half a folder
        _delete(doomed)
        self.lock.release()


class Spool:
    """The folder in which all producers of a user on one machine keep their points.

    Args:
        root: The folder; made with mode 0700 where it does not exist.

    Raises:
        SpoolError: It is not a folder, belongs to somebody else, is open to others, or lies on a
            network or FUSE file system.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            _private_directory(root)
        except OSError as error:
            if isinstance(error, SpoolError):
                raise
            raise SpoolError(f"the spool {root} cannot be made ({error}); {_MOVE_IT}") from error
        kind = file_system_of(root)
        if kind in REMOTE_FILE_SYSTEMS or kind.startswith("fuse"):
            raise SpoolError(f"the spool {root} lies on a {kind} file system; {_MOVE_IT}")

    def add_producer(self, info: ProducerInfo) -> ProducerDirectory:
        """A new folder for one producer, its lock held.

        Raises:
            SpoolError: It cannot be made.
        """
        try:
            return self._add_producer(info)
        except OSError as error:
            if isinstance(error, SpoolError):
                raise
            raise SpoolError(f"no producer's folder can be made in {self.root}: {error}") from error

    def _add_producer(self, info: ProducerInfo) -> ProducerDirectory:
        run = self.root / escaped(info.run_id)
        name = f"{escaped(info.host)[:40]}-{info.pid}-{os.urandom(6).hex()}"
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
        write_file(unborn / "producer.json", info.to_json())
        unborn.rename(run / name)
        return ProducerDirectory(run / name, info, lock)

    def folders(self) -> Iterator[Path]:
        """Every producer's folder, dead or alive."""
        for run in _subfolders(self.root):
            yield from _subfolders(run)

    def adopt(self, folder: Path) -> ProducerDirectory | None:
        """A dead producer's folder with its lock held; None if it lives, or is gone.

        Raises:
            SpoolError: The folder is not this user's alone, or not of this format.
        """
        check_private(folder.parent)
        check_private(folder)
        lock = FileLock.take(folder / "producer.lock")
        if lock is None:
            return None
        try:
            return ProducerDirectory(folder, read_info(folder), lock)
        except BaseException:
            lock.release()
            raise

    def sweep(self) -> None:
        """Delete the folders that a process was making, or deleting, when it died."""
        for run in _subfolders(self.root):
            for folder in _subfolders(run, hidden=True):
                try:
                    if time.time() - folder.stat().st_mtime < _UNFINISHED_FOR_S:
                        continue
                    lock = FileLock.take(folder / "producer.lock", create=True)
                    if lock is not None:
                        _delete(folder)
                        lock.release()
                except OSError:
                    continue  # another process was faster

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


def read_info(folder: Path) -> ProducerInfo:
    """What ``producer.json`` says.

    Raises:
        SpoolFormatError: It is missing, damaged, or of another format version.
    """
    path = folder / "producer.json"
    try:
        said = json.loads(read_file(path, limit=65536))
        intact = said.pop("checksum") == _checksum(said)
        if intact and said["format"] != FORMAT_VERSION:
            raise SpoolFormatError(
                f"{path} has format version {said['format']}; this flowbuffer reads version "
                f"{FORMAT_VERSION}: deliver it with the version that wrote it"
            )
        info = ProducerInfo(**said)
    except SpoolFormatError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SpoolFormatError(f"{path} is missing or damaged ({error!r})") from error
    if not intact:
        raise SpoolFormatError(f"{path} is damaged: its checksum does not match")
    return info


def _checksum(fields: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def this_producer(run_id: str, tracking_uri: str, rank: int | None, start_ms: int) -> ProducerInfo:
    """This process as a producer."""
    return ProducerInfo(run_id, tracking_uri, platform.node(), os.getpid(), rank, start_ms)


def escaped(name: str) -> str:
    """``name`` as one component of a path: never empty, hidden, or a way out of the folder."""
    return quote(name, safe="").replace(".", "%2E")[:200] or "%"


def open_file(path: Path, flags: int) -> int:
    """A descriptor of a regular file of this user; links are not followed.

    Raises:
        SpoolError: It is a link, not a regular file, or somebody else's.
        OSError: As :func:`os.open`.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if path.is_symlink():
            raise SpoolError(f"{path} is a link; flowbuffer follows none") from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(descriptor)
        raise SpoolError(f"{path} is not a regular file of this user")
    return descriptor


def read_file(path: Path, *, limit: int) -> bytes:
    """The content of a file, of which at most ``limit`` bytes are read."""
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size))


def write_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace a file whole: whoever reads it finds the old content or the new."""
    fresh = path.with_name(f".{path.name}.new")
    with os.fdopen(open_file(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    fresh.replace(path)


def check_private(folder: Path) -> None:
    """Refuse a folder that is not this user's alone.

    Raises:
        SpoolError: It is a link, no folder, somebody else's, or open to others.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise SpoolError(f"{folder} is not a folder (links are not followed); {_MOVE_IT}")
    if found.st_uid != os.geteuid():
        raise SpoolError(f"{folder} belongs to user id {found.st_uid}; {_MOVE_IT}")
    if found.st_mode & 0o077:
        raise SpoolError(
            f"{folder} is open to other users (mode {stat.S_IMODE(found.st_mode):04o}); "
            f"chmod 700 it, or {_MOVE_IT}"
        )


def file_system_of(path: Path) -> str:
    """The type of the file system that holds ``path``; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in lines:
        mount, _, description = line.partition(" - ")
        point = mount.split(" ")[4].encode().decode("unicode_escape")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, description.split(" ")[0]
    return kind


def _private_directory(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    check_private(folder)


def _delete(folder: Path) -> None:
    """Delete a producer's folder, and the run's when it was the last one."""
    for entry in _entries(folder):
        os.unlink(entry.path)
    folder.rmdir()
    try:
        folder.parent.rmdir()
    except OSError:
        pass  # another producer of the run is there


def _subfolders(folder: Path, *, hidden: bool = False) -> list[Path]:
    return sorted(
        Path(entry.path)
        for entry in _entries(folder)
        if entry.is_dir(follow_symlinks=False) and entry.name.startswith(".") == hidden
    )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing if it is gone."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []
