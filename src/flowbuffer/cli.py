"""The command ``flowbuffer``: what may be asked, and how the answers look.

What a command does is in ``flowbuffer.commands``, imported when it is called: NumPy and MLflow take
a second, and ``--help`` needs neither.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowbuffer.errors import FlowbufferError

if TYPE_CHECKING:
    from rich.table import Table

    from flowbuffer.commands.status import SpoolStatus

#: How often ``status --watch`` looks, in s.
_WATCH_EVERY_S = 2.0
#: The width of a table that is not shown on a terminal, in characters: nothing is cut.
_FILE_WIDTH = 400
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code; 2 for misuse, and where there is no usable spool."""
    try:
        return int(_commands.main(arguments, "flowbuffer", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("flowbuffer: interrupted", err=True)
        return _INTERRUPTED
    except (FlowbufferError, OSError) as error:
        click.echo(f"flowbuffer: {_line(error)}", err=True)
        return 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def _commands() -> None:
    """Buffered metric logging for MLflow: look after what waits in a spool.

    Every command ends with 2 on misuse, and when there is no spool or it cannot be used.
    """


def _command(function: Callable[..., int]) -> click.Command:
    """A command of that name, with the options that all have."""
    spool_dir = click.option(
        "--spool",
        "spool_dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="The spool. Default: spool_dir of the settings.",
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
    name = function.__name__.strip("_")
    return _commands.command(name)(spool_dir(as_json(function)))


_of_run = click.option("--run-id", metavar="ID", help="Only what was logged to this run.")


@_command
@click.option("--watch", is_flag=True, help="Look again every 2 s, until Ctrl-C.")
def _status(spool_dir: Path | None, as_json: bool, watch: bool) -> int:
    """Who logs to the spool, and what waits for delivery.

    Ends with 0, also if the spool is empty; with 2 if there is none, or it cannot be read.
    """
    from flowbuffer.commands.places import settings_of, spool_of
    from flowbuffer.commands.status import status

    if watch and as_json:
        raise click.UsageError("--watch is for people, --json is for programs; give one of them")
    spool = spool_of(settings_of(spool_dir))
    if as_json:
        _print_json(asdict(status(spool)))
    elif watch:
        _watch(lambda: _status_table(status(spool)))
    else:
        _print(_status_table(status(spool)))
    return 0


@_command
@_of_run
@click.option("--tracking-uri", metavar="URI", help="Deliver everything there instead.")
@click.option("--experiment", metavar="NAME", help="Where runs are created that are not there.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="The most seconds to try.",
)
def _sync(
    spool_dir: Path | None,
    as_json: bool,
    run_id: str | None,
    tracking_uri: str | None,
    experiment: str | None,
    timeout: float,
) -> int:
    """Deliver everything that is in the spool now.

    Beside other processes that deliver it, too. What an offline job logged goes to a run that is
    created if need be, and found again by the next sync.

    Ends with 0 if nothing is left, 1 if something is (stderr says why), 2 on misuse.
    """
    from flowbuffer.clock import SYSTEM_CLOCK
    from flowbuffer.commands.places import settings_of, spool_of
    from flowbuffer.commands.sync import sync
    from flowbuffer.progress import Progress

    settings = settings_of(spool_dir)
    spool = spool_of(settings)
    counts: dict[str, int] = {}
    start_s = SYSTEM_CLOCK.monotonic_s()
    progress = Progress(lambda: counts)

    def watch(now: dict[str, int]) -> None:
        counts.update(now)
        progress.show(SYSTEM_CLOCK.monotonic_s() - start_s)

    try:
        report = sync(
            spool,
            settings,
            run_id=run_id,
            tracking_uri=tracking_uri,
            experiment=experiment,
            timeout_s=timeout,
            watch=watch,
        )
    finally:
        progress.close()
    if as_json:
        _print_json(asdict(report))
    else:
        for run in report.created:
            _print_line(f"run {run.run_id} is run {run.created_run_id} at {run.tracking_uri}")
        _print_line(
            f"delivered {report.delivered}, rejected {report.rejected}, pending {report.pending}"
        )
    for run_id, why in report.left.items():
        click.echo(f"run {_line(run_id)}: {_line(why)}", err=True)
    return 1 if report.left else 0


@_command
@_of_run
@click.option("--retry", is_flag=True, help="Put them into the spool again.")
def _rejected(spool_dir: Path | None, as_json: bool, run_id: str | None, retry: bool) -> int:
    """The points that the server refused for good, with its reasons.

    Ends with 0, whether there are any or not.
    """
    from flowbuffer.commands import rejected
    from flowbuffer.commands.places import settings_of, spool_of

    settings = settings_of(spool_dir)
    spool = spool_of(settings)
    if not retry:
        letters = rejected.rejected(spool, run_id)
        if as_json:
            _print_json([asdict(letter) for letter in letters])
            return 0
        rows = [
            (x.run_id, Path(x.producer).name, x.kind, x.key, x.value, x.step, x.timestamp, x.reason)
            for x in letters
        ]
        columns = ("run", "producer", "kind", "key", "value", "step", "timestamp", "reason")
        _print(_table(columns, rows) if rows else "nothing was rejected")
        return 0
    retried = rejected.retry(spool, settings, run_id)
    if as_json:
        _print_json([asdict(one) for one in retried])
        return 0
    for one in retried:
        kept = f", {one.kept} stay: {one.reason}" if one.kept else ""
        _print_line(f"run {one.run_id}: {one.points} points wait for delivery again{kept}")
    if any(one.points for one in retried):
        _print_line("a collector process delivers them if one runs, else: flowbuffer sync")
    elif not retried:
        _print_line("nothing was rejected")
    return 0


@_command
@click.option("--rejected", is_flag=True, help="Delete also where there are rejected points.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def _clean(spool_dir: Path | None, as_json: bool, rejected: bool, yes: bool) -> int:
    """Delete what dead producers left and nobody needs; never a point that is pending.

    Ends with 0, whatever was kept.
    """
    from flowbuffer.commands.clean import clean, folders_with_letters
    from flowbuffer.commands.places import settings_of, spool_of

    spool = spool_of(settings_of(spool_dir))
    if rejected and not yes and sys.stdin.isatty():
        doomed = folders_with_letters(spool)
        if doomed:
            question = f"Delete the rejected points of {len(doomed)} producers for good?"
            rejected = click.confirm(question, err=True)
    cleaned = clean(spool, with_rejected=rejected)
    if as_json:
        _print_json([asdict(one) for one in cleaned])
        return 0
    for one in cleaned:
        _print_line(f"{'removed' if one.removed else 'kept'} {one.folder}{_because(one.reason)}")
    _print_line(f"removed {sum(one.removed for one in cleaned)} of {len(cleaned)} folders")
    return 0


@_command
@click.option("--tracking-uri", metavar="URI", help="The server. Default: MLflow's current one.")
def _doctor(spool_dir: Path | None, as_json: bool, tracking_uri: str | None) -> int:
    """What is wrong with settings, spool, server, clock and versions, and what to do.

    Ends with 0 if nothing failed (warnings do not count), 1 if something did.
    """
    from flowbuffer.commands.doctor import doctor

    checks = doctor(spool_dir, tracking_uri)
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        rows = [(check.result, check.name, check.detail, check.advice) for check in checks]
        _print(_table(("", "check", "found", "what to do"), rows))
    return int(any(check.result == "fail" for check in checks))


# How it looks.


def _status_table(found: SpoolStatus) -> Table:
    rows = [
        (
            row.run_id, row.host, row.pid, row.rank, row.state, row.delivery, row.pending,
            row.delivered, row.rejected,
            "" if row.oldest_s is None else f"{row.oldest_s:.0f} s", row.tracking_uri,
            row.last_error,
        )
        for row in found.producers
    ]  # fmt: skip
    columns = (
        "run", "host", "pid", "rank", "state", "delivery", "pending", "delivered", "rejected",
        "oldest", "tracking URI", "last error",
    )  # fmt: skip
    table = _table(columns, rows)
    pid = f" ({found.collector_pid})" if found.collector_pid is not None else ""
    runs = f"a collector process runs{pid}" if found.collector_runs else "no collector process runs"
    table.title = f"{_line(found.spool)}: {found.used_bytes / 2**20:.1f} MiB; {runs}"
    return table


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # As Text, because brackets in plain text would be read as markup.
        table.add_row(*(Text("" if cell is None else _line(cell)) for cell in row))
    return table


def _print(content: Any) -> None:
    from rich.console import Console

    console = Console(soft_wrap=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(content)


def _watch(draw: Callable[[], Any]) -> None:
    import signal

    from rich.live import Live

    from flowbuffer.clock import SYSTEM_CLOCK

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


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def _print_line(text: str) -> None:
    click.echo(_line(text))


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _line(text: object) -> str:
    """As one line without control characters: it may be what a server, or a job, said."""
    return "".join(c if c.isprintable() else " " for c in str(text))
