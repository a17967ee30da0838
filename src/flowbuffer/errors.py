"""Every error that flowbuffer raises.

    FlowbufferError
    ├── SettingError            also a ValueError: a setting out of its range
    ├── InvalidArgument         also a ValueError: what a caller handed over is not what is wanted
    │   └── InvalidPoint        a key, value, step or timestamp that cannot be logged
    ├── SpoolError              also an OSError: the spool cannot be used as it is
    │   ├── SpoolFull           no room for another point (see ``when_full``)
    │   ├── SpoolGone           a producer's folder was wiped while it logged; within flowbuffer
    │   └── SpoolFormatError    bytes that this version cannot read
    ├── WaitTimeout             also a TimeoutError: time was up before delivery
    ├── DeliveryError           a handle's points are not, and will not be, in the backend
    └── TransportError          what a tracking server answered; never raised in a training loop
        ├── RetriableError      the same request may succeed later; whatever is not MLflow's answer
        │   └── DoubtfulError   MLflow itself failed, of its own or because of the content
        ├── UnauthorisedError   401, 403: someone has to renew the credentials
        ├── RunGoneError        MLflow has no such run, or it is deleted: nothing can be stored
        ├── TooLargeError       413: the same points may fit in smaller requests
        └── RejectedError       any other 4xx with MLflow's error code: the content is at fault

A :class:`TransportError` carries what the sender needs to decide; nobody matches on its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def described(value: object) -> str:
    """``value`` in the message of an error, with its type: ``5, an int``."""
    try:
        text = repr(value)
    except Exception:
        text = "an object without repr"
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    kind = type(value).__name__
    return f"{shown}, {'an' if kind[0] in _VOWELS else 'a'} {kind}"


_VOWELS = "aeioAEIO"


class FlowbufferError(Exception):
    """The base of every error raised by flowbuffer."""


class SettingError(FlowbufferError, ValueError):
    """A setting is not what it may be; the message names it, its value and what is allowed."""


class InvalidArgument(FlowbufferError, ValueError):
    """What a caller handed over is not what is wanted; the message says what it is, and what would
    be right."""


class InvalidPoint(InvalidArgument):
    """A key, value, step or timestamp that cannot be logged. No other point is affected.

    Attributes:
        stored: Where the other points of the same call are (``spool.writing.places.Places``).
        count: How many points of the call were not logged.
    """

    stored: Sequence[Any] = ()
    count: int = 1


class SpoolError(FlowbufferError, OSError):
    """The spool cannot be used as it is; the message names the path and what would help."""


class SpoolFull(SpoolError):
    """There is no room for another point within ``max_spool_bytes``, or on the disk."""


class SpoolGone(SpoolError):
    """A producer's folder was wiped while it logged. Within flowbuffer: a logger goes on in a new
    one."""


class SpoolFormatError(SpoolError):
    """A spool file holds bytes that this version cannot read; the file was left alone."""


class WaitTimeout(FlowbufferError, TimeoutError):
    """Time was up before everything waited for was delivered. Nothing is lost by it."""


class DeliveryError(FlowbufferError):
    """Points of a handle are not, and will not be, in the backend; the message says why."""


class TransportError(FlowbufferError):
    """A request failed.

    Args:
        reason: What the server, or the connection to it, said.
        retry_after_s: How many seconds the server asked to be left alone; ``None`` if it did not.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[TransportError], tuple[str, float | None]]:
        return type(self), (self.reason, self.retry_after_s)


class RetriableError(TransportError):
    """The same request may succeed later: no connection, time-out, 408, 425, 429, 5xx, a redirect,
    an answer that is not MLflow's, and whatever went wrong on this side before there was one."""


class DoubtfulError(RetriableError):
    """MLflow's BAD_REQUEST and INTERNAL_ERROR: it, or its database, failed; of its own, as with an
    exhausted pool, or because of the content, as with a NUL in a text on PostgreSQL.

    It is tried again, and it never condemns a point by itself: only what fails so again and again
    while other requests of the run are stored is at fault (``Batch.is_at_fault``).
    """


class UnauthorisedError(TransportError):
    """401 or 403: it succeeds once the credentials are renewed."""


class RunGoneError(TransportError):
    """MLflow has no such run, or it is deleted: nothing can be stored until it is restored."""


class TooLargeError(TransportError):
    """413: the same points may fit in smaller requests. A point alone is tried again."""


class RejectedError(TransportError):
    """Any other 4xx of MLflow's own: something in the request will never be accepted."""


def is_passing(error: BaseException) -> bool:
    """Whether something only cannot be done on this machine now, for want of descriptors, memory,
    disk or permission. If not, what was read, or is to be sent, is at fault."""
    at_fault = isinstance(error, (SpoolError, FileNotFoundError))
    return isinstance(error, (OSError, MemoryError)) and not at_fault
