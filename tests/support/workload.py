"""Many threads that log through one MetricLogger, and what must come back of it (P2, P3, P4).

Plain functions without pytest: `tests/promises/test_order.py` runs them small, `scripts/order` full
size.
"""

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from flowbuffer import MetricLogger, Settings, Stats
from support.backends import histories, make_run

if TYPE_CHECKING:
    from mlflow.entities import Metric

    Histories = Mapping[str, Sequence[Metric]]

Steps = Literal["none", "repeated", "rising"]

VALUES = (1.0, 2.0, 3.0, 2.0)
"""What the points of a thread with keys of its own repeat: sorted by value they would show."""
THREAD = 1 << 20
"""Where threads share their keys, a value is thread * THREAD + call * MIX % THREAD."""
MIX = 0x9E375
"""Has the values of a thread go up and down: sorted by value they would not be in order."""
UNMIX = pow(MIX, -1, THREAD)


@dataclass(frozen=True)
class Workload:
    """What each of the threads logs: `points` calls in a tight loop, its keys in turn.

    With `own_keys` no two threads share a key and values repeat, else the value tells the thread
    and the call.
    """

    keys: int
    steps: Steps
    own_keys: bool = False
    threads: int = 8
    points: int = 1000

    def __str__(self) -> str:
        return f"{self.keys} {'own' if self.own_keys else 'shared'} keys, steps {self.steps}"

    def key(self, thread: int, call: int) -> str:
        name = f"key{call % self.keys}"
        return f"thread{thread}/{name}" if self.own_keys else name

    def value(self, thread: int, call: int) -> float:
        if self.own_keys:
            return VALUES[call // self.keys % len(VALUES)]
        return float(thread * THREAD + call * MIX % THREAD)

    def step(self, call: int) -> int | None:
        return {"none": None, "repeated": call // self.keys // 10, "rising": call}[self.steps]


@dataclass
class Calls:
    """When each call began and ended, in ms: arrays of (thread, call)."""

    before: np.ndarray
    after: np.ndarray


@dataclass
class Verdict:
    """What a store holds of a workload; all is well if the first four counts are 0.

    `out_of_interval`: points whose time is not within their call's, and that no tie had to move
    so far. `late`: points after their call, moved ties all of them if `out_of_interval` is 0.
    """

    points: int
    lost: int = 0
    surplus: int = 0
    reordered: int = 0
    out_of_interval: int = 0
    late: int = 0
    late_most_ms: int = 0

    @property
    def good(self) -> bool:
        return not (self.lost or self.surplus or self.reordered or self.out_of_interval)


@contextmanager
def eager_threads() -> Iterator[None]:
    """Have the interpreter change threads every 10 us and not every 5 ms, so that they mix."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def log(logger: MetricLogger, work: Workload) -> Calls:
    """Log it all, from threads that start together. An error in a thread is raised here."""
    shape = (work.threads, work.points)
    calls = Calls(np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    start = threading.Barrier(work.threads)
    errors: list[BaseException] = []

    def loop(thread: int) -> None:
        points = [
            (work.key(thread, call), work.value(thread, call), work.step(call))
            for call in range(work.points)
        ]
        before, after = calls.before[thread], calls.after[thread]
        now_ns, log_metric = time.time_ns, logger.log_metric
        start.wait()
        try:
            for call, (key, value, step) in enumerate(points):
                before[call] = now_ns()
                log_metric(key, value, step)
                after[call] = now_ns()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(work.threads)]
    with eager_threads():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    calls.before //= 1_000_000
    calls.after //= 1_000_000
    return calls


def check(work: Workload, calls: Calls, found: "Histories") -> Verdict:
    """Compare what came back with what was logged."""
    verdict = Verdict(points=work.threads * work.points)
    seen = np.zeros((work.threads, work.points), np.int64)
    for key, history in found.items():
        last_calls = [-1] * work.threads
        counts = [0] * work.threads
        before: Metric | None = None
        for metric in history:
            thread, call = _origin(work, key, metric.value, counts)
            if not (0 <= thread < work.threads and 0 <= call < work.points):
                verdict.surplus += 1
                continue
            seen[thread, call] += 1
            logged = (work.key(thread, call), work.value(thread, call), work.step(call) or 0)
            if call <= last_calls[thread] or (key, metric.value, metric.step) != logged:
                verdict.reordered += 1
            last_calls[thread] = call
            late_ms = metric.timestamp - int(calls.after[thread, call])
            if late_ms > 0:
                verdict.late += 1
                verdict.late_most_ms = max(verdict.late_most_ms, late_ms)
            early = metric.timestamp < calls.before[thread, call]
            if early or (late_ms > 0 and not _had_to_move(metric, before)):
                verdict.out_of_interval += 1
            before = metric
    verdict.lost = int((seen == 0).sum())
    verdict.surplus += int((seen - 1).clip(0).sum())
    return verdict


def _origin(work: Workload, key: str, value: float, counts: list[int]) -> tuple[int, int]:
    """The thread and the call that a point of a history comes from."""
    if not work.own_keys:
        thread, mixed = divmod(int(value), THREAD)
        return thread, mixed * UNMIX % THREAD
    owner, _, name = key.partition("/")
    thread = int(owner.removeprefix("thread"))
    counts[thread] += 1
    return thread, int(name.removeprefix("key")) + (counts[thread] - 1) * work.keys


def _had_to_move(metric: "Metric", before: "Metric | None") -> bool:
    """Whether an earlier time would not have kept the point behind the one before it."""
    if before is None:
        return False
    ties = (metric.step, metric.value) <= (before.step, before.value)
    least = before.timestamp + ties
    return metric.timestamp == least


def run(
    uri: str, work: Workload, settings: Settings, *, read_uri: str | None = None
) -> tuple[Verdict, Stats, float]:
    """Log a workload to a new run at `uri`, deliver it, and read it back; seconds to delivery.

    `read_uri`: where to read; a server's store itself is read ten times faster than the server.
    """
    run_id = make_run(uri)
    with MetricLogger(run_id, tracking_uri=uri, settings=settings) as logger:
        start_s = time.monotonic()
        calls = log(logger, work)
        logger.flush()
        seconds = time.monotonic() - start_s
        stats = logger.stats()
    return check(work, calls, histories(read_uri or uri, run_id)), stats, seconds
