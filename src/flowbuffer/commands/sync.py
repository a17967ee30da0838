"""``flowbuffer sync``: deliver what is in a spool now.

A folder that somebody else delivers is waited for, and taken over if that somebody dies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from flowbuffer.backends.credentials import vouch_for, without_credentials
from flowbuffer.backends.uris import absolute_uri
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.collector.collector import Collector
from flowbuffer.collector.destinations import Destination
from flowbuffer.collector.policies import SYNC
from flowbuffer.commands.runs import Runs, end_created_run
from flowbuffer.commands.servers import Server
from flowbuffer.commands.targets import Target
from flowbuffer.delivery.retry import RetryPolicy
from flowbuffer.errors import FlowbufferError, RejectedError, RunGoneError, TransportError
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.files import FileLock
from flowbuffer.spool.folders import Spool, has_producer
from flowbuffer.spool.layout import FINISHED
from flowbuffer.spool.notes import delivery_note, is_parked_since, park, parked_reason
from flowbuffer.spool.producer_info import OFFLINE, ProducerInfo
from flowbuffer.spool.segment_files import closed_outcome
from flowbuffer.spool.tally import tally

#: How often the spool is looked at for folders that can be taken, in s.
_LOOK_EVERY_S = 0.25
#: How often whoever has a folder is told to hurry, in s.
_HURRY_EVERY_S = 1.0
#: What another process found out before this one began counts after so long, in s.
_OLD_NEWS_S = 10.0
#: A dead producer's folder that nobody takes for so long, in s, cannot be taken.
_UNTAKEN_S = 3.0
#: How long what is on its way may take at the end, in s.
_END_S = 2.0


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What a sync did, with what was in the spool when it began.

    Attributes:
        delivered, rejected, pending, unknown: Points; unknown are those whose part of the spool was
            wiped meanwhile, or is damaged.
        left: Why something is left, by run id; empty if nothing is.
        created: The runs that are others on their server, those of earlier syncs included.
        seconds: How long it took.
        interrupted: Whether it was, by Ctrl-C.
    """

    delivered: int
    rejected: int
    pending: int
    left: dict[str, str]
    created: tuple[CreatedRun, ...]
    seconds: float
    unknown: int = 0
    interrupted: bool = False


@dataclass(frozen=True, kw_only=True)
class CreatedRun:
    """A run that sync created: ``run_id`` is what its producers logged to."""

    tracking_uri: str
    run_id: str
    created_run_id: str


@dataclass(eq=False)
class _Run:
    """The producers of one run, and where their points go. ``there``: the run id on the server,
    once it is known; None until then."""

    server: Server
    tracking_uri: str
    run_id: str
    targets: list[Target] = field(default_factory=list)
    there: str | None = None
    ended: bool = False
    attempt: int = 0
    ask_at_s: float = 0.0
    reason: str = ""

    @property
    def created(self) -> bool:
        return self.there not in (None, self.run_id)

    @property
    def failed(self) -> bool:
        return any(target.outcome not in (None, FINISHED) for target in self.targets)


def sync(
    spool: Spool,
    settings: Settings,
    *,
    run_id: str | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    timeout_s: float = 3600.0,
    watch: Callable[[dict[str, int]], None] = lambda _: None,
) -> SyncReport:
    """Deliver everything that is in a spool now.

    Args:
        spool: The spool.
        settings: How to deliver; what the producers said goes before.
        run_id: Only what was logged to this run.
        tracking_uri: Everything goes to this server, not to where it was logged.
        experiment: Where runs are created that the server does not have.
        timeout_s: The most seconds to try.
        watch: Called now and then with how many points are delivered, rejected and pending.

    Raises:
        SpoolError: The spool cannot be used.
    """
    # Requests leave from threads, so that one that hangs does not hold the others up.
    work = _Sync(spool, settings.with_changes(delivery="thread"), tracking_uri, experiment)
    work.find(run_id)
    start_s = SYSTEM_CLOCK.monotonic_s()
    interrupted = False
    try:
        work.work(start_s + timeout_s, watch)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        work.let_go()
    report = work.report(SYSTEM_CLOCK.monotonic_s() - start_s)
    return replace(report, interrupted=interrupted)


