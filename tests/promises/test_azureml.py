"""Jobs on Azure ML: the real ``azureml-mlflow`` against a loopback endpoint, with its limits, its
tokens and its failures."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from support.azureml import POLLS, POSTS, StartAzureJob, StartService
from support.collectors import collector_pid, end_collector, is_empty
from support.jobs import Ended, Job
from support.waiting import wait_until

if importlib.util.find_spec("azureml") is None:
    pytest.skip("needs flowbuffer[azureml]", allow_module_level=True)

from flowbuffer.testing import ManualClock
from flowbuffer.testing.azureml import AzureMLEndpoint, Received


class Script(Job):
    """A program as a user has it: nothing is imported for it."""

    BEGIN = ""


def values(service: AzureMLEndpoint, key: str = "loss", run_id: str = "") -> list[float]:
    """What can be read of a key now, in MLflow's order."""
    return [value for *_, value in service.history(run_id or service.run_id, key)]


def counted(count: int) -> list[float]:
    return [float(step) for step in range(count)]


def seen(service: AzureMLEndpoint, name: str, status: int = 200) -> list[Received]:
    found = list(service.requests)
    return [request for request in found if (request.name, request.status) == (name, status)]


def well(ended: Ended) -> Ended:
    assert ended.status == 0, ended.err
    return ended


PROCESS = {"FLOWBUFFER_DELIVERY": "process"}
THREAD = {"FLOWBUFFER_DELIVERY": "thread"}
SWITCH = {"FLOWBUFFER_ENABLED": "1", **PROCESS}

#: Azure Machine Learning, "Log metrics, parameters, and files with MLflow": asynchronous logging.
DOCUMENTED_LOOP = """
import mlflow

with mlflow.start_run():
    mlflow.log_param("lr", 0.1)
    run_operations = []
    for step in range(1000):
        run_operations.append(
            mlflow.log_metric("loss", float(step), step=step, synchronous=False)
        )
    for run_operation in run_operations:
        run_operation.wait()
    mlflow.set_tag("phase", "done")
"""
DOCUMENTED_BATCH = """
import time
import mlflow
from mlflow.entities import Metric, Param, RunTag

with mlflow.start_run() as run:
    client = mlflow.MlflowClient()
    metrics = [
        Metric(key="loss", value=float(step), timestamp=int(time.time() * 1000), step=step)
        for step in range(1000)
    ]
    run_operation = client.log_batch(
        run.info.run_id,
        metrics=metrics,
        params=[Param("lr", "0.1")],
        tags=[RunTag("phase", "done")],
        synchronous=False,
    )
    run_operation.wait()
"""


@pytest.mark.parametrize("code", [DOCUMENTED_LOOP, DOCUMENTED_BATCH], ids=["loop", "log_batch"])
def test_the_documented_script(
    start_service: StartService, start_azure_job: StartAzureJob, code: str
) -> None:
    """Microsoft's script, unmodified, with the switch: a thousand values are all there when the
    job ends, in order, in few requests within the limit; its status is left to the service."""
    service = start_service(latency_s=0.05, ingestion_delay_s=1.0)
    well(start_azure_job(service, code, Script, **SWITCH).end())
    assert values(service) == counted(1000)
    run = service.run(service.run_id)
    assert (run.status, run.duplicates) == ("RUNNING", 0)
    assert (run.params, run.tags["phase"]) == ({"lr": "0.1"}, "done")
    assert not seen(service, "runs/update")
    assert {request.name for request in service.requests if request.status != 200} <= set()
    assert max(request.metrics for request in service.requests) <= 250
    assert len(seen(service, POSTS)) < 20
    service.end_job()
    assert run.visible_at_end == 1000


