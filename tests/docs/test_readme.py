"""README.md and docs/ name what exists, and the README stays short. `make test-docs` runs their commands."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from posterior.data.reading import read_rows
from server.cli import main
from tests.docs.blocks import PAGES, README, ROOT, RUN, SHOWN, Block, blocks, prose

VERBS = ("fit", "import", "calibrate", "evaluate", "probe", "inspect", "serve", "doctor", "key", "ask")
LINKING = (*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks").rglob("*.md")))
ROOMS = ("server/http/", "server/services/", "server/engine/compat/", "server/workers/")  # server/ moves into them
COMMANDS = re.compile(r"(posterior|make|curl|git|python|pip|\$|\.venv/bin/\S+) ")
ALL = [block for page in PAGES for block in blocks(page)]


def ids(item: Block | Path) -> str:
    return item.place if isinstance(item, Block) else str(item.relative_to(ROOT))


@functools.cache
def help_of(verb: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    return out.getvalue()


def flags_of(verb: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", help_of(verb)))


def commands(text: str) -> list[list[str]]:
    """Every call of the command `posterior` in it, in words from its verb on."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
            if words and Path(words[0]).name == "posterior" and len(words) > 1:
                found.append(words[1:])
    return found


def test_the_readme_is_short() -> None:
    text = README.read_text()
    paragraphs = [part for part in re.split(r"\n\s*\n|\n(?=- )", prose(README)) if not part.lstrip().startswith("|")]
    longest = max(paragraphs, key=lambda part: len(part.split()))
    assert len(text.splitlines()) <= 100
    assert len(text.split()) <= 800
    assert len(longest.split()) <= 60, longest
    assert text.count("](docs/figures/") >= 1


@pytest.mark.parametrize("block", ALL, ids=ids)
def test_every_block_runs_or_says_why_not(block: Block) -> None:
    if block.mark == "not run":
        assert len(block.reason.split()) >= 3, "a block that is not run says why"
    assert block.language in (*RUN, *SHOWN)
    if block.language == "json":
        json.loads(block.text)
    if block.language == "text":
        assert not [line for line in block.text.splitlines() if COMMANDS.match(line)]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_verb_and_option_exists(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    texts = [block.text for block in blocks(page) if block.language == "sh"] + spans
    for words in (words for text in texts for words in commands(text)):
        verb, *rest = words
        assert verb in (*VERBS, "VERB"), words
        assert verb == "VERB" or {word for word in rest if word.startswith("--")} <= flags_of(verb), words
    known = set[str]().union(*(flags_of(verb) for verb in VERBS))
    alone = {word for span in spans if span.startswith("--") for word in span.split() if word.startswith("--")}
    assert alone <= known, alone - known


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_target_module_and_path_exists(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    texts = [block.text for block in blocks(page) if block.language == "sh"] + spans
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in texts:
        assert not (made := set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) - targets), made
        for module in re.findall(r"python -m ((?:benchmarks|tests|posterior)\.\w+)", text):
            assert importlib.util.find_spec(module), module
        for path in re.findall(
            r"(?<![\w./-])((?:benchmarks|clients|docs|examples|posterior|requirements|server|tests|tools)/[\w./-]*)",
            text,
        ):
            new = "NAME" in text or any(path.startswith(room) and not (ROOT / room).exists() for room in ROOMS)
            assert new or (ROOT / path).exists() or text.startswith("make "), path


@pytest.mark.parametrize("page", LINKING, ids=ids)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        assert re.match("https?:", target) or file.exists(), target
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_readme_fits_rows_that_exist() -> None:
    words = [words for block in blocks(README) for words in commands(block.text)]
    fit, evaluate, *_ = [each for each in words if each[0] in ("fit", "evaluate")]
    answers = [answer.strip() for answer in fit[fit.index("--answers") + 1 : fit.index("--answers") + 3]]
    for name, least in ((fit[1], 40), (evaluate[2], 59)):
        rows = read_rows(ROOT / name)
        assert len(rows) >= least and {row["label"] for row in rows} == set(answers)
    assert evaluate[1] == fit[fit.index("--out") + 1]


def test_the_examples_do_not_overlap() -> None:
    names = ("reviews.csv", "held-out.csv")
    fitted, held = ({row["text"] for row in read_rows(ROOT / "examples" / name)} for name in names)
    assert not fitted & held


def test_the_readme_claims_no_number_of_its_own() -> None:
    measured = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    for number in re.findall(r"\d\.\d{3} ± \d\.\d{3}", README.read_text()):
        assert number in measured, number
