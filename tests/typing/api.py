"""The public names as a user's type checker sees them: right uses pass, wrong ones are errors.

Nothing here is run. ``test_api.py`` checks it with ``mypy --strict``, for which a wrong use that
passes is an error, too: its comment is unused then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

import flowbuffer
from flowbuffer import Handle, MetricLogger, Report, Settings, Stats


def settings() -> None:
    made: Settings = Settings(spool_dir="/tmp/spool", linger_s=0.1)
    Settings(spool_dir=Path("/tmp/spool"), max_in_flight=None, delivery="thread", enabled=True)
    Settings.from_env({"FLOWBUFFER_LINGER_S": "1"}, strict=False)
    folder: Path | None = made.spool_dir
    seconds: float = made.linger_s
    flag: bool | None = made.enabled
    print(folder, seconds, flag, made.with_changes(ranks="0").resolved_spool_dir().parent)
    Settings(spool_dir=5)  # type: ignore[arg-type]
    Settings(delivery="pigeon")  # type: ignore[arg-type]
    Settings(lingers=1)  # type: ignore[call-arg]
    made.linger_s = 1  # type: ignore[misc]


def logging(losses: dict[str, float], counts: Mapping[str, np.int64]) -> None:
    with MetricLogger("id", tracking_uri="sqlite:///m.db", settings=Settings()) as logger:
        handle: Handle = logger.log_metric("loss", 0.5, step=3)
        logger.log_metric("loss", np.float32(0.5), np.int64(3), timestamp=np.int64(1))
        logger.log_metric("loss", np.ones(1)[0])
        logger.log_metrics(losses, np.arange(3)[1])
        logger.log_metrics(counts)
        logger.log_series("lr", [0.1, 0.2], steps=range(2))
        logger.log_series("lr", np.linspace(0, 1), timestamps=None)
        logger.log_params({"lr": 0.1, "layers": [1, 2]})
        logger.log_param("lr", 0.1).wait(timeout=10)
        logger.set_tags({"a": "b"})
        logger.set_tag("a", 1)
        report: Report = logger.flush(timeout=1)
        stats: Stats = logger.stats()
        left: int = report.pending + stats.pending
        error: flowbuffer.DeliveryError | None = handle.exception(0.5)
        print(left, error, handle.done(), logger.run_id.upper(), logger.settings.strict)
        logger.log_metric("loss", "text")  # type: ignore[arg-type]
        logger.log_metric("loss", 0.5, step="1")  # type: ignore[arg-type]
        logger.log_metric("loss", 0.5, step=0.5)  # type: ignore[arg-type]
        logger.log_metrics([("a", 1)])  # type: ignore[arg-type]
        logger.log_params("x")  # type: ignore[arg-type]
        logger.set_tags(["a"])  # type: ignore[arg-type]
        logger.flush("x")  # type: ignore[arg-type]
        handle.wait("x")  # type: ignore[arg-type]
        logger.log_image("x")  # type: ignore[attr-defined]
    MetricLogger(experiment="trees", run_name="oak", linger_s=0.1, ranks="0")
    MetricLogger(settings={})  # type: ignore[arg-type]


async def waiting(logger: MetricLogger) -> None:
    await logger.log_metric("loss", 0.5)


def functions() -> None:
    with flowbuffer.enable(linger_s=0.1):
        flowbuffer.log_metric("loss", 0.5, np.int64(1)).wait()
        flowbuffer.log_metrics({"loss": 0.5})
        flowbuffer.log_series("loss", np.zeros(3))
        flowbuffer.log_param("p", 1)
        flowbuffer.set_tags({"t": 1})
    print(flowbuffer.flush(3).seconds, flowbuffer.stats().lag_s, flowbuffer.__version__)
    flowbuffer.disable()
    flowbuffer.log_metrik("loss", 0.5)  # type: ignore[attr-defined]


def errors(logger: MetricLogger) -> None:
    try:
        logger.log_metric("loss", 0.5).wait(1)
    except (flowbuffer.InvalidPoint, flowbuffer.SpoolFull) as error:
        print(error)
    except flowbuffer.WaitTimeout:
        pass
    except flowbuffer.FlowbufferError:
        raise