def test_a_run_ends_when_everything_can_be_read(
    start_service: StartService, start_azure_job: StartAzureJob
) -> None:
    """A child run, whose status MLflow reports, is FINISHED only once everything of it is ingested,
    parameters and tags included; so is one that is logged to from outside a job."""
    service = start_service(ingestion_delay_s=1.5)
    code = """
    import mlflow
    def log():
        mlflow.log_params({"lr": 0.1, "layers": 3})
        for step in range(300):
            mlflow.log_metrics({"loss": step, "acc": -step}, step=step)
        mlflow.set_tag("phase", "done")
    with mlflow.start_run():
        with mlflow.start_run(nested=True) as run:
            log()
            print(run.info.run_id)
    with mlflow.start_run(experiment_id=run.info.experiment_id) as other:
        log()
        print(other.info.run_id)
    """
    ended = well(start_azure_job(service, code, Script, **SWITCH).end())
    run_ids = re.findall(r"^[0-9a-f-]{36}$", ended.out, re.MULTILINE)
    assert len(run_ids) == 2
    for run_id in run_ids:
        run = service.run(run_id)
        assert (run.status, run.visible_at_end) == ("FINISHED", 600)
        assert values(service, "acc", run_id) == [-value for value in counted(300)]
        assert run.params == {"lr": "0.1", "layers": "3"}
        assert run.tags["phase"] == "done"
    assert len(seen(service, "runs/update")) == 2
    assert service.run(service.run_id).status == "RUNNING"


@pytest.mark.parametrize("delivery", [PROCESS, THREAD], ids=lambda d: d["FLOWBUFFER_DELIVERY"])
def test_a_429_slows_down_every_lane(
    start_service: StartService, start_azure_job: StartAzureJob, delivery: dict[str, str]
) -> None:
    """P5: after each of three 429s no request of any kind, from any lane, reaches the service
    before its Retry-After is over; then everything arrives, in order."""
    service = start_service(ingestion_delay_s=0.5)
    code = """
    logger = MetricLogger(RUN)
    logger.log_metric("first", 0.0)
    logger.flush()
    say("ready")
    hear()
    for step in range(400):
        logger.log_metrics({f"key{n}": float(step) for n in range(8)}, step=step)
    say("logged")
    report = logger.flush()
    say(f"pending {report.pending}")
    logger.close()
    """
    job = start_azure_job(service, code, **delivery)
    job.expect("ready")
    service.throttle(3, retry_after_s=2.0)
    job.tell("go")
    job.expect("logged")
    well(job.end())
    throttled = [request for request in list(service.requests) if request.status == 429]
    assert len(throttled) == 3
    for refused in throttled:
        in_its_time = [
            request
            for request in list(service.requests)
            if refused.at_s < request.at_s < refused.at_s + 2.0 and request.name != "token"
        ]
        # What was on its way in other lanes already comes a moment later, once on a connection.
        on_their_way = {request.connection: request for request in reversed(in_its_time)}
        on_their_way.pop(refused.connection, None)
        too_soon = [
            request
            for request in in_its_time
            if request.at_s > refused.at_s + 0.3 and request not in on_their_way.values()
        ]
        assert too_soon == []
    for key in range(8):
        assert values(service, f"key{key}") == counted(400)


def test_a_lower_limit_is_learnt(
    start_service: StartService, start_azure_job: StartAzureJob
) -> None:
    """A service that takes less than the documented 250 metrics says so once for each lane, and
    gets what it takes; no point is blamed."""
    service = start_service(max_rows=100)
    code = """
    logger = MetricLogger(RUN)
    for step in range(1000):
        logger.log_metric("loss", step, step=step)
    report = logger.flush()
    say(f"{report.delivered} {report.rejected} {report.pending}")
    logger.close()
    """
    assert "1000 0 0" in well(start_azure_job(service, code).end()).out
    assert values(service) == counted(1000)
    assert len(seen(service, POSTS, 400)) <= 4
    sizes = [request.metrics for request in seen(service, POSTS)]
    assert max(sizes) <= 100
    assert len(sizes) <= 16


# The sleeps of these jobs are real: a token is renewed by timers of delivery and of the plugin, in
# the job, its child and the collector process, and their clocks cannot be turned from here.
START_WITH_A_TOKEN = """
mlflow.start_run()
flowbuffer.log_metric("first", 0)
flowbuffer.flush()
say("ready")
lifetime_s = float(hear())
"""
TOKEN_CODE = """
def log(key):
    logger = MetricLogger(RUN)
    until = time.monotonic() + 1.5 * lifetime_s
    step = 0
    while time.monotonic() < until:
        logger.log_metric(key, step, step=step)
        step += 1
        time.sleep(0.02)
    logger.close()
    say(f"{key} {step}")

"""
IN_A_CHILD = """
flowbuffer.log_metric("parent", 0)
flowbuffer.flush()
pid = os.fork()
if pid == 0:
    log("child")
    os._exit(0)
os.waitpid(pid, 0)
"""


