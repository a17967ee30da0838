"""The interpreters that flowbuffer runs on."""

import sys

import pytest

from flowbuffer import MetricLogger, notices


@pytest.mark.parametrize("has_gil", [True, False])
def test_a_build_without_the_gil_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_gil: bool,
) -> None:
    """A logger that opens where threads run at the same time says that this is not promised, once
    in a process; with the interpreter's lock, and before 3.13, nothing is said."""
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: has_gil, raising=False)
    monkeypatch.setattr(notices, "_warned", set())
    for _ in range(2):
        with MetricLogger("run", tracking_uri="http://127.0.0.1:9", offline=True) as logger:
            logger.log_metric("loss", 1.0)
    said = [text for text in caplog.messages if "interpreter lock" in text]
    assert len(said) == (0 if has_gil else 1)
