"""The only reader of the environment: what it says of settings, and what whatever started this
process says of the job that it is part of."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flowbuffer.settings.values import ENVIRONMENT_PREFIX, nearest, variable_of


@dataclass(frozen=True, kw_only=True)
class JobPlace:
    """The place of this process in a distributed job; None outside one.

    Attributes:
        rank: Among all processes, from 0.
        local_rank: Among those of this machine, from 0.
        world_size: How many processes there are.
    """

    rank: int | None = None
    local_rank: int | None = None
    world_size: int | None = None


def inherited() -> dict[str, str]:
    """A copy of the environment."""
    return dict(os.environ)


def variable(name: str) -> str | None:
    """The value of a variable; None if it is not set, or empty."""
    return os.environ.get(name) or None


def said_of_settings(
    settings: Collection[str], environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What ``FLOWBUFFER_*`` variables say of these settings, by setting. An empty value says
    nothing.

    A variable of flowbuffer's that is none of them is warned of, once in a process: it may be
    misspelt, or of another version.

    Args:
        settings: The names of all settings.
        environ: The variables; the process's own by default.
    """
    said = _said(environ)
    for name in said.keys() - set(settings):
        if name not in _told:
            _told.add(name)
            warnings.warn(_unknown(name, settings), stacklevel=4)
    return {name: text for name, text in said.items() if name in settings}


_told: set[str] = set()


def misspelt(settings: Collection[str]) -> list[str]:
    """Words for each variable of flowbuffer's that is none of these settings."""
    return [_unknown(name, settings) for name in _said(None) if name not in settings]


def _said(environ: Mapping[str, str] | None) -> dict[str, str]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): text
        for name, text in (os.environ if environ is None else environ).items()
        if name.startswith(ENVIRONMENT_PREFIX) and text and name != _SERVER
    }


#: It says what MLflow's server does (``dropin/plugin.py``), and nothing of who logs.
_SERVER = "FLOWBUFFER_SERVER"


def _unknown(name: str, settings: Collection[str]) -> str:
    variable = variable_of(name)
    return f"{variable} is ignored: {nearest(variable, settings)}"


def environment_run_id() -> str | None:
    """The run that ``MLFLOW_RUN_ID`` names, as a job scheduler sets it."""
    return variable("MLFLOW_RUN_ID")


def environment_tracking_uri() -> str | None:
    """What ``MLFLOW_TRACKING_URI`` says."""
    return variable("MLFLOW_TRACKING_URI")


#: How a tracking URI with credentials comes to a collector process: by its environment, which no
#: other user can read, and never by the disk.
_HANDED_ON = "_FLOWBUFFER_TRACKING_URI"
_SINCE = "_FLOWBUFFER_SINCE_MS"


def handed_on(tracking_uri: str, since_ms: int) -> dict[str, str]:
    """The variables by which a collector process is told what started it: the tracking URI, with
    its credentials, of a producer that logs since then (ms since the epoch)."""
    return {_HANDED_ON: tracking_uri, _SINCE: str(since_ms)}


def handed_on_uri() -> str | None:
    """In a collector process: the tracking URI of the producer that started it."""
    return variable(_HANDED_ON)


def handed_on_ms() -> int:
    """In a collector process: since when what started it logs, in ms since the epoch."""
    return int(variable(_SINCE) or 0)


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
    return variable("MLFLOW_EXPERIMENT_ID"), variable("MLFLOW_EXPERIMENT_NAME")


#: (rank, local rank, world size) of torchrun and Ray Train, Open MPI, MPICH and Slurm, as their
#: documentation names the variables.
_PLACES = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)


def environment_job_place() -> JobPlace:
    """The place of this process in a distributed job, from what started it."""

    def whole(name: str) -> int | None:
        said = variable(name) or ""
        return int(said) if said.isdecimal() else None

    for rank, local_rank, world_size in _PLACES:
        if whole(rank) is not None:
            return JobPlace(
                rank=whole(rank), local_rank=whole(local_rank), world_size=whole(world_size)
            )
    return JobPlace()


def environment_secrets() -> set[str]:
    """The values of the variables whose names say that they are secret."""
    return {value for name, value in os.environ.items() if _SECRET.search(name)}


def environment_of_delivery() -> dict[str, str]:
    """The variables on which it depends what servers can be reached from here, and as whom. Of a
    secret only that it is there: no value of one, nor anything that is made of it, is given out."""
    return {
        name: "" if _SECRET.search(name) or "_KEY" in name else _USER_INFO.sub("", value)
        for name, value in os.environ.items()
        if _OF_DELIVERY.fullmatch(name) and value
    }


_OF_DELIVERY = re.compile(
    r"PYTHONPATH|PYTHONHOME"
    r"|MLFLOW_(?!TRACKING_URI$)(?:TRACKING|MYSQL_SSL|SQLALCHEMYSTORE)_.*"
    r"|(?:HTTPS?|ALL|NO)_PROXY|(?:REQUESTS|CURL)_CA_BUNDLE|SSL_CERT_(?:FILE|DIR)"
    r"|AWS_(?!BATCH_|LAMBDA_|EXECUTION_).*|(?:AZURE|GOOGLE|CLOUDSDK|DATABRICKS)_.*|PG[A-Z]+",
    re.I,
)
_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")
_SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|(?:API|ACCESS|ACCOUNT|STORAGE|PRIVATE)_KEY$", re.I)
