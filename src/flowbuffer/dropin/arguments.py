"""The arguments of MLflow's calls in exact types, where MLflow would certainly store them.

Whatever else somebody hands over (an array of entities, a generator, a number of some other kind,
an object without an attribute) is for MLflow itself to take or to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from numbers import Integral
from operator import attrgetter
from typing import Any, ParamSpec, TypeVar

from flowbuffer.dropin.synchronous import OwnTime
from flowbuffer.metric_key import MetricKey
from flowbuffer.spool.layout import TAG
from flowbuffer.spool.writing.points import checked_key, checked_text

P = ParamSpec("P")
T = TypeVar("T")

#: A metric as it is logged: key, value, step, timestamp.
Point = tuple[Any, float, int, int | None]

_INT64 = 1 << 63


class NotBuffered(Exception):
    """MLflow itself has to take the call: it may refuse it, or flowbuffer cannot keep it."""


def looks(check: Callable[P, T]) -> Callable[P, T]:
    """A check of what a caller gave, in which whatever goes wrong is :class:`NotBuffered`: MLflow
    takes the call then, and raises what it finds."""

    @wraps(check)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return check(*args, **kwargs)
        except Exception as error:
            raise NotBuffered from error

    return checked


def exact_text(given: Any, *, over_http: bool) -> str:
    """A text of any class as a ``str``.

    MLflow's databases refuse a key that ``str`` makes another text of, like a member of an
    enumeration; over HTTP its text goes to the server.
    """
    if type(given) is str:
        return given
    text = str.__str__(given)  # a TypeError if it is no text
    if not over_http and str(given) != text:
        raise NotBuffered
    return text


def exact_key(given: Any, *, over_http: bool) -> str | MetricKey:
    """A key as it is logged, if MLflow takes it."""
    if isinstance(given, MetricKey):
        text = checked_key(exact_text(given.key, over_http=over_http))
        key = replace(given, key=text)
        key.stored(text)
        return key
    return checked_key(exact_text(given, over_http=over_http))


def exact_integer(given: Any, low: int = -_INT64) -> int:
    """A step or a timestamp. MLflow's clients differ in what they make of a float or a bool."""
    if type(given) is not int:
        if not isinstance(given, Integral) or isinstance(given, bool):
            raise NotBuffered
        given = int(given)
    if not low <= given < _INT64:
        raise NotBuffered
    return given  # type: ignore[no-any-return]


def exact_time(given: Any) -> int | None:
    """A timestamp; None is the time of the call."""
    return None if given is None or type(given) is OwnTime else exact_integer(given, 0)


def exact_value(given: Any) -> float:
    """The value of a metric, as MLflow makes a number of it."""
    if type(given) is float:
        return given
    from mlflow.tracking.metric_value_conversion_utils import (
        convert_metric_value_to_float_if_possible,
    )

    number = convert_metric_value_to_float_if_possible(given)
    if type(number) is not float:
        raise NotBuffered
    return number


def exact_texts(kind: int, given: Mapping[Any, Any], *, over_http: bool) -> dict[str, str]:
    """Parameters or, as ``kind`` says, tags, of which MLflow stores what ``str`` makes of them."""
    if not isinstance(given, Mapping):
        raise NotBuffered  # it may give its items once only
    texts = {exact_text(key, over_http=over_http): value for key, value in given.items()}
    if kind == TAG and any(key.startswith("mlflow.") for key in texts):
        raise NotBuffered  # MLflow's own: it also reads them where nobody can wait for ours
    return {checked_key(key): checked_text(kind, key, value) for key, value in texts.items()}


def are_certain(*sequences: Any) -> bool:
    """Whether they can be gone through any number of times: what cannot is left to MLflow as it was
    given."""
    return all(type(sequence) in (list, tuple) for sequence in sequences)


#: The fields of one of MLflow's metrics.
metric_fields = attrgetter(
    "key", "value", "step", "timestamp", "model_id", "dataset_name", "dataset_digest"
)


def key_about(key: Any, model_id: Any, dataset_name: Any, dataset_digest: Any) -> Any:
    """The key of a metric, with the model and the dataset that it is about."""
    if (dataset_name is None) != (dataset_digest is None):
        raise NotBuffered
    about = model_id, dataset_name, dataset_digest
    return MetricKey(key, *(text or "" for text in about)) if any(about) else key
