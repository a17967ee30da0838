"""Words that are said in more than one place: how many, how long, how much, what helps."""

from __future__ import annotations

import re


def counted(count: int, what: str = "point") -> str:
    """``1 point``, ``2,000 points``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """About how long: the largest unit, and for hours and days the next one."""
    for unit_s, unit, small_s, small in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
    ):
        if seconds >= unit_s:
            rest = int(seconds % unit_s // small_s)
            return f"{seconds // unit_s:.0f} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{seconds // 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def size(count: int) -> str:
    """About how many bytes."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def short_id(run_id: str, length: int = 8) -> str:
    """The beginning of an id as MLflow makes them, which is enough for the commands; any other
    one is as it is."""
    return run_id[:length] if re.fullmatch("[0-9a-f]{32}", run_id) else run_id


def gone(run_id: str, tracking_uri: str) -> str:
    """What helps where a run is not, or no more, on its server."""
    run = short_id(run_id)
    return (
        f"restore it on {tracking_uri}, deliver it elsewhere with: flowbuffer sync --run-id {run} "
        f"--tracking-uri URI, or discard it with: flowbuffer clean --pending {run}"
    )


def printable(text: str) -> str:
    """``text`` as one line without control characters: a server, or a job, may have said it."""
    return "".join(c if c.isprintable() else " " for c in text)
