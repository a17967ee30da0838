"""A service that takes a batch now and stores it later: the sender's two ends of a request, and how
Azure ML's transport asks for the second one; no plugin, no thread, no time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flowbuffer import Settings
from flowbuffer.backends.azureml_requests import AzureMLRequests, Ingestion
from flowbuffer.backends.azureml_transport import AzureMLTransport
from flowbuffer.backends.mlflow_transport import Request
from flowbuffer.clock import Clock
from flowbuffer.collector.handover import collector_environment
from flowbuffer.errors import (
    RejectedError,
    RetriableError,
    RunGoneError,
    TooLargeError,
    TransportError,
    UnauthorisedError,
)
from flowbuffer.spool.outcomes import Outcome, slot_outcomes
from flowbuffer.testing import FakeTransport, ManualClock
from support.small_spool import SmallSpool

# The sender.


def small_spool(tmp_path: Path, *, max_in_flight: int = 4) -> SmallSpool:
    transport = FakeTransport(max_in_flight=max_in_flight, at_once=False)
    return SmallSpool(tmp_path / "spool", transport, segment_slots=64, max_batch_size=4)


def steps(spool: SmallSpool, count: int = 4) -> None:
    for _ in range(count):
        spool.sender.step(hurry=True)


def sent(spool: SmallSpool) -> list[list[float]]:
    return [list(request.values) for request in spool.transport.requests]


def test_a_lane_is_free_when_its_batch_is_accepted(tmp_path: Path) -> None:
    """A key's next batch is sent once the one before it is accepted, not before, and any number of
    them may be in ingestion."""
    spool = small_spool(tmp_path)
    for value in range(24):
        spool.producer.append("k", float(value))
    for number in range(6):
        steps(spool)
        assert len(sent(spool)) == number + 1
        spool.transport.accept(number)
    steps(spool)
    assert sent(spool) == [[float(first + i) for i in range(4)] for first in range(0, 24, 4)]
    assert len(spool.transport.waiting) == 6  # more than may be on their way at once


def test_a_point_is_delivered_when_it_is_ingested(tmp_path: Path) -> None:
    """P1: an accepted point is pending on the disk until it can be read; then it is delivered,
    whichever batch is ingested first."""
    spool = small_spool(tmp_path)
    places = [spool.producer.append("k", float(value)) for value in range(8)]

    def states() -> list[Outcome]:
        return [slot_outcomes(segment.path, [offset])[0] for segment, offset in places]

    for number in range(2):
        steps(spool)
        spool.transport.accept(number)
    steps(spool)
    assert states() == [Outcome.PENDING] * 8
    spool.transport.answer(1)
    steps(spool)
    assert states() == [Outcome.PENDING] * 4 + [Outcome.DELIVERED] * 4
    spool.transport.answer()
    steps(spool)
    assert states() == [Outcome.DELIVERED] * 8


def test_the_sender_is_idle_when_all_is_ingested(tmp_path: Path) -> None:
    """Whoever waits for the sender waits for ingestion, too."""
    spool = small_spool(tmp_path)
    spool.producer.append("k", 1.0)
    steps(spool)
    spool.transport.accept()
    steps(spool)
    assert not spool.sender.idle
    spool.transport.answer()
    steps(spool)
    assert spool.sender.idle


def test_an_accepted_batch_that_fails_is_sent_again(tmp_path: Path) -> None:
    """P1, P4: a batch that was accepted and not ingested is sent again, the same to the bit, and
    later batches of its key do not wait for it."""
    spool = small_spool(tmp_path)
    for value in range(8):
        spool.producer.append("k", float(value))
    steps(spool)
    spool.transport.accept()
    steps(spool)
    spool.transport.decide = lambda _: RetriableError("not ingested")
    spool.transport.answer()  # the first one
    spool.transport.decide = lambda _: None
    spool.transport.accept()  # the second one
    steps(spool)
    first, second, again = spool.transport.requests
    assert first == again
    assert list(second.values) == [4.0, 5.0, 6.0, 7.0]
    assert spool.sender.retries == 1
    assert not spool.sender.idle
    spool.deliver()
    assert len(spool.transport.requests) == 3
    assert spool.values("k") == [float(value) for value in range(8)]


def test_accepted_is_as_good_as_stored_for_what_is_told(tmp_path: Path) -> None:
    """A service that accepts again is no longer held up, whenever it ingests."""
    spool = small_spool(tmp_path)
    spool.producer.append("k", 1.0)
    steps(spool)
    spool.transport.decide = lambda _: RetriableError("503")
    spool.transport.answer()
    steps(spool)
    assert spool.sender.failure is not None
    spool.transport.decide = lambda _: None
    spool.clock.turn(60.0)
    steps(spool)
    spool.transport.accept()
    steps(spool)
    assert spool.sender.failure is None


def test_a_restart_sends_what_was_accepted_again(tmp_path: Path) -> None:
    """P1, P4: whoever goes on after a kill sends what was accepted and not ingested once more, the
    same to the bit."""
    spool = small_spool(tmp_path)
    for value in range(4):
        spool.producer.append("k", 0.5 * value)
    steps(spool)
    spool.transport.accept()
    steps(spool)
    spool.new_sender(alive=True)
    spool.deliver()
    assert spool.transport.requests[0] == spool.transport.requests[1]
    assert len(spool.history("k")) == 4
    assert spool.sender.idle


def test_a_refused_batch_is_split_part_by_part(tmp_path: Path) -> None:
    """A batch beyond the service's limit goes on in parts, each once the one before is accepted;
    later points of its keys follow them."""
    spool = small_spool(tmp_path)
    transport = spool.transport
    for value in range(6):
        spool.producer.append("k", float(value))
    steps(spool)
    transport.decide = lambda request: TooLargeError("2") if len(request) > 2 else None
    transport.answer()
    transport.max_metrics = 2
    for number in range(3):
        steps(spool)
        assert len(transport.waiting) == number + 1
        transport.accept(number)
    steps(spool)
    assert sent(spool) == [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    spool.deliver()
    assert spool.values("k") == [float(value) for value in range(6)]


# The transport.


class FakeRequests:
    """The service as :class:`AzureMLTransport` sees it: each batch is ingested after ``delay_s``,
    or after what ``delays_s`` has for its number."""

    def __init__(self, clock: Clock) -> None:
        self.max_metrics = 250
        self.delay_s = 0.0
        self.delays_s: dict[str, float] = {}
        self.problem: Exception | None = None
        self.posts = 0
        self.polls: list[tuple[float, str]] = []
        self._clock = clock
        self._since_s: dict[str, float] = {}

    def log_batch(self, run_id: str, *, metrics: Any, **_: Any) -> Ingestion:
        self.posts += 1
        batch_id = str(self.posts) if metrics else ""
        self._since_s[batch_id] = self._clock.monotonic_s()
        return Ingestion(run_id, batch_id)

    def is_complete(self, ingestion: Ingestion) -> bool:
        now_s = self._clock.monotonic_s()
        self.polls.append((now_s, ingestion.batch_id))
        if self.problem:
            raise self.problem
        delay_s = self.delays_s.get(ingestion.batch_id, self.delay_s)
        return now_s >= self._since_s[ingestion.batch_id] + delay_s


class TransportRig:
    """A transport whose looks are taken by hand, and what it said of each request."""

    def __init__(self, *, has_poller: bool = True) -> None:
        self.clock = ManualClock()
        self.requests = FakeRequests(self.clock)
        self.said: dict[str, list[object]] = {}
        self.transport = AzureMLTransport("azureml://host", Settings(delivery="inline"), self.clock)
        self.transport._has_poller = has_poller
        store = SimpleNamespace(flowbuffers_requests=self.requests)
        self.transport._client = SimpleNamespace(
            log_batch=self.requests.log_batch, _tracking_client=SimpleNamespace(store=store)
        )

    def send(self, name: str, request: Request | None = None) -> None:
        said: list[object] = []
        self.said[name] = said
        request = request or Request("run", ["k"], [1.0], [1], [1])
        self.transport.send(request, said.append, lambda: said.append("accepted"))

    def look(self) -> float:
        """One look, and the pause after it; how long that was."""
        pause_s = self.transport._look()
        self.clock.turn(pause_s)
        return pause_s

    def look_until_all_is_done(self) -> None:
        for _ in range(10_000):
            if not self.transport._pending:
                return
            self.look()
        raise AssertionError("it goes on asking")


def test_a_request_is_accepted_and_then_done() -> None:
    """A batch is accepted when its POST is answered, and done when the service says that it can be
    read."""
    rig = TransportRig()
    rig.requests.delay_s = 2.0
    rig.send("batch")
    assert rig.said["batch"] == ["accepted"]
    rig.look()
    assert rig.said["batch"] == ["accepted"]
    rig.look_until_all_is_done()
    assert rig.said["batch"] == ["accepted", None]
    assert 2.0 <= rig.clock.monotonic_s() <= 2.2


def test_what_is_stored_at_once_is_not_asked_for() -> None:
    """Parameters and tags have no ingestion: they are done when their POST is answered."""
    rig = TransportRig()
    rig.send("param", Request("run", params=[("lr", "1")]))
    assert rig.said["param"] == [None]
    assert rig.requests.polls == []


def test_inline_waits_for_ingestion() -> None:
    """With delivery="inline" a request is over when its batch is ingested."""
    rig = TransportRig(has_poller=False)
    rig.requests.delay_s = 2.0
    rig.send("batch")
    assert rig.said["batch"] == ["accepted", None]


def test_a_refused_post_is_over() -> None:
    """A batch that is not accepted is done with its error, and nothing is asked for."""
    rig = TransportRig()

    def refuse(*_: Any, **__: Any) -> None:
        raise RetriableError("503")

    rig.transport._client.log_batch = refuse
    rig.send("batch")
    (error,) = rig.said["batch"]
    assert isinstance(error, RetriableError)
    assert rig.requests.polls == []


def test_it_is_asked_as_often_as_fits() -> None:
    """While nothing is known of the service it is asked every 0.1 s; then eight times while a batch
    is ingested, and at least every 5 s."""
    rig = TransportRig()
    rig.requests.delay_s = 0.2
    rig.send("first")
    assert rig.look() == pytest.approx(0.1)
    rig.look_until_all_is_done()
    rig.requests.delay_s = 16.0
    rig.send("second")
    rig.look_until_all_is_done()
    rig.requests.polls.clear()
    rig.send("third")
    rig.look_until_all_is_done()
    assert len(rig.requests.polls) <= 10
    rig.requests.delay_s = 900.0
    rig.send("fourth")
    rig.look_until_all_is_done()
    rig.send("fifth")
    assert rig.look() == pytest.approx(5.0)


def test_a_hundred_batches_need_few_polls() -> None:
    """100 batches in ingestion are asked for by one thread, oldest first: about one poll each in
    all, not one each every time."""
    rig = TransportRig()
    rig.requests.delay_s = 10.0
    for number in range(100):
        rig.send(str(number))
    rig.look_until_all_is_done()
    assert all(said == ["accepted", None] for said in rig.said.values())
    assert len(rig.requests.polls) <= 100 + 10.0 / 0.1 + 2
    assert next(at_s for at_s, batch in rig.requests.polls if batch == "2") >= 10.0


def test_a_straggler_is_passed_over() -> None:
    """A batch that takes much longer than the others holds none of them up."""
    rig = TransportRig()
    rig.requests.delay_s = 1.0
    rig.requests.delays_s["1"] = 600.0
    for number in range(5):
        rig.send(str(number))
    while any(rig.said[str(number)][-1:] != [None] for number in range(1, 5)):
        rig.look()
        assert rig.clock.monotonic_s() < 60.0
    assert rig.said["0"] == ["accepted"]
    rig.look_until_all_is_done()
    assert rig.said["0"] == ["accepted", None]


def test_a_batch_of_which_nothing_is_heard_is_sent_again() -> None:
    """An hour is no false timeout; after it a batch counts as not ingested."""
    rig = TransportRig()
    rig.requests.delay_s = 1e9
    rig.send("batch")
    while rig.clock.monotonic_s() < 3590.0:
        rig.look()
        assert rig.said["batch"] == ["accepted"]
    rig.look_until_all_is_done()
    assert isinstance(rig.said["batch"][-1], RetriableError)
    assert rig.clock.monotonic_s() < 3700.0


def test_a_batch_that_the_service_does_not_know_is_sent_again() -> None:
    """404 for a batch that was accepted means that it is lost."""
    rig = TransportRig()
    rig.send("batch")
    rig.requests.problem = RunGoneError("404")
    rig.look()
    assert isinstance(rig.said["batch"][-1], RetriableError)


@pytest.mark.parametrize(
    "problem",
    [RetriableError("503"), UnauthorisedError("401"), RejectedError("400"), OSError("reset")],
    ids=lambda problem: type(problem).__name__,
)
def test_a_poll_that_fails_is_repeated(problem: Exception) -> None:
    """What cannot be asked for is asked for again, and not sent again: the service has it."""
    rig = TransportRig()
    rig.send("batch")
    rig.requests.problem = problem
    for _ in range(20):
        assert 1.0 <= rig.look() <= 5.0
    assert rig.said["batch"] == ["accepted"]
    rig.requests.problem = None
    rig.look_until_all_is_done()
    assert rig.said["batch"] == ["accepted", None]
    assert rig.requests.posts == 1


def test_it_warns_once_of_each_limit(caplog: pytest.LogCaptureFixture) -> None:
    """Names beyond 50, and values close to a million, are warned of once for each run."""
    rig = TransportRig()
    for first in range(0, 100, 10):
        names = [f"name{number}" for number in range(first, first + 10)]
        rig.send("names", Request("run", names, [1.0] * 10, [1] * 10, [1] * 10))
        assert len(rig.transport.warnings("run")) == (first >= 50)
    rig.transport._rows["run"]["name0"] = 899_999
    for _ in range(3):
        rig.send("rows", Request("run", ["name0"], [1.0], [1], [1]))
    names, rows = rig.transport.warnings("run")
    rig.transport.warnings("run").clear()  # what a note keeps is its own, so that news is news
    assert rig.transport.warnings("run") == [names, rows]
    assert "more than 50 names" in names
    assert "900,000 values of 'name0'" in rows
    assert rig.transport.warnings("other") == []
    assert len(caplog.records) == 2


def test_it_warns_before_the_service_refuses() -> None:
    """Of too many names is warned also if the service does not take them."""
    rig = TransportRig()
    names = [f"name{number}" for number in range(60)]

    def refuse(*_: Any, **__: Any) -> None:
        raise RejectedError("400 too many names")

    rig.transport._client.log_batch = refuse
    rig.transport._active_until_s["run"] = 1e9  # it is known not to be deleted
    rig.send("names", Request("run", names, [1.0] * 60, [1] * 60, [1] * 60))
    (warning,) = rig.transport.warnings("run")
    assert "more than 50 names" in warning


# Its requests.


class FakeAuth:
    """The plugin's token of a job."""

    def __init__(self, clock: ManualClock, life_s: float) -> None:
        self._clock = clock
        self._life_s = life_s
        self._run_scope_info = ("sub", "group", "ws", "run", "experiment")
        self._experiment_id = "experiment"
        self.set_token("token0", life_s)

    def get_token(self) -> Any:
        return SimpleNamespace(token=self._token, expires_on=self._expires_on)

    def set_token(self, token: str, expires_in_s: float) -> None:
        self._token = token
        self._expires_on = self._clock.now_ns() / 1e9 + expires_in_s

    def _parse_expiry_time_from_token(self, _: str) -> float:
        return self._life_s


