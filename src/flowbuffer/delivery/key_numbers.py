"""The keys of one run, under one number each: its producers number them each for itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class RunKeys:
    """Numbers from 0 for the metrics, parameters and tags that a run's points are of."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._kinds: list[int] = []
        self._numbers: dict[tuple[int, str], int] = {}

    def key(self, number: int) -> str:
        """The key, as it is stored."""
        return self._keys[number]

    def kind(self, number: int) -> int:
        """0 for a metric; PARAM or TAG."""
        return self._kinds[number]

    def numbers(
        self,
        kinds: NDArray[np.uint8],
        identities: NDArray[np.uint32],
        known: dict[tuple[int, int], int],
        key_of: Callable[[int], str],
    ) -> NDArray[np.int32]:
        """The numbers of a producer's points.

        Args:
            kinds: For each point, as in :meth:`kind`.
            identities: For each point the producer's id of its key.
            known: The producer's, from kinds and ids to numbers; new ones are added.
            key_of: Tells the key of one of the producer's ids.
        """
        both = identities.astype(np.int64) << 8 | kinds
        found, inverse = np.unique(both, return_inverse=True)
        numbers = []
        for kind, identity in ((one & 0xFF, one >> 8) for one in found.tolist()):
            number = known.get((kind, identity))
            if number is None:
                number = known[kind, identity] = self._number(kind, key_of(identity))
            numbers.append(number)
        return np.array(numbers, np.int32)[inverse]

    def _number(self, kind: int, key: str) -> int:
        number = self._numbers.setdefault((kind, key), len(self._keys))
        if number == len(self._keys):
            self._keys.append(key)
            self._kinds.append(kind)
        return number
