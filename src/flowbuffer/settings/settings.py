"""Every setting.

A setting has one name in both forms (``linger_s`` and ``FLOWBUFFER_LINGER_S``), a default, a
checked range and one line of explanation. Seconds are floats whose names end in ``_s``; sizes are
integers whose names end in ``_bytes``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flowbuffer.errors import SettingError, described
from flowbuffer.settings.environment import JobPlace, said_of_settings
from flowbuffer.settings.values import (
    Choice,
    Flag,
    Kind,
    Number,
    PathSetting,
    Text,
    nearest,
    variable_of,
)

#: What whoever delivers goes by; the rest is the producer's business.
_OF_DELIVERY = ("linger_s", "max_batch_size", "max_in_flight", "request_timeout_s")

# What stands in a field until a value is there, for type checkers a value.
flag: Any = Flag
choice: Any = Choice
number: Any = Number
text: Any = Text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How flowbuffer works: what is given here, else what ``FLOWBUFFER_*`` variables say, else the
    defaults. Immutable; every value is checked when it is made, and stays what it was then.

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
    spool_dir: PathSetting = PathSetting(
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
        10_000,
        "The most metrics in one request. MLflow's servers get at most 1000, Azure ML 250.",
        low=1,
        high=10_000,
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
        allowed="`all`, or like `0,4`",
    )
    key_template: str = text(
        "{key}",
        "The key under which a point is stored, of `{key}`, `{rank}`, `{local_rank}` and "
        "`{world_size}`, like `{key}/rank{rank}`.",
        allowed="with `{key}`",
    )
    strict: bool = flag(
        True,
        "What the caller got wrong (a value that is no number, an invalid key): True raises at "
        "the call; False counts it, warns once per key, and goes on.",
    )
    progress: Literal["auto", "off"] = choice(
        "auto",
        ("auto", "off"),
        "How a wait goes: `auto`, a line that is drawn again on a terminal and in a notebook, a "
        "line every 15 s elsewhere, and one at the start of a process whose MLflow calls are "
        "buffered; `off`, nothing but what is left at the end.",
    )

    def __post_init__(self) -> None:
        kinds = kinds_of_settings()
        unsaid = {name for name, kind in kinds.items() if getattr(self, name) is kind}
        said = said_of_settings(kinds.keys()) if unsaid else {}
        for name, kind in kinds.items():
            value = kind.of(said.get(name)) if name in unsaid else getattr(self, name)
            object.__setattr__(self, name, kind.checked(value))
        self.logs(0)
        self.stored_key("a key", JobPlace())

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **settings: Any) -> Settings:
        """As ``Settings(**settings)``, with other variables in the place of this process's.

        Args:
            environ: The variables; the process's own by default. An empty value counts as unset.
            settings: What wins over them.

        Raises:
            SettingError: A value is out of range, or a keyword is not a setting.
        """
        kinds = kinds_of_settings()
        _refuse_unknown(settings)
        if environ is not None:
            said = said_of_settings(kinds.keys(), environ)
            unsaid = kinds.keys() - settings.keys()
            settings |= {name: kinds[name].of(said.get(name)) for name in unsaid}
        return cls(**settings)

    def with_changes(self, **changes: Any) -> Settings:
        """A copy in which the named settings are other.

        Raises:
            SettingError: A value is out of range, or a keyword is not a setting.
        """
        _refuse_unknown(changes)
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

    def stored_key(self, key: str, job_place: JobPlace) -> str:
        """``key`` as ``key_template`` has it; outside a distributed job the rank is 0 of 1."""
        try:
            stored = self.key_template.format(
                key=key,
                rank=job_place.rank or 0,
                local_rank=job_place.local_rank or 0,
                world_size=job_place.world_size or 1,
            )
            if key not in stored:
                raise ValueError("{key} is missing")
            return stored
        except (ValueError, LookupError, AttributeError) as error:
            raise SettingError(
                f"key_template ({variable_of('key_template')}) = {self.key_template!r}: it must "
                f"have {{key}}, and may have {{rank}}, {{local_rank}}, {{world_size}} ({error!r})"
            ) from None

    def variables(self) -> dict[str, str | None]:
        """The variables that say the same; None where a variable must not be set."""
        values = {variable_of(name): getattr(self, name) for name in kinds_of_settings()}
        return {name: None if value is None else str(value) for name, value in values.items()}

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


def kinds_of_settings() -> dict[str, Kind]:
    """Every setting, by its name."""
    return {name: kind for name, kind in vars(Settings).items() if isinstance(kind, Kind)}


def _refuse_unknown(names: Iterable[str]) -> None:
    kinds = kinds_of_settings()
    for name in names:
        if name not in kinds:
            raise SettingError(f"{name} is not a setting of flowbuffer: {nearest(name, kinds)}")


def settings_with(settings: object, changes: Mapping[str, Any]) -> Settings:
    """The settings of who was given ``settings``, or None for the environment's, and keywords.

    Raises:
        SettingError: They are none, or a keyword is no setting.
    """
    if settings is None:
        return Settings.from_env(None, **changes)
    if not isinstance(settings, Settings):
        raise SettingError(
            f"settings is {described(settings)}; it must be a Settings, as in "
            "settings=flowbuffer.Settings(linger_s=0.1)"
        )
    return settings.with_changes(**changes)
