from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.metrics import Metrics
from server.store.store import Store
from tests.server.store.made import Cluster, cluster

Opened = Callable[..., Store]


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """That of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'a folder' / 'outcomes.db'}"
    own: Cluster = request.getfixturevalue("postgresql")
    return own.database()


@pytest.fixture
def opened(url: str) -> Iterator[Opened]:
    """Opens stores of the database, which are closed in the end."""
    with contextlib.ExitStack() as stack:

        def open_(**options: Any) -> Store:
            store = Store(url, Metrics(), **options)
            stack.callback(store.close)
            return store

        yield open_


@pytest.fixture
def store(opened: Opened) -> Store:
    return opened()
