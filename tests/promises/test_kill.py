"""P1: what `log_metric` returned for is kept, whoever is killed and whenever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.kill_rounds import KINDS, why_not

TESTS = Path(__file__).parents[1]
ROUNDS = {"alone": 3}  # a third one has its store away


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_returned_is_kept(kind: str, sqlite_template: Path) -> None:
    """Nothing that returned is lost, doubled or reordered, whichever processes of a job, or of
    those that deliver for it, are killed at any moment, and none of them is left (P1, P2, P4)."""
    if reason := why_not(kind):
        pytest.skip(reason)
    rounds = ROUNDS.get(kind, 2)
    command = [sys.executable, "-m", "support.kill_rounds"]
    command += ["--kind", kind, "--rounds", str(rounds), "--seed", "1"]
    command += ["--template", str(sqlite_template)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *python_path()])}
    played = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880)
    assert played.stdout, played.stderr
    tally = json.loads(played.stdout)[kind]
    assert tally["faults"] == []
    assert (tally["lost"], tally["doubled"], tally["disordered"]) == (0, 0, 0)
    assert tally["points_stored"] >= tally["points_returned"] > 0
    assert tally["rounds"] == rounds
    assert tally["killed"] >= rounds
    assert played.returncode == 0, played.stderr


def python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
