"""What a setting can be: a class for each kind, which reads it from text and checks it."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any, overload

from flowbuffer.errors import SettingError

ENVIRONMENT_PREFIX = "FLOWBUFFER_"

#: What counts as yes and as no in a variable, in any case of the letters.
BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
    ("0", "false", "no", "off"), False
)


class Kind(ABC):
    """A kind of setting. An object of it stands where the setting's default is, so that a value
    that was not given is known from one that was.

    Args:
        default: The value if neither a keyword nor the environment says one.
        meaning: One sentence for the table of settings.

    Attributes:
        name: Of the setting.
    """

    name = ""

    def __init__(self, default: Any, meaning: str) -> None:
        self.default = default
        self.meaning = meaning

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.variable}, else {self.default!r}>"

    @property
    def variable(self) -> str:
        """The environment variable of the setting."""
        return variable_of(self.name)

    @property
    @abstractmethod
    def allowed(self) -> str:
        """What may be given, as the table of settings says it."""

    def of(self, text: str | None) -> Any:
        """The text of the variable as the setting's type; the default if there is none.

        Raises:
            SettingError: It cannot be that.
        """
        if text is None:
            return self.default
        try:
            return self._parse(text)
        except ValueError as error:
            raise SettingError(f"{self.variable}={text!r}: {error}") from None

    def checked(self, value: Any) -> Any:
        """``value`` as the setting's type.

        Raises:
            SettingError: It is not allowed; the message says what is.
        """
        if value is None and self.default is None:
            return None
        try:
            return self._check(value)
        except ValueError as error:
            raise SettingError(f"{self.name} ({self.variable}) = {value!r}: {error}") from None

    def _parse(self, text: str) -> Any:
        return text

    @abstractmethod
    def _check(self, value: Any) -> Any:
        """``value`` as it is kept, or ValueError with what would be right."""


class Flag(Kind):
    """True or False; None, too, if that is its default."""

    @property
    def allowed(self) -> str:
        return "`True`, `False`"

    def _parse(self, text: str) -> bool:
        said = BOOLEANS.get(text.strip().lower())
        if said is None:
            raise ValueError(f"allowed are {listed(BOOLEANS)}")
        return said

    def _check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("allowed are True and False")
        return value


class Choice(Kind):
    """One of a few words."""

    def __init__(self, default: str, choices: tuple[str, ...], meaning: str) -> None:
        super().__init__(default, meaning)
        self.choices = choices

    @property
    def allowed(self) -> str:
        return ", ".join(f"`{choice}`" for choice in self.choices)

    def _check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError(f"allowed are {listed(self.choices)}")
        return value


class Number(Kind):
    """A number from ``low`` to ``high``: whole, unless its default is a float."""

    def __init__(
        self, default: float | None, meaning: str, *, low: float, high: float | None = None
    ) -> None:
        super().__init__(default, meaning)
        self.low = low
        self.high = high
        self.whole = not isinstance(default, float)

    @property
    def allowed(self) -> str:
        return f"from {self.low}" + ("" if self.high is None else f" to {self.high}")

    def _parse(self, text: str) -> float:
        try:
            return int(text) if self.whole else float(text)
        except ValueError:
            raise ValueError(f"it must be a {'whole ' if self.whole else ''}number") from None

    def _check(self, value: Any) -> float:
        if not _is_number(value):
            raise ValueError("it must be a number")
        if not math.isfinite(value):
            raise ValueError("it must be finite")
        if self.whole and value != int(value):
            raise ValueError("it must be a whole number")
        if value < self.low or (self.high is not None and value > self.high):
            above = "" if self.high is None else f" and at most {self.high}"
            raise ValueError(f"it must be at least {self.low}{above}")
        return int(value) if self.whole else float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class Text(Kind):
    """Any text; what it must be like is said by whoever uses it."""

    def __init__(self, default: str, meaning: str, *, allowed: str) -> None:
        super().__init__(default, meaning)
        self._allowed = allowed

    @property
    def allowed(self) -> str:
        return self._allowed

    def _check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("it must be a str")
        return value


class PathSetting(Kind):
    """A path. It may be given as text, and is a ``Path`` when it is read: it is a descriptor, from
    which type checkers know both."""

    @property
    def allowed(self) -> str:
        return "a path"

    @overload
    def __get__(self, settings: None, owner: type) -> PathSetting: ...
    @overload
    def __get__(self, settings: object, owner: type) -> Path | None: ...
    def __get__(self, settings: object | None, owner: type) -> Any:
        return self if settings is None else vars(settings)[self.name]

    def __set__(self, settings: object, value: str | os.PathLike[str] | None) -> None:
        vars(settings)[self.name] = value

    def _check(self, value: Any) -> Path:
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError("it must be a path")
        return Path(value)


def variable_of(setting: str) -> str:
    """The environment variable of a setting."""
    return ENVIRONMENT_PREFIX + setting.upper()


def listed(names: Iterable[Any]) -> str:
    """Names in a sentence."""
    return ", ".join(sorted(map(str, names)))


def nearest(name: str, names: Iterable[str]) -> str:
    """What ``name`` may have been meant to be, as the end of a sentence that says that it is
    unknown: one name if one is near, else all. A variable is answered with variables."""
    from difflib import get_close_matches

    prefix = ENVIRONMENT_PREFIX if name.startswith(ENVIRONMENT_PREFIX) else ""
    spell = str.upper if prefix else str
    known = [spell(one) for one in names]
    near = get_close_matches(name.removeprefix(prefix), known, 1, 0.7)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"the settings are {listed(prefix + one for one in known)}"
