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

_OWN_WAY = "batches of metrics are stored MLflow's own way"


def enable() -> None:
    """Replace the view, and tell once, when the server starts, which way batches go.

    For when ``mlflow.server.handlers`` was executed, and nobody has taken anything from it yet.
    """
    from mlflow.server import handlers

    try:
        _replace(handlers)
    except (AttributeError, KeyError) as error:  # a server starts, whatever it is made of
        tell(f"{_OWN_WAY}: this MLflow is new to it ({error})")


def _replace(handlers: Any) -> None:
    stock = handlers.HANDLERS[handlers.LogBatch]
    way = Way(stock)
    view = bulk_view(handlers, stock, way)
    initialize = handlers.initialize_backend_stores

    @wraps(initialize)
    def initialize_and_tell(*arguments: Any, **named: Any) -> None:
        initialize(*arguments, **named)
        reason = way.why_not(handlers._get_tracking_store())
        tell(f"{_OWN_WAY}: {reason}" if reason else "batches of metrics are stored in bulk")

    handlers.initialize_backend_stores = initialize_and_tell
    if not way.unknown_view:
        handlers.HANDLERS[handlers.LogBatch] = view
