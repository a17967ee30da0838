"""How the answers of the commands look on a terminal, and in a file."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.words import counted, duration, printable, short_id, size

if TYPE_CHECKING:
    from flowbuffer.commands.doctor import Check
    from flowbuffer.commands.rejected import Letter
    from flowbuffer.commands.settings import SettingSaid
    from flowbuffer.commands.status import ProducerStatus, SpoolStatus

#: The width of what is not shown on a terminal, in characters: nothing is cut, and no line folded.
_FILE_WIDTH = 400
#: How often what is watched is looked at, in s.
_WATCH_EVERY_S = 2.0


def show(content: Any) -> None:
    """Print on stdout."""
    console().print(content)


def keep_showing(draw: Callable[[], Any]) -> None:
    """Show what ``draw`` gives again and again, until Ctrl-C."""
    stopped = False

    def stop(*_: object) -> None:  # a KeyboardInterrupt in a finalizer would be ignored
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGINT, stop)
    drawn_s = SYSTEM_CLOCK.monotonic_s()
    with Live(draw(), auto_refresh=False) as live:
        while not stopped:
            SYSTEM_CLOCK.sleep(0.1)
            if SYSTEM_CLOCK.monotonic_s() - drawn_s >= _WATCH_EVERY_S:
                drawn_s = SYSTEM_CLOCK.monotonic_s()
                live.update(draw(), refresh=True)


def console() -> Console:
    """For stdout, be it a terminal or not."""
    made = Console(soft_wrap=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = _FILE_WIDTH
    return made


def _one_line(text: object) -> str:
    """As one line without control characters: it may be what a server, or a job, said."""
    return printable(str(text))


def short_ids(run_ids: Iterable[str]) -> dict[str, str]:
    """For each run id as much of its beginning as tells it from the others."""
    known = set(run_ids)
    for length in range(8, 33):
        short = {run_id: short_id(run_id, length) for run_id in known}
        if len(set(short.values())) == len(known):
            return short
    return {run_id: run_id for run_id in known}


# status


def of_status(found: SpoolStatus, *, wide: bool = False) -> Group:
    """The producers of a spool: what they have in common first, what differs as a table, the runs
    that were begun last on top. What holds a run up is below its rows."""
    rows = found.producers
    runs = "a collector process runs" if found.collector_runs else "no collector process runs"
    pid = f" ({found.collector_pid})" if found.collector_pid is not None else ""
    head = [Text(_one_line(found.spool)), Text(f"{size(found.used_bytes)}; {runs}{pid}")]
    if not rows:
        return Group(*head, Text("nothing is logged, and nothing waits"))
    names = _columns(rows, wide=wide)
    common = "" if wide else _common(rows)
    short = short_ids(row.run_id for row in rows)
    cells = {row.folder: _cells(row, row.run_id if wide else short[row.run_id]) for row in rows}
    layout = _Columns(names, cells.values())
    while layout.width > console().width and len(names) > len(_ALWAYS) and not wide:
        names.remove(next(name for name in _FIRST_TO_GO if name in names))
        layout = _Columns(names, cells.values())
    lines: list[Any] = [*head, *([Text(common)] if common else []), Text("")]
    lines.append(Text(layout.titles, "bold"))
    for run in _by_run(rows):
        lines += [Text(layout.line(cells[row.folder])) for row in run]
        if not wide:
            below = _below(run, uris="tracking URI" not in common)
            lines += [Padding(Text(line), (0, 0, 0, 2), expand=False) for line in below]
    total = {name: sum(getattr(row, name) for row in rows) for name in _COUNTS}
    said = ", ".join(f"{total[name]:,} {name}" for name in _COUNTS)
    return Group(*lines, Text(""), Text(f"{counted(len(rows), 'producer')}: {said}"))


class _Columns:
    """Lines of one layout, between which there may be others."""

    def __init__(self, names: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
        self._widths = {
            name: max(map(cell_len, [name, *(row[name] for row in rows)])) for name in names
        }
        self.width = sum(self._widths.values()) + 2 * (len(names) - 1)
        self.titles = self.line({name: name for name in names})

    def line(self, cells: Mapping[str, str]) -> str:
        """A line of these cells."""
        padded = []
        for name, width in self._widths.items():
            room = " " * (width - cell_len(cells[name]))
            padded.append(room + cells[name] if name in _NUMBERS else cells[name] + room)
        return "  ".join(padded).rstrip()


_COUNTS = ("pending", "delivered", "rejected")
_NUMBERS = {"rank", "pid", *_COUNTS, "oldest", "started"}
_ALWAYS = ("run", "state", *_COUNTS, "oldest")
#: What is left out first where a line would be too long.
_FIRST_TO_GO = ("delivery", "started", "host", "pid", "rank")


def _cells(row: ProducerStatus, run: str) -> dict[str, str]:
    cells = {
        "run": run,
        "started": "" if row.started_s is None else f"{duration(row.started_s)} ago",
        "host": row.host,
        "pid": row.pid,
        "rank": row.rank,
        "state": row.state,
        "delivery": row.delivery,
        **{name: f"{getattr(row, name):,}" for name in _COUNTS},
        "oldest": "" if row.oldest_s is None else duration(row.oldest_s),
        "tracking URI": row.tracking_uri,
        "last error": row.last_error,
    }
    return {name: "" if cell is None else _one_line(cell) for name, cell in cells.items()}


def _columns(rows: Sequence[ProducerStatus], *, wide: bool) -> list[str]:
    names = list(_cells(rows[0], ""))
    if wide:
        return names
    varies = {
        name
        for name in ("host", "rank", "delivery")
        if len({getattr(row, name) for row in rows} - {None}) > 1
    }
    if "rank" not in varies and len({row.run_id for row in rows}) < len(rows):
        varies.add("pid")
    if len({row.run_id for row in rows}) > 1:
        varies.add("started")
    return [name for name in names if name in varies or name in _ALWAYS]


def _common(rows: Sequence[ProducerStatus]) -> str:
    """What all producers have in common, in a line."""
    words = []
    for name, attribute in (("tracking URI", "tracking_uri"), ("host", "host")):
        values = {getattr(row, attribute) for row in rows} - {None}
        if len(values) == 1:
            words.append(f"{name}: {_one_line(values.pop())}")
    kinds = {row.delivery for row in rows} - {None}
    if len(kinds) == 1 and kinds != {"process"}:
        words.append(f"delivery: {_one_line(kinds.pop())}")
    return "; ".join(words)


def _by_run(rows: Sequence[ProducerStatus]) -> Iterator[list[ProducerStatus]]:
    """The rows of each run, as they are ordered."""
    runs: dict[str, list[ProducerStatus]] = {}
    for row in rows:
        runs.setdefault(row.run_id, []).append(row)
    return iter(runs.values())


def _below(run: list[ProducerStatus], *, uris: bool) -> list[str]:
    """What there is to say of the rows of a run, each thing once."""
    said = [row.tracking_uri for row in run if uris and row.tracking_uri]
    said += [row.last_error for row in run if row.last_error]
    return [_one_line(text) for text in dict.fromkeys(said)]


# The other commands


def of_rejected(letters: Sequence[Letter]) -> Group:
    """The dead letters, those of one run and one reason together below what they share."""
    groups: dict[tuple[str, str], list[Letter]] = {}
    for letter in letters:
        groups.setdefault((letter.run_id, letter.reason), []).append(letter)
    short = short_ids(letter.run_id for letter in letters)
    blocks: list[Any] = []
    for (run_id, reason), group in groups.items():
        points = sum(letter.points for letter in group)
        title = f"run {short[run_id]}: {counted(points)} rejected: {reason}"
        blocks += [Text(_one_line(title)), Padding(_of_letters(group), (0, 0, 1, 2))]
    total = sum(letter.points for letter in letters)
    advice = "once the reason is mended, send them again with: flowbuffer rejected --retry"
    return Group(*blocks, Text(f"{counted(total)} rejected; {advice}"))


def _of_letters(letters: Sequence[Letter]) -> Table:
    kinds = {letter.kind for letter in letters} != {"metric"}
    table = _table([*(["kind"] if kinds else []), "key", "value", "step", "logged"])
    for letter in letters:
        time_ms = letter.timestamp
        cells = [letter.key, letter.value, letter.step, "" if time_ms is None else _time(time_ms)]
        table.add_row(*map(_text, [*([letter.kind] if kinds else []), *cells]))
    return table


def _time(time_ms: int) -> str:
    """A time of this machine's zone."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ms / 1000))
    except (OverflowError, ValueError, OSError):
        return str(time_ms)


def of_doctor(checks: Sequence[Check]) -> Table:
    """Each check with what was found, and below that what to do."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        found = Text(_one_line(check.detail))
        if check.advice:
            found.append(f"\n→ {_one_line(check.advice)}", "bold")
        table.add_row(Text(check.result, _STYLES[check.result]), Text(check.name), found)
    return table


_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def of_settings(said: Sequence[SettingSaid]) -> Table:
    """Each setting with its value and where that comes from."""
    table = _table(["setting", "is", "from"])
    for one in said:
        value = Text("not valid", "red") if one.error else _text(str(one.value))
        table.add_row(_text(one.name), value, _text(one.error or one.origin))
    return table


def _table(names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        right = name in ("value", "step")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def _text(cell: object) -> Text:
    # As Text, because brackets in plain text would be read as markup.
    return Text("" if cell is None else _one_line(cell))
