"""Delivery's clients that nobody uses just now.

Making one of a database takes 0.1 to 0.3 s, as MLflow looks whether the tables are those of its
version: as long as all else that a short run needs. So it is kept for the next run; its connections
are not.
"""

from __future__ import annotations

from typing import Any

from flowbuffer.backends.mlflow_client import store_of
from flowbuffer.backends.rest import SingleRequests
from flowbuffer.forks import in_child

#: Which store: the tracking URI, the seconds that a request may take, and the database's file.
Which = tuple[str, float, tuple[int, int] | None]

#: How many are kept.
_MOST = 4

_idle: dict[Which, Any] = {}


def take(which: Which) -> Any:
    """An idle client; None if there is none."""
    return _idle.pop(which, None)


def keep(which: Which, client: Any) -> None:
    """Nobody uses a client any more; for now, or for good."""
    store = store_of(client)
    engine = getattr(store, "engine", None)
    requests = getattr(getattr(store, "log_batch", None), "__self__", None)
    if isinstance(requests, SingleRequests):
        requests.close()
    elif engine is None:
        return  # of a store that is not known; its connections go with it
    elif engine not in _engines_of_the_process(store):
        engine.dispose()  # closes its connections; it makes others when it is used again
    _idle[which] = client
    while len(_idle) > _MOST:
        _idle.pop(next(iter(_idle)), None)


def _engines_of_the_process(store: Any) -> list[Any]:
    """Those that MLflow shares between all stores of one URI: their connections are the program's,
    too, and stay as they do without us."""
    names = ("_engine_map", "_db_uri_sql_alchemy_engine_map")  # the second of older versions
    return [one for name in names for one in getattr(type(store), name, {}).values()]


in_child("backends.idle_clients", _idle.clear)
