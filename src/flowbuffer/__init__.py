"""Buffered metric logging for MLflow and Azure ML: a microsecond a point, in order, none lost.

import flowbuffer

with flowbuffer.MetricLogger() as logger:
    for step in range(100_000):
        logger.log_metric("loss", 1 / (step + 1), step)
"""

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowbuffer.dropin.switch import Switch, disable, enable
    from flowbuffer.errors import (
        DeliveryError,
        FlowbufferError,
        InvalidArgument,
        InvalidPoint,
        SettingError,
        SpoolError,
        SpoolFormatError,
        SpoolFull,
        WaitTimeout,
    )
    from flowbuffer.logger.functions import (
        flush,
        log_metric,
        log_metrics,
        log_param,
        log_params,
        log_series,
        set_tag,
        set_tags,
        stats,
    )
    from flowbuffer.logger.handle import Handle
    from flowbuffer.logger.metric_logger import MetricLogger
    from flowbuffer.logger.report import Report, Stats
    from flowbuffer.settings.settings import Settings

__version__ = "0.1.0"

if "_FLOWBUFFER_PATH" in _os.environ:  # noqa: TID251  # the collector process takes it away first
    _os.write(2, b"this was started as flowbuffer's collector process, and is another program\n")
    _os._exit(70)  # EX_SOFTWARE: it must not do its work a second time

# Imported when they are first asked for: MLflow imports this package to find its plugin, also where
# nothing is switched on (see dropin/plugin.py).
_MODULE_OF = {
    **dict.fromkeys(("Switch", "disable", "enable"), "dropin.switch"),
    **dict.fromkeys(("DeliveryError", "FlowbufferError", "InvalidArgument"), "errors"),
    **dict.fromkeys(("InvalidPoint", "SettingError", "SpoolError"), "errors"),
    **dict.fromkeys(("SpoolFormatError", "SpoolFull", "WaitTimeout"), "errors"),
    **dict.fromkeys(
        ("flush", "log_metric", "log_metrics", "log_param", "log_params"), "logger.functions"
    ),
    **dict.fromkeys(("log_series", "set_tag", "set_tags", "stats"), "logger.functions"),
    "Handle": "logger.handle",
    "MetricLogger": "logger.metric_logger",
    **dict.fromkeys(("Report", "Stats"), "logger.report"),
    "Settings": "settings.settings",
}

__all__ = [
    "DeliveryError",
    "FlowbufferError",
    "Handle",
    "InvalidArgument",
    "InvalidPoint",
    "MetricLogger",
    "Report",
    "SettingError",
    "Settings",
    "SpoolError",
    "SpoolFormatError",
    "SpoolFull",
    "Stats",
    "Switch",
    "WaitTimeout",
    "__version__",
    "disable",
    "enable",
    "flush",
    "log_metric",
    "log_metrics",
    "log_param",
    "log_params",
    "log_series",
    "set_tag",
    "set_tags",
    "stats",
]


if not TYPE_CHECKING:  # for type checkers there is nothing but what is imported above

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
