"""The keys of one producer, by their ids, as the reading side knows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flowbuffer.errors import SpoolError, is_passing
from flowbuffer.metric_key import name_of
from flowbuffer.spool import layout
from flowbuffer.spool.files import read_file

_MAX_BYTES: Final = 256 << 20


class KeyTable:
    """What the file ``keys`` of a producer's folder says, read again when an id is not known yet.

    Args:
        path: The file.
        problem: Is told why the file could not be read.
    """

    def __init__(self, path: Path, problem: Callable[[str], None]) -> None:
        self._path = path
        self._problem = problem
        self._keys: dict[int, str] = {}
        self._tie_keys = np.zeros(0, np.uint32)

    def key(self, identity: int) -> str:
        """The key of an id that is known."""
        return self._keys[identity]

    def tie_keys(self, identities: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """For each known id the first one with the same metric: what the metric is about, a model
        or a dataset, makes another key, and MLflow keeps one history of both."""
        return self._tie_keys[identities]

    def known(self, identities: NDArray[np.uint32]) -> list[int]:
        """Which of these ids the table has.

        Raises:
            OSError, MemoryError: It cannot be read now.
        """
        found: list[Any] = np.unique(identities).tolist()
        if any(identity not in self._keys for identity in found):
            self._read()
        return [identity for identity in found if identity in self._keys]

    def _read(self) -> None:
        try:
            content = read_file(self._path, limit=_MAX_BYTES)
        except (SpoolError, FileNotFoundError) as error:
            self._problem(f"{self._path} cannot be read: {error}")
            return
        keys: dict[int, str] = {}
        first: dict[str, int] = {}
        tie_keys: dict[int, int] = {}
        for identity, payload in layout.key_frames(content):
            try:
                key = payload.decode()
                tie_keys[identity] = first.setdefault(name_of(key), identity)
                keys[identity] = key
            except Exception as error:
                if is_passing(error):
                    raise
                self._problem(f"{self._path}, key {identity} cannot be read: {error!r}")
        self._tie_keys = np.arange(max(keys, default=-1) + 1, dtype=np.uint32)
        self._tie_keys[[*tie_keys]] = [*tie_keys.values()]
        self._keys = keys
