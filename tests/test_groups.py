"""`make test` runs two processes. Were a file's tests spread over both, each would start servers and fit posteriors of
its own, and xdist says nothing where it does not see the groups of tests/conftest.py."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has no groups")
def test_a_file_stays_whole(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@test_groups.py")
