"""What a process that logs takes of the descriptors that it may have."""

from __future__ import annotations

import resource
from typing import Final

#: One descriptor in so many is for producers.
_PART: Final = 3
#: What a producer takes: its lock, its mapping, and as many again where this process delivers it.
_EACH: Final = 4
_LEAST: Final = 4
#: However many descriptors there are: the system bounds a process's mappings, too.
_MOST: Final = 4096


def most_producers() -> int:
    """How many producers' folders this process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    return min(max(soft // _PART // _EACH, _LEAST), _MOST)
