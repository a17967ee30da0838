"""What a forked child does first of all."""

import pytest

from flowbuffer import forks


def test_hooks_are_called_in_the_order_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forked child the order does not depend on what was imported first, and a hook that
    raises keeps none of the others from being called; its error is not swallowed."""
    called: list[str] = []
    monkeypatch.setattr(forks, "_hooks", {})

    def fail() -> None:
        called.append("failed")
        raise OSError("a descriptor is gone")

    forks.in_child("dropin.switch", lambda: called.append("switch"))
    forks.in_child("logger.job_end", fail)
    forks.in_child("spool.files", lambda: called.append("files"))
    with pytest.raises(OSError, match="a descriptor is gone"):
        forks._after_in_child()
    assert called == ["files", "failed", "switch"]


def test_a_module_that_is_not_in_the_table_is_refused() -> None:
    """So that somebody decides when its turn is."""
    with pytest.raises(ValueError, match="not in tuple"):
        forks.in_child("logger.somewhere", lambda: None)