def start_with_a_token(
    start_service: StartService,
    start_azure_job: StartAzureJob,
    code: str,
    spool: Path,
    **environment: str,
) -> tuple[AzureMLEndpoint, Job]:
    """A job whose token lives for some seconds, with which it has delivered a first point: so many
    that its start, and that of its collector, has taken less than two thirds of them."""
    for lifetime_s in (6.0, 12.0, 25.0, 50.0):
        service = start_service(token_lifetime_s=lifetime_s, ingestion_delay_s=0.2)
        began_s = time.monotonic()
        job = start_azure_job(service, code, **environment)
        with suppress(AssertionError):  # its token has expired meanwhile
            job.expect("ready")
            if environment["FLOWBUFFER_DELIVERY"] == "process":
                wait_until(lambda: collector_pid(spool))
            if time.monotonic() - began_s < 2 / 3 * lifetime_s:
                job.tell(str(lifetime_s))
                return service, job
        job.kill()
        end_collector(spool)
    raise AssertionError("no job starts within half a minute here")


@pytest.mark.parametrize(
    ("delivery", "last"),
    [
        pytest.param("process", 'log("here")', id="process"),
        pytest.param("thread", 'log("here")', id="thread"),
        pytest.param("thread", IN_A_CHILD, id="forked child"),
    ],
)
def test_a_token_is_renewed(
    start_service: StartService,
    start_azure_job: StartAzureJob,
    tmp_path: Path,
    delivery: str,
    last: str,
) -> None:
    """A job that is longer than its token goes on delivering, with no request refused, also from a
    forked child, in which no timer of the plugin lives."""
    code = START_WITH_A_TOKEN + TOKEN_CODE + last
    service, job = start_with_a_token(
        start_service, start_azure_job, code, tmp_path / "spool", FLOWBUFFER_DELIVERY=delivery
    )
    said = well(job.end()).out
    ((key, count),) = re.findall(r"^(here|child) ([0-9]+)$", said, re.MULTILINE)
    assert values(service, key) == counted(int(count))
    assert not seen(service, POSTS, 401)
    assert not seen(service, POLLS, 401)
    assert service.count("token") >= 2


@pytest.mark.parametrize("forks", [False, True], ids=["here", "in a forked child"])
def test_a_token_outlives_a_quiet_time(
    start_service: StartService, start_azure_job: StartAzureJob, tmp_path: Path, forks: bool
) -> None:
    """A process that logs nothing for longer than its token lives goes on delivering after that."""
    code = """
    pid = os.fork() if os.environ["FORKS"] == "1" else 0
    if pid:
        os.waitpid(pid, 0)
    else:
        logger = MetricLogger(RUN)
        for step in range(2):
            logger.log_metric("loss", step, step=step)
            logger.flush()
            if not step:
                time.sleep(1.2 * lifetime_s)
        say(f"pending {logger.stats().pending}")
        os._exit(0)
    """
    code = START_WITH_A_TOKEN + textwrap.dedent(code)
    service, job = start_with_a_token(
        start_service, start_azure_job, code, tmp_path / "spool", FORKS=str(int(forks)), **THREAD
    )
    assert "pending 0" in job.end().out
    assert values(service) == counted(2)


def test_the_service_restarts(start_service: StartService, start_azure_job: StartAzureJob) -> None:
    """P5: while the service is away the loop goes on; when it is back everything arrives once, in
    order, what was in ingestion included."""
    service = start_service(ingestion_delay_s=1.0)
    code = """
    logger = MetricLogger(RUN)
    def log(steps):
        began = time.monotonic()
        for step in steps:
            logger.log_metric("loss", step, step=step)
        assert time.monotonic() - began < 10  # if one in a hundred waited, it would be more
    log(range(1000))
    say("logged")
    hear()
    log(range(1000, 2000))
    say("again")
    hear()
    logger.close()
    """
    job = start_azure_job(service, code)
    job.expect("logged")
    wait_until(lambda: seen(service, POSTS))
    service.stop()
    job.tell("go on")
    job.expect("again")
    service.start()
    job.tell("end")
    well(job.end())
    assert values(service) == counted(2000)


