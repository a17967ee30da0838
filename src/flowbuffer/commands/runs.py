"""Runs that ``flowbuffer sync`` creates, because the points' own run is not on that server.

``runs.json`` in the spool remembers which is which, ``{tracking URI: {run: run there}}``, and so
does a tag of the run, should the file be lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from flowbuffer.backends.experiments import find_or_create
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.commands.servers import Server
from flowbuffer.errors import RejectedError, RunGoneError
from flowbuffer.settings.environment import environment_experiment
from flowbuffer.spool.files import FileLock, read_file, write_file
from flowbuffer.spool.producer_info import ProducerInfo

#: The tag with the run id that the producers know.
RUN_TAG = "flowbuffer.run_id"
#: The tag of a run of which a producer did not end well: what it was may be known only once.
FAILED_TAG = "flowbuffer.failed"

_MOST_EXPERIMENTS = 100  # in one search


class Runs:
    """The runs of a spool on other servers.

    Args:
        root: The spool.
        experiment: Where runs are created; None goes by the producers, then the environment.
    """

    def __init__(self, root: Path, experiment: str | None) -> None:
        self._root = root
        self._experiment = experiment

    def find(
        self, server: Server, run_id: str, producers: Sequence[ProducerInfo], *, failed: bool
    ) -> str | None:
        """The id of the run there, which is created if need be; None while another process looks.

        Args:
            server: Where.
            run_id: As the producers have it.
            producers: Of the run.
            failed: One of them did not end well.

        Raises:
            TransportError: The server did not say.
        """
        lock = FileLock.take(self._root / "runs.lock", create=True)
        if lock is None:
            return None
        try:
            known = self._read()
            there = known.get(server.name, {}).get(run_id)
            if there is None or not _exists(server, there):
                if _exists(server, run_id):
                    return run_id
                there = self._find_or_create(server, run_id, producers)
                known.setdefault(server.name, {})[run_id] = there
                content = json.dumps(known, indent=1).encode()
                write_file(self._root / "runs.json", content, durable=True)
        finally:
            lock.release()
        if failed:
            server.ask(lambda client: client.set_tag(there, FAILED_TAG, "true"))
        return there

    def _read(self) -> dict[str, dict[str, str]]:
        """What is remembered; nothing if the file is gone or damaged, as the tags tell then."""
        try:
            said = json.loads(read_file(self._root / "runs.json", limit=1 << 26))
            return {uri: {old: str(new) for old, new in runs.items()} for uri, runs in said.items()}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}

    def _find_or_create(
        self, server: Server, run_id: str, producers: Sequence[ProducerInfo]
    ) -> str:
        name = self._experiment_name(producers)
        experiment_id = server.ask(lambda client: find_or_create(client, name))
        found = _tagged(server, run_id, experiment_id)
        if found is None:
            start_ms = min(producer.start_ms for producer in producers)
            run = server.ask(
                lambda client: client.create_run(
                    experiment_id, start_ms, {RUN_TAG: run_id}, run_name=run_id
                )
            )
            found = str(run.info.run_id)
        return found

    def _experiment_name(self, producers: Sequence[ProducerInfo]) -> str:
        named = (producer.experiment for producer in producers)
        first = next((name for name in named if name), None)
        return self._experiment or first or environment_experiment()[1] or "Default"


def end_created_run(server: Server, run_id: str, *, failed: bool) -> None:
    """Mark a run ended that sync created. Ending it again changes nothing, but to FAILED.

    Raises:
        TransportError: The server did not do it.
    """
    run = server.ask(lambda client: client.get_run(run_id))
    failed = failed or FAILED_TAG in run.data.tags or run.info.status == "FAILED"
    status = "FAILED" if failed else "FINISHED"
    if run.info.status != status:
        server.ask(lambda client: _set_terminated(client, run_id, status))


def _set_terminated(client: Any, run_id: str, status: str) -> None:
    from mlflow.entities import RunStatus

    # As client.set_terminated, which also prints the run's URL, with its credentials.
    client._tracking_client.store.update_run_info(
        run_id,
        RunStatus.from_string(status),
        end_time=SYSTEM_CLOCK.now_ns() // 1_000_000,
        run_name=None,
    )


def _exists(server: Server, run_id: str) -> bool:
    try:
        server.ask(lambda client: client.get_run(run_id))
    except (RunGoneError, RejectedError):  # not found, or not even an id there
        return False
    return True


def _tagged(server: Server, run_id: str, experiment_id: str) -> str | None:
    """The run that was created for ``run_id``; looked for in its experiment first, then in all."""
    quote = '"' if "'" in run_id else "'"
    condition = f"tags.`{RUN_TAG}` = {quote}{run_id}{quote}"
    for experiments in chain([[experiment_id]], _all_experiments(server)):

        def search(client: Any, experiments: list[str] = experiments) -> Any:
            return client.search_runs(experiments, condition, max_results=1)

        for run in server.ask(search):
            return str(run.info.run_id)
    return None


def _all_experiments(server: Server) -> Iterator[list[str]]:
    token = None
    while True:

        def search(client: Any, token: str | None = token) -> Any:
            return client.search_experiments(max_results=_MOST_EXPERIMENTS, page_token=token)

        page = server.ask(search)
        if page:
            yield [str(experiment.experiment_id) for experiment in page]
        token = page.token
        if not token:
            return
