"""Rounds of SIGKILL: a process that logs is killed at a random moment, and another one delivers.

`python -m support.kill_rounds --rounds N --seed S` plays the rounds and prints what was counted as
JSON; it fails if anything is wrong. In each round

- a victim logs from four threads, which write down outside the spool what each returned call held;
- it is killed at a moment that the seed decides, while it delivers too, or with its store away;
- other processes open the spool, some of which are killed as well, until one delivers all of it;
- every history must be what was logged, in order: at least all that had returned, nothing twice.

All processes are forked from this one, which has imported MLflow and keeps no thread, no store
and no connection of its own.
"""

import argparse
import json
import os
import select
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from support.backends import copy_sqlite, histories, make_run, new_sqlite
from support.waiting import wait_until

THREADS = 4
LONGEST_SERIES = 20
DELIVERY_TIMEOUT_S = 60.0


@dataclass
class Tally:
    """What the rounds came to. The last three must stay 0."""

    seed: int
    rounds: int = 0
    store_away: int = 0
    """rounds whose victim could not reach its store"""
    killed_opening: int = 0
    """victims that died before anything had returned"""
    killed_delivering: int = 0
    """victims that died with some of their points stored and some not"""
    successors_killed: int = 0
    calls_returned: int = 0
    points_returned: int = 0
    points_stored: int = 0
    stored_by_victims: int = 0
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.disordered or self.faults)


def value_of(index: int) -> float:
    """The value of a key's point number `index`: all differ, and they do not rise."""
    return float(index ^ 0x155)


# What the processes of a round do.


