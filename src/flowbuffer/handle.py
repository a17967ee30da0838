"""What a call that logs gives back: a promise about exactly the points of that call."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from flowbuffer.clock import SYSTEM_CLOCK, checked_timeout
from flowbuffer.errors import DeliveryError, WaitTimeout
from flowbuffer.spool.layout import COMMITTED, EMPTY, REJECTED, SEGMENT_HEADER_SIZE, SLOT_SIZE
from flowbuffer.spool.places import Segment
from flowbuffer.spool.states import dead_letters, parked_reason, slot_states, want


class Handle(tuple[Any, ...]):
    """The points of one call, on their way to the backend.

    The state of a point is in its slot on the disk, so a handle works from any thread, after
    ``close()``, and in a forked child. It can be awaited: ``await handle`` is :meth:`wait`.
    """

    # A tuple (see ``spool.places.Places``): that is the cheapest object to make, and one is made
    # per call.
    __slots__ = ()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the points are in the backend. They are sent without lingering.

        Args:
            timeout: The most seconds to wait; None waits for as long as it takes.

        Raises:
            DeliveryError: A point was rejected, or was never stored; the message has the reason.
            WaitTimeout: Time was up first. The points are safe and go on being delivered.
            InvalidArgument: ``timeout`` is no number from 0.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error

    def done(self) -> bool:
        """Whether every point is delivered, or will not be."""
        return self._outcome()[0]

    def exception(self, timeout: float | None = None) -> DeliveryError | None:
        """Wait as :meth:`wait` does; return the error instead of raising it, None if all is well.

        Raises:
            WaitTimeout: Time was up first.
        """
        clock = SYSTEM_CLOCK
        timeout = checked_timeout(timeout)
        deadline_s = None if timeout is None else clock.monotonic_s() + timeout
        for pause_s in self._pauses():
            done, error = self._outcome()
            if done or error is not None:
                return error
            if deadline_s is not None:
                left_s = deadline_s - clock.monotonic_s()
                if left_s <= 0:
                    raise WaitTimeout(f"{self!r} was not delivered within {timeout:g} s")
                pause_s = min(pause_s, left_s)
            clock.sleep(pause_s)
        raise AssertionError("pauses do not end")

    def __await__(self) -> Generator[Any, None, None]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> None:
        import asyncio  # half of flowbuffer's import time, if imported above

        for pause_s in self._pauses():
            done, error = self._outcome()
            if error is not None:
                raise error
            if done:
                return
            await asyncio.sleep(pause_s)

    def __dir__(self) -> list[str]:
        own = ("done", "exception", "wait")  # and not what a tuple has
        return [*own, *(name for name in object.__dir__(self) if name.startswith("__"))]

    def __repr__(self) -> str:
        if len(self) == 2 and isinstance(self[0], Segment):
            return f"<Handle of the point at byte {self[1]} of {self[0].path}>"
        return f"<Handle of {len(self) // 2} slots>"

    def _pauses(self) -> Iterator[float]:
        """Seconds between looks, growing; before the first pause delivery is told to hurry."""
        pause_s = 0.0
        while True:
            yield pause_s
            for segment, offsets in self._slots().items():
                want(segment.path, max(offsets))
                segment.hurry()
            pause_s = min(max(0.001, pause_s * 1.5), 0.02)

    def _slots(self) -> dict[Segment, list[int]]:
        slots: dict[Segment, list[int]] = {}
        for segment, offset in zip(self[::2], self[1::2], strict=True):
            if segment is not None:
                slots.setdefault(segment, []).append(offset)
        return slots

    def _outcome(self) -> tuple[bool, DeliveryError | None]:
        """Whether nothing is on its way any more, and what went wrong."""
        done = True
        reasons = [reason for reason in self[1::2] if isinstance(reason, str)]
        for segment, offsets in self._slots().items():
            states = slot_states(segment.path, offsets)
            if COMMITTED in states or EMPTY in states:
                done = False
                parked = parked_reason(segment.path.parent)
                if parked is not None:
                    reasons.append(f"{parked} (the points are kept in {segment.path.parent})")
            rejected = [at for at, state in zip(offsets, states, strict=True) if state == REJECTED]
            reasons += _reasons(segment, rejected)
        return done, DeliveryError("; ".join(dict.fromkeys(reasons))) if reasons else None


def _reasons(segment: Segment, offsets: list[int]) -> list[str]:
    """Why these slots were rejected, from the dead letters."""
    if not offsets:
        return []
    slots = {(offset - SEGMENT_HEADER_SIZE) // SLOT_SIZE for offset in offsets}
    found = [
        f"{letter.get('key')!r}: {letter.get('reason')}"
        for letter in dead_letters(segment.path.parent)
        if letter.get("segment") == segment.number and letter.get("slot") in slots
    ]
    return found or ["it was rejected, and the dead letter with the reason is gone"]
