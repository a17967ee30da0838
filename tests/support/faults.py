"""Faults between a client and a real MLflow server.

`FaultProxy` passes everything on to the server, except that each log-batch request meets an action:

    with FaultProxy(server.uri) as proxy:
        proxy.then(status(503), commit_then_reset)  # the next two batches; later ones are forwarded
        proxy.always(poison(lambda metric: metric["value"] > 5, "too large"))  # all but those

An action is a function of one `Exchange`. Whatever it leaves undone is a request without an answer:
the connection is reset. So a test writes its own as

    def flaky(exchange):
        (forward if random() < 0.5 else reset)(exchange)
"""

import http.client
import json
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from support.backends import free_port

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}
UPSTREAM_TIMEOUT_S = 60.0


@dataclass
class LogBatch:
    """One log-batch request, as it came."""

    at_s: float
    """time.monotonic() when it was complete"""
    body: dict[str, Any]
    action: str = ""
    """name of the action it met"""
    status: int | None = None
    """what the client was answered; None when it was not, or not yet"""
    stored: bool = False
    """whether the server took it, whatever the client was told"""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self.body.get("metrics", [])


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Exchange:
    """One log-batch request in the hands of an action."""

    def __init__(self, proxy: "FaultProxy", handler: "_Handler", raw: bytes) -> None:
        self.proxy = proxy
        self.record = LogBatch(time.monotonic(), json.loads(raw))
        self.released = threading.Event()
        self._handler = handler
        self._raw = raw

    def send_to_server(self) -> Answer:
        """Forward the request, keep the answer from the client."""
        answer = self._handler.ask_server(self._raw)
        self.record.stored = answer.status == 200
        return answer

    def answer(self, answer: Answer) -> None:
        """Answer the client."""
        self.record.status = answer.status
        self._handler.reply(answer)


Action = Callable[[Exchange], None]


def forward(exchange: Exchange) -> None:
    """Pass the request on, and the answer back."""
    exchange.answer(exchange.send_to_server())


def reset(exchange: Exchange) -> None:
    """Reset the connection; the server never sees the request."""


def commit_then_reset(exchange: Exchange) -> None:
    """Let the server store the batch, then reset the connection instead of answering."""
    exchange.send_to_server()


def hang(exchange: Exchange) -> None:
    """Hold the request until `proxy.release()`, then forward it; reset it if the proxy closes."""
    exchange.released.wait()
    if not exchange.proxy.closing.is_set():
        forward(exchange)


def status(
    code: int, headers: Mapping[str, str] | None = None, body: bytes | str | dict[str, Any] = b""
) -> Action:
    """Answer `code` without asking the server. A dict is sent as JSON."""
    if isinstance(body, dict):
        body = json.dumps(body)
    content = body.encode() if isinstance(body, str) else body

    def action(exchange: Exchange) -> None:
        exchange.answer(Answer(code, content, headers or {}))

    return _named(action, f"status {code}")


def delay(seconds: float) -> Action:
    """Forward the request after `seconds`; reset it if the proxy closes before."""

    def action(exchange: Exchange) -> None:
        if not exchange.proxy.closing.wait(seconds):
            forward(exchange)

    return _named(action, f"delay {seconds}")


def poison(matches: Callable[[dict[str, Any]], bool], reason: str) -> Action:
    """Refuse, as MLflow does, a batch that holds a metric that `matches`; forward any other."""
    error = {"error_code": "INVALID_PARAMETER_VALUE", "message": reason}
    refuse = status(400, {"Content-Type": "application/json"}, error)

    def action(exchange: Exchange) -> None:
        (refuse if any(map(matches, exchange.record.metrics)) else forward)(exchange)

    return _named(action, "poison")


def _named(action: Action, name: str) -> Action:
    action.__name__ = name
    return action