@pytest.mark.parametrize("keeps_once", [True, False])
def test_a_lost_answer(
    start_service: StartService, start_azure_job: StartAzureJob, keeps_once: bool
) -> None:
    """P4: a batch whose answer was lost after ingestion is sent again, the same to the bit: nothing
    is missing, and a service that keeps equal points once has each once."""
    service = start_service(keeps_once=keeps_once)
    service.lose_answers(2)
    code = """
    logger = MetricLogger(RUN)
    for step in range(1000):
        logger.log_metric("loss", step, step=step)
    logger.close()
    """
    well(start_azure_job(service, code).end())
    assert len(seen(service, POSTS, 0)) == 2
    found = values(service)
    assert sorted(set(found)) == counted(1000)
    assert found == sorted(found)
    duplicates = service.run(service.run_id).duplicates
    assert duplicates > 0
    assert len(found) == 1000 + (0 if keeps_once else duplicates)


def test_sigkill(
    start_service: StartService, start_azure_job: StartAzureJob, tmp_path: Path
) -> None:
    """P1: what a killed trainer logged is delivered by the collector process, which acts as the
    job although MLflow has removed MLFLOW_RUN_ID from the environment."""
    service = start_service(ingestion_delay_s=1.0)
    code = """
    with mlflow.start_run():
        say(f"run id {os.environ.get('MLFLOW_RUN_ID')}")
        mlflow.log_metric("first", 0)
        say("ready")
        hear()
        for step in range(2000):
            mlflow.log_metric("loss", step, step=step)
        say("logged")
        hear()
    """
    job = start_azure_job(service, code, **SWITCH)
    job.expect("ready")
    assert "run id None" in job.said
    pid = wait_until(lambda: collector_pid(tmp_path / "spool"))
    job.tell("go")
    job.expect("logged")
    job.kill()
    assert len(values(service)) < 2000
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    assert f"MLFLOW_RUN_ID={service.run_id}" in environment
    wait_until(lambda: len(values(service)) >= 2000)
    assert values(service) == counted(2000)
    assert service.run(service.run_id).duplicates == 0


def test_sigterm(start_service: StartService, start_azure_job: StartAzureJob) -> None:
    """P7: a job that gets SIGTERM, as at pre-emption, delivers before it ends by it."""
    service = start_service(latency_s=0.05, ingestion_delay_s=1.0)
    code = """
    mlflow.start_run()
    for step in range(2000):
        mlflow.log_metric("loss", step, step=step)
    say("logged")
    hear()
    """
    job = start_azure_job(service, code, **SWITCH)
    job.expect("logged")
    job.process.terminate()
    ended = job.end()
    found = values(service)
    assert ended.status == -signal.SIGTERM
    assert found == counted(2000)


