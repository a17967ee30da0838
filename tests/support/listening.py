"""What flowbuffer logs, heard without pytest's `caplog`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def listening() -> Iterator[list[str]]:
    """The warnings and errors of the block, as they come."""
    listener = _Listener()
    logging.getLogger("flowbuffer").addHandler(listener)
    try:
        yield listener.said
    finally:
        logging.getLogger("flowbuffer").removeHandler(listener)
