import os

# Before torch is imported: OpenMP threads that spin while they wait make tests on shared cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from tests.server.running import server  # noqa: E402, F401 - started once a process, for whichever tests ask
