"""docs/reliability.md: each command of its table names tests, or a target of make, that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("line", LINES, ids=[line.split("|")[1].strip()[:50] for line in LINES])
def test_the_command_is_there(line: str) -> None:
    commands = re.findall(r"`([^`]+)`", line.split("|")[3])
    assert commands
    for command in commands:
        if target := re.match(r"make ([\w-]+)", command):
            assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        else:
            file, _, name = command.split()[0].partition("::")
            assert f"def {name or 'test_'}" in (ROOT / file).read_text(), command
