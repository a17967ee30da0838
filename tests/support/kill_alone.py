"""Kill rounds of ``delivery="thread"``: a process that logs and delivers by itself is killed.

In each round

- a victim logs from four threads, which write down outside the spool what each returned call held;
- it is killed at a moment that the seed decides, while it delivers too, or with its store away;
- other processes open the spool, some of which are killed as well, until one delivers all of it;
- every history must be what was logged, in order: at least all that had returned, nothing twice.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from support.backends import copy_sqlite, make_run
from support.logged import Tally, check, log_from_threads, points_returned, stored, value_of
from support.processes import answer_of, finished, forked, killed, pass_time

DELIVERY_TIMEOUT_S = 150.0

Deliver = Callable[[str, str, Path], None]


def log_until_killed(
    uri: str, run_id: str, spool: Path, records: Path, seed: str, opened: int, store_is_there: bool
) -> None:
    """The victim: log from all threads, once delivery works if it can."""
    from flowbuffer import MetricLogger, Settings

    settings = Settings(spool_dir=spool, linger_s=0.02, delivery="thread")
    logger = MetricLogger(run_id, tracking_uri=uri, settings=settings)
    handle = logger.log_metric("start/single", value_of(0))
    (records / "start").write_text("single 1\n")
    if store_is_there:
        handle.wait(DELIVERY_TIMEOUT_S)
    threads = log_from_threads(logger, "t", records, seed, threading.Event(), 0, 0.03)
    os.write(opened, b"o")
    for thread in threads:
        thread.join()


def deliver_as_logger(uri: str, run_id: str, spool: Path) -> None:
    """The next process of the job: open the run on the same spool, and close it."""
    from flowbuffer import MetricLogger, Settings

    settings = Settings(spool_dir=spool, linger_s=0.02, delivery="thread")
    logger = MetricLogger(run_id, tracking_uri=uri, settings=settings)
    logger.close(DELIVERY_TIMEOUT_S)


def deliver_as_command(_uri: str, _run_id: str, spool: Path) -> None:
    """`flowbuffer sync`."""
    from flowbuffer.commands.cli import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(["sync", "--spool", str(spool), "--timeout", str(DELIVERY_TIMEOUT_S)])


def play(rounds: int, folder: Path, template: Path, tally: Tally) -> None:
    """Play `rounds` rounds below `folder`."""
    start_s = time.monotonic()
    for number in range(rounds):
        pick = Random(f"{tally.seed}/{number}")
        play_round(number, pick, folder / f"round{number}", template, tally)
        tally.rounds += 1
    tally.seconds_per_round = round((time.monotonic() - start_s) / rounds, 2)


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
        lambda: log_until_killed(uri, run_id, spool, records, seed, tell_opened, not is_away),
    )
    try:
        if pick.random() < 0.8:
            pass_time(DELIVERY_TIMEOUT_S, until_readable=opened)
            pass_time(pick.uniform(0, 1.0))
        else:
            pass_time(pick.uniform(0, 0.05))
    finally:
        tally.killed += 1
        if not killed(victim):
            tally.fault("the victim ended before it was killed")
        os.close(opened)
        os.close(tell_opened)
    if is_away:
        store.rmdir()
        away.rename(store)

    before = stored(uri, run_id)
    deliver: Callable[[str, str, Path], None] = (
        deliver_as_command if number % 2 else deliver_as_logger
    )
    if not spool.exists():  # it had not come that far, and the command would complain
        deliver = deliver_as_logger
    while pick.random() < 0.3:
        successor = forked(lambda: deliver(uri, run_id, spool))
        pass_time(pick.uniform(0, 0.5))
        died = killed(successor)
        tally.killed += died
        tally.also["successors_killed"] += died
    finished(forked(lambda: deliver(uri, run_id, spool)))

    check(records, stored(uri, run_id), tally)
    # A hidden folder is one in the making, or going: swept a minute after its process died.
    left = [path.name for path in spool.glob("*/[!.]*")]
    if left:
        tally.fault(f"delivered folders are still there: {left}")
    returned = sum(points_returned(path).total() for path in records.iterdir())
    stored_before = sum(map(len, before.values()))
    tally.also["store_away"] += is_away
    tally.also["killed_opening"] += returned == 0
    tally.also["killed_with_some_stored"] += 0 < stored_before < returned
    tally.also["stored_by_victims"] += stored_before
