"""Buffered metric logging for MLflow and Azure ML: a microsecond a point, in order, none lost.

import flowbuffer

with flowbuffer.MetricLogger() as logger:
    for step in range(100_000):
        logger.log_metric("loss", 1 / (step + 1), step)
"""

from flowbuffer.errors import (
    DeliveryError,
    FlowbufferError,
    InvalidPoint,
    SettingError,
    SpoolError,
    SpoolFormatError,
    SpoolFull,
    WaitTimeout,
)
from flowbuffer.fluent import flush, log_metric, log_metrics, log_series, stats
from flowbuffer.handle import Handle
from flowbuffer.logger import MetricLogger
from flowbuffer.report import Report, Stats
from flowbuffer.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "DeliveryError",
    "FlowbufferError",
    "Handle",
    "InvalidPoint",
    "MetricLogger",
    "Report",
    "SettingError",
    "Settings",
    "SpoolError",
    "SpoolFormatError",
    "SpoolFull",
    "Stats",
    "WaitTimeout",
    "__version__",
    "flush",
    "log_metric",
    "log_metrics",
    "log_series",
    "stats",
]