def log_from_threads(
    uri: str, run_id: str, spool: Path, records: Path, seed: str, opened: int, store_is_there: bool
) -> None:
    """The victim: log from all threads until killed, once delivery works if it can."""
    from flowbuffer import MetricLogger, Settings

    settings = Settings(spool_dir=spool, linger_s=0.02)
    logger = MetricLogger(run_id, tracking_uri=uri, settings=settings)
    handle = logger.log_metric("start/single", value_of(0))
    (records / "start").write_text("single 1\n")
    if store_is_there:
        handle.wait(DELIVERY_TIMEOUT_S)
    threads = [
        threading.Thread(
            target=log_for_ever, args=(logger, f"t{number}", records, Random(f"{seed}/{number}"))
        )
        for number in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    os.write(opened, b"o")
    for thread in threads:
        thread.join()


def log_for_ever(logger, name: str, records: Path, pick: Random) -> None:
    """Log in bursts. Each line of the record is one call that returned: its kind, its points."""
    record = os.open(records / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pause = threading.Event()
    singles = dicts = in_series = 0
    while True:
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
        pause.wait(pick.uniform(0, 0.03))


def deliver_as_logger(uri: str, run_id: str, spool: Path) -> None:
    """The next process of the job: open the run on the same spool, and close it."""
    from flowbuffer import MetricLogger, Settings

    settings = Settings(spool_dir=spool, linger_s=0.02)
    logger = MetricLogger(run_id, tracking_uri=uri, settings=settings)
    logger.close(DELIVERY_TIMEOUT_S)


def deliver_as_command(_uri: str, _run_id: str, spool: Path) -> None:
    """`flowbuffer sync`."""
    from flowbuffer.cli import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(["sync", "--spool", str(spool), "--timeout", str(DELIVERY_TIMEOUT_S)])


# Processes.


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def finished(pid: int, timeout_s: float = 2 * DELIVERY_TIMEOUT_S) -> None:
    """Wait for a child, which must end well and in time."""
    ended: list[int] = []

    def is_over() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        ended.extend([status] if found else [])
        return bool(found)

    try:
        wait_until(is_over, timeout_s, every_s=0.005)
    except BaseException:
        killed(pid)
        raise
    if ended[0]:
        raise RuntimeError(f"a child ended with wait status {ended[0]}")


def killed(pid: int) -> bool:
    """SIGKILL a child; False if it had ended by itself."""
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def answer_of(work: Callable[[], object]) -> object:
    """What `work` returns in a child, as JSON carries it."""
    reading, writing = os.pipe()

    def answer() -> None:
        with os.fdopen(writing, "w") as out:
            json.dump(work(), out)

    pid = forked(answer)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    finished(pid)
    return json.loads(text)


def pass_time(seconds: float, until_readable: int | None = None) -> None:
    """Wait, at most until there is something to read from a descriptor."""
    select.select([] if until_readable is None else [until_readable], [], [], seconds)


# The rounds.


def play(rounds: int, seed: int, folder: Path) -> Tally:
    """Play `rounds` rounds below `folder`."""
    tally = Tally(seed)
    template = folder / "template.db"
    finished(forked(lambda: new_sqlite(template)))
    for number in range(rounds):
        play_round(number, Random(f"{seed}/{number}"), folder / f"round{number}", template, tally)
        tally.rounds += 1
    return tally


def play_round(number: int, pick: Random, folder: Path, template: Path, tally: Tally) -> None:
    store, away, spool, records = (folder / n for n in ("mlflow.db", "away", "spool", "records"))
    records.mkdir(parents=True)
    uri = copy_sqlite(template, store)
    run_id = str(answer_of(lambda: make_run(uri)))

    is_away = number % 3 == 2
    if is_away:
        store.rename(away)
        store.mkdir()  # a folder in the place of the database cannot be opened
    opened, tell_opened = os.pipe()
    seed = f"{tally.seed}/{number}"
    victim = forked(
        lambda: log_from_threads(uri, run_id, spool, records, seed, tell_opened, not is_away),
    )
    try:
        if pick.random() < 0.8:
            pass_time(DELIVERY_TIMEOUT_S, until_readable=opened)
            pass_time(pick.uniform(0, 1.0))
        else:
            pass_time(pick.uniform(0, 0.05))
    finally:
        if not killed(victim):
            tally.faults.append(f"round {number}: the victim ended before it was killed")
        os.close(opened)
        os.close(tell_opened)
    if is_away:
        store.rmdir()
        away.rename(store)

    before = stored(uri, run_id)
    deliver = (deliver_as_logger, deliver_as_command)[number % 2]
    if not spool.exists():  # it had not come that far, and the command would complain
        deliver = deliver_as_logger
    while pick.random() < 0.3:
        successor = forked(lambda: deliver(uri, run_id, spool))
        pass_time(pick.uniform(0, 0.5))
        tally.successors_killed += killed(successor)
    finished(forked(lambda: deliver(uri, run_id, spool)))

    check(number, records, stored(uri, run_id), tally)
    # A hidden folder is one in the making, or going: swept a minute after its process died.
    left = [path.name for path in spool.glob("*/[!.]*")]
    if left:
        tally.faults.append(f"round {number}: delivered folders are still there: {left}")
    returned = sum(points_returned(path).total() for path in records.iterdir())
    stored_before = sum(map(len, before.values()))
    tally.store_away += is_away
    tally.killed_opening += returned == 0
    tally.killed_delivering += 0 < stored_before < returned
    tally.stored_by_victims += stored_before


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


def check(number: int, records: Path, found: dict[str, list[float]], tally: Tally) -> None:
    """Hold the histories against what was logged: points 0 to m of each key, all that returned."""
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
            tally.faults.append(
                f"round {number}, {key}: {returned[key]} returned, {len(values)} stored, "
                f"{lost} lost, {doubled} doubled, {'in order' if in_order else 'out of order'}"
            )
        tally.lost += lost
        tally.doubled += doubled
        tally.disordered += not in_order and not lost and not doubled
        tally.points_returned += returned[key]
        tally.points_stored += len(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time")
    given = parser.parse_args()
    seed = Random().randrange(1 << 32) if given.seed is None else given.seed
    print(f"{given.rounds} rounds, seed {seed}", file=sys.stderr, flush=True)

    # These take seconds: once for all, not in every child.

    import flowbuffer.cli  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        tally = play(given.rounds, seed, Path(folder))
    print(json.dumps(asdict(tally), indent=2))
    return 0 if tally.clean else 1


if __name__ == "__main__":
    sys.exit(main())
