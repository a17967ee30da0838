"""How long the end of a job waits, all in all, and how a person cuts it short.

A job often ends in several waits: that of a ``with`` block, of the end of its run, of the end of
the process. They are one end as long as nothing is logged between them and none succeeds, and they
have one bound together. Ctrl-C during one of them ends them all.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from flowbuffer.clock import SYSTEM_CLOCK, Clock

#: The attribute of a KeyboardInterrupt that came while somebody waited for delivery.
_CAME_IN_A_WAIT = "came_while_flowbuffer_waited"


class Patience:
    """How long the waits of an end of this process may take, and whether a person cut them short.

    Args:
        logged: How many points each logger was given until now, by a key of its own.
        clock: Tells the time.

    Attributes:
        final: The process is ending: whatever is logged now, there is no other end.
    """

    def __init__(self, logged: Callable[[], dict[int, int]], clock: Clock = SYSTEM_CLOCK) -> None:
        self.final = False
        self._logged = logged
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """Another end begins: its waits have the whole bound, and nobody has cut them short."""
        self._start_s: float | None = None  # of this end; None until somebody waits
        self._gave_up = False
        self._logged_then: dict[int, int] = {}  # when somebody gave up
        self._interrupts = 0

    def deadline_s(self, bound_s: float, *, shared: bool = True) -> float:
        """When a wait that begins now gives up, on the monotonic clock.

        Args:
            bound_s: The bound, in s.
            shared: It is that of all waits of this end; else of this wait alone.
        """
        now_s = self._clock.monotonic_s()
        if self._gave_up and not self.final and self._something_was_logged():
            self.begin()
        if self.interrupted:
            return now_s
        if not shared:
            return now_s + bound_s
        if self._start_s is None:
            self._start_s = now_s
        return self._start_s + bound_s

    def succeed(self) -> None:
        """What this end waited for is delivered: a wait that comes after it is of another end, with
        a bound of its own."""
        if not self.final and not self._interrupts:
            self.begin()

    def _give_up(self) -> None:
        self._gave_up = True
        self._logged_then = self._logged()

    @property
    def in_vain(self) -> bool:
        """Whether a wait of this end gave up, or was interrupted: a server that may be gone is not
        tried for minutes then."""
        return self._gave_up or self.interrupted

    def interrupt(self, error: KeyboardInterrupt | None = None) -> None:
        """A person wants to leave.

        Args:
            error: What told it. While it is under way nobody waits, whatever was logged meanwhile.
        """
        if error is None or not hasattr(error, _CAME_IN_A_WAIT):
            self._interrupts += 1
        if error is not None:
            setattr(error, _CAME_IN_A_WAIT, True)
        self._give_up()

    @property
    def interrupted(self) -> bool:
        """Whether this end was cut short: nobody waits in what is left of it."""
        return self._interrupts > 0 or _is_under_way(self.final)

    @property
    def exhausted(self) -> bool:
        """Whether a person has asked twice to leave: nothing more is tried."""
        return self._interrupts > 1

    def _something_was_logged(self) -> bool:
        before = self._logged_then
        return any(count != before.get(key, 0) for key, count in self._logged().items())

    # The wait itself.

    def wait(
        self,
        until: Callable[[], bool],
        deadline_s: float | None,
        meanwhile: Callable[[float], None],
        *,
        ends: bool,
    ) -> bool:
        """Wait (see ``Clock.wait_until``); whether it was over in time.

        Args:
            until: Whether it is over.
            deadline_s: When to give up; None is never.
            meanwhile: Called again and again.
            ends: It is one of the waits of an end.

        Raises:
            KeyboardInterrupt: A person wants to leave.
        """
        relay = _Relay(self if ends else None)
        try:
            relay.begin()
            over = self._clock.wait_until(
                lambda: relay.interrupted or until(), deadline_s, meanwhile
            )
            over = over and not relay.interrupted
            if ends and not over:
                self._give_up()
            return over
        except KeyboardInterrupt as error:
            if ends:
                self.interrupt(error)
            else:
                setattr(error, _CAME_IN_A_WAIT, True)
            raise
        finally:
            relay.end()


class _Relay:
    """Hears of an interrupt that a handler in the place of Python's own keeps to itself: that of
    ``asyncio.run`` cancels a task, which is blocked by this very wait, and a program's may set a
    flag that nobody looks at while its end waits."""

    def __init__(self, patience: Patience | None) -> None:
        self.interrupted = False
        self._patience = patience
        self._handler: Any = None

    def begin(self) -> None:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler) and handler is not signal.default_int_handler:
                self._handler = handler
                signal.signal(signal.SIGINT, self._on_interrupt)

    def end(self) -> None:
        if self._handler is not None and signal.getsignal(signal.SIGINT) == self._on_interrupt:
            signal.signal(signal.SIGINT, self._handler)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._handler(number, frame)
        if _in_event_loop():
            raise KeyboardInterrupt
        if self._patience is not None:
            self.interrupted = True
            self._patience.interrupt()


def _in_event_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


def _is_under_way(final: bool) -> bool:
    """Whether a KeyboardInterrupt that came in a wait is being handled, or ended the program."""
    error = sys.exc_info()[1]
    if error is None and final:
        error = getattr(sys, "last_value", None)
    while error is not None:
        if hasattr(error, _CAME_IN_A_WAIT):
            return True
        error = error.__context__
    return False
