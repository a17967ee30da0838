"""Who delivers what a logger logs, as the logger sees it (the setting ``delivery``)."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.launcher import launcher_of, wake_collector
from flowbuffer.report import warn_once
from flowbuffer.settings import Settings
from flowbuffer.spool.directory import Spool, has_producer
from flowbuffer.spool.states import delivery_note, park, parked_reason

if TYPE_CHECKING:
    from flowbuffer.collector import Collector, Stream

_log = logging.getLogger("flowbuffer")

#: A process that waits for its points, and delivers them itself as nobody else does, goes on with
#: that for so long after it last waited, in s.
_HERE_FOR_S = 1.0
#: How long a collector process that is ready may take to claim a folder, in s.
_TAKES_S = 2.0
#: How often it looks whether somebody else does, in s.
_LOOK_EVERY_S = 0.1


class Delivery(Protocol):
    """Delivers a producer's folder.

    Attributes:
        spool: Where the folder is.
        goes_on: What happens to what is left when the process ends, for its last line.
    """

    spool: Spool
    goes_on: str

    def begin(self, folder: Path) -> None:
        """The producer's folder is there."""

    def push(self) -> None:
        """Someone waits for a point. Called again and again until it is delivered."""

    def end(self) -> None:
        """The producer is closed, and nobody waits any more."""

    def is_idle(self) -> bool:
        """Whether waiting for what dead producers left gets nobody anywhere."""

    def left_by_dead(self, run_id: str) -> list[Path]:
        """The folders of a run whose producers died, to be delivered before the run ends."""


class NoDelivery:
    """Nobody: points stay in the spool (``offline``)."""

    goes_on = ""

    def __init__(self, settings: Settings) -> None:
        self.spool = Spool(settings.resolved_spool_dir())

    def begin(self, folder: Path) -> None:
        park(folder, "flowbuffer is offline")

    def push(self) -> None: ...

    def end(self) -> None: ...

    def is_idle(self) -> bool:
        return True

    def left_by_dead(self, run_id: str) -> list[Path]:  # noqa: ARG002
        return []


class DeliveryHere:
    """A thread of this process, or with ``delivery="inline"`` whoever waits."""

    goes_on = ""

    def __init__(self, settings: Settings, tracking_uri: str) -> None:
        from flowbuffer.collector import collector_of  # it imports NumPy

        self._uri = tracking_uri
        self._pid = os.getpid()
        self._collector: Collector = collector_of(settings)
        self.spool = self._collector.spool

    def begin(self, folder: Path) -> None:
        self._collector.add(folder, self._uri)
        self._collector.start()

    def push(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child waits for a point of its parent, which delivers it
        if not self._collector.has_thread:
            self._collector.drain()
        self._collector.hurry()

    def end(self) -> None:
        if os.getpid() == self._pid:
            self._collector.finish_step()

    def is_idle(self) -> bool:
        return all(stream.stuck for stream in self._collector.streams if stream.adopted)

    def left_by_dead(self, run_id: str) -> list[Path]:
        return [
            stream.claim.path
            for stream in self._collector.streams
            if stream.adopted and stream.claim.info.run_id == run_id
        ]


class DeliveryByProcess:
    """The spool's collector process; while there is none, whoever waits."""

    def __init__(self, settings: Settings, tracking_uri: str) -> None:
        self._settings = settings
        self._uri = tracking_uri
        self._pid = os.getpid()
        self.spool = Spool(settings.resolved_spool_dir())
        self._launcher = launcher_of(settings, tracking_uri)
        self._folder: Path | None = None
        self._here: Stream | None = None
        self._look_at_s = 0.0
        self._ready = self._insists = self._stood_in = False
        self._unready_at_s = 0.0  # when the collector process was last seen not to be ready
        self._told = False
        self.goes_on = (
            f"the collector process goes on for up to {settings.drain_timeout_s:g} s, or "
        )

    def begin(self, folder: Path) -> None:
        self._folder = folder
        self._unready_at_s = SYSTEM_CLOCK.monotonic_s()
        self._launcher.join(self._tell)

    def push(self) -> None:
        from flowbuffer.collector import collector_of

        assert self._folder is not None
        if os.getpid() != self._pid:
            return  # a forked child waits for a point of its parent, whose collector has it
        collector = collector_of(self._settings)
        now_s = SYSTEM_CLOCK.monotonic_s()
        if self._here not in collector.streams:
            self._here = None
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + _LOOK_EVERY_S
            self._launcher.ensure()
            self._ready = wake_collector(self.spool.root)
            if not self._ready:
                self._unready_at_s = now_s
            had_its_time = now_s - self._unready_at_s > _TAKES_S
            if self._here is None and (not self._ready or had_its_time):
                self._here = collector.add(self._folder, self._uri)
                self._insists = had_its_time
        if self._here is not None:
            self._stood_in = True
            hand_over = self._ready and not self._insists
            self._here.until_s = now_s if hand_over else now_s + _HERE_FOR_S
            collector.start()
            if not collector.has_thread:
                collector.drain()
            collector.hurry()

    def end(self) -> None:
        if self._stood_in:
            from flowbuffer.collector import collector_of

            collector_of(self._settings).finish_step()
        self._launcher.leave(self._tell)

    def _tell(self) -> None:
        """Repeat here what goes wrong in the collector process, once."""
        assert self._folder is not None
        for text in delivery_note(self._folder).get("warnings", ()):
            warn_once(text)
        error = last_error(self._folder)
        if bool(error) != self._told:
            self._told = bool(error)
            said = f"is held up, and the points are safe in the spool: {error}"
            _log.warning("delivery %s", said if error else "goes on")

    def is_idle(self) -> bool:
        return True

    def left_by_dead(self, run_id: str) -> list[Path]:
        return [folder for folder in self.spool.folders(run_id) if not has_producer(folder)]


def last_error(folder: Path) -> str:
    """What keeps a producer's points from delivery, and what to do; empty if nothing does."""
    note = delivery_note(folder)
    error = parked_reason(folder) or str(note.get("last_error", ""))
    if note.get("unauthorised"):
        error += (
            " (the collector process has the credentials of the environment; where they exist only "
            "in the process that logs, set FLOWBUFFER_DELIVERY=thread)"
        )
    return error


def settings_for(tracking_uri: str, settings: Settings) -> Settings:
    """``settings``, with ``delivery="thread"`` where only this process knows the store: its scheme
    was registered by the program, not by an installed plugin."""
    if settings.delivery != "process":
        return settings
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry
    from mlflow.utils.uri import get_uri_scheme

    scheme = get_uri_scheme(tracking_uri)
    builder = _tracking_store_registry._registry.get(scheme)
    of_mlflow = builder is None or getattr(builder, "__module__", "").startswith("mlflow.")
    if of_mlflow or scheme in _installed_schemes():
        return settings
    return settings.with_changes(delivery="thread")


@functools.lru_cache(maxsize=1)
def _installed_schemes() -> frozenset[str]:
    from importlib.metadata import entry_points

    return frozenset(plugin.name for plugin in entry_points(group="mlflow.tracking_store"))


def delivery_of(settings: Settings, tracking_uri: str) -> Delivery:
    """Who delivers, by the settings."""
    if settings.offline:
        return NoDelivery(settings)
    if settings.delivery == "process":
        return DeliveryByProcess(settings, tracking_uri)
    return DeliveryHere(settings, tracking_uri)
