"""Whether a function of MLflow's is the one that MLflow shipped."""

from __future__ import annotations

import sys
from typing import Any


def is_as_shipped(owner: Any, name: str) -> bool:
    """Whether nobody has put something else in the place of a function of a module or a class.

    What is defined outside MLflow, like the store of a plugin, is as it was found.
    """
    holders = owner.__mro__ if isinstance(owner, type) else (owner,)
    for holder in holders:
        function = vars(holder).get(name)
        if function is not None:
            module = getattr(holder, "__module__", None) or holder.__name__
            return module.split(".")[0] != "mlflow" or is_mlflows(function)
    return False


def is_mlflows(function: Any) -> bool:
    """Whether its code is in MLflow's files: a wrapper's is not, whatever name it goes by."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(tuple(sys.modules["mlflow"].__path__))
