"""Rounds of SIGKILL: processes that log, or deliver, are killed at random moments.

`python -m support.kill_rounds [--kind KIND] [--rounds N] [--seed S]` plays the rounds of a kind, or
of all, and prints what was counted as JSON; it fails if anything is wrong. The kinds:

- `alone`: a process with `delivery="thread"`, and those that deliver what it left;
- `trainer`: the process that logs;
- `rank`: one of four that log to one run;
- `collector`: the collector process in mid-request;
- `both`: the trainer and the collector;
- `group`: all processes of a job at once;
- `oom`: whatever the OOM killer chooses, as the trainer takes all the memory of a cgroup.

All processes are forked from this one, which has imported MLflow and keeps no thread, no store
and no connection of its own.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from random import Random

from support import kill_alone, kill_jobs
from support.backends import FOREIGN_SETTINGS, new_sqlite
from support.logged import Tally
from support.memory_limit import MemoryLimit
from support.processes import adopt_orphans, finished, forked

KINDS = ("alone", *kill_jobs.KINDS)


def why_not(kind: str) -> str:
    """Why a kind cannot be played here; empty if it can."""
    if kind == "alone":
        return ""
    if sys.platform != "linux":
        return "needs Linux"
    if kind == "oom":
        try:
            MemoryLimit().remove()
        except OSError as error:
            return f"needs a memory cgroup (v1), made as root: {error}"
    return ""


def play(kind: str, rounds: int, seed: int, folder: Path, template: Path) -> Tally:
    tally = Tally(kind, seed)
    module = kill_alone if kind == "alone" else kill_jobs
    module.play(rounds, folder / kind, template, tally)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, help="by default all, one after the other")
    parser.add_argument("--rounds", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time")
    parser.add_argument("--template", type=Path, help="a fresh SQLite store, if there is one")
    given = parser.parse_args()
    seed = Random().randrange(1 << 32) if given.seed is None else given.seed
    print(f"{given.rounds} rounds, seed {seed}", file=sys.stderr, flush=True)
    for name in [name for name in os.environ if name.startswith(FOREIGN_SETTINGS)]:
        del os.environ[name]
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.umask(0o077)

    # This takes seconds: once for all, not in every child.
    import flowbuffer.collector.collector  # noqa: F401
    from flowbuffer.backends.mlflow_client import warm_up

    warm_up("sqlite://")
    if sys.platform == "linux":
        adopt_orphans()
    tallies: dict[str, Tally] = {}
    said: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        template = given.template or Path(folder) / "template.db"
        if not given.template:
            finished(forked(lambda: new_sqlite(template)))
        for kind in [given.kind] if given.kind else KINDS:
            if reason := why_not(kind):
                print(f"{kind} is left out: it {reason}", file=sys.stderr)
                said[kind] = {"left_out": reason}
                continue
            tallies[kind] = play(kind, given.rounds, seed, Path(folder), template)
            said[kind] = vars(tallies[kind])
            print(json.dumps(said[kind], indent=2), file=sys.stderr, flush=True)
    print(json.dumps(said, indent=2))
    return 0 if all(tally.clean for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
