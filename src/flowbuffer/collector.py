"""The loop that delivers a spool: a thread, or whoever calls :meth:`Collector.step`.

A collector delivers for the producers of its own process, and adopts the folders of producers that
died. Whose folder is whose is decided by ``producer.lock``, so any number of collectors can work
one spool side by side and no two ever work one folder.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowbuffer.clock import SYSTEM_CLOCK, Clock
from flowbuffer.sender import Sender, Source
from flowbuffer.settings import Settings
from flowbuffer.spool.directory import ProducerDirectory, Spool
from flowbuffer.spool.reader import Reader
from flowbuffer.spool.states import has_dead_letters
from flowbuffer.transport import MlflowTransport, Transport, absolute_uri, without_credentials

_log = logging.getLogger("flowbuffer")

#: How often the spool is looked at for new points, in s.
POLL_S = 0.05
#: How often the spool is looked at for folders of dead producers, in s.
ADOPT_EVERY_S = 5.0

TransportFactory = Callable[[str, Settings, Clock], Transport]


@dataclass(eq=False)
class Stream:
    """One producer's folder on its way to the backend.

    ``adopted``: its producer died. ``done``: everything is settled and the folder is let go.
    """

    directory: ProducerDirectory
    reader: Reader
    sender: Sender
    source: Source
    adopted: bool
    done: bool = False

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
    """

    def __init__(
        self,
        spool: Spool,
        settings: Settings,
        clock: Clock,
        connect: TransportFactory = MlflowTransport,
    ) -> None:
        self.spool = spool
        self.streams: list[Stream] = []
        self._settings = settings
        self._clock = clock
        self._connect = connect
        self._transports: dict[str, Transport] = {}
        self._senders: dict[tuple[str, str], Sender] = {}
        self._uris: dict[str, str] = {}  # with credentials, by the URI without
        self._broken: set[Sender] = set()
        self._left: set[Path] = set()  # folders to be left alone
        self._adopt_at_s = -math.inf
        self._wake = threading.Event()
        self._step_lock = threading.RLock()
        self._thread: threading.Thread | None = None

    def add(self, directory: ProducerDirectory, tracking_uri: str, *, adopted: bool) -> Stream:
        """Deliver what is, and will be, in a producer's folder."""
        with self._step_lock:
            uri = absolute_uri(tracking_uri)
            sender = self._sender(uri, directory.info.run_id)
            reader = Reader(directory.path, self._clock, alive=not adopted)
            stream = Stream(directory, reader, sender, sender.add(reader), adopted)
            self.streams.append(stream)
        self.hurry()
        return stream

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
            if now_s >= self._adopt_at_s:
                self._adopt_at_s = now_s + ADOPT_EVERY_S
                self._adopt()
            next_s = math.inf
            for sender in list(self._senders.values()):
                next_s = min(next_s, self._step(sender, hurry))
            for stream in [stream for stream in self.streams if stream.reader.settled]:
                self._let_go(stream)
            return min(next_s, self._adopt_at_s - now_s)

    def forget_after_fork(self) -> None:
        """In a forked child: the thread is gone, and locks may be held by nobody."""
        self._wake = threading.Event()
        self.streams.clear()
        self._thread = None

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
                next_s = min(self.step(), POLL_S if self.streams else ADOPT_EVERY_S)
            except Exception:
                _log.exception("delivery failed; the points stay in the spool")
                next_s = 1.0
            if next_s > 0:
                self._clock.wait(self._wake, next_s)
            self._wake.clear()

    def _sender(self, uri: str, run_id: str) -> Sender:
        bare = without_credentials(uri)
        if uri != bare:
            self._uris[bare] = uri
        uri = self._uris.get(bare, uri)
        if uri not in self._transports:
            self._transports[uri] = self._connect(uri, self._settings, self._clock)
        if (uri, run_id) not in self._senders:
            self._senders[uri, run_id] = Sender(
                run_id, self._transports[uri], self._settings, self._clock, self.hurry
            )
        return self._senders[uri, run_id]

    def _adopt(self) -> None:
        self.spool.sweep()
        own = {stream.directory.path for stream in self.streams}
        for folder in self.spool.folders():
            if folder in own or folder in self._left:
                continue
            try:
                directory = self.spool.adopt(folder)
                if directory is not None:
                    self.add(directory, directory.info.tracking_uri, adopted=True)
            except FileNotFoundError:
                continue  # delivered and removed by another process
            except Exception as error:
                self._left.add(folder)
                _log.warning("%s is left alone: %s", folder, error)

    def _let_go(self, stream: Stream) -> None:
        stream.reader.close()
        stream.sender.remove(stream.source)
        self.streams.remove(stream)
        if not any(stream.sender.sources):
            self._senders = {at: s for at, s in self._senders.items() if s is not stream.sender}
        for problem in stream.reader.problems:
            _log.warning("the spool is damaged: %s", problem)
        if stream.reader.problems or has_dead_letters(stream.directory.path):
            self._left.add(stream.directory.path)
            stream.directory.lock.release()
        else:
            try:
                stream.directory.remove()
            except OSError as error:
                _log.warning("%s cannot be removed: %s", stream.directory.path, error)
        stream.done = True


_collectors: dict[tuple[Path, Settings], Collector] = {}
_collectors_lock = threading.RLock()


def collector_of(settings: Settings) -> Collector:
    """This process's collector of a spool; one for all loggers with the same settings.

    Raises:
        SpoolError: The spool cannot be used.
    """
    root = settings.resolved_spool_dir()
    with _collectors_lock:
        if (root, settings) not in _collectors:
            _collectors[root, settings] = Collector(Spool(root), settings, SYSTEM_CLOCK)
        return _collectors[root, settings]


def _forget_after_fork() -> None:
    global _collectors_lock
    _collectors_lock = threading.RLock()
    for collector in _collectors.values():
        collector.forget_after_fork()
    _collectors.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
