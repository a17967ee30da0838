"""When to send again. Pure: an error and the attempt in, seconds out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from flowbuffer.errors import RunGoneError, TransportError, UnauthorisedError

_UNAUTHORISED_FIRST_S = 1.0
_GONE_FIRST_S = 5.0
#: However long a server asks to be left alone: a gateway's mistake must not end delivery.
_MOST_ASKED_S = 3600.0


@dataclass(frozen=True)
class RetryPolicy:
    """Full-jitter backoff (AWS Architecture Blog, "Exponential Backoff And Jitter").

    Args:
        first_s: The longest wait after the first failure; doubled after each one.
        most_s: The longest wait at all, unless the server asks for more.
        unauthorised_s: The longest wait while credentials are refused. The first is short: what
            stands before a server may refuse them for some seconds.
        gone_s: The longest wait before a run that is gone is tried again; it may be restored.
        uniform: Draws a float between two; replaced in tests.
    """

    first_s: float = 0.25
    most_s: float = 30.0
    unauthorised_s: float = 30.0
    gone_s: float = 300.0
    # A generator of its own: the global one is the training code's, which may have seeded it.
    uniform: Callable[[float, float], float] = random.Random().uniform

    def wait_s(self, error: TransportError, attempt: int) -> float:
        """Seconds to wait after failure number ``attempt`` (1 is the first)."""
        asked_s = min(error.retry_after_s or 0.0, _MOST_ASKED_S)
        doublings = 2.0 ** min(attempt - 1, 30)
        if isinstance(error, RunGoneError):
            return max(min(self.gone_s, _GONE_FIRST_S * doublings), asked_s)
        if isinstance(error, UnauthorisedError):
            return max(min(self.unauthorised_s, _UNAUTHORISED_FIRST_S * doublings), asked_s)
        ceiling_s = min(self.most_s, self.first_s * doublings)
        # The server knows its own load; jitter comes on top, so that clients do not return at once.
        return asked_s + self.uniform(0.0, ceiling_s)
