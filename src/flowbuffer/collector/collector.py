"""The loop that delivers a spool: in a thread, in a process, or in whoever calls ``step``.

Whose folder is whose is decided by the folder's ``reader.lock``, so any number of collectors can
work one spool side by side and no two ever work one folder.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

from flowbuffer.backends.base import Transport
from flowbuffer.backends.credentials import without_credentials
from flowbuffer.backends.uris import absolute_uri
from flowbuffer.clock import Clock, Event
from flowbuffer.collector.background import Wake
from flowbuffer.collector.destinations import Destination, TransportFactory, transport_to
from flowbuffer.collector.handover import collector_works
from flowbuffer.collector.policies import Policy
from flowbuffer.delivery.sender import Sender
from flowbuffer.delivery.stream import Stream
from flowbuffer.errors import UnauthorisedError
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.folders import Claim, Spool
from flowbuffer.spool.producer_info import ProducerInfo, read_info

_log = logging.getLogger("flowbuffer")

#: How often the spool is looked at for new points, in s.
POLL_S = 0.05
#: How often it is looked at for new points after :data:`QUIET_S` without any, in s.
QUIET_POLL_S = 0.2
QUIET_S = 2.0
#: How often the spool is looked at for folders of dead producers, in s.
ADOPT_EVERY_S = 5.0
#: A folder that was given up because its points could not be sent from here is its producer's for
#: so long, in s; for good, as long as that lives, where credentials were refused.
_GIVEN_UP_S = 10.0
#: Where there are more folders than can be held at once, each is held at least so long, in s.
_TURN_S = 1.0
#: How many connections to servers that nobody uses any more are kept.
_IDLE_TRANSPORTS = 4


class Collector:
    """Delivers one spool.

    Args:
        spool: The spool.
        settings: Of the process; ``delivery="inline"`` gets no thread.
        clock: Decides when things are due.
        policy: The mode in which it works: which folders it takes, and how much of them at once.
        connect: Makes the transport for a tracking URI.
        wake: Ends a wait between two steps.

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
        policy: Policy,
        connect: TransportFactory = transport_to,
        wake: Event | None = None,
    ) -> None:
        self.spool = spool
        self.policy = policy
        self.streams: list[Stream] = []
        self.refused = False
        self._settings = settings
        self._clock = clock
        self._connect = connect
        self._wake = wake or Wake()
        self._transports: dict[tuple[str, Settings], Transport] = {}
        self._senders: dict[Destination, Sender] = {}
        self._uris: dict[str, str] = {}  # with credentials, by the URI without
        self._broken: set[Sender] = set()
        self._left_alone: set[Path] = set()
        self._infos: dict[Path, ProducerInfo] = {}  # of folders that others deliver, so far
        self._turns: dict[Path, float] = {}  # when a folder was handed on for others' turn
        self._given_up: dict[Path, float] = {}  # living producers' folders, and until when
        self._sweep_at_s = -math.inf
        self._look_at_s = -math.inf if policy.looks else math.inf
        self._quiet_since_s = clock.monotonic_s()

    def add(self, folder: Path, tracking_uri: str) -> Stream | None:
        """Deliver what is, and will be, in a producer's folder; None if another collector does, or
        there are too many just now.

        Raises:
            SpoolError: The folder is not this user's alone, or not of this format.
        """
        for stream in self.streams:
            if stream.path == folder:
                return stream
        self._take_turns(1 - self._room(), self._clock.monotonic_s())
        claim = self.spool.claim(folder, living=True) if self._room() > 0 else None
        if claim is None:
            return None
        return self._serve(claim, Destination(tracking_uri, claim.info.run_id))

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
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + (QUIET_POLL_S if self.policy.serves_living else ADOPT_EVERY_S)
            self.look()
        next_s = min((self._step(one, hurry) for one in self._senders.values()), default=math.inf)
        for stream in list(self.streams):
            self._tend(stream, now_s)
        if self.policy.serves_living:
            for sender in list(self._senders.values()):
                self._give_up(sender, now_s)
        if next_s <= POLL_S:
            self._quiet_since_s = now_s
        return min(next_s, max(self._look_at_s - now_s, 0.0))

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
        self._take_turns(len(found) - self._room(), now_s)
        for folder in sorted(found, key=lambda folder: self._turns.get(folder, -math.inf)):
            if self._room() <= 0:
                break
            try:
                self._take(folder, now_s)
            except Exception as error:
                if folder.exists():  # else it is delivered, and removed by another process
                    self._left_alone.add(folder)
                    _log.warning("%s is left alone: %s", folder, error)

    def leave(self) -> None:
        """Leave every folder to others, whatever is on its way."""
        self._hand_on(list(self.streams))

    def close(self) -> None:
        """Leave every folder, and let go of every connection."""
        self.leave()
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    def not_served(self) -> list[Path]:
        """The folders of the spool that it does not deliver, but might: nothing was found in them
        that nobody can deliver. As long as there are any, there may be something to do."""
        found = list(self.spool.folders())
        self._left_alone.intersection_update(found)
        for known in (self._infos, self._turns, self._given_up):
            for gone in known.keys() - set(found):
                del known[gone]
        passed_over = self._left_alone | {stream.path for stream in self.streams}
        return [folder for folder in found if folder not in passed_over]

    def _room(self) -> int:
        """How many more folders it may hold."""
        return self.policy.max_folders - len(self.streams)

    def _take(self, folder: Path, now_s: float) -> None:
        info = self._infos[folder] = self._infos.get(folder) or read_info(folder)
        destination = self.policy.destination(info)
        others = not self.policy.is_own(info)
        if destination is None or (others and collector_works(self.spool.root, info.environment)):
            return
        given_up = now_s < self._given_up.get(folder, -math.inf)
        claim = self.spool.claim(folder, living=self.policy.takes_living(info) and not given_up)
        if claim is not None:
            self._serve(claim, destination)

    def _serve(self, claim: Claim, destination: Destination) -> Stream:
        try:
            settings = self._settings.with_delivery(claim.info.settings)
            if self.policy.max_in_flight is not None:
                settings = settings.with_changes(max_in_flight=self.policy.max_in_flight)
            stream = self._sender(destination, settings).add(claim)
        except BaseException:
            claim.release()
            raise
        self.streams.append(stream)
        self.hurry()
        return stream

    def _step(self, sender: Sender, hurry: bool) -> float:
        """One round for one run; what fails there stays there."""
        finished = all(stream.reader.finished for stream in sender.streams.values())
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
            transport, window = self._transports[uri, settings], self.policy.window_points
            self._senders[at] = Sender(
                at.run_id, transport, settings, self._clock, self.hurry, window_points=window
            )
        return self._senders[at]

    def _tend(self, stream: Stream, now_s: float) -> None:
        """See whether the producer lives, and whether the folder can be let go or handed on."""
        if stream.test_producer(now_s):
            self.hurry()
        # After the round's reading and not before: a round more sees the end of what is closed, and
        # a folder that is settled is let go here, and not by whoever has to claim it first.
        stream.paused = stream.leaving
        if stream.reader.settled:
            try:
                has_to_stay = stream.let_go()
            except Exception:
                self._forget(stream)  # else it would fail in each round
                raise
            self._forget(stream)
            if has_to_stay:
                self._left_alone.add(stream.path)
        elif stream.paused and not stream.reader.on_their_way:
            self.hand_on(stream)

    def hand_on(self, stream: Stream) -> None:
        """Leave a folder to others. If points of it are on their way the other folders of its run
        go, too, and can be claimed again: a batch may have points of several."""
        run = list(stream.sender.streams.values())
        self._hand_on(run if stream.reader.on_their_way else [stream])

    def _hand_on(self, streams: list[Stream]) -> None:
        for stream in streams:
            stream.hand_on()
            self._forget(stream)

    def _take_turns(self, count: int, now_s: float) -> None:
        """Hand ``count`` folders on in which nothing is to be done just now, those first that were
        claimed first, so that others have their turn."""
        for stream in list(self.streams):
            reader = stream.reader
            if count <= 0:
                return
            if stream.since_s + _TURN_S <= now_s and not (reader.on_their_way or reader.has_unripe):
                self._turns[stream.path] = now_s
                self.hand_on(stream)
                count -= 1

    def _give_up(self, sender: Sender, now_s: float) -> None:
        """What cannot be sent from here is left to the producers that live: their environment may
        have what this one lacks. With credentials refused here that is certain enough to be done
        at once; else it is done as soon as somebody waits."""
        streams = list(sender.streams.values())
        living = [stream for stream in streams if not stream.reader.finished]
        refused = isinstance(sender.failure, UnauthorisedError)
        wanted = refused or any(stream.reader.hurried() for stream in living)
        if sender.failure is None or sender.gone or sender.in_flight or not (living and wanted):
            return
        self.refused = self.refused or refused
        for stream in streams:
            self._given_up[stream.path] = math.inf if refused else now_s + _GIVEN_UP_S
        self._hand_on(streams)

    def _close_transports(self) -> None:
        """Let go of those that nobody uses, but for a few that may be wanted again."""
        used = {sender.transport for sender in self._senders.values()}
        for at, transport in list(self._transports.items())[:-_IDLE_TRANSPORTS]:
            if transport not in used:
                transport.close()
                del self._transports[at]

    def _forget(self, stream: Stream) -> None:
        """The stream has ended. It is forgotten only now: who was interrupted on the way here finds
        it when the collector is closed, and ends it once more."""
        self.streams.remove(stream)
        if not stream.sender.streams:  # nobody needs the sender
            self._senders = {at: s for at, s in self._senders.items() if s is not stream.sender}
            self._close_transports()
