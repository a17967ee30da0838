"""The dead letters of a producer: ``rejected.jsonl``, one JSON object a line, the oldest first.

A letter is written before its slot is marked, so one may be there twice: the same line counts once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from flowbuffer.errors import SpoolError
from flowbuffer.spool.files import opened, read_file, write_file

#: As much of the file is read; what is beyond it is kept, and not counted.
MAX_BYTES: Final = 64 << 20

_NAME: Final = "rejected.jsonl"
#: Letters whose points were put into the spool again, as another producer's.
_RETRIED_NAME: Final = "retried.jsonl"


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A point that was refused, or bytes of the spool that could not be read.

    Attributes:
        reason: What the server said, or what is damaged.
        segment, slot: Where the point was; None if a damaged letter does not say.
        run_id: The run, as far as it was known.
        kind: ``"metric"``, ``"param"`` or ``"tag"``; None for what could not be read.
        key, value, step, timestamp: Of the point, the timestamp in ms since the epoch; None for
            what could not be read. A value that JSON has no number for is ``"nan"`` or ``"inf"``.
        about: The model's id, dataset's name and digest that a metric is about.
        points: How many points it stands for.
        raw: The bytes of the slot that could not be read, in hexadecimal; ``bytes`` in the file.
    """

    reason: str = ""
    segment: int | None = None
    slot: int | None = None
    run_id: str | None = None
    kind: str | None = None
    key: str | None = None
    value: float | str | None = None
    step: int | None = None
    timestamp: int | None = None
    about: tuple[str, ...] | None = None
    points: int = 1
    raw: str | None = None

    def line(self) -> bytes:
        """As a line of the file, without its end."""
        said = {name: given for name, given in asdict(self).items() if given is not None}
        if self.points == 1:
            del said["points"]
        if self.raw is not None:
            said["bytes"] = said.pop("raw")
        return json.dumps(said).encode()

    @classmethod
    def parse(cls, line: bytes) -> DeadLetter | None:
        """A line of the file; None if it is no letter. Fields that make no sense are left out."""
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(said, dict):
            return None
        said["raw"] = said.pop("bytes", None)
        about = said.get("about")
        if isinstance(about, list) and all(isinstance(text, str) for text in about):
            said["about"] = tuple(about)
        names = [f.name for f in fields(cls) if f.name in said]
        return cls(**{name: said[name] for name in names if _fits(name, said[name])})


_KINDS: Final[dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(("segment", "slot", "step", "timestamp", "points"), (int,)),
    "value": (int, float, str),
    "about": (tuple,),
}


def _fits(name: str, given: Any) -> bool:
    return isinstance(given, _KINDS.get(name, (str,))) and not isinstance(given, bool)


def append(folder: Path, letter: DeadLetter) -> None:
    """Write a letter, whole or not at all; do it before its slot is marked.

    Raises:
        OSError: It cannot be written now.
    """
    _append(folder / _NAME, letter.line() + b"\n")


def read(folder: Path) -> Iterator[DeadLetter]:
    """The letters; lines that are none, and a file that is none, are passed over.

    Raises:
        OSError: They cannot be read now.
    """
    return (letter for line in lines(folder) if (letter := DeadLetter.parse(line)) is not None)


def about(folder: Path, segment: int, slots: set[int]) -> list[DeadLetter]:
    """The letters about slots of a segment, those of points that were tried again included.

    Raises:
        OSError: They cannot be read now.
    """
    both = [*lines(folder), *_lines(folder / _RETRIED_NAME)]
    letters = map(DeadLetter.parse, dict.fromkeys(both))
    return [one for one in letters if one and one.segment == segment and one.slot in slots]


def lines(folder: Path) -> list[bytes]:
    """The lines of the file, each once.

    Raises:
        OSError: They cannot be read now.
    """
    return _lines(folder / _NAME)


def count(folder: Path) -> tuple[int, int]:
    """How many points the letters stand for, and how many those whose points were tried again.

    Raises:
        OSError: They cannot be read now.
    """
    return _points(lines(folder)), _points(_lines(folder / _RETRIED_NAME))


def are_in(folder: Path) -> bool:
    """Whether there are any, readable or not.

    Raises:
        OSError: That is not known now.
    """
    try:
        return (folder / _NAME).stat().st_size > 0
    except FileNotFoundError:
        return False


def remove(folder: Path, retried: Iterable[bytes]) -> None:
    """Take letters (lines) out, as their points are in the spool again; what became of their slots
    stays known.

    Raises:
        OSError: They cannot be taken out now.
    """
    gone = dict.fromkeys(retried)
    if not gone:
        return
    _append(folder / _RETRIED_NAME, b"".join(line + b"\n" for line in gone))
    kept = [line for line in lines(folder) if line not in gone]
    if kept:
        write_file(folder / _NAME, b"".join(line + b"\n" for line in kept))
    else:
        (folder / _NAME).unlink()


def _append(path: Path, content: bytes) -> None:
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # by a kill
        rest = memoryview(b"\n" * bool(torn) + content)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise


def _lines(path: Path) -> list[bytes]:
    try:
        return list(dict.fromkeys(read_file(path, limit=MAX_BYTES).splitlines()))
    except (FileNotFoundError, SpoolError):
        return []


def _points(found: list[bytes]) -> int:
    """By the look of the lines: to parse each of them would take seconds."""
    whole = [line for line in found if line.endswith(b"}")]
    several = (DeadLetter.parse(line) for line in whole if b'"points"' in line)
    return len(whole) + sum(letter.points - 1 for letter in several if letter is not None)
