"""What the processes of the kill rounds log, the record of it beside the spool, and the check."""

import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from support.backends import histories
from support.processes import answer_of

THREADS = 4
LONGEST_SERIES = 20


@dataclass
class Tally:
    """What the rounds of a kind came to. ``lost``, ``doubled``, ``disordered`` must stay 0, and
    ``faults`` empty."""

    kind: str
    seed: int
    rounds: int = 0
    seconds_per_round: float = 0.0
    killed: int = 0
    """processes"""
    mid_request: int = 0
    """rounds in which whoever delivered was killed with a request on its way for certain"""
    collectors_replaced: int = 0
    """rounds in which another collector process took over before the next round"""
    calls_returned: int = 0
    points_returned: int = 0
    points_stored: int = 0
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    also: Counter[str] = field(default_factory=Counter)
    """what else happened, by kind"""
    faults: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.disordered or self.faults)

    def fault(self, what: str) -> None:
        """Something is wrong in this round."""
        self.faults.append(f"round {self.rounds}: {what}")


def value_of(index: int) -> float:
    """The value of a key's point number `index`: all differ, and they do not rise."""
    return float(index ^ 0x155)


def log_from_threads(
    logger, name: str, records: Path, seed: str, until: threading.Event, burst: int, pause_s: float
) -> list[threading.Thread]:
    """Log from all threads until the event, each with a record of its own; the threads.

    `burst`: so many points of one key come first, at once. `pause_s`: the longest pause.
    """
    threads = [
        threading.Thread(
            target=log_for_long,
            args=(logger, f"{name}{number}", records, Random(f"{seed}/{name}{number}"), until),
            kwargs={"burst": 0 if number else burst, "pause_s": pause_s},
        )
        for number in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    return threads


def log_for_long(
    logger,
    name: str,
    records: Path,
    pick: Random,
    until: threading.Event,
    burst: int = 0,
    pause_s: float = 0.3,
) -> None:
    """Log in bursts. Each line of the record is one call that returned: its kind, its points."""
    record = os.open(records / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    singles = dicts = in_series = 0
    for _ in range(burst):
        logger.log_metric(f"{name}/single", value_of(singles))
        os.write(record, b"single 1\n")
        singles += 1
    while not until.is_set():
        for _ in range(pick.randrange(1, 30)):
            kind = pick.random()
            if kind < 0.6:
                logger.log_metric(f"{name}/single", value_of(singles))
                os.write(record, b"single 1\n")
                singles += 1
            elif kind < 0.9:
                value = value_of(dicts)
                logger.log_metrics({f"{name}/a": value, f"{name}/b": value}, step=dicts)
                os.write(record, b"dict 1\n")
                dicts += 1
            else:
                count = pick.randrange(1, LONGEST_SERIES + 1)
                values = [value_of(index) for index in range(in_series, in_series + count)]
                logger.log_series(f"{name}/series", values)
                os.write(record, b"series %d\n" % count)
                in_series += count
        until.wait(pick.uniform(0, pause_s))


def stored(uri: str, run_id: str) -> dict[str, list[float]]:
    """The histories of the run, as MLflow gives them out."""

    def read() -> dict[str, list[float]]:
        found = histories(uri, run_id)
        return {key: [metric.value for metric in metrics] for key, metrics in found.items()}

    return answer_of(read)  # type: ignore[return-value]


def points_returned(record: Path) -> Counter[str]:
    """How many points of each key of a thread had returned."""
    points: Counter[str] = Counter()
    for line in record.read_text().splitlines():
        kind, count = line.split()
        for key in ("a", "b") if kind == "dict" else (kind,):
            points[f"{record.name}/{key}"] += int(count)
    return points


def check(records: Path, found: dict[str, list[float]], tally: Tally) -> None:
    """Hold the histories against what was logged: points 0 to m of each key, all that returned.

    No two threads log to one key, so a history in order is the order of each rank and thread.
    """
    returned: Counter[str] = Counter()
    for record in records.iterdir():
        returned += points_returned(record)
        tally.calls_returned += len(record.read_text().splitlines())
    for key in sorted(returned.keys() | found.keys()):
        values = found.get(key, [])
        distinct = set(values)
        lost = sum(value_of(index) not in distinct for index in range(returned[key]))
        doubled = len(values) - len(distinct)
        in_order = values == [value_of(index) for index in range(len(values))]
        most = returned[key] + (LONGEST_SERIES if key.endswith("series") else 1)
        if lost or doubled or not in_order or len(values) > most:
            tally.fault(
                f"{key}: {returned[key]} returned, {len(values)} stored, {lost} lost, "
                f"{doubled} doubled, {'in order' if in_order else 'out of order'}"
            )
        tally.lost += lost
        tally.doubled += doubled
        tally.disordered += not in_order and not lost and not doubled
        tally.points_returned += returned[key]
        tally.points_stored += len(values)
