"""What a person is told. Telling goes wrong in silence: nothing that logs or waits ends by it."""

from __future__ import annotations

import logging
import os
import sys

_warned: set[str] = set()


def tell(text: str) -> None:
    """One line for the person who started the job, on standard error."""
    write(f"flowbuffer: {text}\n")


def write(text: str) -> bool:
    """Write to standard error; whether that went well."""
    stream = sys.stderr
    try:
        stream.write(text)
        stream.flush()
    except RuntimeError:
        # A signal handler tells this, and what it interrupted is writing to the same buffer.
        return _write_past_the_buffer(text)
    except Exception:  # there is none (None), it is closed, a pipe that nobody reads, ...
        return False
    return True


def _write_past_the_buffer(text: str) -> bool:
    try:
        os.write(sys.stderr.fileno(), text.encode(errors="backslashreplace"))
    except Exception:
        return False
    return True


_outages: set[str] = set()


def tell_outage(run_id: str, reason: str) -> None:
    """Warn when delivery of a run begins to be held up, and when it goes on; each once, whoever
    finds it.

    Args:
        run_id: The run.
        reason: What holds it up; empty if nothing does.
    """
    if bool(reason) == (run_id in _outages):
        return
    log = logging.getLogger("flowbuffer")
    if reason:
        _outages.add(run_id)
        log.warning(
            "run %s: delivery is held up, and the points are safe in the spool: %s", run_id, reason
        )
    else:
        _outages.discard(run_id)
        log.warning("run %s: delivery goes on", run_id)


def warn_once(text: str) -> None:
    """Warn of something that is not wrong yet; once in this process, whoever finds it."""
    if text not in _warned:
        _warned.add(text)
        logging.getLogger("flowbuffer").warning("%s", text)


def warn_without_gil() -> None:
    """Say so, once, if threads run at the same time in this interpreter: what two of them do in one
    operation is in order only by the interpreter's lock."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        warn_once(
            "this Python runs without its global interpreter lock, and flowbuffer is not made for "
            "that: points of several threads may be lost; start it with PYTHON_GIL=1"
        )
