"""Runs every command of README.md and docs/ as a reader would: `make test-docs` (minutes). blocks.py has the rules.

A reader starts from a clone of this working tree. Its .venv is the one that runs the tests, so `make` does not make it
again (SETUP=true), and port 8000 is a free port. Pages share the clone: docs/ may use what the README's commands made.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docs.blocks import PAGES, README, ROOT, Block, blocks
from tests.server.running import free_port

LIMIT = 1800  # seconds a block, and for a server to be ready
REPOSITORY = "<this repository>"


class Reader:
    """A shell whose folder stays from block to block, and at most one server."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.origin, self.started = folder / "origin", ""
        self.server: subprocess.Popen[bytes] | None = None
        self.log = folder / "server.log"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("POSTERIOR_")},
            "POSTERIOR_CACHE": str(folder / "cache"),
            "POSTERIOR_BASE_URL": f"http://127.0.0.1:{self.port}/v1",
            "SETUP": "true",
        }

    def publish(self) -> None:
        """The working tree as a repository that can be cloned."""
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        self.origin.mkdir()
        copied = [name for name in names.split(b"\0") if name and (ROOT / os.fsdecode(name)).is_file()]
        tar = subprocess.run(
            ["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input=b"\0".join(copied), stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x"], cwd=self.origin, input=tar.stdout, check=True)
        identity = ("-c", "user.name=reader", "-c", "user.email=reader@localhost")
        for command in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-q", "-m", "tree")):
            subprocess.run(["git", *command], cwd=self.origin, check=True)

    def run(self, block: Block) -> str:
        """What the block prints; a server's block prints nothing and leaves the server running."""
        text = block.text.replace(REPOSITORY, str(self.origin)).replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        if block.mark == "server":
            self.serve(text)
            return ""
        if block.language == "python":
            text = f".venv/bin/python - <<'END'\n{text}\nEND"
        where = self.origin.parent / "where"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{text}\npwd >{where}"],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.place}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        with (self.origin.parent / "said").open("a") as said:  # for whoever looks at the run
            said.write(f"{block.place}\n{done.stdout}\n")
        self.folder = Path(where.read_text().strip())
        return done.stdout

    def serve(self, text: str) -> None:
        if self.server is not None and self.started == text and self.server.poll() is None:
            return
        self.stop()
        command = text.replace("make serve", f"make serve SERVE='--port {self.port}'")
        command = command.replace("posterior serve", f"posterior serve --port {self.port}")
        with self.log.open("wb") as log:
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.started, deadline = text, time.monotonic() + LIMIT
        while time.monotonic() < deadline and self.server.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        pytest.fail(f"{text}: not ready:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        if self.server is not None and self.server.poll() is None:
            os.killpg(self.server.pid, signal.SIGTERM)
            self.server.wait(60)


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Stands in a clone, as after the README's first command."""
    reader = Reader(tmp_path_factory.mktemp("reader"))
    reader.publish()
    reader.run(blocks(README)[0])
    (reader.folder / ".venv").symlink_to(sys.prefix)
    paths = [str(reader.folder), str(reader.folder / "clients" / "python")]
    reader.environment["PYTHONPATH"] = os.pathsep.join(paths)
    yield reader
    reader.stop()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(reader: Reader, page: Path) -> None:
    everything = blocks(page)[1:] if page == README else blocks(page)
    if page != README and any("posteriors/reviews" in block.text for block in everything):
        fitted(reader)
    said = ""
    for block in everything:
        if block.runs:
            said = reader.run(block)
        elif block.language == "json" and block.mark != "not run":
            reply = json.loads(said)
            shown_in(json.loads(block.text), reply["data"][0] if "data" in reply else reply, block.place)


def fitted(reader: Reader) -> None:
    """The README's fit, unless its page has run."""
    if not (reader.folder / "posteriors" / "reviews" / "posterior.json").exists():
        reader.run(next(block for block in blocks(README) if "--out posteriors/reviews" in block.text))


def shown_in(shown: Any, found: Any, place: str) -> None:
    """Every value that is shown is in the answer, numbers to .02: other processors round otherwise."""
    if isinstance(shown, dict):
        for key, value in shown.items():
            shown_in(value, found[key], f"{place} {key}")
    elif isinstance(shown, list):
        assert len(shown) == len(found), place
        for a, b in zip(shown, found, strict=True):
            shown_in(a, b, place)
    elif isinstance(shown, float):
        assert found == pytest.approx(shown, abs=0.02), place
    else:
        assert found == shown, place
