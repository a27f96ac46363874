"""The code blocks of README.md and docs/, and what becomes of each.

| language         | what becomes of it                                                                         |
|------------------|--------------------------------------------------------------------------------------------|
| `sh`, `python`   | `make test-docs` runs it, in the order of the page, where the block before left off        |
| `json`           | shown output: it parses, and the answer of the `sh` block before it holds the same values  |
| `yaml`           | a configuration of another program, which tests/clients/run_litellm.py runs                |
| `typescript`     | the example of clients/typescript, which `make typescript-test` runs                       |
| `text`           | a formula, a tree, a picture: no line of it is a command                                   |

A comment on the line above a block changes that:

    <!-- server -->            the block starts a server, which stays up until another block starts one
    <!-- not run: REASON -->   the block is not run
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
RUN, SHOWN = ("sh", "python"), ("json", "yaml", "typescript", "text")
FENCE = re.compile(r" *```(\w*)")
MARK = re.compile(r"<!-- (server|not run)(?:: (.+))? -->")


@dataclass(frozen=True)
class Block:
    """line: of the opening fence, from 1; mark: "", "server" or "not run"; reason: of the mark."""

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.mark != "not run"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page. Raises ValueError for one that does not end."""
    found, lines = [], page.read_text().splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        fence = FENCE.fullmatch(line)
        if fence and start is None:
            start = number
        elif fence and start is not None:
            mark = MARK.fullmatch(lines[start - 1].strip())
            kind, reason = (mark[1], mark[2] or "") if mark else ("", "")
            language = lines[start].strip().removeprefix("```")
            found.append(Block(page, start + 1, language, "\n".join(lines[start + 1 : number]), kind, reason))
            start = None
    if start is not None:
        raise ValueError(f"{page}:{start + 1}: a block without an end")
    return found


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text())
