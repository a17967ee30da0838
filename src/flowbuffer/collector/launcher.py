"""Keeps a collector process at work on a spool, from the side of those that log.

The process is started with ``collector.lock`` of the spool already locked: the descriptor is handed
on to it, so no two are ever started at once. It is nobody's child and in a session of its own, so
neither the end of the job nor a signal to the job's process group ends it.
"""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.collector.handover import (
    START_COLLECTOR,
    collector_environment,
    interpreter,
    take_collector_lock,
)
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.files import FileLock, OwnedFile, opened
from flowbuffer.spool.mark import is_marked

_log = logging.getLogger("flowbuffer")

#: A collector that is gone sooner than this, in s, has a reason to be: the next start waits.
_SHORT_LIFE_S = 10.0
_LONGEST_PAUSE_S = 60.0
_MAX_LOG_BYTES = 1 << 20
_SHELL = "/bin/sh"


class Launcher:
    """Starts the collector process of a spool whenever there is none. One thread may call it.

    Args:
        root: The spool.
        settings: Of the loggers here.
        tracking_uri: Of the first of them, with credentials if it has any.
        environment: The fingerprint of this process's.
    """

    def __init__(self, root: Path, settings: Settings, tracking_uri: str, environment: str) -> None:
        self._environment = environment
        self._root = root
        self._settings = settings
        self._uri = tracking_uri
        self._since_ms = SYSTEM_CLOCK.now_ns() // 1_000_000
        self._started_s = float("-inf")
        self._pause_s = 0.0
        self._told = False

    def ensure(self) -> None:
        """Start a collector if there is none. Does not wait for it, and raises nothing."""
        now_s = SYSTEM_CLOCK.monotonic_s()
        try:
            if not is_marked(self._root):
                return  # it was wiped, and what is there now is somebody else's
            lock = take_collector_lock(self._root, self._environment)
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
        from flowbuffer.backends.azureml_requests import job_of_this_process

        try:
            os.ftruncate(lock.descriptor, 0)  # of the last collector's pid
            log = self._open_log()
            starter = subprocess.Popen(
                [*_forking(), str(self._root), str(lock.descriptor), self._environment],
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
            starter.wait()
            log.close()
        except BaseException:
            lock.release()
            raise
        lock.leave()

    def _open_log(self) -> OwnedFile:
        path = self._root / "collector.log"
        try:
            log = opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError:
            return OwnedFile(os.devnull, "w")  # nobody reads it until something is wrong
        if os.fstat(log.fileno()).st_size > _MAX_LOG_BYTES:
            os.ftruncate(log.fileno(), 0)
        return log


def _forking() -> list[str]:
    """The command that forks off a collector process and ends within a few ms: what the program's
    own ``os.wait()`` would find of it is waited for here, before anybody else can.

    Raises:
        FileNotFoundError: There is no Python to run it.
    """
    python = interpreter()
    if python is None:
        raise FileNotFoundError("there is no Python interpreter but this program itself")
    collector = [python, "-c", START_COLLECTOR]
    if os.access(_SHELL, os.X_OK):
        return [_SHELL, "-c", '"$@" &', _SHELL, *collector]
    forking = "import os, sys; os.fork() or os.execv(sys.argv[1], sys.argv[1:])"
    return [python, "-I", "-S", "-c", forking, *collector]
