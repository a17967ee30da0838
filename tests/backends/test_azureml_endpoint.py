"""The loopback endpoint, driven by the stock ``azureml-mlflow`` without flowbuffer: what a job sees
there is what it sees of the service, its waits and its failures included."""

import importlib.util
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from flowbuffer.testing import ManualClock
from support.azureml import POLLS, POSTS, StartAzureJob, StartService
from support.jobs import Job
from support.waiting import wait_until

if importlib.util.find_spec("azureml") is None:
    pytest.skip("needs flowbuffer[azureml]", allow_module_level=True)

from flowbuffer.testing.azureml import AzureMLEndpoint


class StockJob(Job):
    """A program that knows only MLflow, and says facts as JSON."""

    BEGIN = """
    import json, os, sys, threading, time
    import mlflow
    from mlflow.entities import Metric

    def say(word="", **facts):
        print(word or json.dumps(facts), flush=True)

    def hear():
        return sys.stdin.readline().strip()

    def error_of(call):
        began = time.monotonic()
        try:
            call()
            found = {"kind": "", "text": "", "code": ""}
        except Exception as error:
            code = getattr(error, "error_code", "")
            found = {"kind": type(error).__name__, "text": str(error), "code": code}
        say(seconds=time.monotonic() - began, **found)

    def log(count, key="loss", start=0, run_id=None):
        return [
            mlflow.log_metric(key, float(step), step=step, synchronous=False, run_id=run_id)
            for step in range(start, start + count)
        ]

    def wait(operations):
        for operation in operations:
            operation.wait()
    """

    def facts(self) -> dict[str, Any]:
        """All that it said until its end, which must be a good one."""
        ended = self.end()
        assert ended.status == 0, ended.err
        found: dict[str, Any] = {}
        for line in ended.out.splitlines():
            if line.startswith("{"):
                found |= json.loads(line)
        return found


Start = Callable[..., StockJob]


@pytest.fixture
def start(start_azure_job: StartAzureJob) -> Start:
    """Starts the process of a job; it does not outlive the test."""
    return partial(start_azure_job, kind=StockJob)  # type: ignore[return-value]


def steps(service: AzureMLEndpoint, key: str = "loss") -> list[int]:
    return [step for _, step, _ in service.history(service.run_id, key)]


def test_a_loop_costs_a_round_trip_per_call_and_a_wait_five_seconds(
    start_service: StartService, start: Start
) -> None:
    """Asynchronous calls post in the caller's thread, and what is not ingested at the first poll is
    asked for again after 5 s."""
    service = start_service(ingestion_delay_s=1.0, latency_s=0.05)
    code = """
    with mlflow.start_run():
        began = time.monotonic()
        operations = log(20)
        called = time.monotonic() - began
        wait(operations)
        say(call_s=called / 20, wait_s=time.monotonic() - began - called)
    """
    said = start(service, code).facts()
    assert said["call_s"] > 0.05
    assert said["wait_s"] > 4.0
    assert service.count(POLLS) <= 40  # two for each
    assert steps(service) == list(range(20))
    assert service.count(POSTS) == 20


def test_the_status_of_the_jobs_own_run_is_left_to_the_service(
    start_service: StartService, start: Start
) -> None:
    """The plugin does not end the run of the job; the service does, once its process has ended."""
    service = start_service()
    code = """
    with mlflow.start_run():
        mlflow.log_metric("loss", 1.0)
        say(run_id=os.environ.get("MLFLOW_RUN_ID"))
    """
    said = start(service, code).facts()
    assert said["run_id"] is None  # MLflow has removed it
    assert service.count("runs/update") == 0
    assert service.run(service.run_id).status == "RUNNING"
    service.end_job()
    assert service.run(service.run_id).status == "FINISHED"
    assert service.run(service.run_id).visible_at_end == 1


def test_end_run_reports_finished_while_data_are_missing(
    start_service: StartService, start: Start
) -> None:
    """Any other run is FINISHED as soon as it is ended, whatever is still in ingestion."""
    service = start_service(ingestion_delay_s=4.0)
    code = "with mlflow.start_run(): log(20)"
    start(service, code, AZUREML_RUN_ID="").facts()
    run = service.run(service.run_id)
    assert run.status == "FINISHED"
    assert run.visible_at_end is not None
    assert run.visible_at_end < 20
    assert len(steps(service)) == 20  # the process ends after its polls


def test_a_batch_beyond_the_row_limit_is_refused_as_a_whole(
    start_service: StartService, start: Start
) -> None:
    """More than 250 metrics are a 400 in the form of the service, in the caller's thread."""
    service = start_service()
    code = """
    with mlflow.start_run() as run:
        points = [Metric("loss", float(i), 1_700_000_000_000 + i, i) for i in range(1000)]
        def send(first, last):
            client = mlflow.MlflowClient()
            return client.log_batch(run.info.run_id, points[first:last], synchronous=False)
        error_of(lambda: send(0, 1000))
        wait([send(first, first + 250) for first in range(0, 1000, 250)])
    """
    said = start(service, code).facts()
    assert (said["kind"], said["code"]) == ("RestException", "INVALID_PARAMETER_VALUE")
    assert "FieldName=MetricV2Dto.Value/Count, Limit=250, Size=1000" in said["text"]
    assert service.visible(service.run_id) == 1000
    assert service.count(POSTS, 400) == 1


