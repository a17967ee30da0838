"""What is read of a run's producers, and waits to be sent."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial

from flowbuffer.delivery.batches import Part
from flowbuffer.delivery.ordering import Backlog, Rows
from flowbuffer.delivery.rejections import Rejections
from flowbuffer.delivery.stream import Stream
from flowbuffer.errors import is_passing

_log = logging.getLogger("flowbuffer")

#: The most points that are read ahead of their delivery; bounds the sender's memory (48 B each).
WINDOW_POINTS = 131072


class Intake:
    """The points of one run that were read and are in no batch yet.

    Args:
        run_id: The run.
        streams: The run's, by the rows' numbers.
        rejections: Is given the points that raise.
        window_points: The most points that are read ahead of their delivery.

    Attributes:
        metrics: Those that are metrics.
        texts: Those that are parameters and tags.
        trouble: Why something cannot be read now; empty if everything can.
    """

    def __init__(
        self,
        run_id: str,
        streams: Mapping[int, Stream],
        rejections: Rejections,
        window_points: int,
    ) -> None:
        self.metrics = Backlog()
        self.texts = Backlog()
        self.trouble = ""
        self._run_id = run_id
        self._streams = streams
        self._rejections = rejections
        self._window_points = window_points
        self._found: deque[tuple[Backlog, Rows]] = deque()  # in no backlog yet

    def __len__(self) -> int:
        return self.metrics.count + self.texts.count + len(self._found)

    def read(self, now_s: float, accepted: Sequence[Part], least: int = 0) -> bool:
        """Read from each stream while the window has room; True if anything came. What cannot be
        read now is tried again with the next call.

        Args:
            now_s: The present monotonic time.
            accepted: What a service has and has not stored yet: that holds up nothing, and only
                takes memory.
            least: So many are read ahead however small the window is: some batches, so that each
                has many points of few keys.
        """
        ahead = max(self._window_points, least)
        window = ahead + sum(len(part.rows) for part in accepted)
        window = min(window, max(ahead, WINDOW_POINTS))
        any_read = False
        trouble = ""
        streams = self._streams.values()
        for stream in streams:
            room = window - sum(other.reader.on_their_way for other in streams)
            try:
                any_read |= room > 0 and self._read(stream, room)
                self._file(now_s)
                # What was read may be at fault: of that, too, nothing is left to be settled then.
                self._rejections.write()
                stream.reader.retire()
            except (OSError, MemoryError) as error:
                trouble = f"{stream.path} cannot be read now: {error}"
        if trouble and not self.trouble:
            _log.warning(
                "run %s: delivery is held up and goes on trying: %s", self._run_id, trouble
            )
        self.trouble = trouble
        return any_read

    def _read(self, stream: Stream, room: int) -> bool:
        found = stream.read(room)
        while stream.refused:
            self._rejections.add(stream, stream.refused.pop(0))
        if found is None:
            return False
        rows, kinds = found
        self._found.append((self.metrics, rows[kinds == 0]))
        self._found.append((self.texts, rows[kinds != 0]))
        return True

    def _file(self, now_s: float) -> None:
        """Put what was found into its backlog, in halves down to a point that raises there."""
        while self._found:
            backlog, rows = self._found[0]
            try:
                backlog.add(rows, now_s)
            except Exception as error:
                if is_passing(error):
                    raise
                half = len(rows) // 2
                self._found.popleft()
                if half:
                    self._found.extendleft([(backlog, rows[half:]), (backlog, rows[:half])])
                    continue
                stream = self._streams[int(rows[0]["stream"])]
                reason = f"it cannot be delivered: {error!r}"
                self._rejections.add(stream, partial(stream.letter, rows[0], reason))
            else:
                self._found.popleft()
