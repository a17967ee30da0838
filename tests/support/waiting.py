"""Waiting for what a real process does, the one place in the tests that sleeps."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 150.0
"""How long anything that has to happen may take. Nobody waits so long unless something is wrong: a
machine that is busy with ten other things is no reason to fail."""


def slack_s() -> float:
    """What a busy machine may take longer for something of a second or two: fifty times what it
    takes right now to start a bare interpreter, which is 0.02 s on a quiet one."""
    start_s = time.monotonic()
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
    return 50 * (time.monotonic() - start_s)


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
