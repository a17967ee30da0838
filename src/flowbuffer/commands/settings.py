"""``flowbuffer settings``: what every setting is here, and where that comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowbuffer.errors import SettingError
from flowbuffer.settings.environment import misspelt, variable
from flowbuffer.settings.settings import Settings, kinds_of_settings


@dataclass(frozen=True, kw_only=True)
class SettingSaid:
    """A setting.

    Attributes:
        name: Its name.
        value: What it is here; None, too, if that is not valid.
        origin: ``default``, or the environment variable.
        error: What is wrong with it; empty if nothing is.
    """

    name: str
    value: Any
    origin: str
    error: str = ""


def settings_said() -> list[SettingSaid]:
    """Every setting, in the order of the table of settings."""
    return [_said(name) for name in kinds_of_settings()]


def unknown_variables() -> list[str]:
    """Words for each variable of flowbuffer's that is no setting."""
    return misspelt(kinds_of_settings())


def valid_settings() -> Settings:
    """The settings, with the default in the place of what is not valid."""
    valid = {one.name: one.value for one in settings_said() if not one.error}
    return Settings.from_env({}, **valid)


def _said(name: str) -> SettingSaid:
    kind = kinds_of_settings()[name]
    text = variable(kind.variable)
    origin = "default" if text is None else kind.variable
    try:
        settings = Settings.from_env({} if text is None else {kind.variable: text})
    except SettingError as error:
        return SettingSaid(name=name, value=None, origin=origin, error=str(error))
    value = getattr(settings, name)
    if name == "spool_dir":
        value = str(settings.resolved_spool_dir())
    return SettingSaid(name=name, value=value, origin=origin)
