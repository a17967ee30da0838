"""What a logger that spools holds, from its opening to its end."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowbuffer.backends.credentials import without_credentials
from flowbuffer.backends.uris import absolute_uri
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.collector.deliverers import Delivery, DeliveryByProcess, NoDelivery
from flowbuffer.logger import job_end
from flowbuffer.logger.counts import Ledger, is_over
from flowbuffer.logger.progress import Progress
from flowbuffer.logger.report import Report
from flowbuffer.logger.succession import Inheritance, inheritance
from flowbuffer.notices import tell, warn_once
from flowbuffer.settings.environment import JobPlace, environment_experiment
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.notes import park, parked_reason
from flowbuffer.spool.producer_info import OFFLINE, ProducerInfo, this_producer
from flowbuffer.spool.segment_files import segment_path
from flowbuffer.spool.waiting import Waiting, want
from flowbuffer.spool.writing.producer import Producer


class Spooling:
    """A producer, who delivers its points, and what became of them.

    Args:
        producer: Takes the points.
        delivery: Delivers them.
        shows_progress: Whether a person is told how a wait goes.

    Attributes:
        before: What the same logger held before; it counts, and is waited for, too.
        left: What the producer leaves to the next one, once it was let go.
    """

    def __init__(
        self,
        producer: Producer,
        delivery: Delivery,
        *,
        shows_progress: bool,
    ) -> None:
        self.left: Inheritance | None = None
        self.before: Spooling | None = None
        self.producer = producer
        self.delivery = delivery
        self.ledger = Ledger(producer, delivery)
        self._shows_progress = shows_progress
        self._has_told = self._has_left = False
        look = weakref.WeakMethod(self.is_wiped)
        delivery.tended = lambda: (found := look()) and found()

    @property
    def folder(self) -> Path:
        """Where the points wait for delivery."""
        return self.producer.directory.path

    def is_wiped(self) -> bool:
        """Whether the folder was wiped while points were logged to it. Looks; says it once."""
        producer = self.producer
        if not producer.is_gone and not producer.is_wiped():
            self.ledger.look()
            return False
        warn_once(
            f"{self.folder}, or a part of it, was wiped while run {producer.directory.info.run_id} "
            "was logged to it; what was not delivered is counted as unknown, and a new folder is "
            "begun"
        )
        producer.give_up()
        return True

    @property
    def is_left_to_others(self) -> bool:
        """Whether this is a child, like a data loader's worker, that need not wait at its end: its
        parent's job goes on, and the collector process with it."""
        return isinstance(self.delivery, DeliveryByProcess) and job_end.is_child()

    def counts(self) -> dict[str, Any]:
        """The fields of a report, but for the time that it took."""
        self.is_wiped()
        own = self.ledger.counts()
        if self.before is None:
            return own
        earlier = self.before.counts()
        dropped = Counter(earlier.pop("dropped")) + Counter(own.pop("dropped"))
        return {**Counter(earlier) + Counter(own), "dropped": dict(dropped)}

    def let_go(self) -> None:
        """Leave what was logged to others, until somebody waits for it; nobody may be in a call."""
        self.producer.stop()
        wiped = self.is_wiped()
        self.ledger.counts()  # while the folder is there
        self.left = None if wiped else inheritance(self.producer)
        self.producer.close()
        self.producer.directory.lock.release()
        self.leave()

    def abandon(self) -> None:
        """The making of the logger was interrupted: nobody has it, or could end it."""
        self.delivery.abandon()
        self.producer.directory.lock.release()

    def flush(self, deadline_s: float | None, *, ends: bool = False) -> None:
        """Wait until everything that was logged before is settled, or cannot be."""
        self.is_wiped()
        over = self._wait(self._look(), deadline_s, ends=ends)
        if over and ends:
            job_end.patience.succeed()

    def stop(self, *, failed: bool) -> None:
        """Take no more points. It may be called again."""
        self.producer.stop()
        self.is_wiped()
        self.ledger.counts()  # while the folder is there
        self.producer.close(failed=failed)
        self._hurry()

    def drain(self, deadline_s: float) -> None:
        """Once it is stopped: wait until everything is settled, or cannot be."""
        over = self._wait(self._is_let_go, deadline_s)
        # What dead producers left is worth waiting for while it gets somewhere.
        if self._wait(self.delivery.is_stuck, deadline_s) and over:
            job_end.patience.succeed()

    def wait_for_dead(self, run_id: str, deadline_s: float) -> None:
        """Wait for what dead producers of a run left."""
        left = self.delivery.left_by_dead(run_id)
        self._wait(lambda: all(map(is_over, left)), deadline_s)

    def say_what_is_left(self, report: Report, *, waited: bool) -> None:
        """Tell a person what of the points is not delivered, or was lost; only the first time.

        Args:
            report: Of the end.
            waited: Whether delivery was waited for; else what is pending is no news.
        """
        if not self._has_told:
            self._has_told = True
            for words in self.ledger.last_words(report, waited=waited):
                tell(words)

    def leave(self) -> None:
        """Nobody waits for delivery here any more: have it end, unless who waited was interrupted,
        and does not even wait for that to be heard."""
        if self.before is not None:
            self.before.leave()
        if not self.ledger.is_there():
            self.producer.directory.lock.release()
        if not self._has_left and not job_end.patience.interrupted:
            self._has_left = True
            self.delivery.end()

    def _look(self) -> Callable[[], bool]:
        """Have everything sent that was logged until now; what a wait asks again and again, which
        says whether all of it is settled, or cannot be."""
        waiting = Waiting(self.folder, self._hurry())
        earlier = self.before._look() if self.before is not None else lambda: True
        lost, folder = self.ledger.is_lost, self.folder
        return lambda: (
            (waiting.is_over() or parked_reason(folder) is not None or lost()) and earlier()
        )

    def _is_let_go(self) -> bool:
        return self.ledger.is_let_go() and (self.before is None or self.before._is_let_go())

    def _push(self, *, again: bool) -> None:
        if self._has_left and self.left is not None and self.ledger.is_there():
            self._has_left = False
            self.delivery.begin(self.folder)
        self.delivery.push(again=again)
        if self.before is not None:
            self.before._push(again=again)

    def _hurry(self) -> tuple[int, int]:
        """Have everything that was logged until now sent without lingering; where that ends.
        A run that is gone may be restored by now: it is looked at again."""
        number, offset = self.producer.barrier()
        if not isinstance(self.delivery, NoDelivery):
            park(self.folder, None)
        want(segment_path(self.folder, number), offset)
        return number, offset

    def _wait(
        self, until: Callable[[], bool], deadline_s: float | None, *, ends: bool = True
    ) -> bool:
        shown = Progress(self.counts, deadline_s, off=not self._shows_progress)

        again = False

        def meanwhile(waited_s: float) -> None:
            nonlocal again
            self._push(again=again)
            again = True
            shown.show(waited_s)

        try:
            return job_end.patience.wait(
                lambda: until() or self.delivery.is_interrupted(), deadline_s, meanwhile, ends=ends
            )
        finally:
            shown.close()


def producer_info(
    run_id: str, uri: str, settings: Settings, job_place: JobPlace, environment: str
) -> ProducerInfo:
    """What a new producer's folder says of it, without credentials.

    Args:
        run_id, uri: Of the run.
        settings: Of the logger.
        job_place: Of this process in its job.
        environment: Of this process, as its delivery has it.
    """
    return this_producer(
        run_id,
        without_credentials(absolute_uri(uri)),
        SYSTEM_CLOCK.now_ns() // 1_000_000,
        **asdict(job_place),
        delivery=OFFLINE if settings.offline else settings.delivery,
        settings=settings.of_delivery(),
        environment=environment,
        experiment=environment_experiment()[1],
    )
