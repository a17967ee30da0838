"""What takes the points of a logger, and what seldom-used settings add to its calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from flowbuffer.errors import InvalidPoint
from flowbuffer.spool.writing.places import Places
from flowbuffer.turn import Turn

_log = logging.getLogger("flowbuffer")

#: A method of a recorder, or one around it.
Append = Callable[..., Places]


class Recorder(Protocol):
    """A producer, or what stands in for one: it takes the points of a call, and returns where they
    are, for a handle to ask what became of them. The arguments are what the caller gave, and may be
    anything.
    """

    def append(self, key: str, value: Any, step: Any = None, timestamp: Any = None, /) -> Places:
        """Take one point."""

    def append_many(
        self, metrics: Mapping[str, Any], step: Any = None, timestamp: Any = None, /
    ) -> Places:
        """Take one point per key."""

    def append_series(
        self, key: str, values: Any, steps: Any = None, timestamps: Any = None, /
    ) -> Places:
        """Take many points of one key."""

    def append_texts(self, kind: int, texts: Mapping[str, Any], /) -> Places:
        """Take parameters or, as ``kind`` says, tags."""


class Calls:
    """A recorder made of what ``call`` gives for the name of each method."""

    def __init__(self, call: Callable[[str], Append]) -> None:
        self.append = call("append")
        self.append_many = call("append_many")
        self.append_series = call("append_series")
        self.append_texts = call("append_texts")


def around(recorder: Recorder, wrap: Callable[[Append], Append]) -> Recorder:
    """A recorder, with what ``wrap`` makes of each of its methods."""
    return Calls(lambda name: wrap(getattr(recorder, name)))


def then(append: Append, finish: Callable[[Places], None]) -> Append:
    """``append``, and then ``finish`` with the places that it returned."""

    def append_and_finish(*args: Any) -> Places:
        places = append(*args)
        finish(places)
        return places

    return append_and_finish


class Lenience:
    """``strict=False``: what cannot be logged is counted, and warned of once per key.

    Attributes:
        invalid: How many points were not logged.
    """

    def __init__(self) -> None:
        self.invalid = 0
        self._warned: set[str] = set()
        self._turn = Turn()

    def around(self, append: Append) -> Append:
        """``append``, to be called in its place: it counts what it raises as :class:`InvalidPoint`,
        and returns a place that says why the point is nowhere."""

        def append_or_count(*args: Any) -> Places:
            try:
                return append(*args)
            except InvalidPoint as error:
                about = _keys_in(args)
                with self._turn:
                    self.invalid += error.count
                    first_time = about not in self._warned
                    self._warned.add(about)
                if first_time:
                    _log.warning("a point was not logged (strict=False): %s", error)
                return [*error.stored, None, str(error)]

        return append_or_count


def _codes(*around: Any) -> set[Any]:
    return {one.__code__ for one in around}


#: The code of what is run around a producer's method: a thread in it is in a call that logs.
WRAPPERS: Final = _codes(then(list, lambda _: None), Lenience().around(list))


def _keys_in(args: tuple[Any, ...]) -> str:
    """The keys among the arguments of a call, as far as there are any."""
    for given in args:
        if isinstance(given, str):
            return given[:300]
        if isinstance(given, Mapping):
            return ", ".join(map(str, given))[:300]
    return type(args[0]).__name__
