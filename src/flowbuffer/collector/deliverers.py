"""Who delivers what a logger logs, as the logger sees it (the setting ``delivery``)."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from flowbuffer.backends.credentials import vouch_for
from flowbuffer.collector.handover import fingerprint, interpreter
from flowbuffer.collector.stopgap import Stopgap
from flowbuffer.collector.thread import CollectorThread
from flowbuffer.forks import in_child
from flowbuffer.notices import tell_outage, warn_once
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.folders import Spool, has_producer
from flowbuffer.spool.notes import delivery_note, park, parked_reason

_log = logging.getLogger("flowbuffer")


class Delivery(Protocol):
    """Delivers a producer's folder.

    Attributes:
        spool: Where the folder is.
        goes_on: What becomes of what is left when the process ends: in the last line, the words
            before "deliver them with: flowbuffer sync". Empty if nobody goes on.
        environment: Of this process, where delivery depends on it, as a fingerprint.
        tended: Set by the logger; called about every 2 s in whatever thread delivers here, or
            watches who does.
    """

    spool: Spool
    goes_on: str
    environment: str
    tended: Callable[[], object]

    def begin(self, folder: Path) -> None:
        """The producer's folder is there."""

    def push(self, *, again: bool = False) -> None:
        """Someone waits for a point. Called again and again until it is delivered, with ``again``
        from the second time on."""

    def end(self) -> None:
        """The producer is closed, and nobody waits any more."""

    def abandon(self) -> None:
        """The making of the logger was interrupted: nobody has it, or could end it."""

    def is_interrupted(self) -> bool:
        """Whether delivery goes on only when who asks has returned: it is a signal handler."""

    def is_stuck(self) -> bool:
        """Whether waiting for what dead producers left is in vain, or others deliver it."""

    def left_by_dead(self, run_id: str) -> list[Path]:
        """The folders of a run whose producers died, to be delivered before the run ends."""


class NoDelivery:
    """Nobody: points stay in the spool (``offline``)."""

    goes_on = environment = ""

    def __init__(self, settings: Settings) -> None:
        self.tended: Callable[[], object] = _nothing
        self.spool = Spool(settings.resolved_spool_dir())

    def begin(self, folder: Path) -> None:
        park(folder, "flowbuffer is offline")

    def push(self, *, again: bool = False) -> None: ...

    def end(self) -> None: ...

    def abandon(self) -> None: ...

    def is_interrupted(self) -> bool:
        return False

    def is_stuck(self) -> bool:
        return True

    def left_by_dead(self, run_id: str) -> list[Path]:  # noqa: ARG002
        return []


class DeliveryHere:
    """A thread of this process, or with ``delivery="inline"`` whoever waits."""

    goes_on = environment = ""

    def __init__(self, settings: Settings, tracking_uri: str) -> None:
        self._uri = tracking_uri
        self._pid = os.getpid()
        self._thread = self._thread_of(settings)
        self._folder: Path | None = None
        self.tended: Callable[[], object] = _nothing
        self.spool = self._thread.spool

    def _thread_of(self, settings: Settings) -> CollectorThread:
        found = _threads.get(_key(settings))
        return found or _threads.setdefault(_key(settings), CollectorThread(settings))

    def begin(self, folder: Path) -> None:
        self._folder = folder
        self._thread.join(self, folder, self._uri)

    def push(self, *, again: bool = False) -> None:
        # A forked child waits for a point of its parent, which delivers it.
        if os.getpid() == self._pid and self._folder is not None:
            self._thread.hurry(self._folder, again=again)

    def end(self) -> None:
        if os.getpid() == self._pid and self._folder is not None:
            self._thread.leave(self._folder)

    def abandon(self) -> None:
        if self._folder is not None:
            self._thread.abandon(self._folder)

    def tend(self) -> None:
        """Called every now and then, in the thread."""
        self.tended()

    def is_interrupted(self) -> bool:
        return self._thread.is_interrupted

    def is_stuck(self) -> bool:
        return all(stream.stuck for stream in self._thread.streams if stream.adopted)

    def left_by_dead(self, run_id: str) -> list[Path]:
        return [
            stream.path
            for stream in self._thread.streams
            if stream.adopted and stream.claim.info.run_id == run_id
        ]


