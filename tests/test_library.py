"""examples/library.py: the Python API from rows to answers, where there is no vLLM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.posterior.conftest import save_tiny_base

EXAMPLE = Path(__file__).parents[1] / "examples" / "library.py"
WITHOUT_VLLM = """
import runpy, sys
sys.modules["vllm"] = None  # an import of it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not [name for name in sys.modules if name.split(".")[0] in ("server", "fastapi") or name.startswith("vllm.")]
"""


@pytest.mark.long
def test_the_example_runs_without_vllm(tmp_path: Path) -> None:
    base, out = save_tiny_base(tmp_path / "base"), tmp_path / "reviews"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    words = [str(EXAMPLE), "--base", str(base), "--epochs", "1", "--out", str(out)]
    command, one_thread = [sys.executable, "-c", WITHOUT_VLLM, *words], {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=one_thread, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, *rest = ended.stdout.splitlines()
    assert re.fullmatch(r"<Posterior reviews@[0-9a-f]{12}: laplace of base>", first), ended.stdout
    assert [line.split(":")[0] for line in rest[:3]] == ["MAP", "linearized", "8 particles"]
    assert re.fullmatch(
        r"100 rows chose (linearized|mixture|map), calibrated by (none|temperature|vector|platt|isotonic)", rest[3]
    )
    assert re.fullmatch(
        r"(negative|positive): [01]\.\d\d \(\d\.\d\d nats of doubt, 0\.\d\d of it the model's own\)", rest[4]
    )
    assert rest[6] == "4 adapters drawn from the posterior"
