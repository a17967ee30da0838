"""The loop that delivers a spool: in a thread, in a process, or in whoever calls ``step``.

Whose folder is whose is decided by the folder's ``reader.lock``, so any number of collectors can
work one spool side by side and no two ever work one folder.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from flowbuffer.clock import SYSTEM_CLOCK, Clock, Event
from flowbuffer.credentials import without_credentials
from flowbuffer.destinations import (
    Destination,
    Destinations,
    TransportFactory,
    as_logged,
    nothing,
    transport_to,
)
from flowbuffer.errors import SpoolError
from flowbuffer.sender import Sender
from flowbuffer.settings import Settings
from flowbuffer.source import Source
from flowbuffer.spool import dead_letters
from flowbuffer.spool.directory import Claim, Spool, has_producer
from flowbuffer.spool.info import OFFLINE, ProducerInfo, read_info
from flowbuffer.spool.reader import Reader
from flowbuffer.spool.states import closed_outcome, parked_reason
from flowbuffer.transport import Transport, absolute_uri

_log = logging.getLogger("flowbuffer")

#: How often the spool is looked at for new points, in s.
POLL_S = 0.05
#: How often it is looked at for new points after :data:`QUIET_S` without any, in s.
QUIET_POLL_S = 0.2
QUIET_S = 2.0
#: How often the spool is looked at for folders of dead producers, in s.
ADOPT_EVERY_S = 5.0
#: How often it is tested whether a producer lives, in s.
_TEST_EVERY_S = 0.1
#: How long the end of a process may wait for the step that is being done, in s.
_FINISH_S = 1.0
_STOPGAP_WINDOW_POINTS = 4096
#: How many connections to servers that nobody uses any more are kept.
_IDLE_TRANSPORTS = 4


@dataclass(eq=False)
class Stream:
    """One producer's folder on its way to the backend.

    ``adopted``: its producer was dead when it was claimed. ``until_s``: from then on, on the
    collector's monotonic clock, it goes back to others once nothing of it is on its way. ``done``:
    everything is settled and the folder is let go.
    """

    claim: Claim
    reader: Reader
    sender: Sender
    source: Source
    adopted: bool
    until_s: float = math.inf
    done: bool = False
    test_at_s: float = 0.0

    @property
    def stuck(self) -> bool:
        """The last request failed; waiting may be in vain."""
        return self.sender.failure is not None


class Collector:
    """Delivers one spool.

    Args:
        spool: The spool.
        settings: Of the process; ``delivery="inline"`` gets no thread.
        clock: Decides when things are due.
        connect: Makes the transport for a tracking URI.
        destinations: Of the folders that are found in the spool.
        living: Take the folders of living producers, too, if their setting is
            ``delivery="process"``.
        stopgap: Deliver until another collector is there to take over: one request at a time, as
            others may do the same, and little read ahead.
        wake: Ends a wait between two steps.
    """

    def __init__(
        self,
        spool: Spool,
        settings: Settings,
        clock: Clock,
        connect: TransportFactory = transport_to,
        destinations: Destinations = as_logged,
        *,
        living: bool = False,
        stopgap: bool = False,
        wake: Event | None = None,
    ) -> None:
        self.spool = spool
        self.streams: list[Stream] = []
        self._settings = settings
        self._clock = clock
        self._connect = connect
        self._destinations = destinations
        self._living = living
        self._stopgap = stopgap
        self._transports: dict[tuple[str, Settings], Transport] = {}
        self._senders: dict[Destination, Sender] = {}
        self._uris: dict[str, str] = {}  # with credentials, by the URI without
        self._broken: set[Sender] = set()
        self._left: set[Path] = set()  # folders to be left alone
        self._infos: dict[Path, ProducerInfo] = {}  # of folders that others deliver, so far
        self._look_at_s = self._sweep_at_s = -math.inf
        self._quiet_since_s = clock.monotonic_s()
        self._wake = wake or threading.Event()
        self._step_lock = threading.RLock()
        self._thread: threading.Thread | None = None

    def add(self, folder: Path, tracking_uri: str) -> Stream | None:
        """Deliver what is, and will be, in a producer's folder; None if another collector does.

        Raises:
            SpoolError: The folder is not this user's alone, or not of this format.
        """
        with self._step_lock:
            claim = self.spool.claim(folder, living=True)
            if claim is None:
                return None
            return self._serve(claim, Destination(tracking_uri, claim.info.run_id))

    def know(self, tracking_uri: str) -> None:
        """Use this URI, with its credentials, where a folder names the one without."""
        uri = absolute_uri(tracking_uri)
        self._uris[without_credentials(uri)] = uri

    def start(self) -> None:
        """Deliver in a daemon thread from now on."""
        with self._step_lock:
            if self._thread is None and self._settings.delivery != "inline":
                thread = threading.Thread(
                    target=self._run, name="flowbuffer-collector", daemon=True
                )
                try:
                    thread.start()
                    self._thread = thread
                except RuntimeError:
                    pass  # the interpreter is ending: whoever waits has to step

    @property
    def has_thread(self) -> bool:
        """Whether :meth:`step` is called by a thread of this collector."""
        return self._thread is not None

    def hurry(self) -> None:
        """Look at the spool now."""
        self._wake.set()

    def drain(self) -> None:
        """Step until nothing is due at once; for where no thread does."""
        while (next_s := self.step(hurry=True)) < POLL_S:
            self._clock.sleep(next_s)

    def step(self, *, hurry: bool = False) -> float:
        """One round for every run. Returns the seconds until the next one is worthwhile."""
        with self._step_lock:
            now_s = self._clock.monotonic_s()
            if now_s >= self._look_at_s:
                self._look_at_s = now_s + (QUIET_POLL_S if self._living else ADOPT_EVERY_S)
                self.look()
            next_s = math.inf
            for sender in list(self._senders.values()):
                next_s = min(next_s, self._step(sender, hurry))
            for stream in list(self.streams):
                self._tend(stream, now_s)
            if next_s <= POLL_S:
                self._quiet_since_s = now_s
            return min(next_s, self._look_at_s - now_s)

    def wait(self, next_s: float) -> None:
        """Wait until the next step is worthwhile, of which the last one said ``next_s``."""
        quiet = self._clock.monotonic_s() - self._quiet_since_s > QUIET_S
        poll_s = QUIET_POLL_S if quiet else POLL_S
        next_s = min(next_s, poll_s if self.streams else ADOPT_EVERY_S)
        if next_s > 0:
            self._clock.wait(self._wake, next_s)
        self._wake.clear()

    def look(self) -> None:
        """Take what is in the spool and nobody delivers."""
        now_s = self._clock.monotonic_s()
        if now_s >= self._sweep_at_s:
            self._sweep_at_s = now_s + ADOPT_EVERY_S
            self.spool.sweep()
        for folder in self.not_served():
            try:
                self._take(folder)
            except Exception as error:
                if folder.exists():  # else it is delivered, and removed by another process
                    self._left.add(folder)
                    _log.warning("%s is left alone: %s", folder, error)

    def finish_step(self) -> None:
        """Wait, but not for long, until a step that is being done is: a folder that it deletes, by
        which others know that all is delivered, is gone then."""
        if self._step_lock.acquire(timeout=_FINISH_S):
            self._step_lock.release()

    def leave(self) -> None:
        """Leave every folder to others, whatever is on its way."""
        with self._step_lock:
            for stream in list(self.streams):
                self._forget(stream)
                stream.claim.release()

    def not_served(self) -> list[Path]:
        """The folders of the spool that are not, and need not be, left alone."""
        found = list(self.spool.folders())
        self._left.intersection_update(found)
        self._infos = {folder: self._infos[folder] for folder in found if folder in self._infos}
        own = {stream.claim.path for stream in self.streams}
        return [folder for folder in found if folder not in own and folder not in self._left]

    def forget_after_fork(self) -> None:
        """In a forked child: the thread is gone, and locks may be held by nobody."""
        self._wake = threading.Event()
        self._step_lock = threading.RLock()
        self.streams.clear()
        self._thread = None

    def _take(self, folder: Path) -> None:
        info = self._infos.get(folder)
        if info is None:
            info = self._infos[folder] = read_info(folder)
        destination = self._destinations(info)
        if destination is None:
            return
        claim = self.spool.claim(
            folder, living=self._living and info.delivery in ("process", OFFLINE)
        )
        if claim is not None:
            self._serve(claim, destination)

    def _serve(self, claim: Claim, destination: Destination) -> Stream:
        try:
            settings = self._settings.with_delivery(claim.info.settings)
            if self._stopgap:
                settings = settings.with_changes(max_in_flight=1)
            sender = self._sender(destination, settings)
            adopted = claim.producer_died()
            reader = Reader(claim.path, self._clock, alive=not adopted)
        except BaseException:
            claim.release()
            raise
        stream = Stream(claim, reader, sender, sender.add(reader), adopted)
        self.streams.append(stream)
        self.hurry()
        return stream

    def _step(self, sender: Sender, hurry: bool) -> float:
        """One round for one run; what fails there stays there."""
        finished = all(source is None or source.reader.finished for source in sender.sources)
        try:
            return sender.step(hurry=hurry or finished)
        except Exception:
            if sender not in self._broken:
                self._broken.add(sender)
                _log.exception(
                    "run %s: delivery failed; its points stay in the spool", sender.run_id
                )
            return 1.0

    def _run(self) -> None:
        while True:
            try:
                next_s = self.step()
            except Exception:
                _log.exception("delivery failed; the points stay in the spool")
                next_s = 1.0
            self.wait(next_s)

    def _sender(self, destination: Destination, settings: Settings) -> Sender:
        uri = absolute_uri(destination.tracking_uri)
        if uri != without_credentials(uri):
            self.know(uri)
        uri = self._uris.get(without_credentials(uri), uri)
        at = Destination(uri, destination.run_id)
        if at not in self._senders:
            if (uri, settings) not in self._transports:
                self._transports[uri, settings] = self._connect(uri, settings, self._clock)
            transport = self._transports[uri, settings]
            self._senders[at] = Sender(
                at.run_id,
                transport,
                settings,
                self._clock,
                self.hurry,
                window_points=_STOPGAP_WINDOW_POINTS if self._stopgap else None,
            )
        return self._senders[at]

    def _tend(self, stream: Stream, now_s: float) -> None:
        """See whether the producer lives, and whether the folder can be let go."""
        reader = stream.reader
        if not reader.finished and now_s >= stream.test_at_s:
            stream.test_at_s = now_s + _TEST_EVERY_S
            if stream.claim.producer_died():
                reader.producer_died()
                self.hurry()
        if reader.settled:
            self._let_go(stream)
        stream.source.paused = now_s >= stream.until_s
        if stream.source.paused and not reader.on_their_way and not stream.done:
            self._forget(stream)
            stream.claim.release()

    def _let_go(self, stream: Stream) -> None:
        self._forget(stream)
        for problem in stream.reader.problems:
            _log.warning("the spool is damaged: %s", problem)
        if stream.reader.problems or dead_letters.are_in(stream.claim.path):
            self._left.add(stream.claim.path)
            stream.reader.note_done()
            stream.claim.release()
        else:
            try:
                stream.claim.remove(delivered=stream.reader.delivered_segments)
            except OSError as error:
                stream.claim.release()
                _log.warning("%s cannot be removed: %s", stream.claim.path, error)
        stream.done = True

    def _close_transports(self) -> None:
        """Let go of those that nobody uses, but for a few that may be wanted again."""
        used = {sender.transport for sender in self._senders.values()}
        for at, transport in list(self._transports.items())[:-_IDLE_TRANSPORTS]:
            if transport not in used:
                transport.close()
                del self._transports[at]

    def _forget(self, stream: Stream) -> None:
        stream.reader.close()
        stream.sender.remove(stream.source)
        self.streams.remove(stream)
        if not any(stream.sender.sources):
            self._senders = {at: s for at, s in self._senders.items() if s is not stream.sender}
            self._close_transports()


def is_served(folder: Path) -> bool:
    """Whether a folder is of a living producer that relies on a collector process. One that is
    closed, and whose run is gone, has nothing more to get from it."""
    try:
        relies = read_info(folder).delivery == "process" and has_producer(folder)
        return relies and not (closed_outcome(folder) and parked_reason(folder))
    except SpoolError:
        return False


_collectors: dict[tuple[Path, Settings], Collector] = {}
_collectors_lock = threading.RLock()


def collector_of(settings: Settings) -> Collector:
    """This process's collector of a spool; one for all loggers with the same settings.

    With ``delivery="process"`` it delivers only what it is given, as a stopgap.

    Raises:
        SpoolError: The spool cannot be used.
    """
    root = settings.resolved_spool_dir()
    with _collectors_lock:
        if (root, settings) not in _collectors:
            given_only = settings.delivery == "process"
            _collectors[root, settings] = Collector(
                Spool(root),
                settings,
                SYSTEM_CLOCK,
                destinations=nothing if given_only else as_logged,
                stopgap=given_only,
            )
        return _collectors[root, settings]


def _forget_after_fork() -> None:
    global _collectors_lock
    _collectors_lock = threading.RLock()
    for collector in _collectors.values():
        collector.forget_after_fork()
    _collectors.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
