"""What a framework hands over to be logged, as MLflow takes it."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flowbuffer.errors import InvalidPoint
from flowbuffer.spool.layout import PARAM
from flowbuffer.spool.writing.points import (
    MAX_PARAM_LENGTH,
    checked_key,
    checked_text,
    checked_value,
)

_log = logging.getLogger("flowbuffer")
_NOT_IN_KEYS = re.compile(r"[^/\w.\- :]")

_T = TypeVar("_T")


class Loggable:
    """Makes metrics and parameters loggable. What cannot be is left out: a training does not end
    because of it. Whatever is changed or left out is warned of, once per key.

    Args:
        replacement: What stands for a character that is in no key of MLflow's; may be empty.
    """

    def __init__(self, replacement: str) -> None:
        self._replacement = replacement
        self._warned: set[str] = set()

    def metrics(self, given: Mapping[Any, Any]) -> dict[str, float]:
        """The numbers, and tensors and arrays of one element, as floats."""
        return self._checked(given, checked_value)

    def params(self, given: Mapping[Any, Any]) -> dict[str, str]:
        """All as text, of which MLflow takes the first 6000 characters."""
        return self._checked(given, self._param)

    def _checked(self, given: Mapping[Any, Any], check: Callable[[str, Any], _T]) -> dict[str, _T]:
        found = {}
        for key, value in given.items():
            try:
                stored = _stored_key(str(key), self._replacement)
                found[stored] = check(stored, value)
            except InvalidPoint as error:
                self._warn(key, f"is not logged: {error}")
            else:
                if stored != key:
                    self._warn(key, f"is logged as {stored!r}: MLflow takes no such key")
        return found

    def _param(self, key: str, value: Any) -> str:
        text = str(value)
        if len(text) > MAX_PARAM_LENGTH:
            self._warn(key, f"is cut: of {len(text)} characters MLflow takes {MAX_PARAM_LENGTH}")
        return checked_text(PARAM, key, text[:MAX_PARAM_LENGTH])

    def _warn(self, key: object, what: str) -> None:
        about = repr(key)[:300]
        if about not in self._warned:
            self._warned.add(about)
            _log.warning("%s %s", about, what)


@functools.lru_cache(maxsize=4096)
def _stored_key(key: str, replacement: str) -> str:
    """``key`` without what MLflow takes in none.

    Raises:
        InvalidPoint: Nothing is left, or it is not valid for another reason.
    """
    return checked_key(_NOT_IN_KEYS.sub(replacement, key))
