"""Kill rounds of ``delivery="process"``: jobs, and the collector that delivers for them.

In each round processes log to a run of their own, from four threads each, which write down beside
the spool what returned. Some are killed; the rest ends normally. Then everything must be delivered,
by the collector that is there or by the one that a next process starts, and no process of the round
be left. All rounds of a kind share one spool, so that a collector which survives a round serves the
next one. Linux only.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from support.backends import MlflowServer, client, copy_sqlite
from support.held import WAYS, HeldRequests
from support.job_site import PATIENCE_S, Site, Worker
from support.logged import Tally, check, stored
from support.memory_limit import MemoryLimit
from support.processes import answer_of, pass_time
from support.waiting import wait_until

RANKS = 4
#: More points than a producer's first segment has, which is deleted once they are delivered.
MORE_THAN_A_SEGMENT = 4500
MOST_FAULTS = 10


@dataclass
class Round:
    """What a round has to do with. ``exact``: nobody was killed between an answer and the mark."""

    site: Site
    number: int
    pick: Random
    run_id: str
    other_run_id: str
    records: Path
    workers: list[Worker] = field(default_factory=list)
    killed_collector: int | None = None
    exact: bool = False

    def start(self, **how) -> Worker:
        """A process that logs to the run of the round."""
        seed = f"{self.site.tally.seed}/{self.number}"
        worker = Worker(self.site, self.run_id, records=self.records, seed=seed, **how)
        self.workers.append(worker)
        return worker

    def wait_a_while(self, worker: Worker) -> None:
        """Until a moment at which the worker opens its logger, or mostly logs."""
        if self.pick.random() < 0.8:
            worker.wait_opened()
            pass_time(self.pick.uniform(0, 1.0))
        else:
            pass_time(self.pick.uniform(0, 0.05))

    def kill(self, *workers: Worker) -> None:
        for worker in workers:
            worker.kill()
            self.site.tally.killed += 1

    def kill_collector(self) -> None:
        self.killed_collector = self.site.kill_collector() or self.killed_collector


# The kinds: what is killed in a round.


def kill_trainer(round_: Round) -> None:
    """The process that logs, at any moment; the collector goes on."""
    trainer = round_.start()
    round_.wait_a_while(trainer)
    collector = round_.site.collector()
    round_.kill(trainer)
    if collector and collector == round_.site.collector():
        round_.site.tally.also["collectors_survived"] += 1
    elif collector:
        round_.site.tally.fault("the collector died with the trainer")


def kill_rank(round_: Round) -> None:
    """One of four ranks that log to one run; the others end normally."""
    ranks = [round_.start(rank=rank) for rank in range(RANKS)]
    victim = ranks.pop(round_.pick.randrange(RANKS))
    round_.wait_a_while(victim)
    round_.kill(victim)
    pass_time(round_.pick.uniform(0, 0.5))
    for rank in ranks:
        rank.stop()
    for rank in ranks:
        rank.finish()


def kill_collector(round_: Round) -> None:
    """The collector, in mid-request; the trainer goes on and ends normally."""
    trainer = _trainer_with_collector(round_)
    _kill_collector_in_mid_request(round_)
    pass_time(round_.pick.uniform(0, 1.5))
    if round_.pick.random() < 0.25:
        round_.exact = False
        wait_until(round_.site.collector, PATIENCE_S)
        pass_time(round_.pick.uniform(0, 2.0))  # while it starts, or delivers
        round_.kill_collector()
    trainer.stop()
    trainer.finish()


def kill_both(round_: Round) -> None:
    """The trainer and the collector in mid-request, one right after the other."""
    trainer = _trainer_with_collector(round_)
    if round_.pick.random() < 0.5:
        round_.kill(trainer)
        _kill_collector_in_mid_request(round_, may_be_idle=True)
    else:
        _kill_collector_in_mid_request(round_)
        round_.kill(trainer)
    _next_process(round_)


def kill_group(round_: Round) -> None:
    """All of a job of two ranks, one of which has a child that logs; the collector, too, or not."""
    site, pick = round_.site, round_.pick
    leader = round_.start(before=lambda: os.setpgid(0, 0), with_child=True)
    leader.wait_opened()
    other = round_.start(rank=1, before=lambda: os.setpgid(0, leader.pid))
    with ExitStack() as stack:
        if pick.random() < 0.7:
            wait_until(lambda: site.stored_points(round_.run_id), PATIENCE_S)
            pass_time(pick.uniform(0, 0.5))
            if pick.random() < 0.5:
                other.wait_opened()
                stack.enter_context(site.locked_store())
                pass_time(0.4)  # points come all the time: by now a request waits for the store
                site.tally.mid_request += 1
        else:
            pass_time(pick.uniform(0, 1.0))
        collector = site.collector()
        os.killpg(leader.pid, signal.SIGKILL)
        if pick.random() < 0.7:
            round_.kill_collector()
        elif collector and collector != site.collector():
            site.tally.fault("the collector died with the job's process group")
        round_.kill(leader, other)
        site.tally.killed += 1  # the leader's child
    _next_process(round_)


def kill_by_memory(round_: Round) -> None:
    """Whatever the OOM killer chooses, until the trainer is dead, which takes ever more memory.

    A collector that a process under a memory limit started is under that limit, too.
    """
    site = round_.site
    assert site.limit
    site.limit.set(round_.pick.randrange(150, 450) << 20)
    delay_s = round_.pick.uniform(0, 0.6)
    collector_first = round_.pick.random() < 0.4

    def grow(until: threading.Event) -> None:
        until.wait(delay_s)
        taken = []
        while not until.is_set():
            taken.append(b"x" * (1 << 20))
            until.wait(0.001)

    trainer = round_.start(before=site.limit.enter, meanwhile=grow)
    before = site.last_collector()
    in_limit: set[int] = set()

    def over() -> bool:
        if (pid := site.collector()) and site.limit and site.limit.holds(pid):
            in_limit.add(pid)
            if collector_first:  # as it is where each of several ranks takes less
                with suppress(OSError):  # it is dead
                    Path(f"/proc/{pid}/oom_score_adj").write_text("800")
        return trainer.has_died()

    wait_until(over, PATIENCE_S, every_s=0.02)
    site.tally.killed += 1
    site.tally.also["collector_was_under_the_limit"] += bool(in_limit)
    alive = site.collector()
    for pid in in_limit - {alive}:
        round_.killed_collector = pid
        site.tally.killed += 1
        site.tally.also["collector_killed_by_memory"] += 1
    site.tally.also["collectors_survived"] += bool(alive) and alive in {before, *in_limit}


def _trainer_with_collector(round_: Round) -> Worker:
    """A trainer with a collector that has delivered something of it, or a whole segment."""
    burst = MORE_THAN_A_SEGMENT if round_.number % 4 == 1 else 0
    round_.exact = bool(burst) or round_.pick.random() < 0.5
    trainer = round_.start(burst=burst, one_request=round_.exact)
    trainer.wait_opened()
    if burst:
        (folder,) = round_.site.folders(round_.run_id)
        wait_until((folder / "carry").exists, PATIENCE_S)
        round_.site.tally.also["killed_beyond_a_segment"] += 1
    else:
        wait_until(lambda: round_.site.stored_points(round_.run_id), PATIENCE_S)
    return trainer


def _kill_collector_in_mid_request(round_: Round, *, may_be_idle: bool = False) -> None:
    held, pick, tally = round_.site.held, round_.pick, round_.site.tally
    assert held
    way = pick.choice(WAYS)
    if pick.random() < 0.8:
        held.hold_next(way)
        if held.wait_held(0.5 if may_be_idle else PATIENCE_S):
            tally.mid_request += 1
            tally.also[f"stored_{way}"] += 1
        else:
            round_.exact = False
            tally.also["none_came_to_hold"] += 1
        pass_time(pick.uniform(0, 0.1))
    else:
        round_.exact = False
        pass_time(pick.uniform(0, 1.0))
    round_.kill_collector()
    held.let_go()


def _next_process(round_: Round) -> None:
    """The job is dead: a next one comes to the spool. It stays, or ends before the collector that
    it starts has read anything."""
    stays = round_.pick.random() < 0.5
    following = Worker(round_.site, round_.other_run_id if stays else round_.run_id)
    round_.workers.append(following)
    following.wait_opened()
    if stays:
        round_.site.wait_delivered(round_.run_id)
    following.stop()
    following.finish()


@dataclass
class Kind:
    """How the rounds of a kind are played.

    ``behind_proxy``: the store is a server's, and requests can be held. ``neighbour``: so many
    rounds have the same neighbour (see :class:`Site`); 0: none has one.
    """

    play: Callable[[Round], None]
    behind_proxy: bool = False
    neighbour: int = 0


KINDS = {
    "trainer": Kind(kill_trainer, neighbour=10),
    "rank": Kind(kill_rank, neighbour=10),
    "collector": Kind(kill_collector, behind_proxy=True),
    "both": Kind(kill_both, behind_proxy=True),
    "group": Kind(kill_group),
    "oom": Kind(kill_by_memory, neighbour=3),
}


def play(rounds: int, folder: Path, template: Path, tally: Tally) -> None:
    """Play `rounds` rounds of the kind of the tally below `folder`."""
    kind = KINDS[tally.kind]
    folder.mkdir()
    store = folder / "mlflow.db"
    store_uri = uri = copy_sqlite(template, store)

    def make_runs() -> list[str]:
        made = client(store_uri)
        return [made.create_run("0").info.run_id for _ in range(rounds + 1)]

    other_run_id, *run_ids = answer_of(make_runs)  # type: ignore[misc]
    with ExitStack() as stack:
        site = Site(folder, store, uri, tally)
        if kind.behind_proxy:
            server = stack.enter_context(MlflowServer(uri, folder))
            site.held = stack.enter_context(HeldRequests(server.uri))
            site.uri = site.held.uri
            site.known |= {server.pid or 0, site.held.pid}
        if tally.kind == "oom":
            site.limit = MemoryLimit()
            stack.callback(site.limit.remove)
        stack.callback(_end_strangers, site)
        start_s = time.monotonic()
        for number, run_id in enumerate(run_ids):
            pick = Random(f"{tally.seed}/{tally.kind}/{number}")
            records = folder / f"records{number}"
            records.mkdir()
            _play_round(kind, Round(site, number, pick, run_id, other_run_id, records), store_uri)
            tally.rounds += 1
            if len(tally.faults) >= MOST_FAULTS:
                tally.fault("too many faults: the rest is not played")
                break
        tally.seconds_per_round = round((time.monotonic() - start_s) / tally.rounds, 2)


def _play_round(kind: Kind, round_: Round, store_uri: str) -> None:
    site, tally = round_.site, round_.site.tally
    try:
        if kind.neighbour and round_.number % kind.neighbour == 0:
            site.part_from_neighbour()
            if round_.pick.random() < 0.5:  # else the job of this round finds no collector
                site.meet_neighbour(round_.other_run_id)
        kind.play(round_)
        if kind.neighbour:
            site.meet_neighbour(round_.other_run_id)
        site.wait_delivered(round_.run_id)
    except (TimeoutError, RuntimeError, OSError) as error:
        tally.fault(f"{type(error).__name__}: {error}")
    finally:
        for worker in round_.workers:
            try:
                worker.kill()
            except RuntimeError:
                pass  # it had ended
    check(round_.records, stored(store_uri, round_.run_id), tally)
    if round_.killed_collector is not None:
        tally.collectors_replaced += site.last_collector() != round_.killed_collector
    if site.held and (twice := site.held.answered_twice()):
        tally.also["answered_twice"] += twice
        if round_.exact:
            tally.fault(f"{twice} points were delivered twice: two deliver one folder")
    left = {p: c for p, c in site.strangers().items() if "flowbuffer.collector.process" not in c}
    if left:
        tally.fault(f"processes are left: {left}")


def _end_strangers(site: Site) -> None:
    """All jobs have ended: the collector has to end by itself."""
    try:
        site.part_from_neighbour()
    except (TimeoutError, RuntimeError, OSError):
        site.tally.fault(f"processes are left at the end: {site.strangers()}")
        for pid in site.strangers():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not site.strangers())
