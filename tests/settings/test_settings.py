"""Settings: one name in keyword and environment, a checked range, a message that helps."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flowbuffer import SettingError, Settings
from flowbuffer.dropin.plugin import NO, YES
from flowbuffer.settings.environment import said_of_settings
from flowbuffer.settings.settings import kinds_of_settings
from flowbuffer.settings.values import BOOLEANS, variable_of

README = Path(__file__).parents[2] / "README.md"


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
        ("FLOWBUFFER_MAX_BATCH_SIZE", "10001", "at most 10000"),
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
    for name, kind in kinds_of_settings().items():
        line = f"| `{name}` | `{kind.default}` | {kind.allowed} | {kind.meaning} |"
        assert line in text


# What is given, what the environment says, and what is neither.


def test_a_keyword_takes_nothing_else_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Settings(linger_s=0.1) has the rest from the environment, the switches that rule flowbuffer
    out or keep it offline included, and wins over it where both say something."""
    monkeypatch.setenv("FLOWBUFFER_ENABLED", "0")
    monkeypatch.setenv("FLOWBUFFER_OFFLINE", "on")
    monkeypatch.setenv("FLOWBUFFER_SPOOL_DIR", str(tmp_path))
    monkeypatch.setenv("FLOWBUFFER_LINGER_S", "7")
    settings = Settings(linger_s=0.1)
    assert (settings.enabled, settings.offline) == (False, True)
    assert (settings.spool_dir, settings.linger_s) == (tmp_path, 0.1)
    assert Settings().linger_s == 7
    assert Settings(enabled=None, offline=False).enabled is None


def test_settings_stay_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made is copied, changed and handed on to other processes as it is, whatever another
    environment says there."""
    monkeypatch.setenv("FLOWBUFFER_LINGER_S", "7")
    made = Settings(strict=False)
    handed_on = pickle.dumps(made)
    monkeypatch.setenv("FLOWBUFFER_LINGER_S", "8")
    monkeypatch.setenv("FLOWBUFFER_STRICT", "1")
    assert pickle.loads(handed_on) == made == copy.deepcopy(made)
    assert hash(made) == hash(pickle.loads(handed_on))
    assert made.with_changes(ranks="0").linger_s == replace(made, ranks="0").linger_s == 7
    assert Settings.from_env({}) == Settings.from_env({"FLOWBUFFER_LINGER_S": ""})
    assert Settings.from_env({}).linger_s == 0.5
    with pytest.raises(SettingError, match=r"lingers is not a setting.*did you mean linger_s"):
        made.with_changes(lingers=1)


def test_yes_and_no_are_the_same_everywhere() -> None:
    """A switch takes the same words in every setting and where MLflow is imported."""
    assert {word for word, said in BOOLEANS.items() if said} == set(YES)
    assert {word for word, said in BOOLEANS.items() if not said} == set(NO)
    for word, said in BOOLEANS.items():
        assert Settings.from_env({"FLOWBUFFER_STRICT": f" {word.upper()} "}).strict is said


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("FLOWBUFFER_ENABLE", "did you mean FLOWBUFFER_ENABLED?"),
        ("FLOWBUFFER_SPOOL", "did you mean FLOWBUFFER_SPOOL_DIR?"),
        ("FLOWBUFFER_ON", "the settings are FLOWBUFFER_BLOCK_TIMEOUT_S, "),
    ],
)
def test_the_nearest_name_is_told(variable: str, meant: str) -> None:
    """A variable that is no setting is told with the name that is near; with all if none is."""
    with pytest.warns(UserWarning, match=re.escape(f"{variable} is ignored: {meant}")):
        Settings.from_env({variable: "1"})


def test_a_number_of_numpy_is_a_number() -> None:
    """Numbers are numbers, whoever's they are."""
    settings = Settings(linger_s=np.float32(0.5), max_batch_size=np.int64(10))  # type: ignore[arg-type]
    assert (settings.linger_s, settings.max_batch_size) == (0.5, 10)
    assert type(settings.max_batch_size) is int


def test_the_servers_switch_is_no_setting() -> None:
    """FLOWBUFFER_SERVER says nothing to who logs, and is not taken for a misspelt setting."""
    assert said_of_settings(kinds_of_settings(), {"FLOWBUFFER_SERVER": "1"}) == {}
