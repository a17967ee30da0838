"""MLflow's client as it was shipped, whatever has been put in its place in this process.

A project may wrap ``MlflowClient.log_batch`` for good, and a test may have a mock there at the
moment at which a batch goes. What they change is what the program logs; delivery carries what was
logged already. So it has modules of its own, executed once more from MLflow's files: some 20 ms.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, NamedTuple

#: Named in the modules of the client, which take them from ``mlflow.entities`` when they run.
_ENTITIES = {
    "Metric": "mlflow.entities.metric",
    "Param": "mlflow.entities.param",
    "RunTag": "mlflow.entities.run_tag",
}


class Shipped(NamedTuple):
    """Classes of MLflow's, not those that the program has.

    ``MlflowClient`` and ``TrackingServiceClient`` build the entities, too. ``operations``: what
    ``log_batch`` may give, the first of them to be made.
    """

    MlflowClient: Any
    TrackingServiceClient: Any
    Metric: Any
    Param: Any
    RunTag: Any
    operations: tuple[Any, ...]


@cache
def shipped() -> Shipped:
    """MLflow's client and what it logs.

    Raises:
        ImportError: MLflow cannot be imported.
    """
    entities = {name: getattr(own_copy(module), name) for name, module in _ENTITIES.items()}
    tracking = own_copy("mlflow.tracking._tracking_service.client")
    client = own_copy("mlflow.tracking.client")
    for module in (tracking, client):
        vars(module).update(entities)
    name = "mlflow.utils.async_logging.run_operations"
    operations = (own_copy(name).RunOperations, import_module(name).RunOperations)
    return Shipped(
        client.MlflowClient,
        tracking.TrackingServiceClient,
        **entities,
        operations=tuple(one for one in operations if isinstance(one, type)),
    )


def own_copy(name: str) -> ModuleType:
    """A module that is executed once more, and that nobody else has.

    Raises:
        ImportError: There is none.
    """
    import_module(name)  # what it imports is there then, and what it registers is registered
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} has no source to be run again", name=name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
