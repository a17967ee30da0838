"""A run's status, told to a server that may not be there, within a bound."""

from __future__ import annotations

import _thread
import queue
from typing import Any

from flowbuffer.backends.mlflow_client import delivery_client
from flowbuffer.backends.translation import first_line
from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.notices import tell

#: How long a server may take for it after an interrupt; and everybody else, in s.
_SHORT_S, _LONG_S = 0.6, 5.0


def set_status(
    tracking_client: Any, run_id: str, status: str, end_time: int | None, *, in_haste: bool
) -> None:
    """Mark a run ended by one request; tell if that did not go well.

    MLflow's own client would try for minutes.

    Args:
        tracking_client: The ``TrackingServiceClient`` of whoever ends the run.
        run_id: The run.
        status: As MLflow names it.
        end_time: In ms since the epoch; None is now.
        in_haste: Somebody wants the process to end, and a server that does not answer is not to
            hold it up. A database that is written by this process itself gets the time it needs:
            else a busy machine would leave the run as it is.
    """
    over_network = not _is_database(tracking_client.store)
    bound_s = _SHORT_S if in_haste and over_network else _LONG_S
    end_ms = end_time or SYSTEM_CLOCK.now_ns() // 1_000_000
    results: queue.SimpleQueue[str] = queue.SimpleQueue()

    def update() -> None:
        try:
            _update(tracking_client, run_id, status, end_ms, bound_s)
            results.put("")
        except Exception as error:
            results.put(first_line(error))

    try:
        # Not threading.Thread: its lock may be held by what a signal handler interrupted.
        _thread.start_new_thread(update, ())
    except RuntimeError:  # the interpreter is ending
        update()
    try:
        failure = results.get(timeout=bound_s)
    except queue.Empty:
        failure = f"no answer within {bound_s:g} s"
    if failure:
        tell(f"run {run_id} could not be marked {status}: {failure}")


def _update(client: Any, run_id: str, status: str, end_ms: int, bound_s: float) -> None:
    from mlflow.entities import RunStatus

    store = client.store
    if not _is_database(store):
        store = delivery_client(client.tracking_uri, bound_s)._tracking_client.store
    store.update_run_info(run_id, RunStatus.from_string(status), end_ms, None)


def _is_database(store: Any) -> bool:
    """Whether it is MLflow's store in a database, not that of a server."""
    return hasattr(store, "engine")
