"""Where points go: which server, which run, by which transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flowbuffer.backends.base import Transport
from flowbuffer.backends.mlflow_transport import MlflowTransport
from flowbuffer.backends.uris import is_azureml
from flowbuffer.clock import Clock
from flowbuffer.settings.settings import Settings

TransportFactory = Callable[[str, Settings, Clock], Transport]


class Destination(NamedTuple):
    """Where the points of a folder go. ``tracking_uri`` may have credentials."""

    tracking_uri: str
    run_id: str


def transport_to(tracking_uri: str, settings: Settings, clock: Clock) -> Transport:
    """The transport for a tracking URI."""
    if is_azureml(tracking_uri):
        from flowbuffer.backends.azureml_transport import AzureMLTransport

        return AzureMLTransport(tracking_uri, settings, clock)
    return MlflowTransport(tracking_uri, settings, clock)
