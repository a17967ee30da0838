"""Where the commands look: the spool, its producers' folders, and what those say."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from flowbuffer.errors import FlowbufferError
from flowbuffer.settings.settings import Settings
from flowbuffer.spool import layout
from flowbuffer.spool.files import read_file
from flowbuffer.spool.folders import Spool
from flowbuffer.spool.segment_files import Ending, bytes_at, names_in, segment_numbers, segment_path


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


def folders_of_run(spool: Spool, given: str) -> list[Path]:
    """The folders of the run with this id, or of the only one whose id begins so.

    Raises:
        FlowbufferError: There is none, or more than one.
    """
    exact = list(spool.folders(given))
    if exact:
        return exact
    runs: dict[str, list[Path]] = {}
    for folder in spool.folders():
        runs.setdefault(unquote(folder.parent.name), []).append(folder)
    found = [run_id for run_id in runs if given and run_id.startswith(given)]
    if len(found) == 1:
        return runs[found[0]]
    if found:
        several = ", ".join(found)
        raise FlowbufferError(f"{given} is the beginning of several runs: {several}")
    has = f"; it has {', '.join(sorted(runs)[:5])}{', ...' if len(runs) > 5 else ''}"
    raise FlowbufferError(f"the spool {spool.root} has nothing of run {given}{has if runs else ''}")


def run_id_in(spool: Spool, given: str) -> str:
    """The whole id of such a run.

    Raises:
        FlowbufferError: There is none, or more than one.
    """
    return unquote(folders_of_run(spool, given)[0].parent.name)


def unread_segments(folder: Path) -> list[str]:
    """The segments that might hold a point nobody has delivered or rejected.

    Stricter than ``tally``, which passes over what it cannot read: a segment counts unless
    all of it is there, can be read, and says that it is settled.
    """
    found = sorted(names_in(folder, Ending.DAMAGED))
    for number in segment_numbers(folder):
        path = segment_path(folder, number)
        try:
            data = read_file(path, limit=layout.segment_size(layout.MAX_SEGMENT_SLOTS))
            whole = len(data) == layout.segment_size(layout.parse_segment_header(data, number))
        except OSError:
            whole = False
        if not whole or set(bytes_at(data, layout.STATE_OFFSET)) - _SETTLED:
            found.append(path.name)
    return found


_SETTLED = {layout.EMPTY, layout.DELIVERED, layout.REJECTED, layout.VOID}
