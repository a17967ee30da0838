"""P1, P2: what interrupts a call at any line loses, mixes and locks nothing but that call.

A seeded sample; scripts/interruptions goes through every line.
"""

import random
from pathlib import Path

import pytest

from support import forked_logger, interrupted_producer

SEED = 20261125
LINES = 12


@pytest.mark.parametrize("what", interrupted_producer.HANDLERS)
def test_a_call_that_logs_is_interrupted(tmp_path: Path, what: str) -> None:
    """An exception, or a handler that logs, at any line of the calls that log: every other call's
    points arrive in order and under their keys, and another thread and another call go on."""
    lines = interrupted_producer.lines(tmp_path / "lines")
    found = {
        str(line): interrupted_producer.interrupt(tmp_path / str(n), line, what)
        for n, line in enumerate(random.Random(f"{SEED} {what}").sample(lines, LINES))
    }
    assert not {line: faults for line, faults in found.items() if faults}


def test_a_fork_while_another_thread_logs(tmp_path: Path) -> None:
    """A fork at any line of a call that logs in another thread: the child is a producer of its own,
    and stores nothing into its parent's slots."""
    forked_logger.lines(tmp_path / "imports")
    lines = forked_logger.lines(tmp_path / "lines")
    found = {
        str(line): forked_logger.fork_at(tmp_path / str(n), line)
        for n, line in enumerate(random.Random(SEED).sample(lines, LINES))
    }
    assert not {line: faults for line, faults in found.items() if faults}
