"""Where the commands look: the spool, its producers' folders, and what those say."""

from __future__ import annotations

from pathlib import Path

from flowbuffer.errors import FlowbufferError
from flowbuffer.settings import Settings
from flowbuffer.spool import layout
from flowbuffer.spool.directory import Spool
from flowbuffer.spool.files import read_file
from flowbuffer.spool.states import segment_numbers


def settings_of(spool_dir: Path | None) -> Settings:
    """The settings of this process, with another spool if one was named.

    Raises:
        SettingError: A variable is out of range.
    """
    settings = Settings.from_env()
    return settings if spool_dir is None else settings.with_changes(spool_dir=spool_dir)


def spool_of(settings: Settings) -> Spool:
    """The spool of these settings, which has to be there: no command makes one.

    Raises:
        SpoolError: It cannot be used.
        FlowbufferError: There is none.
    """
    root = settings.resolved_spool_dir()
    if not root.exists():
        raise FlowbufferError(f"there is no spool at {root}; name another with --spool")
    return Spool(root, make=False)


def unread_segments(folder: Path) -> list[str]:
    """The segments that might hold a point nobody has delivered or rejected.

    Stricter than ``states.tally``, which passes over what it cannot read: a segment counts unless
    all of it is there, can be read, and says that it is settled.
    """
    found = [path.name for path in sorted(folder.glob("*.damaged"))]
    for number in segment_numbers(folder):
        path = folder / f"{number:08d}.slots"
        try:
            data = read_file(path, limit=layout.segment_size(layout.MAX_SEGMENT_SLOTS))
            whole = len(data) == layout.segment_size(layout.parse_segment_header(data, number))
        except OSError:
            whole = False
        if not whole or set(data[_FIRST_STATE :: layout.SLOT_SIZE]) - _SETTLED:
            found.append(path.name)
    return found


_FIRST_STATE = layout.SEGMENT_HEADER_SIZE + layout.STATE_OFFSET
_SETTLED = {layout.EMPTY, layout.DELIVERED, layout.REJECTED, layout.VOID}