def test_a_spool_that_was_saved(
    start_service: StartService, start_azure_job: StartAzureJob, tmp_path: Path
) -> None:
    """What docs/azureml.md says to do for a node that is taken away: the spool goes into an archive
    when SIGTERM came, and `flowbuffer sync` delivers what is in there, from elsewhere."""
    service = start_service()
    code = """
    mlflow.start_run()
    mlflow.log_metric("first", 0)
    flowbuffer.flush()
    say("ready")
    hear()
    for step in range(1000):
        mlflow.log_metric("loss", step, step=step)
    say("logged")
    hear()
    """
    job = start_azure_job(
        service, code, FLOWBUFFER_ENABLED="1", FLOWBUFFER_SHUTDOWN_TIMEOUT_S="0.5", **THREAD
    )
    job.expect("ready")
    service.stop()
    job.tell("go")
    job.expect("logged")
    job.process.terminate()
    assert "flowbuffer sync" in job.end().err
    saved, elsewhere = tmp_path / "spool.tar", tmp_path / "elsewhere"
    subprocess.run(["tar", "-C", tmp_path / "spool", "-cf", saved, "."], check=True)
    shutil.rmtree(tmp_path / "spool")
    elsewhere.mkdir(mode=0o700)
    subprocess.run(["tar", "-C", elsewhere, "-xpf", saved], check=True)
    service.start()
    done = subprocess.run(
        [sys.executable, "-m", "flowbuffer", "sync", "--spool", elsewhere, "--timeout", "150"],
        env={**os.environ, **service.job_environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert values(service) == counted(1000)
    assert is_empty(elsewhere)


def test_a_hundred_batches_in_ingestion(
    start_service: StartService, start_azure_job: StartAzureJob
) -> None:
    """100 batches in ingestion at once take one thread that asks, as many threads as before, and
    far fewer polls than one each every second."""
    clock = ManualClock(time.time())
    service = start_service(ingestion_delay_s=6.0, clock=clock)
    code = """
    def threads():
        return sorted(thread.name for thread in threading.enumerate())

    logger = MetricLogger(RUN)
    logger.log_metric("first", 0)
    say("ready")
    hear()
    before = threads()
    logger.log_series("loss", [float(step) for step in range(25_000)])
    say("logged")
    hear()
    assert threads() == before, (before, threads())
    say(f"threads {before}")
    say("looked")
    logger.close()
    """
    job = start_azure_job(service, code)
    job.expect("ready")
    wait_until(lambda: seen(service, POSTS))
    began_s = time.monotonic()
    job.tell("go")
    job.expect("logged")
    wait_until(lambda: len(seen(service, POSTS)) >= 101)  # the first one, and 100
    assert values(service) == []  # none of them is ingested
    job.tell("look")
    job.expect("looked")
    clock.turn(6.0)
    said = well(job.end()).out
    seconds = time.monotonic() - began_s
    assert values(service) == counted(25_000)
    assert said.count("flowbuffer-ingestion") == 1
    assert len(seen(service, POSTS)) <= 105
    assert len(seen(service, POLLS)) < max(300, 50 * seconds)
    assert len({request.connection for request in service.requests}) <= 10


@pytest.mark.parametrize("waits_for", ["the collector", "its points"])
def test_it_warns_once_of_too_many_names(
    start_service: StartService, start_azure_job: StartAzureJob, tmp_path: Path, waits_for: str
) -> None:
    """More names than Azure ML documents are delivered, and the process that trains is told once,
    before the service refuses, whether the collector process delivers or it does itself."""
    service = start_service(ingestion_delay_s=3.0)
    code = """
    import logging
    heard = threading.Event()
    def hear_warning(record):
        if "names" in record.getMessage():
            heard.set()
        return True
    logging.getLogger("flowbuffer").addFilter(hear_warning)
    logging.basicConfig()

    logger = MetricLogger(RUN)
    say("ready")
    hear()
    for step in range(20):
        logger.log_metrics({f"name{n}": step for n in range(60)}, step=step)
    if hear() == "flush":
        logger.flush()
    assert heard.wait(150)
    for n in range(60, 70):
        logger.log_metric(f"name{n}", 0.0)
    logger.close()
    """
    job = start_azure_job(service, code, **PROCESS)
    job.expect("ready")
    if waits_for == "the collector":
        wait_until(lambda: collector_pid(tmp_path / "spool"))
    job.tell("go")
    job.tell("flush" if waits_for == "its points" else "wait")
    ended = well(job.end())
    assert ended.err.count("more than 50 names") == 1, ended.err
    assert service.visible(service.run_id) == 60 * 20 + 10


def test_outside_a_job_nothing_prompts(
    start_service: StartService, start_azure_job: StartAzureJob, tmp_path: Path
) -> None:
    """Without a job's token the collector process asks for credentials that need nobody; where
    there are none it opens no browser and asks for no code, keeps the points, and the process that
    logs is told what to do."""
    service = start_service()
    code = """
    import logging
    logger = MetricLogger(RUN)
    heard = threading.Event()
    own = "its own credentials"
    tell = lambda record: heard.set() or True if own in record.getMessage() else True
    logging.getLogger("flowbuffer").addFilter(tell)
    logger.log_metric("loss", 1.0)
    assert heard.wait(150)
    say("told")
    hear()
    """
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\ntouch {tmp_path}/opened\n")
    browser.chmod(0o700)
    names = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_RUN_ID", "AZUREML_RUN_ID", "AZURE_TENANT_ID")
    nothing = dict.fromkeys(names, "")
    job = start_azure_job(
        service,
        code,
        **PROCESS,
        **nothing,
        BROWSER=str(browser),
        AZURE_TOKEN_CREDENTIALS="EnvironmentCredential",
    )
    job.expect("told")
    log = (tmp_path / "spool" / "collector.log").read_text()
    assert "microsoft.com/devicelogin" not in log
    assert "no credentials of Azure's in the environment of the collector process" in log
    assert not (tmp_path / "opened").exists()
    assert not service.requests
