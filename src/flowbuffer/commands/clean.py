"""``flowbuffer clean``: delete what dead producers left and nobody needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from flowbuffer.commands.places import folders_of_run, unread_segments
from flowbuffer.errors import FlowbufferError
from flowbuffer.spool import dead_letters
from flowbuffer.spool.folders import Claim, Spool, has_producer
from flowbuffer.spool.tally import tally
from flowbuffer.words import counted


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What became of a producer's folder.

    Attributes:
        folder: Where it is, or was.
        run_id: Its run.
        removed: Whether it was deleted.
        reason: Why it was kept; empty if it was not.
        advice: What could be done about it; empty if nothing.
    """

    folder: str
    run_id: str
    removed: bool
    reason: str = ""
    advice: str = ""


def clean(spool: Spool, *, with_rejected: bool = False) -> list[Cleaned]:
    """Delete the folders of dead producers in which nothing is left.

    Never deleted is what holds a point that is pending, or might: anything that cannot be read.

    Args:
        spool: The spool.
        with_rejected: Delete those with dead letters, too.
    """
    spool.sweep()

    def needed(claim: Claim) -> tuple[str, str]:
        return _needed(claim, with_rejected)

    return [_clean(spool, folder, needed) for folder in list(spool.folders())]


def discard(spool: Spool, run_id: str) -> list[Cleaned]:
    """Delete the folders of a run's dead producers, with what is pending in them.

    Args:
        spool: The spool.
        run_id: The run, or the beginning of its id.

    Raises:
        FlowbufferError: There is no such run.
    """
    return [_clean(spool, folder, lambda _: ("", "")) for folder in folders_of_run(spool, run_id)]


def folders_with_letters(spool: Spool) -> list[Path]:
    """The folders that ``with_rejected`` would delete beyond the others."""
    return [
        folder
        for folder in spool.folders()
        if dead_letters.are_in(folder) and not unread_segments(folder) and not has_producer(folder)
    ]


def _clean(spool: Spool, folder: Path, needed: Callable[[Claim], tuple[str, str]]) -> Cleaned:
    run_id, advice = unquote(folder.parent.name), ""
    try:
        claim = spool.claim(folder)
        if claim is None:
            living = has_producer(folder)
            why = "its process still runs" if living else "another process delivers it"
        else:
            run_id = claim.info.run_id
            try:
                why, advice = needed(claim)
                if not why:
                    claim.remove(delivered=_delivered_segments(claim.path))
            finally:
                claim.release()
    except (FlowbufferError, OSError) as error:
        why = str(error)
    return Cleaned(folder=str(folder), run_id=run_id, removed=not why, reason=why, advice=advice)


_PENDING = (
    "deliver what is pending with: flowbuffer sync; what never can be, discard with: flowbuffer "
    "clean --pending RUN"
)
_REJECTED = (
    "see why points were rejected with: flowbuffer rejected; delete them with: flowbuffer clean "
    "--rejected"
)


def _needed(claim: Claim, with_rejected: bool) -> tuple[str, str]:
    """Why a folder has to stay, and what could be done; empty if it need not."""
    found = tally(claim.path)
    if found is not None and found.pending:
        return f"{counted(found.pending)} {'is' if found.pending == 1 else 'are'} pending", _PENDING
    unread = unread_segments(claim.path)
    if unread:
        return f"{', '.join(unread)} cannot be read", ""
    if found is not None and dead_letters.are_in(claim.path) and not with_rejected:
        were = "was" if found.rejected == 1 else "were"
        return f"{counted(found.rejected)} {were} rejected", _REJECTED
    return "", ""


def _delivered_segments(folder: Path) -> int | None:
    """How many segments it had, if all points in them are delivered."""
    found = tally(folder)
    whole = found is not None and found.is_whole and found.total == found.delivered
    return found.last + 1 if found is not None and whole else None
