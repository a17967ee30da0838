"""What a call that logs gives back: a promise about exactly the points of that call."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from flowbuffer.clock import SYSTEM_CLOCK, checked_timeout
from flowbuffer.errors import DeliveryError, WaitTimeout
from flowbuffer.spool.naming import named
from flowbuffer.spool.notes import parked_reason
from flowbuffer.spool.outcomes import Outcome, reasons, slot_outcomes
from flowbuffer.spool.waiting import want
from flowbuffer.spool.writing.places import Segment


class Handle(tuple[Any, ...]):
    """The points of one call, on their way to the backend.

    The state of a point is in its slot on the disk, so a handle works from any thread, after
    ``close()``, and in a forked child. It can be awaited: ``await handle`` is :meth:`wait`.
    """

    # A tuple (see ``spool.writing.places.Places``): that is the cheapest object to make, and one is
    # made per call.
    __slots__ = ()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the points are in the backend. They are sent without lingering.

        Args:
            timeout: The most seconds to wait; None waits for as long as it takes.

        Raises:
            DeliveryError: A point was rejected, was never stored, or nobody knows what became of
                it; the message has the reason.
            WaitTimeout: Time was up first. The points are safe and go on being delivered.
            InvalidArgument: ``timeout`` is no number from 0.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error

    def done(self) -> bool:
        """Whether every point is delivered, or something is known against one: whether
        :meth:`exception` has an answer."""
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
            if done:
                return error
            if deadline_s is not None:
                left_s = deadline_s - clock.monotonic_s()
                if left_s <= 0:
                    raise WaitTimeout(
                        f"not delivered within {timeout:g} s: {named(self)}; it is safe, and goes "
                        "on its way"
                    )
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
        return f"<Handle of {named(self)}>"

    def _pauses(self) -> Iterator[float]:
        """How long to sleep after each look, in s: not at all at first, then longer and longer. Who
        looks again has delivery told to hurry."""
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
        """Whether whoever waits need wait no longer, and the error to raise then, None if all is
        well. A point that is rejected, or parked, is reason enough to stop."""
        pending = False
        why = [reason for reason in self[1::2] if isinstance(reason, str)]
        for segment, offsets in self._slots().items():
            outcomes = slot_outcomes(segment.path, offsets)
            why += reasons(segment.path, offsets, outcomes)
            if Outcome.PENDING in outcomes:
                pending = True
                folder = segment.path.parent
                parked = parked_reason(folder)
                if parked is not None:
                    why.append(f"{parked} (the points are kept in {folder})")
        error = DeliveryError("; ".join(dict.fromkeys(why))) if why else None
        return not pending or error is not None, error
