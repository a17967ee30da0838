"""An ``MlflowClient`` for delivery alone, apart from the one that the training code uses.

Its store shares no asynchronous queue with the training code's, so that ``end_run`` or
``flush_async_logging`` there can neither stop a batch nor wait for one, and its HTTP requests are
tried once, because trying again is the sender's business. ``docs/design.md`` says what MLflow's
queue does otherwise.
"""

from __future__ import annotations

from typing import Any

from flowbuffer.backends.azureml_requests import never_prompt, use_single_requests
from flowbuffer.backends.credentials import check_may_ask, hide
from flowbuffer.backends.database import Database
from flowbuffer.backends.metric_columns import MetricColumns
from flowbuffer.backends.rest import SingleRequests
from flowbuffer.backends.shipped import shipped
from flowbuffer.backends.translation import translated
from flowbuffer.backends.uris import is_azureml, scheme_of
from flowbuffer.errors import RetriableError
from flowbuffer.forks import whole
from flowbuffer.settings.environment import handed_on_uri


class _CallersQueue:
    """In place of a store's asynchronous queue: the batch is stored by the thread that brings it.

    The transport's threads are the asynchrony. MLflow's own queue would store the batches of one
    run in any order, and its executors' threads would be joined at the end of the process however
    long a dead server takes.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def log_batch_async(self, run_id: str, params: Any, tags: Any, metrics: Any) -> Any:
        said = self._store.log_batch(run_id=run_id, metrics=metrics, params=params, tags=tags)
        if said is not None:
            raise RetriableError(f"the store's log_batch gave {type(said)} in place of nothing")
        return shipped().operations[0]([])

    def is_active(self) -> bool:
        return True

    def is_idle(self) -> bool:
        return True


def warm_up(uri: str) -> None:
    """Import what :func:`delivery_client` will need: seconds, the first time."""
    from importlib import import_module

    from mlflow.store.db.db_types import DATABASE_ENGINES

    import_module("mlflow.store.tracking.rest_store")
    if is_azureml(uri):
        import_module("azureml.mlflow._internal.utils")
    if scheme_of(uri) in DATABASE_ENGINES:
        import_module("mlflow.store.tracking.sqlalchemy_store")


def delivery_client(uri: str, timeout_s: float) -> Any:
    """An ``MlflowClient`` whose tracking store is its own.

    Raises:
        TransportError: It cannot be made here and now, whatever MLflow says of it: a plugin, a
            driver or a certificate may be missing in this process.
    """
    hide(uri)
    check_may_ask(uri)
    with whole:  # MLflow takes locks, and imports, when it makes a store
        try:
            return _made(uri, timeout_s)
        except Exception as error:
            raise translated(error) from error


def _made(uri: str, timeout_s: float) -> Any:
    from mlflow.store.tracking.rest_store import RestStore
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    if is_azureml(uri) and handed_on_uri() is not None:
        never_prompt()  # a collector process: there is nobody to answer
    store = _tracking_store_registry.get_store_builder(uri)(store_uri=uri, artifact_uri=None)
    if hasattr(store, "_async_logging_queue"):
        store._async_logging_queue = _CallersQueue(store)
    if whole.in_child and hasattr(store, "engine"):
        store.engine.dispose(close=False)  # its connections are the parent's
    if type(store) is RestStore:
        requests = SingleRequests(store, timeout_s)
        store._call_endpoint = requests.call_endpoint
        store.log_batch = requests.log_batch
    elif hasattr(store, "service_context"):  # of Azure ML's plugin
        use_single_requests(store, timeout_s)

    mlflow = shipped()
    database = Database(store)

    class PrivateTrackingClient(mlflow.TrackingServiceClient):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.tracking_uri = uri

        @property
        def store(self) -> Any:
            return store

        @property
        def database(self) -> Database:
            return database

        def log_batch(
            self,
            run_id: str,
            metrics: Any = (),
            params: Any = (),
            tags: Any = (),
            synchronous: bool = True,
        ) -> Any:
            is_of_columns = isinstance(metrics, MetricColumns) and not params and not tags
            if is_of_columns and database.log(run_id, metrics):
                return None if synchronous else mlflow.operations[0]([])
            return super().log_batch(run_id, metrics, params, tags, synchronous)

    client = mlflow.MlflowClient(tracking_uri=uri)
    client._tracking_client = PrivateTrackingClient()
    return client


def store_of(client: Any) -> Any:
    """The tracking store of a delivery client; None if there is no client yet."""
    return None if client is None else client._tracking_client.store


def database_of(client: Any) -> Database:
    """What a delivery client does with metrics."""
    found: Database = client._tracking_client.database
    return found