class RequestsRig:
    """Requests of which ``answers`` decides each, and what was asked for with which token."""

    def __init__(self, life_s: float = 3600.0) -> None:
        self.clock = ManualClock()
        self.auth = FakeAuth(self.clock, life_s)
        self.asked: list[tuple[float, str, str]] = []
        self.renewals = 0
        self.answer: Callable[[str, str], TransportError | None] = lambda *_: None
        self.requests = AzureMLRequests(
            SimpleNamespace(
                service_context=SimpleNamespace(auth=self.auth, host_url="https://host"),
                get_host_creds=lambda: SimpleNamespace(token=self.auth.get_token().token),
            ),
            60.0,
            self.clock,
        )
        self.requests._send = self._send  # type: ignore[method-assign]

    def _send(self, host: Any, endpoint: str, *_: Any, **__: Any) -> Any:
        self.asked.append((self.clock.monotonic_s(), endpoint.rpartition("/")[2], host.token))
        error = self.answer(self.asked[-1][1], host.token)
        if error:
            raise error
        if endpoint.endswith("/token"):
            self.renewals += 1
            return {"token": f"token{self.renewals}"}
        return {"batch_tracking_id": "1", "is_complete": True}

    def ask(self) -> Ingestion:
        return self.requests.log_batch_async("run", [], [], [])


