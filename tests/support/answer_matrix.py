"""Every answer that may come in MLflow's place: what becomes of the points meanwhile and after it.

One case is one status, one body and one time for which a gateway answers so. The real sender and
transport send to a real HTTP server on the loopback; the clock is turned by hand, so that a minute
takes no time. ``scripts/answers`` runs all of them, ``tests/backends/test_answers.py`` a sample.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from flowbuffer.backends.mlflow_transport import MlflowTransport
from flowbuffer.clock import Clock
from flowbuffer.settings.settings import Settings
from flowbuffer.spool.layout import PARAM
from support.answering import Answer, AnsweringServer, Received, said
from support.small_spool import RUN, SmallSpool

STATUSES = range(100, 600)
#: What a gateway has to say. The last is what MLflow itself would say.
BODIES = {
    "HTML": Answer(0, b"<html><title>Sign in</title></html>", "text/html"),
    "empty": Answer(0, b"", "text/plain"),
    "JSON": said(0, {"message": "Forbidden", "login": "required"}),
    "error_code": said(0, {"error_code": "INVALID_PARAMETER_VALUE", "message": "no such thing"}),
}
#: For how long it says so, in s; 0 is once.
TIMES_S = (0.0, 8.0, 60.0)
#: In what time everything must be stored after that, in s.
_RECOVERS_S = 60.0


@dataclass(frozen=True)
class Case:
    status: int
    body: str
    seconds: float

    @property
    def may_reject(self) -> bool:
        """Only MLflow's own 4xx, but for those that say that it is not about the content."""
        retried = (401, 403, 404, 408, 413, 425, 429)
        return self.body == "error_code" and 400 <= self.status < 500 and self.status not in retried

    def __str__(self) -> str:
        return f"{self.status} {self.body} for {self.seconds:g} s"


def all_cases() -> list[Case]:
    cases = itertools.product(STATUSES, BODIES, TIMES_S)
    return [Case(*case) for case in cases]


def sample(count: int, seed: int) -> list[Case]:
    return random.Random(seed).sample(all_cases(), count)


class Matrix:
    """A context manager: one server and one transport for many cases."""

    def __enter__(self) -> Matrix:
        self._server = AnsweringServer().__enter__()
        settings = Settings(delivery="inline", request_timeout_s=20.0)
        self._transport = MlflowTransport(self._server.uri, settings, Clock())
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__(*_)

    def run(self, case: Case, root: Path) -> str:
        """What is wrong; empty if all is well."""
        server = self._server
        server.answer, server.rows, server.params = None, set(), {}
        spool = SmallSpool(root, self._transport)  # type: ignore[arg-type]
        until_s = spool.clock.monotonic_s() + case.seconds
        left = [1]  # answers, of the case in which it is one

        def answer(_: Received) -> Answer | None:
            if case.seconds == 0.0:
                left[0] -= 1
                bad = left[0] >= 0
            else:
                bad = spool.clock.monotonic_s() < until_s
            if not bad:
                return None
            body = BODIES[case.body]
            where = {"Location": f"{server.uri}/login"} if case.status in range(300, 400) else {}
            return Answer(case.status, body.body, body.kind, where)

        server.answer = answer
        for step in range(3):
            spool.producer.append("loss", step / 7, step)
            spool.producer.append("accuracy", step / 3, step)
        spool.producer.append_texts(PARAM, {"rate": "0.1"})
        points = 7
        end_s = until_s + _RECOVERS_S
        reader = spool.stream.reader
        while spool.clock.monotonic_s() < end_s:
            next_s = spool.sender.step(hurry=True)
            stored = len(server.rows) + len(server.params)
            if reader.delivered > stored:
                return f"{reader.delivered} delivered, {stored} stored"
            if spool.sender.idle and reader.delivered + reader.rejected == points:
                break
            spool.clock.turn(min(max(next_s, 0.01), 1.0))
        stored = len(server.rows) + len(server.params)
        if reader.rejected and not case.may_reject:
            return f"{reader.rejected} rejected"
        if reader.delivered + reader.rejected != points or stored < reader.delivered:
            return f"{reader.delivered} delivered, {reader.rejected} rejected, {stored} stored"
        if any(key not in (RUN,) for key, *_ in server.rows):
            return "stored elsewhere"
        if any("login" in received.path for received in server.requests):
            return "a redirect was followed"
        server.requests.clear()
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="so many cases, not all")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    logging.getLogger("flowbuffer").setLevel(logging.ERROR)
    cases = sample(given.sample, given.seed) if given.sample else all_cases()
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    with Matrix() as matrix, tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            problem = matrix.run(case, Path(folder) / str(number))
            counts[case.body] += 1
            if problem:
                wrong.append(f"{case}: {problem}")
                print(wrong[-1], flush=True)
            elif number % 500 == 499:
                print(f"{number + 1} of {len(cases)}", flush=True)
    told = ", ".join(f"{count} with {body}" for body, count in sorted(counts.items()))
    print(f"{len(cases)} cases ({told}): {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
