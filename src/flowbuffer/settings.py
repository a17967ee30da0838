"""Every setting, and the only place that reads the environment.

A setting has one name in both forms (``linger_s`` and ``FLOWBUFFER_LINGER_S``), a default, a
checked range and one line of explanation. Seconds are floats whose names end in ``_s``; sizes are
integers whose names end in ``_bytes``.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from flowbuffer.errors import SettingError
from flowbuffer.setting_values import (
    ENVIRONMENT_PREFIX,
    checked,
    choice,
    flag,
    listed,
    number,
    parsed,
    path,
    text,
    variable_of,
)

#: What whoever delivers goes by; the rest is the producer's business.
_OF_DELIVERY = ("linger_s", "max_batch_size", "max_in_flight", "request_timeout_s")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of this process in a distributed job; None outside one.

    Attributes:
        rank: Among all processes, from 0.
        local_rank: Among those of this machine, from 0.
        world_size: How many processes there are.
    """

    rank: int | None = None
    local_rank: int | None = None
    world_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How flowbuffer works. Immutable; every value is checked when it is made.

    Raises:
        SettingError: A value is of the wrong kind or out of range.
    """

    enabled: bool | None = flag(
        None,
        "True: MLflow's own calls are buffered, too. None: only flowbuffer's. False: every call "
        "goes straight to MLflow, synchronously; nothing is spooled.",
    )
    delivery: Literal["process", "thread", "inline"] = choice(
        "process",
        ("process", "thread", "inline"),
        "Who sends: `process`, one process for all that log to this spool, with the credentials of "
        "the environment in which it was started; `thread`, a daemon thread of this process, also "
        "with credentials that exist only in its memory; `inline`, the call itself, for debugging.",
    )
    offline: bool = flag(
        False, "True: only spool; `flowbuffer sync` delivers later, on any machine."
    )
    spool_dir: Path | None = path(
        None,
        "Where points wait for delivery: a local disk or tmpfs. "
        "Default: `flowbuffer` in the platform's state directory of the user.",
    )
    max_spool_bytes: int = number(
        2 << 30, "The most that the spool may take on the disk, in bytes.", low=1 << 20
    )
    when_full: Literal["block", "drop_newest", "raise"] = choice(
        "block",
        ("block", "drop_newest", "raise"),
        "A full spool: `block` the call up to `block_timeout_s`, then raise; "
        "`drop_newest` and count it; or `raise` at once.",
    )
    block_timeout_s: float = number(
        30.0, "How long a call may wait for room in a full spool, in seconds.", low=0
    )
    linger_s: float = number(
        0.5,
        "How old a point may get before its batch leaves half full, in seconds.",
        low=0,
        high=3600,
    )
    max_batch_size: int = number(
        1000,
        "The most metrics in one request. MLflow's servers refuse more than 1000.",
        low=1,
        high=1000,
    )
    max_in_flight: int | None = number(
        None,
        "The most requests on their way at once. Default: 1 for SQLite files, 4 elsewhere.",
        low=1,
        high=64,
    )
    request_timeout_s: float = number(
        60.0,
        "How long one HTTP request may take before it is sent again, in seconds.",
        low=0.1,
        high=86_400,
    )
    durability: Literal["process", "power"] = choice(
        "process",
        ("process", "power"),
        "What a returned point survives: `process`, the death of any process; "
        "`power`, the loss of power too (one disk write per call, about 1000 times slower).",
    )
    shutdown_timeout_s: float = number(
        60.0, "How long the end of a job or of a run may wait for delivery, in seconds.", low=0
    )
    read_timeout_s: float = number(
        30.0,
        "With `enabled=True`: how long a call that reads a run (`mlflow.get_run`, ...) may wait "
        "for what was logged to it, in seconds; 0 reads at once.",
        low=0,
    )
    drain_timeout_s: float = number(
        3600.0,
        "How long the collector process goes on by itself after the last job ended, in seconds.",
        low=0,
    )
    ranks: str = text(
        "all",
        "Which processes of a distributed job log: `all`, or ranks like `0` or `0,4`. In the "
        "others every call returns at once.",
    )
    key_template: str = text(
        "{key}",
        "The key under which a point is stored, of `{key}`, `{rank}`, `{local_rank}` and "
        "`{world_size}`, like `{key}/rank{rank}`.",
    )
    strict: bool = flag(
        True,
        "What the caller got wrong (a value that is no number, an invalid key): True raises at "
        "the call; False counts it, warns once per key, and goes on.",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = checked(item.name, item.metadata, item.default, getattr(self, item.name))
            object.__setattr__(self, item.name, value)
        self.logs(0)
        self.stored_key("a key", Place())

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Settings from keywords, else from ``FLOWBUFFER_*`` variables, else the defaults.

        Args:
            environ: The variables to read; the process's own by default. An empty value counts
                as unset.
            overrides: Settings that win over the environment.

        Raises:
            SettingError: A value is out of range, or a keyword is not a setting. A variable
                that is not one is warned of: it may be of another version.
        """
        environ = os.environ if environ is None else environ
        names = {item.name: item for item in fields(cls)}
        values: dict[str, Any] = {}
        for variable, said in environ.items():
            if not variable.startswith(ENVIRONMENT_PREFIX) or not said:
                continue
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if name not in names:
                known = listed(variable_of(setting) for setting in names)
                warnings.warn(f"{variable} is ignored: the settings are {known}", stacklevel=2)
                continue
            values[name] = parsed(variable, str(names[name].type), said)
        unknown = overrides.keys() - names.keys()
        if unknown:
            raise SettingError(
                f"{listed(unknown)} is not a setting of flowbuffer; "
                f"the settings are {listed(names)}"
            )
        values.update(overrides)
        return cls(**values)

    def with_changes(self, **changes: Any) -> Settings:
        """A copy in which the named settings are other."""
        return replace(self, **changes)

    def logs(self, rank: int | None) -> bool:
        """Whether the process of this rank logs (``ranks``); outside a distributed job it does."""
        if self.ranks == "all":
            return True
        try:
            chosen = {int(rank) for rank in self.ranks.split(",")}
        except ValueError:
            chosen = {-1}
        if min(chosen) < 0:
            raise SettingError(
                f"ranks ({variable_of('ranks')}) = {self.ranks!r}: "
                "it must be all, or ranks from 0 with commas between them"
            )
        return rank is None or rank in chosen

    def stored_key(self, key: str, place: Place) -> str:
        """``key`` as ``key_template`` has it; outside a distributed job the rank is 0 of 1."""
        try:
            stored = self.key_template.format(
                key=key,
                rank=place.rank or 0,
                local_rank=place.local_rank or 0,
                world_size=place.world_size or 1,
            )
            if key not in stored:
                raise ValueError("{key} is missing")
            return stored
        except (ValueError, LookupError, AttributeError) as error:
            raise SettingError(
                f"key_template ({variable_of('key_template')}) = {self.key_template!r}: it must "
                f"have {{key}}, and may have {{rank}}, {{local_rank}}, {{world_size}} ({error!r})"
            ) from None

    def of_delivery(self) -> dict[str, Any]:
        """What whoever delivers this process's points goes by, as JSON takes it."""
        return {name: getattr(self, name) for name in _OF_DELIVERY}

    def with_delivery(self, said: Mapping[str, Any]) -> Settings:
        """A copy that delivers as :meth:`of_delivery` said, elsewhere.

        Raises:
            SettingError: A value is out of range.
        """
        return replace(self, **{name: said[name] for name in _OF_DELIVERY if name in said})

    def resolved_spool_dir(self) -> Path:
        """``spool_dir`` as an absolute path, the platform's state directory when it is unset."""
        if self.spool_dir is not None:
            return self.spool_dir.expanduser().absolute()
        import platformdirs

        return Path(platformdirs.user_state_dir("flowbuffer", appauthor=False))


