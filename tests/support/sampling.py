"""Of a long list of cases the suite runs a part, the same one each time; with `--every` all."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

every = False
"""Whether all cases are run; set by the option."""


def part_of(cases: Sequence[T], share: int, seed: object = 0) -> list[T]:
    """One case in `share`, in their order."""
    count = len(cases) if every else -(-len(cases) // share)
    return [cases[at] for at in sorted(Random(str(seed)).sample(range(len(cases)), count))]


def part_of_table(cases: Mapping[str, T], share: int, seed: object = 0) -> dict[str, T]:
    """As `part_of`, for cases that have names."""
    return {name: cases[name] for name in part_of(list(cases), share, seed)}
