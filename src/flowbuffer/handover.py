"""What passes between those that log and the collector process: the program that it is, its
environment, its lock, its pid, and what wakes it."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from flowbuffer.environment import inherited, variable
from flowbuffer.setting_values import variable_of
from flowbuffer.settings import Settings
from flowbuffer.spool.files import read_file

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
#: How a tracking URI with credentials comes to a collector process: by its environment, which no
#: other user can read, and never by the disk.
_HANDED_ON = "_FLOWBUFFER_TRACKING_URI"
_SINCE = "_FLOWBUFFER_SINCE_MS"


#: What the interpreter of a collector process runs. Modules are looked for where this process looks
#: for them, but last of all: what lies beside a job is not meant for the collector.
START_COLLECTOR = (
    "import os, sys; sys.path += os.environ.pop('_FLOWBUFFER_PATH').split(os.pathsep); "
    "from flowbuffer.collector_process import main; main()"
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
    environment |= {_HANDED_ON: tracking_uri, _SINCE: str(since_ms)}
    environment["_FLOWBUFFER_PATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    environment = {name: value for name, value in environment.items() if value}
    for name, text in settings.variables().items():
        environment.pop(name, None)
        if text is not None and name != variable_of("enabled"):  # no calls are buffered there
            environment[name] = text
    if tracking_uri.startswith("azureml:"):
        # What its plugin must find to act as the job.
        run_id, token = job or (environment.get("AZUREML_RUN_ID"), None)
        named = {"MLFLOW_RUN_ID": run_id, "MLFLOW_TRACKING_TOKEN": token}
        environment |= {name: value for name, value in named.items() if value}
        environment["MLFLOW_TRACKING_URI"] = tracking_uri
    return {**environment, "PYTHONSAFEPATH": "1"}


def handed_on_uri() -> str | None:
    """In a collector process: the tracking URI of the producer that started it."""
    return variable(_HANDED_ON) or None


def handed_on_ms() -> int:
    """In a collector process: since when what started it logs, in ms since the epoch."""
    return int(variable(_SINCE) or 0)


#: How interpreters are called. What is called otherwise is a program that has Python in it, and
#: would do its own work a second time if it were started.
_INTERPRETER = re.compile(r"(python|pypy|graalpy)[\d.]*(t|d|td|-dbg|w)?(\.exe)?", re.IGNORECASE)


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
