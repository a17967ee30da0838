"""``flowbuffer sync --dry-run``: what a sync would deliver, and where."""

from __future__ import annotations

from dataclasses import dataclass

from flowbuffer.backends.credentials import without_credentials
from flowbuffer.commands.status import status
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.producer_info import OFFLINE


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What would become of the points of a run.

    Attributes:
        run_id: The run.
        points: How many are pending.
        tracking_uri: Where they would go; None if that is not known.
        note: What there is to know of them; empty if nothing.
    """

    run_id: str
    points: int
    tracking_uri: str | None
    note: str = ""


def plan(
    spool: Spool, *, run_id: str | None = None, tracking_uri: str | None = None
) -> list[Planned]:
    """What a sync with these arguments would deliver. No server is asked.

    Args:
        spool: The spool.
        run_id: Only what was logged to this run.
        tracking_uri: Everything would go there, and not to where it was logged.
    """
    to = None if tracking_uri is None else without_credentials(tracking_uri)
    found: dict[tuple[str, str | None], Planned] = {}
    for row in status(spool, run_id).producers:
        if not row.pending:
            continue
        if row.state == "damaged":
            note = row.last_error
        elif row.state == "alive" and (to is not None or row.delivery == OFFLINE):
            note = f"process {row.pid} still logs: it is left until that ends"
        elif row.delivery == OFFLINE or to is not None:
            note = "the run is created if the server does not have it"
        else:
            note = row.last_error
        key = row.run_id, to or row.tracking_uri
        before = found.get(key)
        found[key] = Planned(
            run_id=row.run_id,
            points=row.pending + (before.points if before else 0),
            tracking_uri=key[1],
            note=note or (before.note if before else ""),
        )
    return list(found.values())