class _Sync:
    def __init__(
        self, spool: Spool, settings: Settings, tracking_uri: str | None, experiment: str | None
    ) -> None:
        self._spool = spool
        self._settings = settings
        self._uri = None if tracking_uri is None else absolute_uri(tracking_uri)
        if self._uri is not None:
            vouch_for(self._uri)
        policy = replace(SYNC, destination=self._destination)
        self._collector = Collector(spool, settings, SYSTEM_CLOCK, policy)
        self._known_uri: str | None = None
        self._runs = Runs(spool.root, experiment)
        self._policy = RetryPolicy(most_s=5.0, unauthorised_s=5.0)
        self._targets: list[Target] = []
        self._elsewhere: list[_Run] = []  # runs that may have to be created
        self._destinations: dict[bytes, Destination] = {}  # by the text of producer.json
        self._left: dict[str, str] = {}
        self._start_s = self._look_at_s = SYSTEM_CLOCK.monotonic_s()
        self._start_ns = SYSTEM_CLOCK.now_ns()

    # What there is.

    def find(self, run_id: str | None) -> None:
        """Take stock of the folders."""
        for folder in self._spool.folders(run_id):
            try:
                target = Target.of(folder)
                if target is not None:
                    self._settings.with_delivery(target.info.settings)  # they are in range
            except (FlowbufferError, OSError) as error:
                if folder.exists():
                    self._left[folder.parent.name] = f"{folder} is left alone: {error}"
                continue
            if target is not None and run_id in (None, target.info.run_id):
                self._targets.append(target)
        self._choose_destinations()

    def _choose_destinations(self) -> None:
        """Decide where each folder goes, as far as that needs no server."""
        if any(target.before.pending for target in self._targets):
            import mlflow

            # A folder names its server without the credentials that this process may have.
            self._known_uri = absolute_uri(mlflow.get_tracking_uri())
            self._collector.know(self._known_uri)
        runs: dict[tuple[str, str], _Run] = {}
        for target in self._targets:
            info = target.info
            uri = self._uri_of(info)
            moved = without_credentials(uri) != info.tracking_uri
            living = has_producer(target.folder)
            logs = living and not closed_outcome(target.folder)
            if not target.before.pending:  # no server is needed to see that it is settled
                target.settled = living
                self._destinations[info.to_json()] = Destination(info.tracking_uri, info.run_id)
            elif logs and (moved or info.delivery == OFFLINE):
                how = "is offline" if info.delivery == OFFLINE else f"logs to {info.tracking_uri}"
                target.left = f"process {info.pid} runs, and {how}; sync again when it ended"
            elif moved or self._uri is not None or info.delivery == OFFLINE:
                run = runs.setdefault((uri, info.run_id), _Run(Server(uri), uri, info.run_id))
                run.targets.append(target)
            else:
                self._destinations[info.to_json()] = Destination(uri, info.run_id)
        self._elsewhere = list(runs.values())

    def _uri_of(self, info: ProducerInfo) -> str:
        known = self._known_uri
        if self._uri is not None:
            return self._uri
        if known is not None and without_credentials(known) == info.tracking_uri:
            return known
        return info.tracking_uri

    def _destination(self, info: ProducerInfo) -> Destination | None:
        return self._destinations.get(info.to_json())

    # Working.

    def work(self, deadline_s: float, watch: Callable[[dict[str, int]], None]) -> None:
        """Deliver until everything is settled or given up, or time is up."""
        while True:
            now_s = SYSTEM_CLOCK.monotonic_s()
            for run in self._elsewhere:
                self._attend(run, now_s)
            if now_s >= self._look_at_s:
                self._look_at_s = now_s + _LOOK_EVERY_S
                self._collector.look()
            next_s = self._collector.step(hurry=True)
            self._check(now_s)
            watch(self._counts())
            left_s = deadline_s - SYSTEM_CLOCK.monotonic_s()
            over = all(target.over for target in self._targets)
            if (over and not any(map(self._is_to_end, self._elsewhere))) or left_s <= 0:
                return
            self._collector.wait(min(next_s, left_s, 0.1))

    def _attend(self, run: _Run, now_s: float) -> None:
        """Ask the server for the run, and in the end tell it that the run is over."""
        if now_s < run.ask_at_s:
            return
        try:
            if run.there is None:
                if not all(target.over for target in run.targets):
                    self._find_run(run)
            elif self._is_to_end(run):
                end_created_run(run.server, run.there, failed=run.failed)
                run.ended = True
            run.attempt, run.reason = 0, ""
        except TransportError as error:
            run.attempt += 1
            run.ask_at_s = now_s + self._policy.wait_s(error, run.attempt)
            run.reason = error.reason
            if isinstance(error, (RejectedError, RunGoneError)):
                run.ended = True
                for target in run.targets:
                    target.left = "" if target.settled else error.reason

    def _find_run(self, run: _Run) -> None:
        infos = [target.info for target in run.targets]
        run.there = self._runs.find(run.server, run.run_id, infos, failed=run.failed)
        if run.there is not None:
            for info in infos:
                self._destinations[info.to_json()] = Destination(run.tracking_uri, run.there)
            self._look_at_s = 0.0

    def _is_to_end(self, run: _Run) -> bool:
        """Whether a run that sync created is complete, and is not marked so."""
        return (
            run.created
            and not run.ended
            and all(target.settled for target in run.targets)
            and not any(map(_goes_on, self._spool.folders(run.run_id)))
        )

    def _check(self, now_s: float) -> None:
        streams = {stream.path: stream for stream in self._collector.streams}
        for target in self._targets:
            if target.over:
                continue
            stream = streams.get(target.folder)
            if stream is not None and target.stream is None:
                park(target.folder, None)  # what was in its way may be so no more
            # One that ended still tells how: it was let go, or is handed on and with others now.
            own = target.stream = stream or target.stream
            if own is not None and own.is_let_go:
                target.settled = True
            elif own is not None and own.sender.gone and own.sender.failure is not None:
                target.leave_as_gone(own.sender.failure.reason)
            elif (stream is None or not stream.reader.finished) and now_s >= target.look_at_s:
                self._check_from_outside(target, now_s, own=stream is not None)

    def _check_from_outside(self, target: Target, now_s: float, *, own: bool) -> None:
        """See what became of a folder that another process has, or whose producer lives."""
        folder = target.folder
        target.look_at_s = now_s + _LOOK_EVERY_S
        target.settled = target.waiting.is_over()
        if target.settled:
            return
        if now_s >= target.hurry_at_s:
            target.hurry_at_s = now_s + _HURRY_EVERY_S
            target.hurry()
        if own or target.info.to_json() not in self._destinations:
            return
        if has_producer(folder) or FileLock.is_held(folder / "reader.lock"):
            target.untaken_since_s = None
            parked = parked_reason(folder)
            known = target.info.delivery != OFFLINE and now_s - self._start_s > _OLD_NEWS_S
            if parked and (known or is_parked_since(folder, self._start_ns)):
                target.leave_as_gone(parked)
        elif target.untaken_since_s is None:
            target.untaken_since_s = now_s
        elif now_s - target.untaken_since_s > _UNTAKEN_S:
            target.left = f"{folder} cannot be delivered"

    def let_go(self) -> None:
        """Leave the folders that are not done to others, what is on its way first."""
        end_s = SYSTEM_CLOCK.monotonic_s() + _END_S
        for stream in self._collector.streams:
            stream.leaving = True
        while any(not stream.stuck for stream in self._collector.streams):
            left_s = end_s - SYSTEM_CLOCK.monotonic_s()
            if left_s <= 0:
                break
            self._collector.wait(min(self._collector.step(hurry=True), left_s, 0.1))
        for stream in self._collector.streams:
            stream.hand_on()

    # Telling.

    def _counts(self) -> dict[str, int]:
        pending = sum(target.pending_now() for target in self._targets)
        total = sum(target.before.pending for target in self._targets)
        return {"delivered": total - pending, "rejected": 0, "pending": pending}

    def report(self, seconds: float) -> SyncReport:
        """What became of it."""
        became = [target.what_became() for target in self._targets]
        delivered, rejected, pending, unknown = map(sum, zip((0,) * 4, *became, strict=True))
        left = dict(self._left)
        for target in self._targets:
            if not target.settled:
                left[target.info.run_id] = self._why(target)
        for target, (_, _, _, lost) in zip(self._targets, became, strict=True):
            if lost:
                left[target.info.run_id] = (
                    f"nobody knows what became of {lost} points: what held them was wiped, or is "
                    "damaged"
                )
        created = [
            CreatedRun(tracking_uri=run.server.name, run_id=run.run_id, created_run_id=run.there)
            for run in self._elsewhere
            if run.there is not None and run.created
        ]
        for run in self._elsewhere:
            if run.reason:
                left.setdefault(run.run_id, run.reason)
        return SyncReport(
            delivered=delivered,
            rejected=rejected,
            pending=pending,
            left=left,
            created=tuple(created),
            seconds=seconds,
            unknown=unknown,
        )

    def _why(self, target: Target) -> str:
        if target.left:
            return target.left
        for run in self._elsewhere:
            if target in run.targets and run.there is None:
                return run.reason or "another process holds runs.lock of the spool"
        own = target.stream
        if own is not None:
            return "time was up" if own.sender.failure is None else own.sender.failure.reason
        said = delivery_note(target.folder).last_error
        return said or "another process delivers it, and is not done"


def _goes_on(folder: Path) -> bool:
    """Whether a producer may still log, or has points that are not delivered."""
    try:
        if has_producer(folder) and not closed_outcome(folder):
            return True
    except OSError:
        return True
    found = tally(folder)
    return found is not None and found.pending > 0
