"""Settings: one name in keyword and environment, a checked range, a message that helps."""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path

import pytest

from flowbuffer import SettingError, Settings
from flowbuffer.settings import variable_of

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("enabled", "0", False),
        ("enabled", "TRUE", True),
        ("delivery", "inline", "inline"),
        ("spool_dir", "/somewhere", Path("/somewhere")),
        ("max_spool_bytes", "1048576", 1 << 20),
        ("linger_s", "0.25", 0.25),
        ("max_in_flight", "2", 2),
        ("strict", "no", False),
    ],
)
def test_the_environment_sets_it(name: str, text: str, value: object) -> None:
    """Every kind of setting can be given as a variable."""
    assert getattr(Settings.from_env({variable_of(name): text}), name) == value


def test_a_keyword_wins_over_the_environment() -> None:
    """Settings come from keyword, then environment, then default."""
    environ = {"FLOWBUFFER_LINGER_S": "3", "FLOWBUFFER_STRICT": ""}
    settings = Settings.from_env(environ, linger_s=1)
    assert (settings.linger_s, settings.strict) == (1.0, True)
    assert Settings.from_env(environ).linger_s == 3.0


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("FLOWBUFFER_ENABLED", "maybe", "true"),
        ("FLOWBUFFER_DELIVERY", "pigeon", "inline, process, thread"),
        ("FLOWBUFFER_LINGER_S", "soon", "a number"),
        ("FLOWBUFFER_LINGER_S", "-1", "at least 0"),
        ("FLOWBUFFER_LINGER_S", "nan", "finite"),
        ("FLOWBUFFER_MAX_BATCH_SIZE", "1001", "at most 1000"),
        ("FLOWBUFFER_MAX_BATCH_SIZE", "2.5", "a whole number"),
        ("FLOWBUFFER_MAX_SPOOL_BYTES", "1", "at least 1048576"),
        ("FLOWBUFFER_WHEN_FULL", "explode", "block, drop_newest, raise"),
    ],
)
def test_a_bad_value_is_named(variable: str, text: str, allowed: str) -> None:
    """A bad value is refused with the variable, the value, and what is allowed."""
    with pytest.raises(SettingError) as caught:
        Settings.from_env({variable: text})
    assert variable in str(caught.value)
    assert text in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize("value", [True, "0.5", None, [1]])
def test_a_keyword_of_the_wrong_kind_is_refused(value: object) -> None:
    """A keyword is checked as a variable is."""
    with pytest.raises(SettingError, match="linger_s"):
        Settings(linger_s=value)  # type: ignore[arg-type]


def test_an_unknown_name_is_told() -> None:
    """A misspelt keyword is an error; a variable may be of another version, and is warned of."""
    with pytest.raises(SettingError, match="lingers is not a setting"):
        Settings.from_env({}, lingers=1)
    with pytest.warns(UserWarning, match="FLOWBUFFER_LINGERS is ignored"):
        Settings.from_env({"FLOWBUFFER_LINGERS": "1"})


def test_the_readme_lists_every_setting() -> None:
    """Each setting has its line in the README's table: name, default, range, meaning."""
    text = README.read_text()
    for item in fields(Settings):
        assert f"| `{item.name}` | `{item.default}` | {allowed(item)} | " in text
        assert f"| {item.metadata['meaning']} |" in text


def allowed(item: Field[object]) -> str:
    limits = item.metadata
    if "choices" in limits:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    if "flag" in limits:
        return "`True`, `False`"
    if item.name in ("spool_dir", "ranks", "key_template"):
        return {"spool_dir": "a path", "ranks": "`all`, or like `0,4`"}.get(
            item.name, "with `{key}`"
        )
    return f"from {limits['low']}" + ("" if limits["high"] is None else f" to {limits['high']}")