def failing(*errors: TransportError) -> Callable[[str, str], TransportError | None]:
    left = list(errors)
    return lambda *_: left.pop(0) if left else None


def test_no_request_before_retry_after() -> None:
    """When the service asks to be left alone, posts and polls alike wait for as long."""
    rig = RequestsRig()
    rig.answer = failing(RetriableError("429", 7.0))
    with pytest.raises(RetriableError):
        rig.ask()
    rig.requests.is_complete(Ingestion("run", "1"))
    assert [at_s for at_s, *_ in rig.asked] == [0.0, 7.0]


def test_the_longest_retry_after_holds() -> None:
    """Of two requests at once that are both asked to wait, the longer wait holds for all."""
    rig = RequestsRig()

    def answer_another_one_first(*_: Any) -> TransportError:
        rig.answer = failing(RetriableError("429", 30.0))
        with pytest.raises(RetriableError):
            rig.ask()
        return RetriableError("429", 1.0)

    rig.answer = answer_another_one_first
    with pytest.raises(RetriableError):
        rig.ask()
    rig.ask()
    assert rig.asked[-1][0] >= 30.0


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ("FieldName=MetricV2Dto.Value/Count, Limit=100, Size=250. See", 100),
        ("FieldName=MetricV2Dto.Value/Count, Limit=0, Size=250. See", 1),
        ("FieldName=MetricV2Dto.Value/Count, Limit=1000, Size=250. See", 250),
    ],
)
def test_the_limit_that_the_service_names_holds(said: str, limit: int) -> None:
    """A lower limit than the documented one is learnt from what the service says of it."""
    rig = RequestsRig()
    rig.answer = failing(RejectedError(f"400 INVALID_PARAMETER_VALUE: {said}"))
    with pytest.raises(TooLargeError):
        rig.ask()
    assert rig.requests.max_metrics == limit


