"""Every name that MLflow, and Azure ML's plugin, do not document and that flowbuffer uses.

A new version may lack any of them. A test looks for each in what is installed, and for names in
this package that are missing here.
"""

from __future__ import annotations

from typing import Final

#: The versions of MLflow in which the names were looked for; of the plugin 1.60.0 and 1.62.0.post6.
CHECKED_IN: Final = ("3.15.0", "3.17.2")

_AUTHENTICATION = "azureml.mlflow._common._authentication.azureml_token_authentication"

#: What is used, as ``module:name``, and what for; ``module:class#name`` is an attribute that the
#: objects of a class have.
PRIVATE_NAMES: Final = {
    # Where the calls that are replaced come together.
    "mlflow.tracking.client:MlflowClient": "its methods are replaced",
    "mlflow.tracking.fluent:log_metric": "the fluent functions are replaced",
    "mlflow.tracking._tracking_service.client:TrackingServiceClient": "reads wait, runs end",
    "mlflow.tracking._tracking_service.client:TrackingServiceClient.set_terminated": "runs end",
    "mlflow.tracking._tracking_service.utils:_get_store": "whether somebody replaced it",
    "mlflow.tracking._tracking_service.utils:_tracking_uri": "whether a URI was set",
    "mlflow.tracking._tracking_service.utils:_tracking_store_registry._registry": (
        "which plugin has a scheme"
    ),
    "mlflow.tracking.client:MlflowClient#_tracking_client": "the store of a client",
    "mlflow.store.tracking.abstract_store:AbstractStore": "flush_async_logging waits",
    "mlflow.store.tracking.abstract_store:AbstractStore.flush_async_logging": "it waits for ours",
    "mlflow.utils.async_logging.async_logging_queue:AsyncLoggingQueue": "whether it is replaced",
    "mlflow.utils.async_logging.async_logging_queue:AsyncLoggingQueue.log_batch_async": "the same",
    "mlflow.utils.async_logging.run_operations:RunOperations": "what synchronous=False returns",
    # What MLflow makes of arguments.
    "mlflow.tracking.metric_value_conversion_utils:convert_metric_value_to_float_if_possible": (
        "a metric's value"
    ),
    "mlflow.environment_variables:MLFLOW_ENABLE_ASYNC_LOGGING": "what synchronous=None means",
    "mlflow.environment_variables:MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE": "a queue of that size",
    "mlflow.tracking.context.registry:resolve_tags": "the tags of a run that we start",
    "mlflow.utils.uri:get_uri_scheme": "the scheme of a tracking URI",
    "mlflow.utils.workspace_context:get_request_workspace": "none before MLflow 3.10",
    # How delivery asks a server, or writes a database.
    "mlflow.store.tracking.rest_store:RestStore": "delivery's store for servers",
    "mlflow.store.tracking.rest_store:RestStore._call_endpoint": "every request is ours",
    "mlflow.store.tracking.abstract_store:AbstractStore#_async_logging_queue": "ours instead",
    "mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore._engine_map": "what stores share",
    "mlflow.store.db.db_types:DATABASE_ENGINES": "which schemes are databases",
    "mlflow.utils.rest_utils:MlflowHostCreds": "credentials of one host",
    "mlflow.utils.rest_utils:_REST_API_PATH_PREFIX": "paths of the REST API",
    "mlflow.utils.rest_utils:extract_api_info_for_service": "paths of the REST API",
    "mlflow.utils.proto_json_utils:parse_dict": "answers of the REST API",
    "mlflow.protos.service_pb2:LogBatch": "a request of the REST API",
    "mlflow.protos.service_pb2:MlflowService": "paths of the REST API",
    "mlflow.protos.databricks_pb2:ErrorCode": "the codes that a server answers with",
    # The credentials of Azure ML's plugin.
    "azureml.mlflow._internal.utils:InteractiveBrowserCredential": "nobody is prompted",
    "azureml.mlflow._internal.utils:DeviceCodeCredential": "nobody is prompted",
    f"{_AUTHENTICATION}:AzureMLTokenAuthentication._registered_auth": "the present token of a job",
    f"{_AUTHENTICATION}:AzureMLTokenAuthentication._parse_expiry_time_from_token": "its end",
    f"{_AUTHENTICATION}:AzureMLTokenAuthentication#_run_scope_info": "whose token it is",
    f"{_AUTHENTICATION}:AzureMLTokenAuthentication#_aml_access_token": "the token",
    f"{_AUTHENTICATION}:AzureMLTokenAuthentication#_run_id": "whose token it is",
    f"{_AUTHENTICATION}:AzureMLTokenAuthentication#_experiment_id": "whose token it is",
}
