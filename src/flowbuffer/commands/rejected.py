"""``flowbuffer rejected``: the points that a server refused for good, and another try for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.errors import FlowbufferError, InvalidPoint
from flowbuffer.metric_key import MetricKey
from flowbuffer.settings.settings import Settings
from flowbuffer.spool import dead_letters
from flowbuffer.spool.dead_letters import DeadLetter
from flowbuffer.spool.folders import Claim, Spool, has_producer
from flowbuffer.spool.layout import FAILED, PARAM, TAG
from flowbuffer.spool.producer_info import read_info
from flowbuffer.spool.segment_files import closed_outcome
from flowbuffer.spool.writing.places import Places
from flowbuffer.spool.writing.producer import Producer

_Point = Callable[[Producer], Places]


@dataclass(frozen=True, kw_only=True)
class Letter:
    """A dead letter: a point that was refused, or bytes of the spool that could not be read.

    Attributes:
        run_id: The run.
        producer: The producer's folder.
        kind, key, value, step, timestamp, points, reason: As in ``DeadLetter``.
    """

    run_id: str
    producer: str
    kind: str | None
    key: str | None
    value: float | str | None
    step: int | None
    timestamp: int | None
    points: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Retried:
    """What became of the dead letters of one producer.

    Attributes:
        run_id: The run.
        producer: The producer's folder.
        points: How many are on their way again.
        kept: How many letters stay as they are.
        reason: Why they stay; empty if none does.
    """

    run_id: str
    producer: str
    points: int
    kept: int
    reason: str = ""


def rejected(spool: Spool, run_id: str | None = None) -> list[Letter]:
    """The dead letters of a spool, or of one run, in the order in which each producer got them.

    Raises:
        SpoolError: They cannot be read.
    """
    return [
        Letter(
            run_id=letter.run_id or _run_id(folder),
            producer=str(folder),
            kind=letter.kind,
            key=letter.key,
            value=letter.value,
            step=letter.step,
            timestamp=letter.timestamp,
            points=letter.points,
            reason=letter.reason,
        )
        for folder in spool.folders(run_id)
        for letter in dead_letters.read(folder)
    ]


def retry(spool: Spool, settings: Settings, run_id: str | None = None) -> list[Retried]:
    """Put the points of dead letters into the spool again, with their own times.

    Those of living producers, and what could not be read, stay. A letter is removed only once its
    point is stored, so that an end in between leaves it in both places; MLflow keeps it once.

    Raises:
        SpoolFull: There is no room for them.
    """
    settings = settings.with_changes(when_full="raise")
    return [_retry(spool, folder, settings) for folder in _folders_with_letters(spool, run_id)]


def _folders_with_letters(spool: Spool, run_id: str | None) -> Iterator[Path]:
    return (folder for folder in list(spool.folders(run_id)) if dead_letters.are_in(folder))


def _retry(spool: Spool, folder: Path, settings: Settings) -> Retried:
    try:
        claim = spool.claim(folder)
    except FlowbufferError as error:
        return _all_kept(folder, str(error))
    if claim is None:
        living = has_producer(folder)
        return _all_kept(
            folder, "its process still runs" if living else "another process delivers it"
        )
    try:
        lines = dead_letters.lines(folder)
        points = {line: point for line in lines if (point := _point(line)) is not None}
        refused = _store(spool, claim, points, settings)
        retried = [line for line in points if line not in refused]
        dead_letters.remove(folder, retried)
        kept = len(lines) - len(retried)
        return Retried(
            run_id=claim.info.run_id,
            producer=str(folder),
            points=len(retried),
            kept=kept,
            reason="what was damaged in the spool is no point" if kept else "",
        )
    finally:
        claim.release()


def _store(
    spool: Spool, claim: Claim, points: dict[bytes, _Point], settings: Settings
) -> set[bytes]:
    """Store these points as a new producer would; those that cannot be stored."""
    refused: set[bytes] = set()
    if not points:
        return refused
    directory = spool.add_producer(claim.info)
    producer = Producer(directory, spool, settings, SYSTEM_CLOCK, lambda: None)
    try:
        for line, point in points.items():
            try:
                point(producer)
            except InvalidPoint:
                refused.add(line)
    finally:
        producer.close(failed=closed_outcome(claim.path) == FAILED)
        directory.lock.release()
    return refused


def _point(line: bytes) -> _Point | None:
    """What logs again what a dead letter is about; None if it is no point."""
    letter = DeadLetter.parse(line)
    kinds = {"metric": 0, "param": PARAM, "tag": TAG}
    if letter is None or letter.kind not in kinds or letter.key is None:
        return None
    kind, key, value = kinds[letter.kind], letter.key, letter.value
    if kind:
        return lambda producer: producer.append_texts(kind, {key: value})
    try:
        stored: Any = MetricKey(key, *letter.about) if letter.about else key
        point = (stored, float(value), letter.step, letter.timestamp)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return None
    return lambda producer: producer.append(*point)


def _all_kept(folder: Path, why: str) -> Retried:
    kept = sum(1 for _ in dead_letters.read(folder))
    return Retried(run_id=_run_id(folder), producer=str(folder), points=0, kept=kept, reason=why)


def _run_id(folder: Path) -> str:
    try:
        return read_info(folder).run_id
    except FlowbufferError:
        return unquote(folder.parent.name)