def test_other_refusals_are_no_limits() -> None:
    """Another limit, or another reason, is the content's fault."""
    rig = RequestsRig()
    rig.answer = failing(RejectedError("400: FieldName=Parameters, Limit=200, Size=201"))
    with pytest.raises(RejectedError):
        rig.ask()
    assert rig.requests.max_metrics == 250


@pytest.mark.parametrize(("life_s", "renewed_s"), [(3600.0, 3505.0), (20.0, 13.4)])
def test_a_token_is_renewed_before_its_end(life_s: float, renewed_s: float) -> None:
    """A token is renewed when 95 s, or a third of its life, is left, and every one after it."""
    rig = RequestsRig(life_s)
    for _ in range(3):
        before = rig.renewals
        rig.ask()
        rig.clock.turn(renewed_s - 1.0)
        rig.ask()
        assert rig.renewals == before
        rig.clock.turn(2.0)
        rig.ask()
        assert rig.renewals == before + 1
        assert rig.asked[-1][2] == f"token{rig.renewals}"


def test_a_refused_token_is_renewed_once() -> None:
    """A request that is refused with 401 is made once more with a new token."""
    rig = RequestsRig()
    rig.answer = failing(UnauthorisedError("401"))
    rig.ask()
    assert [name for _, name, _ in rig.asked] == ["log-batch-async", "token", "log-batch-async"]
    rig.answer = lambda name, _: None if name == "token" else UnauthorisedError("401")
    rig.asked.clear()
    with pytest.raises(UnauthorisedError):
        rig.ask()
    assert [name for _, name, _ in rig.asked] == ["log-batch-async", "token", "log-batch-async"]


