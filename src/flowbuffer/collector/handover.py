"""What passes between those that log and the collector process: the program that it is, its
environment, its lock, its pid, and what wakes it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path

from flowbuffer.backends.uris import is_azureml
from flowbuffer.errors import SpoolError
from flowbuffer.settings.environment import environment_of_delivery, handed_on, inherited
from flowbuffer.settings.settings import Settings
from flowbuffer.settings.values import variable_of
from flowbuffer.spool.files import FileLock, read_file, write_file

#: Has a collector look at the spool now. Whoever else gets it ignores it: that is its default.
WAKE_SIGNAL = signal.SIGURG

#: MLflow's own retries, batching and recording would multiply ours; in the collector they are off.
_QUIET_MLFLOW = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_RUN_ID": "",
}
#: The libraries under NumPy would start a thread per core.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
#: What the interpreter of a collector process runs. Modules are looked for where this process looks
#: for them, but last of all: what lies beside a job is not meant for the collector.
START_COLLECTOR = (
    "import os, sys; sys.path += os.environ.pop('_FLOWBUFFER_PATH').split(os.pathsep); "
    "from flowbuffer.collector.process import main; main()"
)


def collector_environment(
    settings: Settings, tracking_uri: str, since_ms: int, job: tuple[str, str] | None = None
) -> dict[str, str]:
    """The environment of a collector process: this one's, with its credentials, and the settings.

    Args:
        settings: What the collector goes by where a producer says nothing.
        tracking_uri: Of the producer that starts it, with its credentials.
        since_ms: When this process began to log, in ms since the epoch.
        job: The run and the present token of the job on Azure ML that this process is part of.
    """
    environment = {**inherited(), **_QUIET_MLFLOW, **_ONE_THREAD}
    environment |= handed_on(tracking_uri, since_ms)
    environment["_FLOWBUFFER_PATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    environment = {name: value for name, value in environment.items() if value}
    for name, text in settings.variables().items():
        environment.pop(name, None)
        if text is not None and name != variable_of("enabled"):  # no calls are buffered there
            environment[name] = text
    if is_azureml(tracking_uri):
        # What its plugin must find to act as the job.
        run_id, token = job or (environment.get("AZUREML_RUN_ID"), None)
        named = {"MLFLOW_RUN_ID": run_id, "MLFLOW_TRACKING_TOKEN": token}
        environment |= {name: value for name, value in named.items() if value}
        environment["MLFLOW_TRACKING_URI"] = tracking_uri
    return {**environment, "PYTHONSAFEPATH": "1"}


#: How interpreters are called. What is called otherwise is a program that has Python in it, and
#: would do its own work a second time if it were started.
_INTERPRETER = re.compile(r"(python|pypy|graalpy)[\d.]*(t|d|td|-dbg|w)?(\.exe)?", re.IGNORECASE)


def fingerprint() -> str:
    """Stands for what this process needs to reach its servers: its Python, and the environment. Two
    jobs with the same one can have the same collector process. No secret's value is in it."""
    said = [sys.prefix, sys.version_info[:2], environment_of_delivery()]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]


def collector_lock(root: Path, environment: str = "") -> Path:
    """The file that a collector process of a spool holds locked; its content is its pid, once it
    is ready to deliver. The first one has ``collector.lock``, whatever its environment is; one with
    another environment that works beside it has a file that is named after that."""
    return root / (f"collector-{environment}.lock" if environment else "collector.lock")


def take_collector_lock(root: Path, environment: str) -> FileLock | None:
    """The lock for a new collector process with this environment; None if there is one."""
    own = collector_lock(root, environment)
    lock = FileLock.take(collector_lock(root), create=True)
    if lock is None:
        return None if _is_first(root, environment) else FileLock.take(own, create=True)
    if FileLock.is_held(own):
        lock.release()
        return None
    write_file(root / _FIRST, environment.encode())
    return lock


def same_environment(environment: str, other: str) -> bool:
    """Whether these fingerprints are of the same environment; one that says nothing is of any."""
    return environment == other or not (environment and other)


def collector_works(root: Path, environment: str) -> bool:
    """Whether there is a collector process with this environment."""
    if FileLock.is_held(collector_lock(root, environment)):
        return True
    return _is_first(root, environment) and FileLock.is_held(collector_lock(root))


def wake_collector(root: Path, environment: str = "") -> bool:
    """Have the collector process of a spool look at it now; whether there seems to be one."""
    named = "" if _is_first(root, environment) else environment
    try:
        pid = read_file(collector_lock(root, named), limit=20).decode()
        if re.fullmatch("[0-9]{1,10}", pid) and int(pid) > 1:
            os.kill(int(pid), WAKE_SIGNAL)
            return True
    except (OSError, OverflowError, UnicodeDecodeError):
        pass  # none yet, or none any more
    return False


#: The fingerprint of the environment of the collector process that has ``collector.lock``.
_FIRST = "collector.environment"


def _is_first(root: Path, environment: str) -> bool:
    try:
        return read_file(root / _FIRST, limit=100).decode() in ("", environment)
    except FileNotFoundError:
        return True
    except (OSError, SpoolError, UnicodeDecodeError):
        return False


def interpreter() -> str | None:
    """The Python that runs a collector process; None where there is none but this program itself,
    frozen (PyInstaller, Nuitka, ...) or with Python embedded (uWSGI, ...)."""
    main = sys.modules.get("__main__")
    if (
        getattr(sys, "frozen", False)
        or hasattr(main, "__compiled__")
        or "__compiled__" in globals()
    ):
        return None
    program = sys.executable or ""
    is_one = _INTERPRETER.fullmatch(os.path.basename(program)) is not None
    return program if is_one and os.access(program, os.X_OK) else None
