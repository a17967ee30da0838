"""A metric's key: its name, and the model or dataset that it is about.

MLflow keeps one history for each name. What a metric is about is a column of its own there; in a
spool and in a request it is a part of the key, behind the name, so that such points have a lane of
their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from flowbuffer.errors import InvalidPoint

#: Between the parts of a stored key; no key that MLflow takes has it.
_SEPARATOR: Final = "\0"
#: MLflow's limit on the length of a dataset's name, in characters; a digest's is 36.
_MAX_ABOUT: Final = 500


class About(NamedTuple):
    """What a metric is about; empty where it is about none."""

    model_id: str
    dataset_name: str
    dataset_digest: str


@dataclass(frozen=True)
class MetricKey:
    """The key of a metric that is about a model or a dataset; it can stand where a key can."""

    key: str
    model_id: str
    dataset_name: str
    dataset_digest: str

    def stored(self, key: str) -> str:
        """As the key table has it, with ``key`` in place of its own.

        Raises:
            InvalidPoint: It cannot be told apart there.
        """
        about: tuple[Any, ...] = (self.model_id, self.dataset_name, self.dataset_digest)
        if any(type(t) is not str or _SEPARATOR in t or len(t) > _MAX_ABOUT for t in about):
            raise InvalidPoint(f"{about!r} is no model's id, dataset's name and digest")
        return _SEPARATOR.join((key, *about))


def name_of(stored: str) -> str:
    """The name in a stored key."""
    return stored.partition(_SEPARATOR)[0]


def parsed(stored: str) -> tuple[str, About | None]:
    """The name in a stored key, and what the metric is about, if it is about anything.

    Raises:
        TypeError: It is no stored key.
    """
    name, *about = stored.split(_SEPARATOR)
    return name, About(*about) if about else None
