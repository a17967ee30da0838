"""A tracking server, asked now and then; not for delivery, which is the transport's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from flowbuffer.backends.credentials import without_credentials
from flowbuffer.backends.mlflow_client import delivery_client, store_of
from flowbuffer.backends.translation import translated
from flowbuffer.backends.uris import absolute_uri
from flowbuffer.errors import TransportError

T = TypeVar("T")

#: The most that one question may take, in s.
ASK_TIMEOUT_S = 10.0


class Server:
    """A tracking server.

    Args:
        tracking_uri: As MLflow takes it, with credentials if it has any.
        timeout_s: The most that one HTTP request may take.

    Attributes:
        name: The URI as it may be shown and stored, without credentials.
    """

    def __init__(self, tracking_uri: str, timeout_s: float = ASK_TIMEOUT_S) -> None:
        self.name = without_credentials(absolute_uri(tracking_uri))
        self._uri = absolute_uri(tracking_uri)
        self._timeout_s = timeout_s
        self._client: Any = None

    def ask(self, question: Callable[[Any], T]) -> T:
        """What ``question`` returns when it is given an ``MlflowClient``.

        Raises:
            TransportError: The server said so, or said nothing.
        """
        try:
            if self._client is None:
                self._client = delivery_client(self._uri, self._timeout_s)
            return question(self._client)
        except TransportError:
            raise
        except Exception as error:
            raise translated(error, store_of(self._client)) from error
