"""Every setting, and the only place that reads the environment.

A setting has one name in both forms (``linger_s`` and ``FLOWBUFFER_LINGER_S``), a default, a
checked range and one line of explanation. Seconds are floats whose names end in ``_s``; sizes are
integers whose names end in ``_bytes``.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from flowbuffer.errors import SettingError

ENVIRONMENT_PREFIX = "FLOWBUFFER_"

_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _setting(
    default: Any, meaning: str, *, low: float | None = None, high: float | None = None
) -> Any:
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high})


def _choice(default: str, choices: tuple[str, ...], meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How flowbuffer works. Immutable; every value is checked when it is made.

    Raises:
        SettingError: A value is of the wrong kind or out of range.
    """

    enabled: bool = _setting(
        True, "False: every call goes straight to MLflow, synchronously; nothing is spooled."
    )
    delivery: Literal["thread", "inline"] = _choice(
        "thread",
        ("thread", "inline"),
        "Who sends: `thread`, a daemon thread of this process; `inline`, the call itself, "
        "for debugging.",
    )
    spool_dir: Path | None = _setting(
        None,
        "Where points wait for delivery: a local disk or tmpfs. "
        "Default: `flowbuffer` in the platform's state directory of the user.",
    )
    max_spool_bytes: int = _setting(
        2 << 30, "The most that the spool may take on the disk, in bytes.", low=1 << 20
    )
    when_full: Literal["block", "drop_newest", "raise"] = _choice(
        "block",
        ("block", "drop_newest", "raise"),
        "A full spool: `block` the call up to `block_timeout_s`, then raise; "
        "`drop_newest` and count it; or `raise` at once.",
    )
    block_timeout_s: float = _setting(
        30.0, "How long a call may wait for room in a full spool, in seconds.", low=0
    )
    linger_s: float = _setting(
        0.5,
        "How old a point may get before its batch leaves half full, in seconds.",
        low=0,
        high=3600,
    )
    max_batch_size: int = _setting(
        1000,
        "The most metrics in one request. MLflow's servers refuse more than 1000.",
        low=1,
        high=1000,
    )
    max_in_flight: int | None = _setting(
        None,
        "The most requests on their way at once. Default: 1 for SQLite files, 4 elsewhere.",
        low=1,
        high=64,
    )
    request_timeout_s: float = _setting(
        60.0, "How long one HTTP request may take before it is sent again, in seconds.", low=0.1
    )
    durability: Literal["process", "power"] = _choice(
        "process",
        ("process", "power"),
        "What a returned point survives: `process`, the death of any process; "
        "`power`, the loss of power too (one disk write per call, about 1000 times slower).",
    )
    shutdown_timeout_s: float = _setting(
        60.0, "How long the end of a job or of a run may wait for delivery, in seconds.", low=0
    )
    strict: bool = _setting(
        True,
        "What the caller got wrong (a value that is no number, an invalid key): True raises at "
        "the call; False counts it, warns once per key, and goes on.",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = _checked(item.name, item.metadata, item.default, getattr(self, item.name))
            object.__setattr__(self, item.name, value)

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
        for variable, text in environ.items():
            if not variable.startswith(ENVIRONMENT_PREFIX) or not text:
                continue
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if name not in names:
                known = _listed(variable_of(setting) for setting in names)
                warnings.warn(f"{variable} is ignored: the settings are {known}", stacklevel=2)
                continue
            values[name] = _parsed(variable, str(names[name].type), text)
        unknown = overrides.keys() - names.keys()
        if unknown:
            raise SettingError(
                f"{_listed(unknown)} is not a setting of flowbuffer; "
                f"the settings are {_listed(names)}"
            )
        values.update(overrides)
        return cls(**values)

    def with_changes(self, **changes: Any) -> Settings:
        """A copy in which the named settings are other."""
        return replace(self, **changes)

    def resolved_spool_dir(self) -> Path:
        """``spool_dir`` as an absolute path, the platform's state directory when it is unset."""
        if self.spool_dir is not None:
            return self.spool_dir.expanduser().absolute()
        import platformdirs

        return Path(platformdirs.user_state_dir("flowbuffer", appauthor=False))


def variable_of(setting: str) -> str:
    """The environment variable of a setting."""
    return ENVIRONMENT_PREFIX + setting.upper()


def environment_run_id() -> str | None:
    """The run that ``MLFLOW_RUN_ID`` names, as a job scheduler sets it."""
    return os.environ.get("MLFLOW_RUN_ID") or None


def environment_experiment() -> tuple[str | None, str | None]:
    """What ``MLFLOW_EXPERIMENT_ID`` and ``MLFLOW_EXPERIMENT_NAME`` say."""
    environ = os.environ
    return environ.get("MLFLOW_EXPERIMENT_ID") or None, environ.get(
        "MLFLOW_EXPERIMENT_NAME"
    ) or None


def environment_rank() -> int | None:
    """The rank of this process among its job's, from torchrun, MPI or Slurm; None alone."""
    for variable in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        text = os.environ.get(variable, "")
        if text.isdecimal():
            return int(text)
    return None


def _parsed(variable: str, annotation: str, text: str) -> Any:
    """The text of a variable as the setting's type; text that cannot be is left for the check."""
    parse: Callable[[str], Any]
    if annotation == "bool":
        if text.lower() not in _BOOLEANS:
            raise SettingError(f"{variable}={text!r}: allowed are {_listed(_BOOLEANS)}")
        return _BOOLEANS[text.lower()]
    if annotation.startswith("int"):
        parse, kind = int, "a whole number"
    elif annotation.startswith("float"):
        parse, kind = float, "a number"
    else:
        return text
    try:
        return parse(text)
    except ValueError:
        raise SettingError(f"{variable}={text!r}: it must be {kind}") from None


def _checked(name: str, metadata: Mapping[str, Any], default: Any, value: Any) -> Any:
    """``value`` as the setting's type, or a :class:`SettingError` that says what is allowed."""
    said = f"{name} ({variable_of(name)}) = {value!r}"
    if value is None and default is None:
        return None
    if "choices" in metadata:
        if value not in metadata["choices"]:
            raise SettingError(f"{said}: allowed are {_listed(metadata['choices'])}")
        return value
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise SettingError(f"{said}: allowed are True and False")
        return value
    if name == "spool_dir":
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise SettingError(f"{said}: it must be a path")
        return Path(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SettingError(f"{said}: it must be a number")
    if not math.isfinite(value):
        raise SettingError(f"{said}: it must be finite")
    if not isinstance(default, float):
        if value != int(value):
            raise SettingError(f"{said}: it must be a whole number")
        value = int(value)
    else:
        value = float(value)
    low, high = metadata["low"], metadata["high"]
    if not (low is None or value >= low) or not (high is None or value <= high):
        above = "" if high is None else f" and at most {high}"
        raise SettingError(f"{said}: it must be at least {low}{above}")
    return value


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))
