"""What a setting can be: how one is declared, read from text, and checked."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from flowbuffer.errors import SettingError

ENVIRONMENT_PREFIX = "FLOWBUFFER_"

_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def number(
    default: Any, meaning: str, *, low: float | None = None, high: float | None = None
) -> Any:
    """A setting from ``low`` to ``high``: whole, unless its default is a float."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high})


def path(default: Path | None, meaning: str) -> Any:
    """A setting that is a path, given as text, too."""
    return field(default=default, metadata={"meaning": meaning, "path": True})


def choice(default: str, choices: tuple[str, ...], meaning: str) -> Any:
    """A setting that is one of a few words."""
    return field(default=default, metadata={"meaning": meaning, "choices": choices})


def flag(default: bool | None, meaning: str) -> Any:
    """A setting that is True or False; None, too, if that is its default."""
    return field(default=default, metadata={"meaning": meaning, "flag": True})


def text(default: str, meaning: str) -> Any:
    """A setting that is any text."""
    return field(default=default, metadata={"meaning": meaning})


def variable_of(setting: str) -> str:
    """The environment variable of a setting."""
    return ENVIRONMENT_PREFIX + setting.upper()


def parsed(variable: str, annotation: str, text: str) -> Any:
    """The text of a variable as the setting's type.

    Raises:
        SettingError: It cannot be that.
    """
    parse: Callable[[str], Any]
    if annotation.startswith("bool"):
        if text.lower() not in _BOOLEANS:
            raise SettingError(f"{variable}={text!r}: allowed are {listed(_BOOLEANS)}")
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


def checked(name: str, metadata: Mapping[str, Any], default: Any, value: Any) -> Any:
    """``value`` as the setting's type.

    Raises:
        SettingError: It is not allowed; the message says what is.
    """
    said = f"{name} ({variable_of(name)}) = {value!r}"
    if value is None and default is None:
        return None
    if "choices" in metadata:
        if value not in metadata["choices"]:
            raise SettingError(f"{said}: allowed are {listed(metadata['choices'])}")
        return value
    if "flag" in metadata:
        if not isinstance(value, bool):
            raise SettingError(f"{said}: allowed are True and False")
        return value
    if "path" in metadata:
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise SettingError(f"{said}: it must be a path")
        return Path(value)
    if isinstance(default, str):
        if not isinstance(value, str):
            raise SettingError(f"{said}: it must be a str")
        return value
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


def listed(names: Any) -> str:
    """Names in a sentence."""
    return ", ".join(sorted(map(str, names)))
