"""Jobs on Azure ML, and the loopback service that they log to; a pytest plugin for its fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.collectors import end_collector
from support.jobs import Job

if TYPE_CHECKING:  # most tests do without
    from flowbuffer.testing.azureml import AzureMLEndpoint

#: The requests that post a batch, and that ask what became of it, as the service counts them.
POSTS = "runs/log-batch-async"
POLLS = "runs/get-run-data-status"

#: Starts a workspace: the options of ``AzureMLEndpoint``.
StartService = Callable[..., "AzureMLEndpoint"]
#: Starts a process of a job: the service, its code, then its kind and variables if need be.
StartAzureJob = Callable[..., Job]


@pytest.fixture
def start_service() -> Iterator[StartService]:
    """Starts workspaces with one job each; they end with the test."""
    from flowbuffer.testing.azureml import AzureMLEndpoint

    with ExitStack() as services:
        yield lambda **options: services.enter_context(AzureMLEndpoint(**options))


@pytest.fixture
def start_azure_job(tmp_path: Path) -> Iterator[StartAzureJob]:
    """Starts the processes of a job, with its environment; none outlives the test."""
    jobs: list[Job] = []

    def start(
        service: AzureMLEndpoint, code: str, kind: type[Job] = Job, **environment: str
    ) -> Job:
        environment = {**service.job_environment(), **environment}
        script = tmp_path / f"job{len(jobs)}.py"
        jobs.append(kind(script, service.tracking_uri, service.run_id, code, **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
    end_collector(tmp_path / "spool")
