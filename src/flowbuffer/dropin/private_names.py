"""Every name that MLflow, and Azure ML's plugin, do not document and that flowbuffer uses.

A new version may lack any of them. ``tests/dropin/test_private_names.py`` looks for each in what is
installed, for each in the files that are said to use it, and for names in this package that are
missing here.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Use(NamedTuple):
    """Which files of this package use a name, and what for.

    ``since`` is the first version of ``CHECKED_IN`` that has it, and ``until`` the last one; empty
    if all have it.
    """

    files: str
    purpose: str
    since: str = ""
    until: str = ""


#: The versions of MLflow in which the names were looked for; of the plugin 1.60.0 and 1.62.0.post6.
CHECKED_IN: Final = ("3.1.0", "3.15.0", "3.17.2")

_SERVICE = "mlflow.tracking._tracking_service"
_CLIENT = f"{_SERVICE}.client:TrackingServiceClient"
_QUEUE = "mlflow.utils.async_logging.async_logging_queue:AsyncLoggingQueue"
_STORE = "mlflow.store.tracking.abstract_store:AbstractStore"
_REST_STORE = "mlflow.store.tracking.rest_store:RestStore"
_SQL_STORE = "mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore"
_HTTP = "mlflow.utils.rest_utils"
_HANDLERS = "mlflow.server.handlers"
_AUTH = (
    "azureml.mlflow._common._authentication.azureml_token_authentication:AzureMLTokenAuthentication"
)

#: By ``module:name``, or ``module:class.name``; ``module:class#name`` is an attribute that the
#: objects of a class have.
PRIVATE_NAMES: Final = {
    # What the switch replaces, and what it looks at to see whether somebody else has.
    "mlflow.tracking.fluent:log_metric": Use(
        "dropin/plugin.py dropin/switch.py dropin/functions.py", "replacing the fluent functions"
    ),
    "mlflow.tracking.fluent:MlflowClient": Use(
        "dropin/functions.py", "whether somebody replaced what the fluent functions call"
    ),
    "mlflow.tracking.client:MlflowClient": Use(
        "dropin/switch.py backends/shipped.py", "replacing its methods; delivery's own copy"
    ),
    "mlflow.tracking.client:MlflowClient#_tracking_client": Use(
        "dropin/methods.py backends/mlflow_client.py backends/azureml_transport.py"
        " logger/run_status.py commands/runs.py",
        "the store of a client",
    ),
    "mlflow.tracking.client:TrackingServiceClient": Use(
        "dropin/calls.py", "whether somebody replaced what a client makes"
    ),
    _CLIENT: Use(
        "dropin/switch.py logger/job_end.py backends/shipped.py",
        "having reads and ends of runs wait; delivery's own copy",
    ),
    f"{_CLIENT}.set_terminated": Use("logger/job_end.py", "delivering before a run is ended"),
    f"{_CLIENT}.store": Use(
        "dropin/methods.py dropin/known_runs.py logger/run_status.py backends/mlflow_client.py",
        "the store of a client",
    ),
    f"{_CLIENT}#tracking_uri": Use(
        "dropin/methods.py dropin/known_runs.py dropin/reads.py logger/run_status.py"
        " backends/mlflow_client.py",
        "the server of a client",
    ),
    **{
        f"{_CLIENT}.{name}": Use("dropin/reads.py", "waiting for what was logged, or a new run")
        for name in (
            *("create_run", "get_run", "get_metric_history", "delete_tag", "delete_run"),
            *("restore_run", "log_outputs", "search_runs", "get_logged_model"),
            "search_logged_models",
        )
    },
    f"{_SERVICE}.utils:_get_store": Use(
        "dropin/calls.py dropin/switch.py", "whether somebody replaced it"
    ),
    f"{_SERVICE}.utils:_tracking_uri": Use(
        "logger/active_run.py backends/credentials.py", "what mlflow.set_tracking_uri was told"
    ),
    f"{_STORE}.flush_async_logging": Use("dropin/switch.py", "waiting for what was buffered, too"),
    _QUEUE: Use("dropin/switch.py", "whether somebody replaced its method"),
    f"{_QUEUE}.log_batch_async": Use("dropin/calls.py", "whether somebody replaced it"),
    f"{_QUEUE}.is_active": Use("dropin/synchronous.py", "a queue of the size that was set"),
    f"{_QUEUE}.activate": Use("dropin/synchronous.py", "a queue of the size that was set"),
    "mlflow.utils.async_logging.run_operations:RunOperations": Use(
        "dropin/synchronous.py backends/shipped.py", "what synchronous=False returns"
    ),
    # What MLflow makes of arguments and of its environment.
    "mlflow.tracking.metric_value_conversion_utils:convert_metric_value_to_float_if_possible": Use(
        "dropin/arguments.py", "a metric's value"
    ),
    "mlflow.environment_variables:MLFLOW_ENABLE_ASYNC_LOGGING": Use(
        "dropin/synchronous.py", "what synchronous=None means"
    ),
    "mlflow.environment_variables:MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE": Use(
        "dropin/synchronous.py", "a queue of the size that was set"
    ),
    "mlflow.tracking.context.registry:resolve_tags": Use(
        "integrations/lightning.py", "the tags of a run that is started"
    ),
    "mlflow.utils.uri:get_uri_scheme": Use("collector/deliverers.py", "which plugin has a URI"),
    "mlflow.utils.workspace_context:get_request_workspace": Use(
        "dropin/known_runs.py", "leaving calls in a workspace to MLflow", since="3.15.0"
    ),
    # Stores: delivery has one of its own.
    f"{_SERVICE}.utils:_tracking_store_registry": Use(
        "backends/mlflow_client.py collector/deliverers.py", "making a store"
    ),
    f"{_SERVICE}.utils:_tracking_store_registry.get_store_builder": Use(
        "backends/mlflow_client.py", "making a store"
    ),
    f"{_SERVICE}.utils:_tracking_store_registry._registry": Use(
        "collector/deliverers.py", "whether only this process knows a scheme"
    ),
    f"{_STORE}#_async_logging_queue": Use(
        "dropin/synchronous.py backends/mlflow_client.py", "delivery's queue in its place"
    ),
    f"{_STORE}.log_batch": Use(
        "backends/mlflow_client.py backends/idle_clients.py", "storing a batch"
    ),
    f"{_STORE}.get_run": Use("dropin/known_runs.py", "the one look at a run"),
    f"{_STORE}.get_metric_history": Use("backends/stored_nans.py", "NaN that a run has"),
    f"{_STORE}.get_logged_model": Use("backends/stored_nans.py", "NaN that a model has"),
    f"{_STORE}.update_run_info": Use("logger/run_status.py", "ending a run by one request"),
    _SQL_STORE: Use(
        "logger/active_run.py backends/mlflow_client.py sql/store.py",
        "importing it early; its engines; whether a store is MLflow's",
    ),
    f"{_SQL_STORE}#engine": Use(
        "backends/mlflow_client.py backends/mlflow_transport.py backends/idle_clients.py"
        " backends/database.py sql/store.py server/way.py logger/run_status.py",
        "closing a database's connections; whether it is one",
    ),
    f"{_SQL_STORE}._engine_map": Use(
        "backends/idle_clients.py logger/active_run.py", "engines that stores share", since="3.15.0"
    ),
    f"{_SQL_STORE}._db_uri_sql_alchemy_engine_map": Use(
        "backends/idle_clients.py logger/active_run.py",
        "the same under its old name",
        until="3.1.0",
    ),
    # A database is written in bulk where all of these are as MLflow shipped them.
    **{
        f"{_SQL_STORE}{name}": Use("sql/store.py", purpose)
        for name, purpose in (
            ("#ManagedSessionMaker", "a session, with MLflow's errors"),
            ("._get_run", "the run"),
            ("._check_run_is_active", "whether it takes metrics"),
            ("._get_query", "whether somebody replaced it"),
            (".log_batch_async", "whether somebody replaced it"),
            ("._log_metrics", "whether somebody replaced it"),
            ("._log_model_metrics", "whether somebody replaced it"),
            ("._update_latest_metrics_if_necessary", "whether somebody replaced it"),
            (".sanitize_metric_value", "whether somebody replaced it"),
        )
    },
    f"{_SQL_STORE}.log_batch": Use(
        "sql/store.py server/way.py", "whether somebody replaced it; what it does"
    ),
    f"{_SQL_STORE}._log_metrics_once": Use(
        "sql/store.py", "whether somebody replaced it", since="3.17.2"
    ),
    f"{_SQL_STORE}._run_with_deadlock_retry": Use(
        "server/way.py", "its patience with a deadlock", since="3.15.0"
    ),
    "mlflow.store.tracking.sqlalchemy_workspace_store:WorkspaceAwareSqlAlchemyStore": Use(
        "sql/store.py", "whether a store is MLflow's", since="3.15.0"
    ),
    "mlflow.utils.validation:_validate_metric": Use("sql/store.py", "a metric's name"),
    "mlflow.utils.validation:_validate_run_id": Use("sql/store.py", "a run's id"),
    # MLflow's server: what stands behind log-batch.
    **{
        f"{_HANDLERS}:{name}": Use(files, purpose)
        for name, files, purpose in (
            ("HANDLERS", "dropin/plugin.py server/switch.py", "replacing the view"),
            ("initialize_backend_stores", "server/switch.py", "telling at the start"),
            ("_get_tracking_store", "server/view.py server/switch.py", "the server's store"),
            ("_get_request_json", "server/view.py", "the body of a request"),
            ("_disable_if_artifacts_only", "server/view.py", "what stands before the view"),
            ("catch_mlflow_exception", "server/view.py", "MLflow's answer to an error"),
            ("message_to_json", "server/view.py", "MLflow's answer"),
            ("Response", "server/view.py", "MLflow's answer"),
            ("LogBatch", "server/view.py server/switch.py", "MLflow's answer; its view"),
        )
    },
    "mlflow.store.db.db_types:DATABASE_ENGINES": Use(
        "backends/mlflow_client.py", "which schemes are databases"
    ),
    _REST_STORE: Use(
        "backends/mlflow_client.py backends/translation.py dropin/buffered_run.py"
        " dropin/known_runs.py",
        "whether a server is asked",
    ),
    f"{_REST_STORE}._call_endpoint": Use(
        "backends/mlflow_client.py backends/azureml_requests.py", "delivery's requests"
    ),
    f"{_REST_STORE}#get_host_creds": Use("backends/rest.py", "host and credentials"),
    # Requests to a server.
    f"{_HTTP}:MlflowHostCreds": Use(
        "backends/http_session.py backends/azureml_requests.py", "host and credentials"
    ),
    f"{_HTTP}:http_request": Use(
        "backends/http_session.py", "headers, TLS and plugins of MLflow's"
    ),
    f"{_HTTP}:_get_http_response_with_retries": Use(
        "backends/http_session.py", "sending a request once in its place"
    ),
    f"{_HTTP}:_REST_API_PATH_PREFIX": Use("backends/rest.py", "paths of the REST API"),
    f"{_HTTP}:extract_api_info_for_service": Use("backends/rest.py", "paths of the REST API"),
    "mlflow.utils.proto_json_utils:parse_dict": Use("backends/rest.py", "answers of the REST API"),
    "mlflow.protos.service_pb2:LogBatch": Use("backends/rest.py", "a request of the REST API"),
    "mlflow.protos.service_pb2:MlflowService": Use("backends/rest.py", "paths of the REST API"),
    "mlflow.protos.databricks_pb2:ErrorCode": Use(
        "backends/translation.py", "the codes that a server answers with"
    ),
    # Delivery's own copies of what it sends.
    "mlflow.entities.metric:Metric": Use("backends/shipped.py", "what a batch holds"),
    "mlflow.entities.param:Param": Use("backends/shipped.py", "what a batch holds"),
    "mlflow.entities.run_tag:RunTag": Use("backends/shipped.py", "what a batch holds"),
    # Azure ML's plugin.
    "azureml.mlflow._internal.utils:InteractiveBrowserCredential": Use(
        "backends/azureml_requests.py backends/mlflow_client.py", "prompting nobody"
    ),
    "azureml.mlflow._internal.utils:DeviceCodeCredential": Use(
        "backends/azureml_requests.py backends/mlflow_client.py", "prompting nobody"
    ),
    "azureml.mlflow._store.azureml_reststore:AzureMLAbstractRestStore#service_context": Use(
        "backends/azureml_requests.py backends/mlflow_client.py", "host and credentials"
    ),
    **{
        f"{_AUTH}{name}": Use("backends/azureml_requests.py", f"{purpose} of a job")
        for name, purpose in (
            ("._registered_auth", "the present token"),
            (".get_token", "the present token"),
            (".set_token", "a new token"),
            ("._parse_expiry_time_from_token", "a new token"),
            ("#_aml_access_token", "the present token"),
            ("#_run_scope_info", "a new token"),
            ("#_experiment_id", "a new token"),
            ("#_run_id", "the run"),
        )
    },
}
