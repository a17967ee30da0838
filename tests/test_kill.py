"""P1: what `log_metric` returned for is kept, whoever is killed and whenever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.timeout(300)
def test_returned_is_kept() -> None:
    """Nothing that returned is lost, doubled or reordered when the process, or the one that
    delivers after it, is killed at any moment (P1, P2, P4)."""
    command = [sys.executable, "-m", "support.kill_rounds", "--rounds", "5", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *python_path()])}
    played = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert played.stdout, played.stderr
    tally = json.loads(played.stdout)
    assert tally["faults"] == []
    assert (tally["lost"], tally["doubled"], tally["disordered"]) == (0, 0, 0)
    assert tally["points_stored"] >= tally["points_returned"] > 0
    assert tally["rounds"] == 5
    assert played.returncode == 0, played.stderr


def python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
