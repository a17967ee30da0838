"""The documentation is that of the code."""

from __future__ import annotations

import runpy
from pathlib import Path

import flowbuffer
from flowbuffer.commands import cli

ROOT = Path(__file__).parent.parent


def test_the_api_page_is_current() -> None:
    """docs/api.md is what scripts/api makes of the docstrings, and has every public name."""
    page = runpy.run_path(str(ROOT / "scripts" / "api"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text() == page, "run scripts/api"
    for name in set(flowbuffer.__all__) - {"__version__", "Switch"}:
        assert name in page


def test_the_readme_has_every_command() -> None:
    """README's table of commands has each command and each of its options."""
    text = (ROOT / "README.md").read_text()
    for name, command in cli._commands.commands.items():
        assert f"| `{name}` |" in text
        for option in command.params:
            assert option.opts[0] in text
