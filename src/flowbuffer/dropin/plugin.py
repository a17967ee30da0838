"""What MLflow loads when it is imported: its entry point for tracking stores.

It asks two variables: one for programs that log, one for MLflow's server. Where neither is set
nothing changes, and nothing of flowbuffer is imported unless another variable looks as if it had
been meant to be the first one.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any


def tracking_store(store_uri: str | None = None, **_: Any) -> Any:
    """There is no such store: flowbuffer works with every tracking URI.

    Raises:
        SettingError: Always.
    """
    from flowbuffer.errors import SettingError

    raise SettingError(
        f"the tracking URI {store_uri!r} names no store: keep the URI of your server, and set "
        "FLOWBUFFER_ENABLED=1"
    )


@atexit.register  # before MLflow registers anything, so that it is called after that
def _at_the_very_end() -> None:
    job_end = sys.modules.get("flowbuffer.logger.job_end")
    if job_end is not None:
        job_end.at_the_very_end()


class _EnableAfter:
    """Finds one module as Python would, and enables something of flowbuffer's once it is executed.

    MLflow is being imported, and hands its functions out only after that.

    Args:
        name: Of the module.
        switch: The module whose ``enable`` is called.
    """

    def __init__(self, name: str, switch: str) -> None:
        self._name, self._switch = name, switch

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != self._name:
            return None
        from importlib import import_module
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enable(module: Any) -> None:
                switch = import_module(self._switch)
                execute(module)
                switch.enable()

            spec.loader.exec_module = execute_and_enable  # type: ignore[method-assign]
        return spec


def _is_on(variable: str, otherwise: str) -> bool:
    """Whether a variable says yes. One that says neither that nor no is warned of."""
    said = os.environ.get(variable, "").strip().lower()
    if said and said not in YES + NO:
        from warnings import warn

        allowed = ", ".join(YES + NO)
        warn(f"{variable}={said!r}: allowed are {allowed}; {otherwise}", stacklevel=3)
    return said in YES


def _warn_of_misspelt() -> None:
    """Where the switch is not set, see whether a variable that says yes was meant to be it."""
    for name, text in os.environ.items():
        if name.startswith("FLOWBUFFER_") and name != SERVER and text.strip().lower() in YES:
            from flowbuffer.settings.environment import said_of_settings
            from flowbuffer.settings.settings import kinds_of_settings

            said_of_settings(kinds_of_settings(), {name: text})  # warns of what is no setting


#: What says yes and what says no, as in every setting (``settings.values.BOOLEANS``): nothing of
#: that is imported where nothing is switched on.
YES = ("1", "true", "yes", "on")
NO = ("0", "false", "no", "off")

CLIENT, SERVER = "FLOWBUFFER_ENABLED", "FLOWBUFFER_SERVER"

if _is_on(CLIENT, "nothing is buffered"):
    sys.meta_path.insert(0, _EnableAfter("mlflow.tracking.fluent", "flowbuffer.dropin.switch"))
elif not os.environ.get(CLIENT, "").strip():
    _warn_of_misspelt()
if _is_on(SERVER, "the server stores batches as ever"):
    sys.meta_path.insert(0, _EnableAfter("mlflow.server.handlers", "flowbuffer.server.switch"))