class DeliveryByProcess(DeliveryHere):
    """The spool's collector process; while there is none, whoever waits."""

    def __init__(self, settings: Settings, tracking_uri: str) -> None:
        self.environment = fingerprint()
        super().__init__(settings, tracking_uri)
        self.goes_on = (
            f"the collector process goes on for up to {settings.drain_timeout_s:g} s, or "
        )

    def _thread_of(self, settings: Settings) -> CollectorThread:
        key = (*_key(settings)[:2], self.environment)
        found = _threads.get(key)
        return found or _threads.setdefault(key, Stopgap(settings, self._uri, self.environment))

    def tend(self) -> None:
        """Repeat here what goes wrong in the collector process, once."""
        super().tend()
        assert self._folder is not None
        for text in delivery_note(self._folder).warnings:
            warn_once(text)
        tell_outage(unquote(self._folder.parent.name), last_error(self._folder))

    def is_stuck(self) -> bool:
        return True

    def left_by_dead(self, run_id: str) -> list[Path]:
        return [folder for folder in self.spool.folders(run_id) if not has_producer(folder)]


def _nothing() -> None: ...


def _key(settings: Settings) -> tuple[Path, Settings, str]:
    return settings.resolved_spool_dir(), settings, ""


#: One for all loggers of this process with one spool and the same settings.
_threads: dict[tuple[Path, Settings, str], CollectorThread] = {}

in_child("collector.deliverers", _threads.clear)


def stop_threads() -> None:
    """The interpreter ends: no thread delivers any more, and whoever still logs does it."""
    for thread in list(_threads.values()):
        thread.stop()


def last_error(folder: Path) -> str:
    """What keeps a producer's points from delivery, and what to do; empty if nothing does."""
    note = delivery_note(folder)
    error = parked_reason(folder) or note.last_error
    if note.unauthorised:
        error += (
            " (the process that logs goes on with its own credentials, as they are in its "
            "environment now: renew them there)"
        )
    return error


def settings_for(tracking_uri: str, settings: Settings) -> Settings:
    """``settings``, with ``delivery="thread"`` where a process cannot deliver: there is no Python
    to run it, or only this process knows the store: its scheme was registered by the program, not
    by an installed plugin."""
    if settings.delivery != "process":
        return settings
    if interpreter() is None:
        _tell_frozen()
        return settings.with_changes(delivery="thread")
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry
    from mlflow.utils.uri import get_uri_scheme

    scheme = get_uri_scheme(tracking_uri)
    builder = _tracking_store_registry._registry.get(scheme)
    of_mlflow = builder is None or getattr(builder, "__module__", "").startswith("mlflow.")
    if of_mlflow or scheme in _installed_schemes():
        return settings
    return settings.with_changes(delivery="thread")


@functools.lru_cache(maxsize=1)
def _tell_frozen() -> None:
    _log.info(
        "%s is not started as a collector process: it is no Python interpreter, or this program "
        "itself; a thread delivers (FLOWBUFFER_DELIVERY=thread says so)", sys.executable,
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def _installed_schemes() -> frozenset[str]:
    from importlib.metadata import entry_points

    return frozenset(plugin.name for plugin in entry_points(group="mlflow.tracking_store"))


def delivery_of(settings: Settings, tracking_uri: str) -> Delivery:
    """Who delivers, by the settings. The server gets the credentials that this process has for it:
    its program logs there."""
    vouch_for(tracking_uri)
    if settings.offline:
        return NoDelivery(settings)
    if settings.delivery == "process":
        return DeliveryByProcess(settings, tracking_uri)
    return DeliveryHere(settings, tracking_uri)