def test_a_renewal_that_fails_stops_nothing() -> None:
    """While the old token holds, a service that gives no new one holds up no request."""
    rig = RequestsRig(30.0)
    rig.ask()
    rig.clock.turn(25.0)
    rig.answer = lambda name, _: RetriableError("503") if name == "token" else None
    rig.ask()
    assert rig.asked[-1][1:] == ("log-batch-async", "token0")


def test_credentials_of_other_kinds_renew_themselves() -> None:
    """Credentials of azure-identity are left alone."""
    rig = RequestsRig()
    rig.requests._store.service_context.auth = SimpleNamespace()
    rig.answer = failing(UnauthorisedError("401"))
    with pytest.raises(UnauthorisedError):
        rig.ask()
    assert len(rig.asked) == 1


# What the collector process is given.


def test_the_collector_gets_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The collector process has the run and the present token of the job, which the process that
    logs has no more in its environment; with other servers it has neither."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "first")
    monkeypatch.setenv("AZUREML_RUN_ID", "job")
    settings = Settings(spool_dir=tmp_path)
    uri = "azureml://localhost/mlflow"
    environment = collector_environment(settings, uri, 0, ("job", "present"))
    assert environment["MLFLOW_RUN_ID"] == "job"
    assert environment["MLFLOW_TRACKING_TOKEN"] == "present"
    assert environment["MLFLOW_TRACKING_URI"] == uri
    environment = collector_environment(settings, uri, 0)  # the plugin was not used yet
    assert environment["MLFLOW_RUN_ID"] == "job"
    assert environment["MLFLOW_TRACKING_TOKEN"] == "first"
    environment = collector_environment(settings, "http://host", 0, ("job", "present"))
    assert "MLFLOW_RUN_ID" not in environment
    assert environment["MLFLOW_TRACKING_TOKEN"] == "first"
