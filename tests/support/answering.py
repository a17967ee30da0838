"""A tracking server on the loopback that keeps rows as MLflow's stores do, or answers otherwise.

    with AnsweringServer() as server:
        server.answer = lambda request: gateway(request, 404, b"<html>")  # None answers as MLflow

It is for answers that a real server does not give: those of what stands before it, and those of an
MLflow that is not installed here.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOG_BATCH = "/api/2.0/mlflow/runs/log-batch"
GET_RUN = "/api/2.0/mlflow/runs/get"
GET_HISTORY = "/api/2.0/mlflow/metrics/get-history"


@dataclass
class Received:
    """One request, as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Answer:
    status: int
    body: bytes = b"{}"
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


def said(status: int, content: Any, **headers: str) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(content).encode(), headers=headers)


Row = tuple[str, str, int, int, str]


class AnsweringServer:
    """A context manager.

    Args:
        takes_nan_once: Refuse a NaN that is stored already, as MLflow does before 3.17.

    Attributes:
        uri: Where it is.
        answer: Asked first; None, or what it gives, leaves it to MLflow's way.
        rows: What is stored: run, key, timestamp, step and value as text.
        params, tags: By run and key.
        requests: All, in the order in which they came.
        refused: The points that were rejected with an error code, by key and step.
    """

    def __init__(self, *, takes_nan_once: bool = False) -> None:
        self.answer: Callable[[Received], Answer | None] | None = None
        self.rows: set[Row] = set()
        self.params: dict[tuple[str, str], str] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.requests: list[Received] = []
        self.deleted: set[str] = set()
        self._takes_nan_once = takes_nan_once
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # header and body are two writes

            def do(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = urlsplit(self.path)
                query = {name: texts[0] for name, texts in parse_qs(parts.query).items()}
                body = json.loads(raw) if raw else query
                received = Received(self.command, parts.path, dict(self.headers), body)
                answer = server.reply(received)
                if answer.status < 200:  # what comes after an interim answer never comes
                    self.wfile.write(b"HTTP/1.1 %d Interim\r\n\r\n" % answer.status)
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.kind)
                self.send_header("Content-Length", str(len(answer.body)))
                for name, text in answer.headers.items():
                    self.send_header(name.replace("_", "-"), text)
                self.end_headers()
                self.wfile.write(answer.body)

            do_GET = do_POST = do_PATCH = do

            def log_message(self, *_: Any) -> None: ...

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None: ...

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> AnsweringServer:
        threading.Thread(
            target=self._listener.serve_forever, args=(0.02,), name="answering", daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def reply(self, received: Received) -> Answer:
        with self._lock:
            self.requests.append(received)
            answer = self.answer(received) if self.answer else None
            return answer or self._as_mlflow(received)

    def history(self, run_id: str, key: str) -> list[tuple[int, int, float]]:
        """Timestamp, step and value, as ``get_metric_history`` has them."""
        found = [row for row in self.rows if row[:2] == (run_id, key)]
        return sorted((row[2], row[3], float(row[4])) for row in found)

    def _as_mlflow(self, received: Received) -> Answer:
        body = received.body
        if received.path == LOG_BATCH:
            return self._log_batch(body)
        if received.path == GET_HISTORY:
            return self._get_history(body)
        if received.path != GET_RUN:
            return said(404, {"error_code": "ENDPOINT_NOT_FOUND", "message": received.path})
        run_id = body["run_id"]
        stage = "deleted" if run_id in self.deleted else "active"
        info = {"run_id": run_id, "run_uuid": run_id, "lifecycle_stage": stage}
        info |= {"status": "RUNNING", "experiment_id": "0"}
        return said(200, {"run": {"info": info, "data": {}}})

    def _log_batch(self, body: dict[str, Any]) -> Answer:
        run_id = body["run_id"]
        rows: list[Row] = [
            (run_id, m["key"], m["timestamp"], m["step"], repr(float(m["value"])))
            for m in body.get("metrics", ())
        ]
        nans = [row for row in rows if row[4] == "nan"]
        if self._takes_nan_once and (len(set(nans)) < len(nans) or not self.rows.isdisjoint(nans)):
            text = "(sqlite3.IntegrityError) UNIQUE constraint failed: metrics.key, metrics.step"
            return said(400, {"error_code": "BAD_REQUEST", "message": text})
        self.rows.update(rows)
        self.params |= {(run_id, p["key"]): p["value"] for p in body.get("params", ())}
        self.tags |= {(run_id, t["key"]): t["value"] for t in body.get("tags", ())}
        return said(200, {})

    def _get_history(self, body: dict[str, Any]) -> Answer:
        key, most = body["metric_key"], int(body.get("max_results", 1 << 30))
        start = int(body.get("page_token") or 0)
        found = self.history(body["run_id"], key)
        page = [
            {"key": key, "timestamp": time, "step": step, "value": _in_json(value)}
            for time, step, value in found[start : start + most]
        ]
        more = {"next_page_token": str(start + most)} if start + most < len(found) else {}
        return said(200, {"metrics": page, **more})


def _in_json(value: float) -> float | str:
    return "NaN" if value != value else value
