"""What MLflow loads when it is imported: its entry point for tracking stores.

It asks one variable. Where that is not set, nothing of flowbuffer is imported and nothing changes.
"""

from __future__ import annotations

import os
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


def _enable(_: Any) -> None:
    from flowbuffer.dropin.switch import enable

    enable()


if os.environ.get("FLOWBUFFER_ENABLED", "").lower() in ("1", "true", "yes"):
    from mlflow.utils.import_hooks import register_post_import_hook

    # MLflow is being imported, and hands out its functions only after this.
    register_post_import_hook(_enable, "mlflow.tracking.fluent")
