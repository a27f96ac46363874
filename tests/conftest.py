from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from tests.server.running import Running

# Before torch is imported: OpenMP threads that spin while they wait make tests on shared cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process a core


@cache
def asks_the_server(file: str) -> bool:
    """Whether a test of this file asks the real server."""
    return "server: Running" in (Path(__file__).parents[1] / file).read_text()


class Files(LoadScopeScheduling):
    """A file's tests run in one process, and all files that ask the real server in the same one: it starts once."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "server" if asks_the_server(file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real server's tests run first: together they take as long as nearly all others. Then the files of the upper
    folders, which have the longest tests; short files at the end keep both processes at work."""

    def order(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return 0 if asks_the_server(file) else file.count("/")

    items.sort(key=order)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The one real server, started when a test first asks for it."""
    # Not before: pytest's own process, which runs no test, would wait for it.
    from tests.server.running import OPTIONS, serving

    with serving(tmp_path_factory.mktemp("serving"), *OPTIONS) as running:
        yield running