def environment_run_id() -> str | None:
    """The run that ``MLFLOW_RUN_ID`` names, as a job scheduler sets it."""
    return os.environ.get("MLFLOW_RUN_ID") or None


def environment_tracking_uri() -> str | None:
    """What ``MLFLOW_TRACKING_URI`` says."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


# os.environ turns text to bytes at every look, and for a variable that is not there raises and
# catches KeyError: 0.8 us, for a look at each call. What is under it is a plain dict.
_ENVIRON: Any = getattr(os.environ, "_data", os.environ)
_ASYNC_LOGGING = "MLFLOW_ENABLE_ASYNC_LOGGING"
_ASYNC_LOGGING_KEY = os.environ.encodekey(_ASYNC_LOGGING) if _ENVIRON is not os.environ else ""


def says_async_logging() -> bool:
    """Whether ``MLFLOW_ENABLE_ASYNC_LOGGING`` says anything, be it yes or no."""
    return (_ASYNC_LOGGING_KEY or _ASYNC_LOGGING) in _ENVIRON


def environment_experiment() -> tuple[str | None, str | None]:
    """What ``MLFLOW_EXPERIMENT_ID`` and ``MLFLOW_EXPERIMENT_NAME`` say."""
    environ = os.environ
    return environ.get("MLFLOW_EXPERIMENT_ID") or None, environ.get(
        "MLFLOW_EXPERIMENT_NAME"
    ) or None


#: (rank, local rank, world size) of torchrun and Ray Train, Open MPI, MPICH and Slurm, as their
#: documentation names the variables.
_PLACES = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)


def environment_place() -> Place:
    """The place of this process in a distributed job, from what started it."""

    def whole(variable: str) -> int | None:
        said = os.environ.get(variable, "")
        return int(said) if said.isdecimal() else None

    for rank, local_rank, world_size in _PLACES:
        if whole(rank) is not None:
            return Place(
                rank=whole(rank), local_rank=whole(local_rank), world_size=whole(world_size)
            )
    return Place()


def environment_secrets() -> set[str]:
    """The values of the variables whose names say that they are secret."""
    return {value for name, value in os.environ.items() if _SECRET.search(name)}


_SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|(?:API|ACCESS|ACCOUNT|STORAGE|PRIVATE)_KEY$", re.I)

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
    "import os, sys; sys.path += os.environ['_FLOWBUFFER_PATH'].split(os.pathsep); "
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
    environment = {**os.environ, **_QUIET_MLFLOW, **_ONE_THREAD}
    environment |= {_HANDED_ON: tracking_uri, _SINCE: str(since_ms)}
    environment["_FLOWBUFFER_PATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    environment = {name: value for name, value in environment.items() if value}
    for item in fields(settings):
        value = getattr(settings, item.name)
        environment.pop(variable_of(item.name), None)
        if value is not None:
            environment[variable_of(item.name)] = str(value)
    environment.pop(variable_of("enabled"), None)  # there are no calls to be buffered
    if tracking_uri.startswith("azureml:"):
        # What its plugin must find to act as the job.
        run_id, token = job or (os.environ.get("AZUREML_RUN_ID"), None)
        named = {"MLFLOW_RUN_ID": run_id, "MLFLOW_TRACKING_TOKEN": token}
        environment |= {name: value for name, value in named.items() if value}
        environment["MLFLOW_TRACKING_URI"] = tracking_uri
    return {**environment, "PYTHONSAFEPATH": "1"}


def handed_on_uri() -> str | None:
    """In a collector process: the tracking URI of the producer that started it."""
    return os.environ.get(_HANDED_ON) or None


def handed_on_ms() -> int:
    """In a collector process: since when what started it logs, in ms since the epoch."""
    return int(os.environ.get(_SINCE) or 0)
