"""A spool without processes, threads or time: producer, reader and sender driven by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowbuffer.delivery.retry import RetryPolicy
from flowbuffer.delivery.sender import Sender
from flowbuffer.delivery.stream import Stream
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.folders import Claim, ProducerDirectory, Spool
from flowbuffer.spool.producer_info import this_producer
from flowbuffer.spool.tally import tally
from flowbuffer.spool.writing.producer import Producer
from flowbuffer.testing import FakeTransport, ManualClock

RUN = "run"


@dataclass
class StandInClaim(Claim):
    """A claim without a lock, of a folder whose producer is dead if the test says so."""

    is_orphaned: bool = False


class SmallSpool:
    """One producer, and one sender for it at a time.

    Args:
        root: Where the spool is made.
        transport: The backend.
        segment_slots: Small, so that segments end often.
        settings: Keywords of Settings.
    """

    def __init__(
        self,
        root: Path,
        transport: FakeTransport | None = None,
        segment_slots: int = 8,
        **settings: object,
    ) -> None:
        self.settings = Settings(spool_dir=root, **settings)  # type: ignore[arg-type]
        self.clock = ManualClock()
        self.transport = transport or FakeTransport()
        self.spool = Spool(root)
        self.woken = 0
        self._slots = (segment_slots, segment_slots)
        self.directory: ProducerDirectory = self.spool.add_producer(
            this_producer(RUN, "fake://", 0)
        )
        self.producer = self.new_producer(self.directory)
        self.sender, self.stream = self.new_sender(alive=True)

    def new_producer(self, directory: ProducerDirectory) -> Producer:
        return Producer(
            directory,
            self.spool,
            self.settings,
            self.clock,
            lambda: None,
            segment_slots=self._slots,
        )

    def new_sender(self, *, alive: bool) -> tuple[Sender, Stream]:
        """A sender as after a restart: all that it knows, it reads from the spool."""
        policy = RetryPolicy(uniform=lambda _low, high: high)
        self.sender = Sender(RUN, self.transport, self.settings, self.clock, self._wake, policy)
        self.stream = self.add(self.directory, alive=alive)
        return self.sender, self.stream

    def add(self, directory: ProducerDirectory, *, alive: bool) -> Stream:
        """Have the sender deliver a folder, too."""
        claim = StandInClaim(directory.path, directory.info, directory.lock, not alive)
        return self.sender.add(claim)

    def deliver(self, seconds: float = 600.0) -> None:
        """Step, and turn the clock, until nothing is left or ``seconds`` have passed."""
        end_s = self.clock.monotonic_s() + seconds
        while self.clock.monotonic_s() < end_s:
            next_s = self.sender.step(hurry=True)
            while self.transport.waiting:
                self.transport.answer()
                next_s = 0.0
            found = tally(self.directory.path)
            if self.sender.idle and (found is None or not found.pending):
                return
            self.clock.turn(min(next_s, 1.0))

    def history(self, key: str) -> list[tuple[int, int, float]]:
        return self.transport.history(RUN, key)

    def values(self, key: str) -> list[float]:
        return [value for _, _, value in self.history(key)]

    def _wake(self) -> None:
        self.woken += 1
