"""What a logger tells: counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the points that a logger was given.

    Attributes:
        delivered: Points in the backend.
        rejected: Points that the server refused for good; they are dead letters in the spool.
        pending: Points in the spool that are to be delivered.
        unknown: Points of which nobody knows what became: what held them was wiped from the spool,
            or is damaged.
        dropped: Points that were never stored, by reason: ``spool_full`` (``when_full``),
            ``invalid`` (``strict=False``).
        seconds: How long the call that made this report took.
    """

    delivered: int = 0
    rejected: int = 0
    pending: int = 0
    unknown: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stats(Report):
    """A :class:`Report` of a logger at work.

    Attributes:
        lag_s: The age of the oldest point that is pending, in s; 0 if none is.
        backlog_bytes: What the whole spool takes on the disk, in bytes.
        ties_moved: Points that were moved in time so that order holds.
        ties_moved_most_ms: By how much at most, in ms.
        retries: Requests that were sent again.
        last_error: What the last request failed with; empty after a success.
    """

    lag_s: float = 0.0
    backlog_bytes: int = 0
    ties_moved: int = 0
    ties_moved_most_ms: int = 0
    retries: int = 0
    last_error: str = ""
