"""A pytest plugin: whatever a test starts ends with it, whether it passes, fails, hangs or is
interrupted; and with pytest, however that ends. See `support.marks`."""

import itertools
import os
import secrets
from collections.abc import Generator

import pytest

from support import marks

_numbers = itertools.count()
_run = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Each of xdist's workers has a watchdog, and the process that started them, too."""
    mark = f"{os.environ.get(marks.MARK, '')}/{secrets.token_hex(8)}"
    watchdog = marks.start_watchdog(mark)
    marking = marks.carried_on(mark)

    def end() -> None:
        marking.__exit__(None, None, None)
        watchdog.communicate()

    marking.__enter__()
    config.stash[_run] = mark
    config.add_cleanup(end)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test's processes carry its mark."""
    mark = f"{item.config.stash[_run]}/{next(_numbers)}"
    try:
        with marks.carried_on(mark):
            return (yield)
    finally:
        marks.end(mark)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """What a fixture starts for several tests is no single one's."""
    if fixturedef.scope == "function":
        return (yield)
    with marks.carried_on(request.config.stash[_run]):
        return (yield)
