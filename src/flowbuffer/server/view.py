"""The view of log-batch: in bulk what MLflow would certainly store, and MLflow's view for the rest.

So no refusal of MLflow's is imitated: what it would refuse, or may, is answered by its own code.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from flowbuffer.server.body import batch_of
from flowbuffer.server.way import Way


def bulk_view(handlers: Any, stock: Any, way: Way) -> Any:
    """What takes the place of MLflow's view, and goes by its name.

    Args:
        handlers: ``mlflow.server.handlers``.
        stock: MLflow's view.
        way: Which way a store takes.
    """

    @wraps(stock)
    def log_batch() -> Any:
        batch = batch_of(handlers._get_request_json())
        if batch is None or not way.log(handlers._get_tracking_store(), batch):
            return stock()
        response = handlers.Response(mimetype="application/json")
        response.set_data(handlers.message_to_json(handlers.LogBatch.Response()))
        return response

    return handlers.catch_mlflow_exception(handlers._disable_if_artifacts_only(log_batch))
