"""Which part of the code may import which: docs/architecture.md as a test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: a room (a folder or a module of the package) imports those of earlier lines and itself, and
# nothing else of its package. Rooms in one line do not import each other.
SERVER: Sequence[Sequence[str]] = (
    ("errors",),
    ("access", "configuration", "logs", "tracing"),
    ("validation", "console", "metrics"),
    ("engine", "workers", "store"),
    ("services",),
    ("http",),
    ("main", "doctor", "replicas"),
    ("calibrate",),
    ("cli",),
)
POSTERIOR: Sequence[Sequence[str]] = (
    ("errors",),
    ("settings", "files", "validation"),
    ("models",),
    ("data",),
    ("predictive", "meaning"),
    ("likelihood",),
    ("curvature",),
    ("training",),
    ("laplace",),
    ("particles", "calibration"),
    ("storage",),
    ("evaluation",),
    ("fitting", "importing"),
    ("api",),
    ("cli",),
)
ORDER = {"server": SERVER, "posterior": POSTERIOR}
FOREIGN = {"server": ("posterior",), "posterior": ()}  # the other packages of this repository that one may import
# Libraries, with the only rooms that may import them.
ONLY = {
    "vllm": {"server.engine"},
    "fastapi": {"server.http"},
    "starlette": {"server.http", "server.replicas"},
    "uvicorn": {"server.http"},
    "sqlalchemy": {"server.store"},
    "alembic": {"server.store"},
    "opentelemetry": {"server.tracing"},
    "aiohttp": {"server.replicas"},
    "ray": {"server.replicas"},
}


@dataclass(frozen=True)
class Import:
    """Module `name`, imported by `file` at `line`."""

    file: str
    line: int
    name: str


def imports(source: str, file: str) -> Iterator[Import]:
    """Every import of a file, also those within functions and those for types only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                parts = file.removesuffix(".py").split("/")[: -node.level]
                base = ".".join([*parts, *filter(None, [node.module])])
            yield from (Import(file, node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room(name: str) -> str:
    """The room of a dotted module name or of a path: "server.http" of both server.http.app and server/http/app.py."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return ".".join(parts[:2])


def wrong(found: Import) -> str | None:
    """Why this import may not be, in one line; None if it may."""
    where, own, other = f"{found.file}:{found.line}", room(found.file), room(found.name)
    package, _, inside = own.partition(".")
    library, _, outside = other.partition(".")
    if library in ONLY and own not in ONLY[library]:
        return f"{where} imports {library}; only {', '.join(sorted(ONLY[library]))} may"
    if library in FOREIGN and library != package and library not in FOREIGN[package]:
        return f"{where} imports {found.name}; {package}/ may not import {library}/"
    if package not in ORDER or library != package or inside in ("__init__", outside):
        return None
    floors = {each: floor for floor, rooms in enumerate(ORDER[package]) for each in rooms}
    for each in (inside, outside):
        if each not in floors:
            return f"{where}: {package}.{each} has no place in the order of tests/test_house.py"
    if floors[outside] < floors[inside]:
        return None
    return f"{where} imports {found.name}; {own} may import only {', '.join(_below(package, floors[inside]))}"


def _below(package: str, floor: int) -> list[str]:
    return [f"{package}.{each}" for rooms in ORDER[package][:floor] for each in rooms] or ["nothing of its package"]


def files(package: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("file", [file for package in FOREIGN for file in files(package)])
def test_a_file_imports_only_what_lies_below(file: str) -> None:
    found = [wrong(each) for each in imports((ROOT / file).read_text(), file)]
    assert not (lines := [line for line in found if line]), "\n".join(lines)


@pytest.mark.parametrize("package", ORDER)
def test_every_room_has_its_place(package: str) -> None:
    rooms = {room(file).partition(".")[2] for file in files(package)} - {"__init__"}
    assert rooms == {each for floor in ORDER[package] for each in floor}


@pytest.mark.parametrize(
    ("file", "source", "words"),
    [
        ("server/services/x.py", "from server.http import app", "server/services/x.py:1 imports server.http.app; "),
        ("server/services/x.py", "def f():\n    import server.http.app", "may import only server.errors, "),
        ("server/services/x.py", "from ..http.app import create_app", "imports server.http.app"),
        ("server/services/x.py", "import fastapi", "imports fastapi; only server.http may"),
        ("server/workers/x.py", "from server.engine import gang", "imports server.engine.gang"),
        ("server/http/x.py", "from vllm import LLM", "imports vllm; only server.engine may"),
        ("server/errors.py", "from server import cli", "nothing of its package"),
        ("server/http/x.py", "from server.attic import box", "server.attic has no place"),
        ("posterior/x/y.py", "from server.engine import gang", "posterior/ may not import server/"),
    ],
)
def test_a_wrong_direction_is_named(file: str, source: str, words: str) -> None:
    (line,) = [line for line in map(wrong, imports(source, file)) if line]
    assert words in line


@pytest.mark.parametrize("source", ["from server.services import choices", "from . import errors", "import torch"])
def test_the_right_direction_passes(source: str) -> None:
    assert not [line for line in map(wrong, imports(source, "server/http/x.py")) if line]


def option_names(source: str) -> Iterator[str]:
    """Strings that name an option of the command, docstrings and commands of pip aside."""
    tree = ast.parse(source)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    docs = {body[0].value for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in docs and isinstance(node.value, str):
            yield from re.findall(r"(?<!install )--[a-z][a-z-]*", node.value)


def test_the_library_speaks_of_settings_and_not_of_options():
    """A notebook sees the same errors as the command does; SettingError gives each its own name of a setting."""
    files = [path for path in (ROOT / "posterior").rglob("*.py") if "cli" not in path.relative_to(ROOT).parts]
    assert {str(path): found for path in files if (found := list(option_names(path.read_text())))} == {}
    assert list(option_names('"""--doc"""\nraise E(f"{x} is too long; lower --max-length")')) == ["--max-length"]
