"""docs/upgrading-vllm.md names every file that touches vLLM, with names that are in that file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.docs.blocks import ROOT
from tests.test_house import imports

ENGINE = ROOT / "server" / "engine"
COMPAT = ENGINE / "compat"
PAGE = ROOT / "docs" / "upgrading-vllm.md"


def rows() -> dict[str, set[str]]:
    """The names in the last cell of each row that begins with a file."""
    found = re.findall(r"^\| `(\w+\.py)` \|.*\| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return {file: set(re.findall("`([^`]+)`", names)) for file, names in found}


def touching() -> list[Path]:
    """The files of `server/` that import vLLM, and all of compat/."""
    importing = [
        path
        for path in (ROOT / "server").rglob("*.py")
        if any(each.name.split(".")[0] == "vllm" for each in imports(path.read_text(), str(path)))
    ]
    return sorted({*importing, *COMPAT.glob("*.py")} - {COMPAT / "__init__.py"})


def test_every_file_that_touches_vllm_has_a_row() -> None:
    assert all(path.parent in (ENGINE, COMPAT) for path in touching())
    assert {path.name for path in touching()} <= rows().keys()


def test_the_names_of_a_row_are_in_its_file() -> None:
    files = {path.name: path for folder in (ENGINE, COMPAT) for path in folder.glob("*.py")}
    for file, names in rows().items():
        words = {word for node in ast.walk(ast.parse(files[file].read_text())) for word in _words(node)}
        assert names <= words, (file, names - words)


def _words(node: ast.AST) -> list[str]:
    """The names in a node of code, and its text if it is one."""
    fields = (getattr(node, name, None) for name in ("id", "attr", "arg", "name", "value"))
    return [each for each in fields if isinstance(each, str)]
