"""Which way the batches of a server go: in bulk, or MLflow's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from types import CodeType
from typing import Any, Final

from flowbuffer.originals import is_mlflows
from flowbuffer.server.body import Batch
from flowbuffer.sql.bulk import write
from flowbuffer.sql.store import checked, transaction, why_not
from flowbuffer.turn import Turn

#: Whatever MLflow's view of log-batch, and its store's ``log_batch``, name from MLflow 3.1.0 to
#: 3.18.0. In a later one they may do more than is done here.
_NAMES: Final = frozenset(
    """
    _assert_array _assert_required _assert_string _get_request_json _get_request_message
    _get_tracking_store _validate_batch_log_api_req LogBatch Metric Param Response RunTag enumerate
    from_proto get log_batch message_to_json metrics params run_id set_data tags
    _check_run_is_active _get_run _log_metrics _log_model_metrics _log_params _set_tags
    _validate_batch_log_data _validate_batch_log_limits _validate_param_keys_unique
    _validate_run_id experiment_id Exception INTERNAL_ERROR ManagedSessionMaker MlflowException
    """.split()  # noqa: SIM905 (as a list it is a line for each)
)


class Way:
    """Decides once for each store.

    Args:
        view: MLflow's, of log-batch.

    Attributes:
        unknown_view: Why that view may not be replaced, in words; empty if it may.
    """

    def __init__(self, view: Any) -> None:
        is_replaced = not is_mlflows(view)
        self.unknown_view = "somebody replaced its view" if is_replaced else _says_more(view)
        self._decided: tuple[Any, str] = (None, "")
        # Who waits for SQLite's own lock sleeps, longer and longer: four clients are half as fast.
        self._turns = {"sqlite": Turn()}

    def why_not(self, store: Any) -> str:
        """Why batches go MLflow's own way, in words; empty if they are written in bulk."""
        from sqlalchemy.exc import SQLAlchemyError

        of, reason = self._decided
        if of is not store:
            try:
                reason = self.unknown_view or why_not(store)
                reason = reason or _says_more(type(store).log_batch)
            except SQLAlchemyError as error:  # it may be there for the next batch
                return f"its database does not answer ({type(error).__name__})"
            self._decided = store, reason
        return reason

    def log(self, store: Any, batch: Batch) -> bool:
        """Write a batch in bulk; False if it has to go MLflow's own way, and nothing was done.

        Raises:
            MlflowException: What MLflow would raise.
        """
        rows = None if self.why_not(store) else checked(*batch)
        if rows is None:
            return False

        turn = self._turns.get(store.engine.dialect.name) or nullcontext()

        def write_once() -> None:
            with turn, transaction(store, batch.run_id) as connection:
                write(connection, batch.run_id, rows)

        if hasattr(store, "_run_with_deadlock_retry"):  # an older MLflow has no such patience
            store._run_with_deadlock_retry(write_once)
        else:
            write_once()
        return True


def _says_more(function: Any) -> str:
    """Whether a function of MLflow's does more than is known, in words."""
    function = inspect.unwrap(function)
    more = sorted({*_names(function.__code__)} - _NAMES)
    return f"MLflow's {function.__name__} is new to it ({', '.join(more)})" if more else ""


def _names(code: CodeType) -> Iterator[str]:
    """What the code of a function, and of those in it, names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
