"""One HTTP request: tried once, not redirected, and over after a time whatever the server does.

``requests`` bounds the wait for each piece of an answer. A server that sends one byte a second, or
one header, keeps it for ever; here an answer as a whole has its time.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import Any, NamedTuple

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from flowbuffer.backends.credentials import belongs
from flowbuffer.backends.shipped import own_copy
from flowbuffer.clock import SYSTEM_CLOCK

_here = threading.local()

#: The most of an answer that is read, in bytes: a page of a metric's history has a few MB, and of
#: an error the beginning says it all.
_MOST_BYTES = 1 << 28
_MOST_BYTES_OF_AN_ERROR = 1 << 20

#: The headers that go to a server which this environment's credentials are not for.
_NOT_SECRET = ("User-Agent", "X-MLflow-Client-Version")
#: What of ``MlflowHostCreds`` is not for one server, and what is.
_TLS = ("ignore_tls_verification", "server_cert_path")
_SECRET = ("username", "password", "token", "aws_sigv4", "auth", "client_cert_path")


class Answer(NamedTuple):
    """What a server, or whatever stands before it, said."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Requests:
    """Requests to one server, in any thread of any process.

    Args:
        timeout_s: How long the whole of an answer may take, in s, after at most as long to connect.
    """

    def __init__(self, timeout_s: float) -> None:
        # What MLflow makes of host, credentials and plugins into a request; and `Session`, because
        # the program's may be replaced. The adapters are the program's: what an administrator
        # patches in there, like certificates, is to hold for delivery, too.
        self._http = own_copy("mlflow.utils.rest_utils")
        vars(self._http)["_get_http_response_with_retries"] = self._send
        self._new_session = own_copy("requests.sessions").Session
        self._timeout_s = (min(timeout_s, 10.0), timeout_s)  # to connect, to read
        self._sessions: dict[int, Any] = {}  # by process

    def request(self, host_and_credentials: Any, endpoint: str, method: str, body: Any) -> Answer:
        """Ask, once.

        Args:
            host_and_credentials: MLflow's ``MlflowHostCreds``. The credentials go only to a server
                which they are for (``credentials``); those in the host's URL always go.
            endpoint: The path below the host.
            method: As HTTP has it.
            body: What goes as JSON, or as the query of a GET.

        Raises:
            MlflowException: There is no answer. ``requests``' and others' errors likewise.
        """
        _here.deadline_s = SYSTEM_CLOCK.monotonic_s() + sum(self._timeout_s)
        _here.foreign = not belongs(host_and_credentials.host)
        if _here.foreign:
            host_and_credentials = self._http.MlflowHostCreds(
                host_and_credentials.host,
                **{name: getattr(host_and_credentials, name) for name in _TLS},
            )
        try:
            response = self._http.http_request(
                host_and_credentials,
                endpoint,
                method,
                max_retries=0,
                raise_on_status=False,
                timeout=self._timeout_s,
                **{"params" if method == "GET" else "json": body},
            )
            with response:
                return Answer(response.status_code, response.headers, _content(response))
        finally:
            _here.deadline_s = None

    def close(self) -> None:
        """Close the connections that are not in use; the next request makes new ones."""
        sessions, self._sessions = self._sessions, {}
        for pid, session in sessions.items():
            if pid == os.getpid():
                session.close()

    def _send(
        self,
        method: str,
        url: str,
        *_: Any,
        allow_redirects: Any = None,  # noqa: ARG002
        respect_retry_after_header: Any = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> Any:
        """In place of MLflow's ``_get_http_response_with_retries``."""
        session = self._session()
        if _here.foreign:  # a plugin of MLflow's may have put credentials there
            headers = kwargs.get("headers") or {}
            kwargs["headers"] = {name: headers[name] for name in _NOT_SECRET if name in headers}
        return session.request(method, url, **{**kwargs, "allow_redirects": False, "stream": True})

    def _session(self) -> Any:
        pid = os.getpid()
        if pid not in self._sessions:  # connections of a parent are the parent's
            session = self._new_session()
            session.mount("https://", _Adapter(pool_maxsize=64))
            session.mount("http://", _Adapter(pool_maxsize=64))
            self._sessions = {pid: session}
        return self._sessions[pid]


def withholds(host_and_credentials: Any) -> bool:
    """Whether there are credentials that :meth:`Requests.request` keeps from this server."""
    has_any = any(getattr(host_and_credentials, name, None) for name in _SECRET)
    return has_any and not belongs(host_and_credentials.host)


def _content(response: Any) -> bytes:
    most = _MOST_BYTES if response.status_code == 200 else _MOST_BYTES_OF_AN_ERROR
    content = bytearray()
    for piece in response.iter_content(1 << 16):
        content += piece
        if len(content) > most:
            if response.status_code == 200:
                raise OSError(f"the answer has more than {most} bytes")
            break
    return bytes(content)


# An answer is read from a file object over the socket. This one gives each read what is left of the
# time of the request that this thread makes.


class _Bounded(io.RawIOBase):
    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        deadline_s = getattr(_here, "deadline_s", None)
        if deadline_s is not None:
            left_s = deadline_s - SYSTEM_CLOCK.monotonic_s()
            if left_s <= 0:
                raise TimeoutError("the answer took too long")
            wait_s = self._raw._sock.gettimeout()
            self._raw._sock.settimeout(left_s if wait_s is None else min(wait_s, left_s))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach()))


class _Connection(HTTPConnection):
    response_class = _BoundedResponse


class _SecureConnection(HTTPSConnection):
    response_class = _BoundedResponse


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection

    def __str__(self) -> str:  # errors begin with it
        return f"{self.host}:{self.port}"


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection
    __str__ = _Pool.__str__


_POOLS = {"http": _Pool, "https": _SecurePool}


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager
