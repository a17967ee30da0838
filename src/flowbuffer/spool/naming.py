"""What the points of a call are called when a person is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from flowbuffer.metric_key import name_of
from flowbuffer.spool import layout
from flowbuffer.spool.files import read_file
from flowbuffer.spool.writing.places import Segment
from flowbuffer.words import counted

_MANY = 3  # keys that are named


def named(places: Sequence[Any]) -> str:
    """``'loss' at step 3 of run 1f0c...``, from what is in the spool; without the key where that
    is no more there. Raises nothing: an error's message is made of it."""
    told = [(place, at) for place, at in zip(places[::2], places[1::2], strict=True) if place]
    if not told:
        return "points that were not stored"
    run = f"run {unquote(told[0][0].path.parent.parent.name)}"
    names = list(dict.fromkeys(name for place, at in told[:_MANY] if (name := _name(place, at))))
    if len(told) == 1:
        return f"{names[0] if names else 'a point'} of {run}"
    more = ", ..." if len(told) > _MANY else ""
    return f"{counted(len(told))} of {run}" + (f": {', '.join(names)}{more}" if names else "")


def _name(segment: Segment, offset: int) -> str:
    """Key and step of a slot; empty if they cannot be read any more."""
    try:
        with segment.path.open("rb") as file:
            file.seek(offset)
            slot = layout.SLOT.unpack(file.read(layout.SLOT_SIZE))
        _, value, step, _, key_id, flags, _ = slot
        keys = dict(layout.key_frames(read_file(segment.path.with_name("keys"), limit=1 << 28)))
        key = repr(name_of(keys[key_id].decode()))
    except Exception:
        return ""
    if flags & layout.TEXT:
        return f"the {'parameter' if flags & layout.PARAM else 'tag'} {key}"
    return f"{counted(int(value))} of {key}" if flags & layout.SERIES else f"{key} at step {step}"
