"""Whatever happens, in whatever order: P2, P3 and P4 hold.

Hypothesis logs, steps, answers, fails, loses answers, turns and sets back the clock, kills the
collector and the producer, in any order it can think of; the backend keeps rows as MLflow's SQL
stores do. At the end everything is delivered and compared with what was logged.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from flowbuffer.errors import RejectedError, RetriableError, TooLargeError
from flowbuffer.testing import FakeTransport
from support.small_spool import RUN, SmallSpool

KEYS = st.sampled_from(["a", "b", "c"])
#: Few values, so that equal points are the rule; 13 is the one that the server refuses.
VALUES = st.sampled_from([0.0, 1.0, 2.0, float("nan"), float("-inf"), 13.0])
STEPS = st.one_of(st.none(), st.integers(-1, 3))


def refuse_13(request):
    return RejectedError("400 unlucky") if 13.0 in request.values else None


class Delivery(RuleBasedStateMachine):
    @initialize(
        in_flight=st.integers(1, 3), segment_slots=st.integers(2, 9), batch_size=st.integers(1, 7)
    )
    def start(self, in_flight: int, segment_slots: int, batch_size: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="flowbuffer-test-"))
        transport = FakeTransport(in_flight, at_once=False, answer=refuse_13)
        self.spool = SmallSpool(
            self.root / "spool", transport, segment_slots, max_batch_size=batch_size, linger_s=0.2
        )
        self.logged: dict[str, list[tuple[int, int, float]]] = {}
        self.given_ms = 1000
        self.alive = True

    def note(self, key: str, value: float, step: int | None, time: int | None = None) -> None:
        now_ms = self.spool.clock.now_ns() // 1_000_000
        logged = self.logged.setdefault(key, [])
        point = (now_ms if time is None else time, step or 0, value)
        if time is None or [repr(point)] != list(map(repr, logged[-1:])):
            logged.append(point)  # else the same given point again, which is one point

    # What the training loop does.

    @precondition(lambda self: self.alive)
    @rule(key=KEYS, value=VALUES, step=STEPS)
    def log(self, key: str, value: float, step: int | None) -> None:
        self.spool.producer.append(key, value, step)
        self.note(key, value, step)

    @precondition(lambda self: self.alive)
    @rule(values=st.dictionaries(KEYS, VALUES), step=STEPS)
    def log_many(self, values: dict[str, float], step: int | None) -> None:
        self.spool.producer.append_many(values, step)
        for key, value in values.items():
            self.note(key, value, step)

    @precondition(lambda self: self.alive)
    @rule(key=KEYS, values=st.lists(VALUES, max_size=12), steps=st.booleans())
    def log_series(self, key: str, values: list[float], steps: bool) -> None:
        own_steps = [index // 3 for index in range(len(values))]
        self.spool.producer.append_series(key, values, own_steps if steps else None)
        for index, value in enumerate(values):
            self.note(key, value, own_steps[index] if steps else index)

    @precondition(lambda self: self.alive)
    @rule(value=VALUES, later=st.integers(0, 2), step=STEPS)
    def log_at(self, value: float, later: int, step: int | None) -> None:
        self.given_ms += later
        self.spool.producer.append("given", value, step, self.given_ms)
        self.note("given", value, step, self.given_ms)

    # What the collector, the server and the world do.

    @rule(hurry=st.booleans())
    def step(self, hurry: bool) -> None:
        self.spool.sender.step(hurry=hurry)

    @precondition(lambda self: self.spool.transport.waiting)
    @rule(data=st.data(), lose=st.booleans())
    def answer(self, data: st.DataObject, lose: bool) -> None:
        waiting = len(self.spool.transport.waiting)
        self.spool.transport.answer(data.draw(st.integers(0, waiting - 1)), lose=lose)

    @precondition(lambda self: self.spool.transport.waiting)
    @rule(
        error=st.sampled_from(
            [RetriableError("503"), RetriableError("429", 3.0), TooLargeError("413")]
        )
    )
    def fail(self, error: Exception) -> None:
        size = len(self.spool.transport.waiting[0][0])
        if isinstance(error, TooLargeError) and size == 1:
            error = RetriableError("503")  # one point that is too large is refused for good
        self.spool.transport.decide = lambda _: error
        self.spool.transport.answer()
        self.spool.transport.decide = refuse_13

    @rule(seconds=st.sampled_from([0.0004, 0.001, 0.3, 5.0]))
    def turn(self, seconds: float) -> None:
        self.spool.clock.turn(seconds)

    @rule(back_s=st.floats(0.001, 100.0))
    def set_clock_back(self, back_s: float) -> None:
        self.spool.clock.set_wall(self.spool.clock.now_ns() / 1e9 - back_s)

    @rule()
    def collector_dies(self) -> None:
        self.spool.transport.waiting.clear()  # nobody is there for the answers
        self.spool.new_sender(alive=self.alive)

    @precondition(lambda self: self.alive)
    @rule()
    def producer_dies(self) -> None:
        self.alive = False
        self.collector_dies()

    @invariant()
    def the_window_is_consistent(self) -> None:
        assert self.spool.stream.reader.on_their_way >= 0

    def teardown(self) -> None:
        if not hasattr(self, "spool"):
            return
        try:
            self.spool.deliver()
            for key, points in self.logged.items():
                self.check(key, [point for point in points if point[2] != 13.0])
            assert {row[1] for row in self.spool.transport.rows} <= set(self.logged)
            assert self.spool.stream.reader.problems == []
        finally:
            shutil.rmtree(self.root)

    def check(self, key: str, logged: list[tuple[int, int, float]]) -> None:
        stored = self.spool.transport.history(RUN, key)
        # P2 and P4: as many as were logged, in the order of the calls.
        assert [(step, repr(value)) for _, step, value in stored] == [
            (step, repr(value)) for _, step, value in logged
        ]
        # P3: never earlier than logged.
        for (stored_ms, *_), (logged_ms, *_) in zip(stored, logged, strict=True):
            assert stored_ms >= logged_ms


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
