"""The documentation is that of the code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

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


def test_the_map_of_the_rooms_is_that_of_the_sources() -> None:
    """docs/design.md names each module in its room, and nothing else."""
    text = (ROOT / "docs" / "design.md").read_text().split("## The rooms\n")[1]
    block = text.split("```")[1]
    found = set()
    outer = inner = ""
    for line in block.splitlines():
        words = line.split()
        if words and words[0].endswith("/"):
            outer, inner = (outer, words[0]) if line.startswith(" ") else (words[0], "")
        found |= {outer + inner + name for name in re.findall(r"\b_*[a-z]\w*\.py\b", line)}
    sources = Path(flowbuffer.__file__).parent
    there = {path.relative_to(sources).as_posix() for path in sources.rglob("*.py")}
    assert found == {name for name in there if not name.endswith("__init__.py")}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/design.md"])
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    """Where to look, and where to change what, is a file that is there."""
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:[\w.]+/)*\w+\.py|(?:scripts|benchmarks|examples|docs)/[\w./]+)", text)
    named += re.findall(r"\]\(([\w./]+)", text)
    places = (ROOT, Path(flowbuffer.__file__).parent, (ROOT / page).parent)
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert named
    assert missing == []