class FaultProxy:
    """A reverse proxy on loopback, in front of the MLflow server at `target_uri`.

    `requests` has every log-batch request in the order of arrival.
    """

    def __init__(self, target_uri: str, action: Action = forward) -> None:
        target = urlsplit(target_uri)
        self.target = (target.hostname or "127.0.0.1", target.port)
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.requests: list[LogBatch] = []
        self.closing = threading.Event()
        self._default = action
        self._queue: deque[Action] = deque()
        self._exchanges: set[Exchange] = set()
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def then(self, *actions: Action) -> None:
        """Add actions for the next log-batch requests, one each."""
        with self._lock:
            self._queue.extend(actions)

    def always(self, action: Action) -> None:
        """Set the action for log-batch requests that have none of their own."""
        with self._lock:
            self._default = action

    def release(self) -> None:
        """Let go on every request that is in `requests` now and hangs."""
        with self._lock:
            for exchange in self._exchanges:
                exchange.released.set()

    def run_action(self, exchange: Exchange) -> None:
        """Record the request, and do to it what it is its turn to meet."""
        with self._lock:
            action = self._queue.popleft() if self._queue else self._default
            exchange.record.action = action.__name__
            self.requests.append(exchange.record)
            self._exchanges.add(exchange)
            if self.closing.is_set():
                exchange.released.set()
        try:
            action(exchange)
        finally:
            with self._lock:
                self._exchanges.remove(exchange)

    def up(self) -> None:
        """Accept connections. Nothing happens if it does."""
        if self._server is None:
            self.closing.clear()
            self._server = _Server(self)

    def down(self) -> None:
        """Drop all connections, and refuse new ones on the same port until `up()`."""
        if self._server is not None:
            self.closing.set()
            self.release()
            self._server.stop()
            self._server = None

    def __enter__(self) -> "FaultProxy":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() joins them

    def __init__(self, proxy: FaultProxy) -> None:
        super().__init__(("127.0.0.1", proxy.port), _Handler)
        self.proxy = proxy
        self.sockets: set[socket.socket] = set()  # open ones, to clients and to the server
        self._loop = threading.Thread(target=self.serve_forever, args=(0.05,), name="FaultProxy")
        self._loop.start()

    def opened(self, connection: socket.socket) -> None:
        """Note a connection, so that `stop()` ends the thread that waits for it."""
        self.sockets.add(connection)
        if self.proxy.closing.is_set():
            _wake(connection)

    def stop(self) -> None:
        """Return when the last thread is gone. `proxy.closing` is set before."""
        self.shutdown()
        self._loop.join()
        for connection in self.sockets.copy():
            _wake(connection)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _wake(connection: socket.socket) -> None:
    """End the wait of the thread that reads it."""
    with suppress(OSError):  # it was closed meanwhile
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """The requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"  # keeps connections
    disable_nagle_algorithm = True  # headers and body are two writes
    server: _Server

    def setup(self) -> None:
        self.server.opened(self.request)
        super().setup()

    def finish(self) -> None:
        self.server.sockets.discard(self.request)
        super().finish()

    def handle_any(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.path.endswith("/runs/log-batch"):
            self.reply(self.ask_server(raw))
            return
        exchange = Exchange(self.server.proxy, self, raw)
        self.server.proxy.run_action(exchange)
        if exchange.record.status is None:
            self.reset()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any

    def ask_server(self, raw: bytes) -> Answer:
        """The server's answer to this request; 502 when there is none."""
        upstream = http.client.HTTPConnection(*self.server.proxy.target, timeout=UPSTREAM_TIMEOUT_S)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP | {"host"}}
        try:
            upstream.connect()
            self.server.opened(upstream.sock)
            upstream.request(self.command, self.path, raw or None, headers)
            response = upstream.getresponse()
            return Answer(response.status, response.read(), dict(response.getheaders()))
        except (OSError, http.client.HTTPException) as error:
            return Answer(502, repr(error).encode())
        finally:
            self.server.sockets.discard(upstream.sock)
            upstream.close()

    def reply(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def reset(self) -> None:
        """Close the connection with RST at once, not with the FIN of a regular end."""
        self.close_connection = True
        self.server.sockets.discard(self.request)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.request.detach())

    def log_message(self, *_: object) -> None:
        pass
