"""What seldom-used settings add to the calls that log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from flowbuffer.errors import InvalidPoint
from flowbuffer.spool.writing.places import Places
from flowbuffer.turn import Turn

_log = logging.getLogger("flowbuffer")

#: A method of the producer that logs, or one around it.
Append = Callable[..., Places]


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
        """``append``, which raises no :class:`InvalidPoint`."""

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


#: What is run around a producer's method.
WRAPPERS: Final = _codes(then(list, lambda _: None), Lenience().around(list))


def _keys_in(args: tuple[Any, ...]) -> str:
    """The keys among the arguments of a call, as far as there are any."""
    for given in args:
        if isinstance(given, str):
            return given[:300]
        if isinstance(given, Mapping):
            return ", ".join(map(str, given))[:300]
    return type(args[0]).__name__
