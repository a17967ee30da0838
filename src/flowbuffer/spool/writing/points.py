"""What the caller may log: keys, values, steps and timestamps as the spool stores them.

The rules for keys are MLflow's (``mlflow.utils.validation._validate_metric_name``), so that what
is wrong shows at the call and not at the server.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, SupportsFloat, SupportsIndex

from flowbuffer.errors import InvalidPoint, described
from flowbuffer.spool.layout import MAX_KEY_LENGTH, PARAM

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Floats = numpy.typing.NDArray[numpy.float64]
    Integers = numpy.typing.NDArray[numpy.int64]

#: Anything with ``__float__``: Python and NumPy numbers, bool, 0-d arrays, tensors.
Number = SupportsFloat | SupportsIndex

#: MLflow's limits on the values of parameters and tags, in characters (``MAX_PARAM_VAL_LENGTH`` and
#: ``MAX_TAG_VAL_LENGTH`` in ``mlflow.utils.validation``).
MAX_PARAM_LENGTH: Final = 6000
MAX_TAG_LENGTH: Final = 8000


_KEY = re.compile(r"[/\w.\- :]+")
_INT64 = 1 << 63


def checked_key(key: object) -> str:
    """``key`` as a plain string, if MLflow takes it. Of a str that is an Enum, too, its value.

    Raises:
        InvalidPoint: It is no string, too long, has other characters, or reads as another path.
    """
    if not isinstance(key, str):
        raise InvalidPoint(f"the key {described(key)}; it must be a str")
    key = str.__str__(key)
    if len(key) > MAX_KEY_LENGTH:
        raise InvalidPoint(
            f"the key {key[:40]!r}... has {len(key)} characters; "
            f"at most {MAX_KEY_LENGTH} are allowed"
        )
    if not _KEY.fullmatch(key):
        raise InvalidPoint(
            f"the key {key!r} is not valid; it may hold letters, digits, spaces and _ - . : /, "
            "and must hold one"
        )
    plain = posixpath.normpath(key)
    if plain != key or plain == "." or plain.startswith(("..", "/")):
        raise InvalidPoint(f"the key {key!r} is not valid; as a path it would read {plain!r}")
    return key


def checked_value(key: object, value: Any) -> float:
    """``value`` as a float; NaN and infinities are values.

    Raises:
        InvalidPoint: It is no number, or an integer too large for a float.
    """
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError("text is no number")
        # As MLflow does: of an array or tensor, whatever its dimensions, the only element.
        return float(value.item() if getattr(value, "ndim", 0) else value)
    except Exception as error:
        raise InvalidPoint(
            f"the value of {key!r} is {described(value)} ({error}); "
            "it must be a number, or have __float__, or one element"
        ) from error


def checked_mapping(what: str, given: Any) -> Mapping[Any, Any]:
    """``given``, or what its ``items()`` are; ``what`` has keys and values.

    Raises:
        InvalidPoint: It has no ``items()``.
    """
    if type(given) is dict or isinstance(given, Mapping):
        return given
    try:
        return dict(given.items())
    except Exception:
        raise InvalidPoint(
            f"the {what} are {described(given)}; they must be a dict, like {{'name': value}}"
        ) from None


def checked_text(kind: int, key: object, value: Any) -> str:
    """The value of a parameter or, as ``kind`` says, a tag: text, or what ``str`` makes of it.

    Raises:
        InvalidPoint: It is longer than MLflow takes, or is no text.
    """
    what, most = ("parameter", MAX_PARAM_LENGTH) if kind == PARAM else ("tag", MAX_TAG_LENGTH)
    try:
        text = str(value)
        text.encode()
    except Exception as error:
        raise InvalidPoint(f"the {what} {key!r} has no text ({error}); give a str") from error
    if len(text) > most:
        raise InvalidPoint(
            f"the {what} {key!r} has {len(text)} characters; at most {most} are allowed"
        )
    return text


def checked_step(step: Any) -> int:
    """``step`` as an integer of 64 bits; whole floats are taken.

    Raises:
        InvalidPoint: It is not whole, or out of range.
    """
    return _checked_integer("step", step, -_INT64)


def checked_timestamp(timestamp: Any) -> int:
    """``timestamp`` as ms since the epoch, an integer from 0; whole floats are taken.

    Raises:
        InvalidPoint: It is negative, not whole, or out of range.
    """
    return _checked_integer("timestamp", timestamp, 0)


def checked_series(
    key: str, values: Any, steps: Any, timestamps: Any
) -> tuple[Floats, Integers | None, Integers | None]:
    """The columns of a series, of one length.

    Raises:
        InvalidPoint: One of them is not a 1-D array of numbers, or their lengths differ.
    """
    import numpy

    found = _one_dimension(f"values of {key!r}", values)
    if found.dtype.kind in "biuf":
        column = found.astype(numpy.float64)
    else:
        column = numpy.array([checked_value(key, value) for value in found.tolist()], "f8")
    return (
        column,
        _integers("step", steps, len(column), -_INT64),
        _integers("timestamp", timestamps, len(column), 0),
    )


def _integers(what: str, given: Any, length: int, low: int) -> Integers | None:
    if given is None:
        return None
    found = _one_dimension(f"{what}s", given)
    if len(found) != length:
        raise InvalidPoint(f"there are {length} values and {len(found)} {what}s; give one each")
    if found.dtype.kind not in "biu" or (found.dtype.kind == "u" and found.dtype.itemsize == 8):
        import numpy

        return numpy.array([_checked_integer(what, one, low) for one in found.tolist()], "i8")
    column: Integers = found.astype("i8")
    if length and column.min() < low:
        raise InvalidPoint(f"the {what} {column.min()} is not valid; it must be at least {low}")
    return column


def _one_dimension(what: str, given: Any) -> numpy.typing.NDArray[Any]:
    import numpy

    try:
        found = numpy.asarray(given)
    except Exception as error:
        raise InvalidPoint(f"the {what} are no array of numbers ({error})") from error
    if found.ndim != 1:
        raise InvalidPoint(f"the {what} have {found.ndim} dimensions; they must have 1")
    return found


def _checked_integer(what: str, given: Any, low: int) -> int:
    if type(given) is int and low <= given < _INT64:
        return given
    try:
        number = int(given)
        if isinstance(given, (str, bytes, bytearray)) or number != given:
            raise ValueError("it is not whole")
        if not low <= number < _INT64:
            raise ValueError("it is out of range")
    except Exception as error:
        raise InvalidPoint(
            f"the {what} {described(given)} is not valid ({error}); "
            f"it must be a whole number from {low} to {_INT64 - 1}"
        ) from error
    return number
