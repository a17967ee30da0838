"""The public door: what is there, how light it is, and what it says of bad input."""

from __future__ import annotations

import decimal
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flowbuffer
from flowbuffer.errors import InvalidPoint
from flowbuffer.spool.writing.points import (
    checked_key,
    checked_series,
    checked_step,
    checked_timestamp,
    checked_value,
)


def repr_start(value: object) -> str:
    return repr(value)[:20]


def test_the_public_names() -> None:
    """A name cannot come or go by accident."""
    assert set(flowbuffer.__all__) == {
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
    }
    assert all(hasattr(flowbuffer, name) for name in flowbuffer.__all__)
    assert set(flowbuffer.__all__) <= set(dir(flowbuffer))
    with pytest.raises(AttributeError, match="no attribute 'log_image'"):
        flowbuffer.log_image  # noqa: B018


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            flowbuffer.MetricLogger.__init__,
            "self run_id tracking_uri experiment run_name settings changes",
        ),
        (flowbuffer.MetricLogger.log_metric, "self key value step timestamp"),
        (flowbuffer.MetricLogger.log_metrics, "self metrics step timestamp"),
        (flowbuffer.MetricLogger.log_series, "self key values steps timestamps"),
        (flowbuffer.MetricLogger.log_params, "self params"),
        (flowbuffer.MetricLogger.set_tags, "self tags"),
        (flowbuffer.MetricLogger.flush, "self timeout"),
        (flowbuffer.MetricLogger.close, "self timeout failed"),
        (flowbuffer.Handle.wait, "self timeout"),
        (flowbuffer.Handle.exception, "self timeout"),
        (flowbuffer.log_metric, "key value step timestamp"),
        (flowbuffer.log_metrics, "metrics step timestamp"),
        (flowbuffer.log_series, "key values steps timestamps"),
    ],
)
def test_the_parameters(function: object, parameters: str) -> None:
    """A parameter cannot be renamed by accident."""
    assert list(inspect.signature(function).parameters) == parameters.split()  # type: ignore[arg-type]


def test_what_is_shown_is_public(tmp_path: Path) -> None:
    """dir() of the package, of a logger and of a handle show the public names and nothing else but
    what Python has in every object."""
    assert dir(flowbuffer) == sorted(flowbuffer.__all__)
    settings = flowbuffer.Settings(spool_dir=tmp_path / "spool", offline=True)
    with flowbuffer.MetricLogger("run", settings=settings) as logger:
        handle = logger.log_metric("loss", 1.0)
        shown = {name for name in dir(handle) if not name.startswith("__")}
        assert shown == {"done", "exception", "wait"}
        shown = {name for name in dir(logger) if not name.startswith("__")}
    assert shown == {
        *("close", "closed", "flush", "run_id", "settings", "stats"),
        *("log_metric", "log_metrics", "log_param", "log_params", "log_series"),
        *("set_tag", "set_tags"),
    }
    assert all(hasattr(logger, name) for name in shown)


def test_the_types_are_those_of_a_user() -> None:
    """mypy, as strict as it can be, takes the right uses of every public name, with text for paths
    and NumPy's integers for steps, and refuses the wrong ones."""
    pytest.importorskip("mypy", reason="scripts/check has it")
    root = Path(__file__).parent.parent
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "tests/typing/api.py"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_the_import_is_light() -> None:
    """Importing flowbuffer imports neither MLflow nor NumPy nor pandas."""
    code = "import sys, flowbuffer; print({'mlflow', 'numpy', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("key", ["loss", "a/b", "a b", "with-all_of.these: 1", "größe", "k" * 250])
def test_a_key_that_mlflow_takes(key: str) -> None:
    """Keys are checked by MLflow's rules: these are good."""
    from mlflow.utils.validation import _validate_metric_name

    assert checked_key(key) == key
    _validate_metric_name(key)


@pytest.mark.parametrize(
    "key",
    ["", ".", "..", "../x", "/x", "a//b", "a/../b", "a?", "a\nb", "a\n", "k" * 251, 7, None, ["a"]],
)
def test_a_key_that_mlflow_refuses(key: object) -> None:
    """P5: an invalid key raises at the call, with what was wrong and what would be right."""
    with pytest.raises(InvalidPoint, match="key"):
        checked_key(key)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.int8(3), 3.0),
        (np.array(2.5), 2.5),
        (np.ones(1), 1.0),
        (np.full((1, 1), 2, np.int8), 2.0),
        (decimal.Decimal("0.25"), 0.25),
        (float("inf"), float("inf")),
    ],
)
def test_a_value(value: object, expected: float) -> None:
    """Python and NumPy numbers, bool, arrays of one element and whatever has __float__ are values,
    as for MLflow."""
    from mlflow.tracking.metric_value_conversion_utils import (
        convert_metric_value_to_float_if_possible,
    )

    assert checked_value("k", value) == expected
    assert convert_metric_value_to_float_if_possible(value) == expected


@pytest.mark.parametrize(
    "value",
    ["1", b"1", None, [1], {}, 1j, object(), 10**400, np.ones(2), np.ones(0)],
    ids=repr_start,
)
def test_what_is_no_value(value: object) -> None:
    """P5: a value that is no number raises at the call and says so."""
    with pytest.raises(InvalidPoint, match="it must be a number"):
        checked_value("k", value)


@pytest.mark.parametrize("step", [0.5, "1", None, 1 << 63, float("nan"), []], ids=repr_start)
def test_what_is_no_step(step: object) -> None:
    """P5: a step that is not whole, or beyond 64 bits, raises at the call and says so."""
    with pytest.raises(InvalidPoint, match="whole number"):
        checked_step(step)


def test_whole_steps_and_times() -> None:
    """Steps and timestamps are whole numbers of any type; timestamps are not negative."""
    assert checked_step(np.int64(-3)) == -3
    assert checked_step(2.0) == 2
    assert checked_timestamp(1_700_000_000_000.0) == 1_700_000_000_000
    with pytest.raises(InvalidPoint, match="from 0"):
        checked_timestamp(-1)


@pytest.mark.parametrize(
    ("values", "steps", "timestamps", "said"),
    [
        ([[1.0]], None, None, "2 dimensions"),
        (1.0, None, None, "0 dimensions"),
        ([1.0, "x"], None, None, "must be a number"),
        ([1.0], [1, 2], None, "1 values and 2 steps"),
        ([1.0], [0.5], None, "whole number"),
        ([1.0], None, [-1], "at least 0"),
        ([1.0], None, [[1]], "2 dimensions"),
    ],
)
def test_what_is_no_series(values: object, steps: object, timestamps: object, said: str) -> None:
    """P5: a series is checked as a whole, with what was wrong in it."""
    with pytest.raises(InvalidPoint, match=said):
        checked_series("k", values, steps, timestamps)


def test_a_series() -> None:
    """Series are 1-D array-likes of any numbers."""
    values, steps, times = checked_series("k", [1, True, np.float32(2)], (3.0, 4.0, 5.0), None)
    assert values.tolist() == [1.0, 1.0, 2.0]
    assert steps is not None
    assert steps.tolist() == [3, 4, 5]
    assert times is None
