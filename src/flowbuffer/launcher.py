"""Keeps a collector process at work on a spool, from the side of those that log.

The process is started with ``collector.lock`` of the spool already locked: the descriptor is handed
on to it, so no two are ever started at once. It is nobody's child and in a session of its own, so
neither the end of the job nor a signal to the job's process group ends it.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.handover import START_COLLECTOR, collector_environment
from flowbuffer.settings import Settings
from flowbuffer.spool.files import FileLock, open_file, read_file

_log = logging.getLogger("flowbuffer")

#: Has a collector look at the spool now. Whoever else gets it ignores it: that is its default.
WAKE_SIGNAL = signal.SIGURG
#: How often a logging process looks whether the collector is there, in s.
CHECK_EVERY_S = 2.0
#: A collector that is gone sooner than this, in s, has a reason to be: the next start waits.
_SHORT_LIFE_S = 10.0
_LONGEST_PAUSE_S = 60.0
_MAX_LOG_BYTES = 1 << 20
_COMMAND = (sys.executable, "-c", START_COLLECTOR)


def collector_lock(root: Path) -> Path:
    """The file that the collector process of a spool holds locked; its content is its pid, once it
    is ready to deliver."""
    return root / "collector.lock"


def wake_collector(root: Path) -> bool:
    """Have the collector process of a spool look at it now; whether there seems to be one."""
    try:
        pid = read_file(collector_lock(root), limit=20).decode()
        if re.fullmatch("[0-9]{1,10}", pid) and int(pid) > 1:
            os.kill(int(pid), WAKE_SIGNAL)
            return True
    except (OSError, OverflowError, UnicodeDecodeError):
        pass  # none yet, or none any more
    return False


class Launcher:
    """Starts the collector process of a spool whenever there is none and someone logs.

    Args:
        root: The spool.
        settings: Of the loggers here.
        tracking_uri: Of the first of them, with credentials if it has any.
    """

    def __init__(self, root: Path, settings: Settings, tracking_uri: str) -> None:
        self._root = root
        self._settings = settings
        self._uri = tracking_uri
        self._since_ms = SYSTEM_CLOCK.now_ns() // 1_000_000
        self._users: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._users_changed = threading.Event()
        self._lock = threading.Lock()
        self._started_s = float("-inf")
        self._pause_s = 0.0
        self._told = False
        self._starter: subprocess.Popen[bytes] | None = None  # forks off the collector and ends

    def join(self, tend: Callable[[], None]) -> None:
        """Someone logs: have a collector until :meth:`leave`.

        Args:
            tend: Called every now and then, as long as the collector is looked after.
        """
        self.ensure()
        with self._lock:
            self._users.append(tend)
            self._users_changed.set()
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="flowbuffer-watch", daemon=True)
                try:
                    thread.start()
                    self._thread = thread
                except RuntimeError:
                    pass  # the interpreter is ending: whoever waits looks by itself

    def leave(self, tend: Callable[[], None]) -> None:
        """Someone logs no more."""
        with self._lock:
            self._users.remove(tend)
            self._reap()

    def ensure(self) -> None:
        """Start a collector if there is none. Does not wait for it, and raises nothing."""
        now_s = SYSTEM_CLOCK.monotonic_s()
        with self._lock:
            self._reap()
            try:
                lock = FileLock.take(collector_lock(self._root), create=True)
                if lock is None:
                    if now_s - self._started_s > _SHORT_LIFE_S:
                        self._pause_s = 0.0
                elif now_s - self._started_s < self._pause_s:
                    lock.release()
                else:
                    self._started_s = now_s
                    self._pause_s = min(max(1.0, 2 * self._pause_s), _LONGEST_PAUSE_S)
                    self._start(lock)
            except Exception as error:
                if not self._told:
                    self._told = True
                    _log.warning(
                        "no collector process can be started (%s); points are delivered when "
                        "somebody waits for them, or with delivery='thread'", error,
                    )  # fmt: skip

    def _start(self, lock: FileLock) -> None:
        from flowbuffer.azureml_client import job_of_this_process

        os.ftruncate(lock.descriptor, 0)  # of the last collector's pid
        log = -1
        try:
            log = self._open_log()
            process = subprocess.Popen(
                [*_COMMAND, str(self._root), str(lock.descriptor)],
                env=collector_environment(
                    self._settings, self._uri, self._since_ms, job_of_this_process()
                ),
                pass_fds=[lock.descriptor],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",  # so that nothing in a folder of the job is imported by mistake
                start_new_session=True,
            )
        except BaseException:
            lock.release()
            raise
        finally:
            if log >= 0:
                os.close(log)
        lock.leave()
        self._starter = process

    def _reap(self) -> None:
        if self._starter is not None and self._starter.poll() is not None:
            self._starter = None

    def _open_log(self) -> int:
        path = self._root / "collector.log"
        try:
            descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError:
            return os.open(os.devnull, os.O_WRONLY)  # nobody reads it until something is wrong
        if os.fstat(descriptor).st_size > _MAX_LOG_BYTES:
            os.ftruncate(descriptor, 0)
        return descriptor

    def _watch(self) -> None:
        while True:
            self._users_changed.wait(CHECK_EVERY_S if self._users else None)
            self._users_changed.clear()
            users = list(self._users)
            if users:
                self.ensure()
            for tend in users:
                tend()


_launchers: dict[tuple[Path, Settings], Launcher] = {}
_launchers_lock = threading.Lock()


def launcher_of(settings: Settings, tracking_uri: str) -> Launcher:
    """This process's launcher of a spool; one for all loggers with the same settings."""
    root = settings.resolved_spool_dir()
    with _launchers_lock:
        if (root, settings) not in _launchers:
            _launchers[root, settings] = Launcher(root, settings, tracking_uri)
        return _launchers[root, settings]


def _forget_after_fork() -> None:
    global _launchers_lock
    _launchers_lock = threading.Lock()
    _launchers.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
