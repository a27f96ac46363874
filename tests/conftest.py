import os

import pytest

# Before torch is imported: OpenMP threads that spin while they wait make tests on shared cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from tests.server.running import server  # noqa: E402, F401 - started once, for whichever tests ask for it


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` runs two processes. One of them runs all tests of the common server and of `half`, in bfloat16, which
    would come last and alone: larger groups go first. Other files go whole to either."""
    for item in items:
        shared = {"server", "half"} & set(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("server" if shared else item.path.name))
