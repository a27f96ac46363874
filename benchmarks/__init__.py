"""One script a question; each prints the table that answers it. Threads wait passively: on shared cores spinning is
far slower."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
