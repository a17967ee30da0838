"""The modes of a collector: what it takes of a spool, and how much of that at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flowbuffer.collector.destinations import Destination
from flowbuffer.collector.handover import same_environment
from flowbuffer.spool.producer_info import OFFLINE, ProducerInfo


def as_logged(info: ProducerInfo) -> Destination | None:
    """To the run and the server that the producer named, unless it was offline."""
    return None if info.delivery == OFFLINE else Destination(info.tracking_uri, info.run_id)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a collector goes by in one mode.

    Attributes:
        looks: It looks for folders in the spool, besides those that it is given.
        serves_living: It delivers for living producers that rely on others to do so, and leaves to
            them what it cannot send: their environment may have what this one lacks.
        environment: The fingerprint of this process's: the folders of others are others', as long
            as their collector process works. Empty if it does not matter.
        destination: Where the points of a folder go that it found; None leaves it alone.
        max_folders: How many it holds at once; where there are more, they take turns.
        window_points: The most points of a run that it reads ahead; None means a sender's own.
        max_in_flight: The most requests to a server at once; None means as the settings say.
    """

    looks: bool = True
    serves_living: bool = False
    environment: str = ""
    destination: Callable[[ProducerInfo], Destination | None] = as_logged
    max_folders: int = 1 << 30
    window_points: int | None = None
    max_in_flight: int | None = None

    def is_own(self, info: ProducerInfo) -> bool:
        """Whether a producer has the environment that this collector is for."""
        return same_environment(info.environment, self.environment)

    def takes_living(self, info: ProducerInfo) -> bool:
        """Whether a folder that was found is taken though its producer lives. One that has a thread
        of its own keeps it; an offline one minds nothing where it has a destination."""
        return self.serves_living and self.is_own(info) and info.delivery in ("process", OFFLINE)


#: A thread of the process that logs: what it is given, and what dead producers left.
THREAD = Policy()
#: Whoever waits, until a collector process is there: what it is given. Eight ranks may do the same
#: at once, so it is one request at a time; what was read ahead would keep others waiting.
STOPGAP = Policy(looks=False, window_points=4096, max_in_flight=1)
#: The collector process of a spool.
PROCESS = Policy(serves_living=True)
#: ``flowbuffer sync``: what it was asked for goes where it was asked to; that is the destination.
SYNC = Policy(serves_living=True)
