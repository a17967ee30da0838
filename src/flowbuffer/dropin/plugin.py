"""What MLflow loads when it is imported: its entry point for tracking stores.

It asks one variable. Where that is not set nothing changes, and nothing of flowbuffer is imported
unless another variable looks as if it had been meant to be the one.
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
    """Finds one module as Python would, and enables flowbuffer once it is executed.

    MLflow is being imported, and hands its functions out only after that.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != self._name:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enable(module: Any) -> None:
                from flowbuffer.dropin.switch import enable

                execute(module)
                enable()

            spec.loader.exec_module = execute_and_enable  # type: ignore[method-assign]
        return spec


def _warn_of_misspelt() -> None:
    """Where the switch is not set, see whether a variable that says yes was meant to be it."""
    for name, text in os.environ.items():
        if name.startswith("FLOWBUFFER_") and text.strip().lower() in YES:
            from flowbuffer.settings.environment import said_of_settings
            from flowbuffer.settings.settings import kinds_of_settings

            said_of_settings(kinds_of_settings(), {name: text})  # warns of what is no setting


#: What says yes and what says no, as in every setting (``settings.values.BOOLEANS``): nothing of
#: that is imported where nothing is switched on.
YES = ("1", "true", "yes", "on")
NO = ("0", "false", "no", "off")

_said = os.environ.get("FLOWBUFFER_ENABLED", "").strip().lower()
if _said in YES:
    sys.meta_path.insert(0, _EnableAfter("mlflow.tracking.fluent"))
elif not _said:
    _warn_of_misspelt()
elif _said not in NO:
    from warnings import warn

    allowed = ", ".join(YES + NO)
    warn(f"FLOWBUFFER_ENABLED={_said!r}: allowed are {allowed}; nothing is buffered", stacklevel=2)
