"""The keys of one producer and their ids, as the writing side knows them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowbuffer.errors import SpoolFull
from flowbuffer.metric_key import MetricKey
from flowbuffer.spool import layout
from flowbuffer.spool.writing.growing_file import append_frame
from flowbuffer.spool.writing.points import checked_key
from flowbuffer.spool.writing.room import Room


class WrittenKeys:
    """Gives each key an id, and writes both down.

    Two calls may write one key at the same time, in two threads or in one another. Both write it
    under an id of their own, the first id is used from then on, and readers take both for one key.

    Args:
        path: The key table's file.
        room: Of the spool.
        stored_key: Makes the key that is stored from the metric's key that the caller gave.
        durable: See :func:`append_frame`.

    Attributes:
        metrics: The ids of metrics, by str or :class:`MetricKey`.
        texts: The ids of parameters and tags.
    """

    def __init__(
        self, path: Path, room: Room, stored_key: Callable[[str], str], *, durable: bool
    ) -> None:
        self.metrics: dict[Any, int] = {}
        self.texts: dict[str, int] = {}
        self._path = path
        self._room = room
        self._stored_key = stored_key
        self._durable = durable
        self._new_id = itertools.count().__next__
        self._unused: list[int] = []  # of keys for which there was no room

    def go_on_from(self, before: WrittenKeys) -> None:
        """Begin with the ids of another producer's keys, which the file has already."""
        self.metrics.update(before.metrics)
        self.texts.update(before.texts)
        self._new_id = itertools.count(before._new_id() + 1).__next__

    def add_metric(self, key: Any, points: int = 1) -> int | None:
        """The id of a metric's key; None if its ``points`` were dropped, as there is no room.

        Raises:
            InvalidPoint: It is no key.
            SpoolFull: There is no room (``when_full``).
        """
        plain = key if type(key) is MetricKey else checked_key(key)
        identity = self.metrics.get(plain)
        if identity is None:
            identity = self._add(self.metrics, plain, self._stored(plain), points)
        if identity is not None and plain is not key:
            self.metrics.setdefault(key, identity)  # an Enum that is a str has a hash of its own
        return identity

    def add_text(self, key: str) -> int | None:
        """The id of a parameter's or tag's key, which was checked; ``stored_key`` is not for these.
        None if it was dropped."""
        identity = self.texts.get(key)
        return self._add(self.texts, key, key, 1) if identity is None else identity

    def _stored(self, key: Any) -> str:
        if type(key) is MetricKey:
            return key.stored(self._stored(checked_key(key.key)))
        return checked_key(self._stored_key(key))

    def _add(self, ids: dict[Any, int], key: Any, stored: str, points: int) -> int | None:
        try:
            identity = self._unused.pop()
        except IndexError:
            identity = self._new_id()
        frame = layout.frame(identity, stored.encode())
        try:
            written = self._room.wait_for(
                lambda: append_frame(self._path, frame, durable=self._durable), points
            )
        except SpoolFull:
            self._unused.append(identity)
            raise
        if written is None:
            self._unused.append(identity)
            return None
        return ids.setdefault(key, identity)
