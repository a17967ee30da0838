"""An HTTPS server in threads on the loopback, with a certificate of its own."""

from __future__ import annotations

import json
import math
import socket
import ssl
import struct
import threading
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

#: Status, body and ``Retry-After`` in s; None drops the connection unanswered.
Answer = tuple[int, dict[str, Any], float | None] | None


class Service(Protocol):
    """What a server asks for its answers, from any thread."""

    def answer(self, path: str, body: Mapping[str, Any], token: str, connection: int) -> Answer:
        """Answer a request with a JSON body, or with a query as one."""


class LoopbackServer(ThreadingHTTPServer):
    """Listens with TLS, and remembers its connections, so that it can drop them.

    Args:
        service: What answers.
        tls: From :func:`tls_context`.
        port: Where to listen on 127.0.0.1; 0 takes a free one.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, service: Service, tls: ssl.SSLContext, port: int = 0) -> None:
        self.service = service
        self._tls = tls
        self._open: set[ssl.SSLSocket] = set()
        self._open_lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def begin(self) -> None:
        """Serve, in threads."""
        name = "flowbuffer-azureml"
        threading.Thread(target=self.serve_forever, args=(0.05,), name=name, daemon=True).start()

    def end(self) -> None:
        """Close the port and all connections."""
        self.shutdown()
        self.server_close()
        with self._open_lock:
            for connection in self._open:
                _drop(connection)

    def get_request(self) -> tuple[ssl.SSLSocket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The handshake is left to the connection's thread: a slow client holds up nobody else.
        secure = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._open_lock:
            self._open.add(secure)
        return secure, address

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in the middle of a request are not worth a traceback."""


def _drop(connection: socket.socket) -> None:
    """Reset a connection: what was not sent is discarded."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # below the TLS: no farewell
    except OSError:
        pass  # it is gone already


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackServer

    def do_GET(self) -> None:
        self._answer(dict(parse_qsl(urlsplit(self.path).query)))

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._answer(json.loads(self.rfile.read(length) or b"{}"))

    def _answer(self, body: Mapping[str, Any]) -> None:
        path = urlsplit(self.path).path
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        answer = self.server.service.answer(path, body, token, self.client_address[1])
        if answer is None:
            _drop(self.connection)
            self.close_connection = True
            return
        status, said, retry_after_s = answer
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if retry_after_s is not None:
            self.send_header("Retry-After", str(math.ceil(retry_after_s)))  # HTTP has whole s
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Requests are kept in ``AzureMLEndpoint.requests``."""


def tls_context(ca_bundle: Path) -> ssl.SSLContext:
    """A context with a new certificate for ``localhost``, which is written to ``ca_bundle``."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain = ca_bundle.with_name("server.pem")
    chain.write_bytes(secret + public)  # ssl reads certificates from files only
    context.load_cert_chain(chain)
    chain.unlink()
    ca_bundle.write_bytes(public + Path(certifi.where()).read_bytes())
    return context
