"""The command ``flowbuffer``: what may be asked, and with which words it is answered.

What a command does is in ``flowbuffer.commands``, imported when it is called: NumPy and MLflow take
a second, and ``--help`` needs neither.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowbuffer.errors import FlowbufferError
from flowbuffer.words import counted, printable, short_id

if TYPE_CHECKING:
    from flowbuffer.commands.sync import SyncReport
    from flowbuffer.spool.folders import Spool

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code; 2 for misuse, and where there is no usable spool."""
    with warnings.catch_warnings():
        # A variable that is no setting is told without the line of code that found it.
        warnings.showwarning = lambda message, *_: _say(str(message))
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        return int(_commands.main(arguments, "flowbuffer", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return _INTERRUPTED
    except (FlowbufferError, OSError) as error:
        _say(str(error))
        return 2


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""Every command ends with 0 when it did its work, with 1 as it says itself, with 2 on
    misuse and where there is no usable spool, and with 130 on Ctrl-C.

    \b
    Completion in bash (zsh, fish: zsh_source, fish_source):
      eval "$(_FLOWBUFFER_COMPLETE=bash_source flowbuffer)"
    """,
)
@click.version_option(package_name="flowbuffer", message="flowbuffer %(version)s")
def _commands() -> None:
    """Buffered metric logging for MLflow: look after what waits in a spool."""


def _command(function: Callable[..., int]) -> click.Command:
    """A command of that name, with the option that all have."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
    return _commands.command(function.__name__.strip("_"))(as_json(function))


_of_spool = click.option(
    "--spool",
    "spool_dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The spool. Default: spool_dir of the settings.",
)
_of_run = click.option(
    "--run-id",
    metavar="ID",
    help="Only what was logged to this run. The beginning of its id is enough.",
)
_without_asking = click.option("--yes", is_flag=True, help="Do not ask.")


@_command
@_of_spool
@_of_run
@click.option("--wide", is_flag=True, help="Whole run ids, and all columns.")
@click.option("--watch", is_flag=True, help="Look again every 2 s, until Ctrl-C.")
@click.option("--exit-code", is_flag=True, help="End with 1 if something is pending.")
def _status(
    spool_dir: Path | None,
    as_json: bool,
    run_id: str | None,
    wide: bool,
    watch: bool,
    exit_code: bool,
) -> int:
    """Who logs to the spool, and what waits for delivery.

    The run that was begun last comes first. Ends with 0, also if the spool is empty.
    """
    from flowbuffer.commands.places import settings_of, spool_of
    from flowbuffer.commands.status import status

    if watch and as_json:
        raise click.UsageError("--watch is for people, --json is for programs; give one of them")
    spool = spool_of(settings_of(spool_dir))
    found = status(spool, run_id)
    if as_json:
        _print_json(asdict(found))
    else:
        from flowbuffer.commands.render import keep_showing, of_status, show

        if watch:
            keep_showing(lambda: of_status(status(spool, run_id), wide=wide))
            return _INTERRUPTED
        show(of_status(found, wide=wide))
    return int(exit_code and any(row.pending for row in found.producers))


@_command
@_of_spool
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
@click.option("--dry-run", is_flag=True, help="Only say what would be delivered, and where.")
def _sync(
    spool_dir: Path | None,
    as_json: bool,
    run_id: str | None,
    tracking_uri: str | None,
    experiment: str | None,
    timeout: float,
    dry_run: bool,
) -> int:
    """Deliver everything that is in the spool now.

    Beside other processes that deliver it, too. What an offline job logged goes to a run that is
    created if need be, and found again by the next sync.

    Ends with 0 if nothing is left, and with 1 if something is (stderr says why).
    """
    from flowbuffer.clock import SYSTEM_CLOCK
    from flowbuffer.commands.places import run_id_in, settings_of, spool_of
    from flowbuffer.logger.progress import Progress

    settings = settings_of(spool_dir)
    spool = spool_of(settings)
    if run_id is not None:
        run_id = run_id_in(spool, run_id)
    if dry_run:
        return _plan(spool, as_json, run_id, tracking_uri)
    from flowbuffer.commands.sync import sync

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
        _tell_synced(report)
    if report.interrupted:
        return _INTERRUPTED
    return 1 if report.left else 0


def _plan(spool: Spool, as_json: bool, run_id: str | None, tracking_uri: str | None) -> int:
    from flowbuffer.commands.plan import plan

    planned = plan(spool, run_id=run_id, tracking_uri=tracking_uri)
    if as_json:
        _print_json([asdict(one) for one in planned])
    for one in [] if as_json else planned:
        note = f" ({one.note})" if one.note else ""
        _print_line(f"run {one.run_id}: {counted(one.points)} to {one.tracking_uri}{note}")
    if not as_json:
        _print_line(f"{counted(sum(one.points for one in planned))} would be delivered")
    return 0


def _tell_synced(report: SyncReport) -> None:
    for run in report.created:
        _print_line(f"run {run.run_id} is run {run.created_run_id} at {run.tracking_uri}")
    _print_line(
        f"{'interrupted: ' if report.interrupted else ''}delivered {report.delivered:,}, "
        f"rejected {report.rejected:,}, pending {report.pending:,}"
    )
    if report.interrupted:
        return
    runs: dict[str, list[str]] = {}
    for run_id, why in report.left.items():
        runs.setdefault(why, []).append(run_id)
    for why, run_ids in runs.items():
        of = f"run {run_ids[0]}: " if len(run_ids) == 1 else f"{len(run_ids)} runs: "
        _say(why if why.startswith(f"run {run_ids[0]}") else of + why)


@_command
@_of_spool
@_of_run
@click.option("--retry", is_flag=True, help="Put them into the spool again.")
def _rejected(spool_dir: Path | None, as_json: bool, run_id: str | None, retry: bool) -> int:
    """The points that the server refused for good, with its reasons.

    Ends with 0, whether there are any or not.
    """
    from flowbuffer.commands import rejected
    from flowbuffer.commands.places import run_id_in, settings_of, spool_of

    settings = settings_of(spool_dir)
    spool = spool_of(settings)
    if run_id is not None:
        try:
            run_id = run_id_in(spool, run_id)
        except FlowbufferError as error:  # once all is delivered there is nothing of a run
            _say(str(error))
    if not retry:
        letters = rejected.rejected(spool, run_id)
        if as_json:
            _print_json([asdict(letter) for letter in letters])
        elif letters:
            from flowbuffer.commands.render import of_rejected, show

            show(of_rejected(letters))
        else:
            _print_line("nothing was rejected")
        return 0
    retried = rejected.retry(spool, settings, run_id)
    if as_json:
        _print_json([asdict(one) for one in retried])
        return 0
    for one in retried:
        kept = f", {one.kept:,} stay: {one.reason}" if one.kept else ""
        wait = "waits" if one.points == 1 else "wait"
        _print_line(f"run {one.run_id}: {counted(one.points)} {wait} for delivery again{kept}")
    if any(one.points for one in retried):
        _print_line("a collector process delivers them if one runs, else: flowbuffer sync")
    elif not retried:
        _print_line("nothing was rejected")
    return 0


@_command
@_of_spool
@click.option("--rejected", is_flag=True, help="Delete also where there are rejected points.")
@click.option(
    "--pending",
    metavar="RUN",
    help="Discard what of this run is not delivered. The beginning of its id is enough.",
)
@_without_asking
def _clean(
    spool_dir: Path | None, as_json: bool, rejected: bool, pending: str | None, yes: bool
) -> int:
    """Delete what dead producers left and nobody needs.

    Without --pending never a point that is pending. What --rejected and --pending delete is asked
    for first; without a terminal they need --yes.

    Ends with 0, whatever was kept.
    """
    from flowbuffer.commands.clean import clean, discard, folders_with_letters
    from flowbuffer.commands.places import run_id_in, settings_of, spool_of
    from flowbuffer.commands.status import status

    spool = spool_of(settings_of(spool_dir))
    if pending is not None:
        run_id = run_id_in(spool, pending)
        points = sum(row.pending for row in status(spool, run_id).producers)
        what = f"{counted(points)} of run {run_id} that {'is' if points == 1 else 'are'} pending"
        if not (yes or _confirmed(f"Discard {what}? Nothing can bring them back.")):
            return 0
        cleaned = discard(spool, run_id)
    else:
        doomed = folders_with_letters(spool) if rejected and not yes else []
        if doomed:
            what = f"the rejected points of {counted(len(doomed), 'producer')}"
            rejected = _confirmed(f"Delete {what} for good?")
        cleaned = clean(spool, with_rejected=rejected)
    if as_json:
        _print_json([asdict(one) for one in cleaned])
        return 0
    for one in cleaned:
        because = f": {one.reason}" if one.reason else ""
        where = f"run {short_id(one.run_id)}, {Path(one.folder).name}"
        _print_line(f"{'removed' if one.removed else 'kept'} {where}{because}")
    for advice in dict.fromkeys(one.advice for one in cleaned if one.advice):
        _print_line(f"→ {advice}")
    removed = sum(one.removed for one in cleaned)
    _print_line(f"removed {removed} of {counted(len(cleaned), 'folder')}")
    return 0


@_command
@_of_spool
@click.option("--tracking-uri", metavar="URI", help="The server. Default: MLflow's current one.")
def _doctor(spool_dir: Path | None, as_json: bool, tracking_uri: str | None) -> int:
    """What is wrong here, and what to do about it.

    Looks at settings, spool, disk, server, clock and versions, and changes nothing.

    Ends with 0 if nothing failed (warnings do not count), and with 1 if something did.
    """
    from flowbuffer.commands.doctor import doctor

    checks = doctor(spool_dir, tracking_uri)
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        from flowbuffer.commands.render import of_doctor, show

        show(of_doctor(checks))
    return int(any(check.result == "fail" for check in checks))


@_command
def _settings(as_json: bool) -> int:
    """Every setting: its value here, and where that comes from.

    Ends with 0, and with 1 if one is not valid.
    """
    from flowbuffer.commands.settings import settings_said, unknown_variables

    said = settings_said()
    if as_json:
        _print_json([asdict(one) for one in said])
    else:
        from flowbuffer.commands.render import of_settings, show

        show(of_settings(said))
    for words in unknown_variables():
        _say(words)
    return int(any(one.error for one in said))


# Asking and telling.


def _confirmed(question: str) -> bool:
    """What a person says; without one it is an error."""
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} There is no terminal to ask; give --yes.")
    return click.confirm(question, err=True)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def _print_line(text: str) -> None:
    click.echo(printable(text))


def _say(text: str) -> None:
    click.echo(f"flowbuffer: {printable(text)}", err=True)