def test_waiting_fails_after_the_timeout_although_the_data_arrive(
    start_service: StartService, start: Start
) -> None:
    """The plugin's timeout is looked at before the answer, so that it is a false one."""
    service = start_service(ingestion_delay_s=4.0)
    code = "with mlflow.start_run(): error_of(log(1)[0].wait)"
    said = start(service, code, MLFLOW_RUN_DATA_WAIT_TIMEOUT_SEC="1").facts()
    assert "Timed out waiting for run data to be available" in said["text"]
    assert steps(service) == [0]


def test_throttling_blocks_the_caller(start_service: StartService, start: Start) -> None:
    """Every 429 holds the caller for its Retry-After."""
    service = start_service()
    code = """
    mlflow.start_run()
    log(1)
    sys.stdin.readline()
    error_of(lambda: log(1, start=1))
    """
    job = start(service, code)
    wait_until(lambda: service.count(POLLS))
    service.throttle(2, retry_after_s=1.0)
    job.tell("go")
    said = job.facts()
    assert said["kind"] == ""
    assert said["seconds"] > 2.0
    assert service.count(POSTS, 429) == 2
    assert steps(service) == [0, 1]


def test_a_restart_keeps_what_was_accepted(start_service: StartService, start: Start) -> None:
    """The endpoint comes back on its port, and the plugin's HTTP client goes on."""
    service = start_service(latency_s=0.02)
    job = start(service, "with mlflow.start_run(): wait(log(100))")
    wait_until(lambda: service.count(POSTS) > 20)
    service.restart()
    job.facts()
    assert steps(service) == list(range(100))


@pytest.mark.parametrize(("keeps_once", "points"), [(True, 10), (False, 11)])
def test_a_lost_answer_is_posted_again(
    start_service: StartService, start: Start, keeps_once: bool, points: int
) -> None:
    """A batch whose answer is lost is taken; what comes twice is kept once or twice, as asked."""
    service = start_service(keeps_once=keeps_once)
    service.lose_answers(1)
    start(service, "with mlflow.start_run(): wait(log(10))").facts()
    assert (service.count(POSTS), service.count(POSTS, 0)) == (10, 1)
    assert service.run(service.run_id).duplicates == 1
    assert len(steps(service)) == points


def test_params_are_there_at_once_and_cannot_be_changed(
    start_service: StartService, start: Start
) -> None:
    """Parameters have no ingestion, and keep their first value."""
    service = start_service(ingestion_delay_s=60.0)
    code = """
    mlflow.start_run()
    mlflow.log_param("lr", 1, synchronous=False)
    error_of(lambda: mlflow.log_param("lr", 2))
    """
    assert start(service, code).facts()["code"] == "INVALID_PARAMETER_VALUE"
    assert service.run(service.run_id).params == {"lr": "1"}
    assert service.count(POLLS) == 0


def test_an_expired_token_locks_the_plugin_out(start_service: StartService, start: Start) -> None:
    """A token is renewed when less than 95 s are left, by the store that is made or by a timer of
    30 s; once it has expired it is refused."""
    clock = ManualClock(time.time())
    service = start_service(token_lifetime_s=90.0, clock=clock)
    code = """
    mlflow.start_run()
    log(1)
    say("logged")
    hear()
    error_of(lambda: log(1))
    """
    job = start(service, code)
    job.expect("logged")
    clock.turn(90.0)
    job.tell("go on")
    said = job.facts()
    assert service.count("token") == 1
    assert (said["kind"], said["code"]) == ("RestException", "UNAUTHENTICATED")
    assert "expired" in said["text"]


def test_after_a_fork_nothing_polls(start_service: StartService, start: Start) -> None:
    """In a forked child a batch is posted, and waiting for it never ends."""
    service = start_service()
    code = """
    run_id = mlflow.start_run().info.run_id
    wait(log(3))
    if os.fork() == 0:
        (operation,) = log(1, "child", run_id=run_id)
        waiter = threading.Thread(target=operation.wait, daemon=True)
        waiter.start()
        waiter.join(1)
        say(hangs=waiter.is_alive())
        os._exit(0)
    os.wait()
    """
    assert start(service, code).facts()["hangs"]
    assert steps(service, "child") == [0]


def test_points_can_be_read_after_the_delay(start_service: StartService) -> None:
    """A batch is complete, and its points can be read, when its delay is over; equal ones are
    counted."""
    clock = ManualClock()
    service = start_service(ingestion_delay_s=5.0, clock=clock)
    token = service.job_environment()["MLFLOW_TRACKING_TOKEN"]
    path = service.tracking_uri + "/api/2.0/preview/mlflow/"
    point = {"key": "k", "timestamp": 1, "step": 1, "value": "NaN"}
    body = {"run_id": service.run_id, "metrics": [point, point]}
    answer = service.answer(path + POSTS, body, token, 0)
    assert answer is not None
    query = {"run_id": service.run_id, **answer[1]}
    assert service.answer(path + POLLS, query, token, 0) == (200, {"is_complete": False}, None)
    assert service.visible(service.run_id) == 0
    clock.turn(5.0)
    assert service.answer(path + POLLS, query, token, 0) == (200, {"is_complete": True}, None)
    assert service.visible(service.run_id) == 1
    assert service.run(service.run_id).duplicates == 1


def test_it_leaves_no_thread_and_no_file() -> None:
    """After its block nothing of the endpoint is left."""
    before = set(threading.enumerate())
    with AzureMLEndpoint() as service:
        service.restart()
        bundle = service.ca_bundle
        assert [file.name for file in bundle.parent.iterdir()] == ["ca.pem"]
    assert not bundle.exists()
    wait_until(lambda: set(threading.enumerate()) <= before)
