"""The switch: MLflow's server gets another view of log-batch, before it makes its routes.

Nothing stands in front of a view but what MLflow has there for this one: who is not authorised, or
in no workspace, is turned away before it is called.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from flowbuffer.notices import tell
from flowbuffer.server.view import bulk_view
from flowbuffer.server.way import Way


def enable() -> None:
    """Replace the view, and tell once, when the server starts, which way batches go.

    For when ``mlflow.server.handlers`` was executed, and nobody has taken anything from it yet.
    """
    from mlflow.server import handlers

    stock = handlers.HANDLERS[handlers.LogBatch]
    way = Way(stock)
    handlers.HANDLERS[handlers.LogBatch] = bulk_view(handlers, stock, way)
    initialize = handlers.initialize_backend_stores

    @wraps(initialize)
    def initialize_and_tell(*arguments: Any, **named: Any) -> None:
        initialize(*arguments, **named)
        reason = way.why_not(handlers._get_tracking_store())
        way_taken = f"MLflow's own way: {reason}" if reason else "in bulk"
        tell(f"batches of metrics are stored {way_taken}")

    handlers.initialize_backend_stores = initialize_and_tell
