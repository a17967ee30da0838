"""What MLflow loads when it is imported: its entry point for tracking stores.

It asks one variable. Where that is not set, nothing of flowbuffer is imported and nothing changes.
"""

from __future__ import annotations

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


_said = os.environ.get("FLOWBUFFER_ENABLED", "").lower()
if _said not in ("", "0", "false", "no", "1", "true", "yes"):
    from warnings import warn

    warn(f"FLOWBUFFER_ENABLED={_said!r}: allowed are 0, 1; nothing is buffered", stacklevel=2)
if _said in ("1", "true", "yes"):
    sys.meta_path.insert(0, _EnableAfter("mlflow.tracking.fluent"))
