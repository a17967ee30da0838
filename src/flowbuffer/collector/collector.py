"""The loop that delivers a spool: in a thread, in a process, or in whoever calls ``step``.

Whose folder is whose is decided by the folder's ``reader.lock``, so any number of collectors can
work one spool side by side and no two ever work one folder.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from flowbuffer.backends.base import Transport
from flowbuffer.backends.credentials import without_credentials
from flowbuffer.backends.uris import absolute_uri
from flowbuffer.clock import Clock, Event
from flowbuffer.collector.background import Wake
from flowbuffer.collector.destinations import (
    Destination,
    Destinations,
    TransportFactory,
    as_logged,
    transport_to,
)
from flowbuffer.collector.handover import collector_works, same_environment
from flowbuffer.delivery.sender import Sender
from flowbuffer.delivery.source import Source
from flowbuffer.errors import UnauthorisedError
from flowbuffer.settings.settings import Settings
from flowbuffer.spool import dead_letters
from flowbuffer.spool.folders import Claim, Spool
from flowbuffer.spool.mark import foreign
from flowbuffer.spool.producer_info import OFFLINE, ProducerInfo, read_info
from flowbuffer.spool.reading.reader import Reader

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
#: A folder that was given up because its points could not be sent from here is its producer's for
#: so long, in s; for good, as long as that lives, where credentials were refused.
_GIVEN_UP_S = 10.0
#: Where there are more folders than can be held at once, each is held at least so long, in s.
_TURN_S = 1.0
_STOPGAP_WINDOW_POINTS = 4096
#: How many connections to servers that nobody uses any more are kept.
_IDLE_TRANSPORTS = 4


@dataclass(eq=False)
class Stream:
    """One producer's folder on its way to the backend.

    Attributes:
        adopted: Its producer was dead when it was claimed.
        since_s: When it was claimed, on the collector's monotonic clock.
        until_s: From then on it goes back to others once nothing of it is on its way.
        done: Everything is settled, and the folder is let go.
    """

    claim: Claim
    reader: Reader
    sender: Sender
    source: Source
    adopted: bool
    since_s: float
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
        destinations: Of the folders that are found in the spool; None leaves all of them alone,
            but for those that are given by :meth:`add`.
        living: Take the folders of living producers, too, if their setting is
            ``delivery="process"``.
        stopgap: Deliver until another collector is there to take over: one request at a time, as
            others may do the same, and little read ahead.
        wake: Ends a wait between two steps.
        environment: The fingerprint of this process's: the folders of others are others', as long
            as their collector process works. Empty if it does not matter.
        max_folders: How many are held at once; where there are more, they take turns.

    Attributes:
        streams: What it delivers.
        refused: The credentials that it has were refused, and folders were given up for it.

    One thread at a time may call it.
    """

    def __init__(
        self,
        spool: Spool,
        settings: Settings,
        clock: Clock,
        connect: TransportFactory = transport_to,
        destinations: Destinations | None = as_logged,
        *,
        living: bool = False,
        stopgap: bool = False,
        wake: Event | None = None,
        environment: str = "",
        max_folders: int = 1 << 30,
    ) -> None:
        self.spool = spool
        self.streams: list[Stream] = []
        self.refused = False
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
        self._wake = wake or Wake()
        self._environment = environment
        self._max_folders = max_folders
        self._turns: dict[Path, float] = {}  # when a folder was given back for others' turn
        self._given_up: dict[Path, float] = {}  # living producers' folders, and until when

    def add(self, folder: Path, tracking_uri: str) -> Stream | None:
        """Deliver what is, and will be, in a producer's folder; None if another collector does, or
        there are too many just now.

        Raises:
            SpoolError: The folder is not this user's alone, or not of this format.
        """
        for stream in self.streams:
            if stream.claim.path == folder:
                return stream
        if len(self.streams) >= self._max_folders:
            self._give_back(1, self._clock.monotonic_s())
            if len(self.streams) >= self._max_folders:
                return None
        claim = self.spool.claim(folder, living=True)
        return (
            None
            if claim is None
            else self._serve(claim, Destination(tracking_uri, claim.info.run_id))
        )

    def know(self, tracking_uri: str) -> None:
        """Use this URI, with its credentials, where a folder names the one without."""
        uri = absolute_uri(tracking_uri)
        self._uris[without_credentials(uri)] = uri

    def hurry(self) -> None:
        """Look at the spool now."""
        self._wake.set()

    def step(self, *, hurry: bool = False) -> float:
        """One round for every run. Returns the seconds until the next one is worthwhile."""
        now_s = self._clock.monotonic_s()
        if self._destinations is not None and now_s >= self._look_at_s:
            self._look_at_s = now_s + (QUIET_POLL_S if self._living else ADOPT_EVERY_S)
            self.look()
        next_s = math.inf
        for sender in list(self._senders.values()):
            next_s = min(next_s, self._step(sender, hurry))
        for stream in list(self.streams):
            self._tend(stream, now_s)
        if self._living:
            for sender in list(self._senders.values()):
                self._give_up(sender, now_s)
        if next_s <= POLL_S:
            self._quiet_since_s = now_s
        return min(next_s, max(self._look_at_s - now_s, 0.0)) if self._destinations else next_s

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
        found = self.not_served()
        self._give_back(len(self.streams) + len(found) - self._max_folders, now_s)
        for folder in sorted(found, key=lambda folder: self._turns.get(folder, -math.inf)):
            if len(self.streams) >= self._max_folders:
                break
            try:
                self._take(folder, now_s)
            except Exception as error:
                if folder.exists():  # else it is delivered, and removed by another process
                    self._left.add(folder)
                    _log.warning("%s is left alone: %s", folder, error)

    def leave(self) -> None:
        """Leave every folder to others, whatever is on its way."""
        for stream in list(self.streams):
            self.hand_on(stream)

    def close(self) -> None:
        """Leave every folder, and let go of every connection."""
        self.leave()
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    def not_served(self) -> list[Path]:
        """The folders of the spool that are not, and need not be, left alone."""
        found = list(self.spool.folders())
        self._left.intersection_update(found)
        for known in (self._infos, self._turns, self._given_up):
            for gone in known.keys() - set(found):
                del known[gone]
        own = {stream.claim.path for stream in self.streams}
        return [folder for folder in found if folder not in own and folder not in self._left]

    def _take(self, folder: Path, now_s: float) -> None:
        assert self._destinations is not None
        info = self._infos.get(folder)
        if info is None:
            info = self._infos[folder] = read_info(folder)
        destination = self._destinations(info)
        if destination is None:
            return
        own = same_environment(info.environment, self._environment)
        if not own and collector_works(self.spool.root, info.environment):
            return
        living = own and self._living and info.delivery in ("process", OFFLINE)
        given_up = now_s < self._given_up.get(folder, -math.inf)
        claim = self.spool.claim(folder, living=living and not given_up)
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
        stream = Stream(
            claim, reader, sender, sender.add(reader), adopted, self._clock.monotonic_s()
        )
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
            self.hand_on(stream)

    def hand_on(self, stream: Stream) -> None:
        """Leave a folder to others, whatever of it is on its way."""
        self._forget(stream)
        stream.claim.release()

    def _give_back(self, count: int, now_s: float) -> None:
        """Give ``count`` folders back in which nothing is to be done, those first that were taken
        first: others are to have their turn."""
        for stream in list(self.streams):
            reader = stream.reader
            if count <= 0:
                return
            if stream.since_s + _TURN_S <= now_s and not (reader.on_their_way or reader.has_unripe):
                self._turns[stream.claim.path] = now_s
                self.hand_on(stream)
                count -= 1

    def _give_up(self, sender: Sender, now_s: float) -> None:
        """What cannot be sent from here is left to the producers that live: their environment may
        have what this one lacks. With credentials refused here that is certain enough to be done
        at once; else it is done as soon as somebody waits."""
        living = [s for s in self.streams if s.sender is sender and not s.reader.finished]
        refused = isinstance(sender.failure, UnauthorisedError)
        wanted = refused or any(stream.reader.hurried() for stream in living)
        if sender.failure is None or sender.gone or sender.in_flight or not (living and wanted):
            return
        self.refused = self.refused or refused
        for stream in [stream for stream in self.streams if stream.sender is sender]:
            self._given_up[stream.claim.path] = math.inf if refused else now_s + _GIVEN_UP_S
            self.hand_on(stream)

    def _let_go(self, stream: Stream) -> None:
        self._forget(stream)
        for problem in stream.reader.problems:
            _log.warning("the spool is damaged: %s", problem)
        others = foreign(stream.claim.path)
        if others:
            _log.warning("%s is kept: %s is not flowbuffer's", stream.claim.path, others[0])
        kept = stream.reader.problems or stream.reader.has_lost
        if others or kept or dead_letters.are_in(stream.claim.path):
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
