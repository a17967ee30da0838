"""A fault proxy in a process of its own, which holds a request for as long as a kill takes."""

import json
from collections import Counter
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from support.faults import Exchange, FaultProxy
from support.processes import finished, forked

#: What becomes of a request that is held while whoever sent it is killed: the server never sees
#: it; had stored it before; or stores it afterwards, perhaps after the same points came again.
WAYS = ("never", "before", "afterwards")


class HeldRequests:
    """The proxy, from outside. A context manager: it is gone after the block."""

    def __init__(self, server_uri: str) -> None:
        self._said, said = Pipe()
        self.pid = forked(lambda: _Holder(said).serve(server_uri))
        said.close()
        self.uri = self._ask("uri")

    def hold_next(self, way: str) -> None:
        """Hold the next request."""
        self._ask(way)

    def wait_held(self, timeout_s: float) -> bool:
        """Wait until a request is held; whether one is."""
        return self._said.poll(timeout_s) and self._said.recv() == "held"

    def let_go(self) -> None:
        """Hold nothing any more."""
        self._ask("let go")

    def answered_twice(self) -> int:
        """How many points were answered as stored twice since this was asked last: to two
        processes, or to one that forgot."""
        return self._ask("answered twice")

    def _ask(self, what: str):
        self._said.send(what)
        while (answer := self._said.recv()) == "held":
            pass  # too late
        return answer

    def __enter__(self) -> "HeldRequests":
        return self

    def __exit__(self, *_: object) -> None:
        self._said.send("end")
        finished(self.pid)


class _Holder:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._way = ""
        self._holds = False

    def serve(self, server_uri: str) -> None:
        with FaultProxy(server_uri) as proxy:
            while (command := self._connection.recv()) != "end":
                if command == "uri":
                    self._connection.send(proxy.uri)
                elif command == "let go":
                    self._holds = False
                    proxy.always(_forward)
                    proxy.release()
                    self._connection.send("did")
                elif command == "answered twice":
                    requests = list(proxy.requests)
                    del proxy.requests[: len(requests)]
                    self._connection.send(answered_twice(requests))
                else:
                    self._way, self._holds = command, True
                    proxy.always(self._hold)
                    self._connection.send("will")

    def _hold(self, exchange: Exchange) -> None:
        way = self._way
        first, self._holds = self._holds, False
        if not first:  # those that are sent beside it
            _forward(exchange)
            return
        if way == "before":
            exchange.send_to_server()
        self._connection.send("held")
        exchange.released.wait()
        if way == "afterwards":
            exchange.send_to_server()


def _forward(exchange: Exchange) -> None:
    exchange.answer(exchange.send_to_server())


def answered_twice(requests: list) -> int:
    """Points that two requests brought whose senders both were told that they are stored.

    Not those of series: a series of which a part is stored when its sender dies comes again whole.
    """
    points: Counter[tuple[str, str]] = Counter()
    for request in requests:
        if request.status == 200:
            run = request.body["run_id"]
            points.update(
                (run, json.dumps(metric, sort_keys=True))
                for metric in request.metrics
                if not metric["key"].endswith("series")
            )
    return sum(count - 1 for count in points.values())
