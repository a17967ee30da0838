"""Files as a spool uses them: of this user alone, no links, replaced whole, locked by flock."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import os
import stat
import weakref
from pathlib import Path

from flowbuffer.errors import SpoolError
from flowbuffer.forks import in_child

#: What to do about a folder that cannot be a spool.
MOVE_IT = "set FLOWBUFFER_SPOOL_DIR (spool_dir) to a folder on a local disk or tmpfs"


class OwnedFile(io.FileIO):
    """An open file that is closed, without a word, at the latest when nobody refers to it any more:
    a call that is interrupted leaves no descriptor open, and no lock taken."""

    def __del__(self) -> None:
        self.close()


def opened(path: Path, flags: int) -> OwnedFile:
    """A regular file of this user; links are not followed.

    Args:
        path: Where it is.
        flags: As of :func:`os.open`; a file that is made is this user's alone.

    Raises:
        SpoolError: It is a link, not a regular file, somebody else's, or open to others.
        OSError: As :func:`os.open`.
    """
    try:
        try:
            file = _opened(path, flags)
        except OSError as error:
            if error.errno != errno.EMFILE or not _spare:
                raise
            _spare.pop().close()
            file = _opened(path, flags)
    except OSError as error:
        if path.is_symlink():
            raise SpoolError(f"{path} is a link; flowbuffer follows none") from error
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise SpoolError(f"{path} is not a regular file") from error
        raise
    if not _spare:
        _have_spare()
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        file.close()
        raise SpoolError(f"{path} is not a regular file of this user")
    if found.st_mode & 0o077:
        file.close()
        raise SpoolError(f"{path} is open to other users; chmod 600 it")
    return file


def _opened(path: Path, flags: int) -> OwnedFile:
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    return OwnedFile(path, opener=lambda name, _: os.open(name, flags, 0o600))


#: A descriptor that is given up where the program has used all others, so that logging goes on.
_spare: list[OwnedFile] = []


def _have_spare() -> None:
    try:
        _spare.append(OwnedFile(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)))
    except OSError:
        pass  # there will be one when the program has closed some of its own


class FileLock:
    """An exclusive flock on a file, held until :meth:`release` or the death of the process.

    A forked child does not keep it: there the descriptor is closed at once, so that the lock goes
    with the parent.

    Args:
        file: Locked already, or about to be.
    """

    def __init__(self, file: OwnedFile) -> None:
        self._file = file
        _held_locks.add(self)

    @property
    def descriptor(self) -> int:
        """What the system calls the locked file; -1 once it is released."""
        return -1 if self._file.closed else self._file.fileno()

    def is_at(self, path: Path) -> bool:
        """Whether the locked file is the one at ``path``.

        Raises:
            OSError: It cannot be looked at now.
            ValueError: The lock was released.
        """
        own = os.fstat(self.descriptor)
        try:
            return os.path.samestat(own, os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return False

    @classmethod
    def take(cls, path: Path, *, create: bool = False) -> FileLock | None:
        """The lock of the file at ``path``, or None if another process holds it or it is gone."""
        try:
            lock = cls(opened(path, os.O_RDWR | (os.O_CREAT if create else 0)))
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.descriptor).st_nlink:
                return lock
        except BlockingIOError:
            pass
        except BaseException:  # else it would be held, by nobody, until this process ends
            lock.release()
            raise
        lock.leave()
        return None

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether a process holds the lock of the file at ``path``. Any number may ask at once.

        Raises:
            SpoolError, OSError: As :func:`opened`, but for a file that is not there.
        """
        try:
            file = opened(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        with file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(file.fileno(), fcntl.LOCK_UN)  # a child may have the descriptor, too
                return False
            except BlockingIOError:
                return True

    def release(self) -> None:
        """Let go; doing so again does nothing."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # a child may have the descriptor, too
        except ValueError:
            pass  # it was released before, or is by a signal handler just now
        self.leave()

    def leave(self) -> None:
        """Close the descriptor; the lock stays with the process that inherited it, if one did."""
        self._file.close()
        _held_locks.discard(self)


_held_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _close_inherited_locks() -> None:
    for lock in list(_held_locks):
        lock.leave()


in_child("spool.files", _close_inherited_locks)


def read_file(path: Path, *, limit: int) -> bytes:
    """The content of a file, of which at most ``limit`` bytes are read."""
    with opened(path, os.O_RDONLY) as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size))


#: Tells apart the unfinished files of calls that run at the same time, or in one another.
_serials = itertools.count()


def write_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace a file whole: whoever reads it finds the old content or the new.

    Raises:
        SpoolError: What is there is no file, so it is somebody's.
        OSError: It cannot be written.
    """
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise SpoolError(f"{path} is not a regular file, and is not replaced")
    fresh = path.with_name(f".{path.name}.{next(_serials)}.new")
    try:
        with opened(fresh, os.O_WRONLY | os.O_CREAT) as file:
            os.ftruncate(file.fileno(), 0)  # only now that it is known to be a private file
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
            if durable:
                os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def check_own(folder: Path) -> None:
    """Refuse what is not a folder of this user.

    Raises:
        SpoolError: It is a link, no folder, or somebody else's.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise SpoolError(f"{folder} is not a folder (links are not followed); {MOVE_IT}")
    if found.st_uid != os.geteuid():
        raise SpoolError(f"{folder} belongs to user id {found.st_uid}; {MOVE_IT}")


def check_private(folder: Path) -> None:
    """Refuse a folder that is not this user's alone.

    Raises:
        SpoolError: It is a link, no folder, somebody else's, or open to others.
    """
    check_own(folder)
    mode = stat.S_IMODE(folder.lstat().st_mode)
    if mode & 0o077:
        raise SpoolError(
            f"{folder} is open to other users (mode {mode:04o}); chmod -R go-rwx it, or {MOVE_IT}"
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
