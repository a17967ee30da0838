"""Waiting for what a real process does, the one place in the tests that sleeps."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 150.0
"""How long anything that has to happen may take. Nobody waits so long unless something is wrong: a
machine that is busy with ten other things is no reason to fail."""


def wait_until(
    condition: Callable[[], T], timeout_s: float = PATIENCE_S, every_s: float = 0.02
) -> T:
    """Return the first true value of `condition()`; TimeoutError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} was not true within {timeout_s} s")
        time.sleep(every_s)
    return value
