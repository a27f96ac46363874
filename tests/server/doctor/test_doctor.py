"""`posterior doctor`: each thing that can be wrong is a line that says what to do, without torch and vLLM."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posterior.errors import PosteriorError
from posterior.storage import record
from server import cli
from server.configuration.schema import SHIPPED, ServeSettings
from server.doctor import bases, memory, served, stack
from server.doctor.line import Line
from tests.server.running import free_port


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty cache and no settings."""
    for name in [name for name in os.environ if name.startswith("POSTERIOR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("POSTERIOR_CACHE", str(tmp_path / "cache"))
    return tmp_path


def base(folder: Path) -> Path:
    """A base of 1,000 parameters in bfloat16, two layers with one head of 4."""
    folder.mkdir(parents=True)
    header = json.dumps({"a": {"dtype": "BF16", "shape": [10, 100], "data_offsets": [0, 2000]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2000))
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[Line]]:
    """The exit status and the lines."""
    try:
        status = cli.main(["doctor", "--json", *words])
    except SystemExit as error:
        status = int(error.code or 0)
    return status, [Line(**line) for line in json.loads(capsys.readouterr().out)]


def of(lines: Sequence[Line], check: str) -> list[Line]:
    return [line for line in lines if line.check == check]


def test_a_machine_that_can_serve(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    status, lines = doctor(capsys, "--port", str(free_port()), "--base", str(base(home / "tiny")), "--device", "cpu")
    assert time.monotonic() - start < 5
    assert [line for line in lines if line.status == "fail"] == [] and status == 0
    checks = "settings python torch transformers peft packages vllm compiler keys port cache posteriors base memory"
    assert list(dict.fromkeys(line.check for line in lines)) == checks.split()
    assert of(lines, "torch")[0].what == f"torch {importlib.metadata.version('torch')}"
    assert [line.what.split()[0] for line in of(lines, "posteriors")] == ["sentiment", "support"]
    assert cli.main(["doctor", "--port", str(free_port()), "--base", str(home / "tiny"), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(lines) and shown[0] == "ok    settings    as asked for"


def test_what_is_wrong_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = home / "keys.toml"
    keys.write_text(f'[keys.a]\nsha256 = "{hashlib.sha256(b"a").hexdigest()}"\nmodels = ["sentiment"]\n')
    keys.chmod(0o644)
    (home / "cache").write_text("a file where a folder should be")
    (home / "none").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = f"--port {taken.getsockname()[1]} --keys {keys} --posteriors {home / 'none'} --base {home / 'nothing'}"
        status, lines = doctor(capsys, *words.split())
    assert status == 1
    assert [(line.check, line.status) for line in lines if line.status != "ok"] == [
        ("keys", "warn"), ("port", "fail"), ("cache", "fail"), ("posteriors", "fail"), ("base", "fail"),
    ]  # fmt: skip
    assert "chmod 600" in of(lines, "keys")[0].what and "choose another" in of(lines, "port")[0].what


def test_settings_are_read_as_serve_reads_them(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / "server.toml"
    file.write_text('host = "0.0.0.0"\nprot = 1\n')
    status, lines = doctor(capsys, "--config", str(file))
    assert status == 1 and "did you mean 'port'?" in of(lines, "settings")[0].what
    file.write_text(f'host = "0.0.0.0"\nport = {free_port()}\nssl_certfile = "nothing"\n')
    _, lines = doctor(capsys, "--config", str(file))
    assert "without a key" in of(lines, "keys")[0].what and "there is no file" in of(lines, "port")[0].what
    file.write_text(f'api_key = "s3cret"\nport = {free_port()}\ncompile = true\n')
    file.chmod(0o644)
    monkeypatch.setenv("PATH", "")
    _, lines = doctor(capsys, "--config", str(file))
    said = {line.check: line for line in lines if line.status != "ok"}
    assert f"run `chmod 600 {file}`" in said["settings"].what and said["compiler"].status == "fail"
    assert of(lines, "keys")[0].what == "1 of them"


def test_a_posterior_that_was_changed_is_named(home: Path) -> None:
    root = home / "posteriors"
    for name in ("good", "bad", "worse"):
        shutil.copytree(SHIPPED / "sentiment", root / name)
    with (root / "bad" / "laplace.safetensors").open("r+b") as file:
        file.write(b"x")
    (root / "worse" / record.NAME).write_text("{}")
    bad, good, worse = served.posteriors(root)
    assert (bad.status, good.status, worse.status) == ("fail", "ok", "fail")
    assert bad.what == f"{root}/bad/laplace.safetensors is missing or was changed"


PACKAGES = {
    "torch==1.0": ("fail", "this server was tested with ==1.0"),
    "nothing-of-this-name>=2": ("fail", "it is not installed; >=2 is needed"),
    "pytest>=1": ("ok", ""),
}


def test_versions_are_those_of_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "_own", lambda: (">=99", [*PACKAGES, 'vllm>=99; extra == "cuda"', 'x; extra == "y"']))
    (python,) = stack.python()
    assert python.status == "fail" and ">=99 is needed" in python.what
    lines = list(stack.packages())
    assert [(line.check, line.status) for line in lines] == [
        ("torch", "fail"), ("nothing-of-this-name", "fail"), ("vllm", "fail"),
    ]  # fmt: skip
    assert all(PACKAGES[name][1] in line.what for name, line in zip(PACKAGES, lines, strict=False))
    monkeypatch.setattr(stack, "_own", lambda: (None, []))
    first, vllm = stack.packages()
    assert first.status == "warn" and vllm.check == "vllm" and list(stack.python())[0].status == "ok"


def test_it_works_without_torch_and_vllm(home: Path) -> None:
    program = (
        "import sys, importlib.util as u, importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in ('torch', 'vllm'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from server.cli import main\n"
        "sys.exit(main(['doctor', '--port', '0', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    lines = [Line(**line) for line in json.loads(done.stdout)]
    wrong = {line.check: line for line in lines if line.status == "fail"}
    assert {"torch", "vllm"} == set(wrong) and all("cannot be imported" in line.what for line in wrong.values())


def test_the_sum_of_the_memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServeSettings(base=str(base(home / "tiny")), device="cpu", kv_cache_gib=2.0, particles=4)
    assert memory.weights(home / "tiny") == memory.Weights(1000, 2000)
    found = {}
    for free in (2.0, 4.3, 64.0):
        monkeypatch.setattr(memory.machine, "free", lambda _, free=free: free * 2**30)
        _, line = memory.lines(settings)
        found[free] = line.status
    assert found == {2.0: "fail", 4.3: "warn", 64.0: "ok"}
    tokens = 2 * 2**30 // (2 * 2 * 1 * 4 * 2)  # keys and values, layers, heads, width, bytes
    assert f"KV cache ({tokens:,} tokens, 1/K of that for K particles) 2.00" in line.what
    assert "10 adapters" in line.what, "four particles and theta* of each posterior"
    assert "base of the linearised worker in float32" in line.what and "3 processes" in line.what
    assert line.what.endswith("= 4.12 of 64.00 GiB")
    _, line = memory.lines(replace(settings, linearized="off"))
    assert "worker" not in line.what and line.what.endswith("= 3.42 of 64.00 GiB"), "a process and a copy less"


WHERE = ("off", "cpu", "cuda", "cuda:0", "cuda:1")


def test_memory_of_a_gpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServeSettings(base=str(base(home / "tiny")))
    monkeypatch.setattr(memory, "_gpus", lambda: [("H200", 140.0 * 2**30, 139.0 * 2**30)])
    lines = list(memory.lines(settings))
    assert [(line.check, line.status) for line in lines] == [
        ("base", "ok"), ("gpu", "ok"), ("vLLM", "warn"), ("worker", "ok"),
    ]  # fmt: skip
    assert lines[1].what == "H200, 139.0 of 140.0 GiB free"
    checks = {where: [line.check for line in memory.lines(replace(settings, linearized=where))] for where in WHERE}
    assert checks == {"off": ["base", "gpu", "vLLM"], "cuda:1": ["base", "gpu", "vLLM"]} | {
        where: ["base", "gpu", "vLLM", "worker"] for where in ("cpu", "cuda", "cuda:0")
    }
    monkeypatch.setattr(memory, "_gpus", list)
    _, line = memory.lines(ServeSettings(base=settings.base, device="cuda"))
    assert line.status == "fail" and "no GPU" in line.what


def test_where_a_base_lies(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    commit = "a" * 40
    snapshot = home / "hf" / "hub" / "models--org--name" / "snapshots" / commit
    assert bases.find(f"org/name@{commit}") is None
    snapshot.mkdir(parents=True)
    assert bases.find(f"org/name@{commit}") == snapshot == bases.find("org/name@main")
    assert bases.find(f"org/name@{'b' * 40}") is None
    assert bases.find(None) is None
    converted = home / "cache" / "base" / "SmolLM2-135M-Instruct-0.1.2-v2"
    converted.mkdir(parents=True)
    assert bases.find(None) == converted
    (home / "model.gguf").write_text("")
    assert bases.find(str(home / "model.gguf")) is None
    for wrong, words in {"org/name": "not pinned", "x": "is no model", str(home / "a/b"): "is no model"}.items():
        with pytest.raises(PosteriorError, match=words):
            bases.find(wrong)
    (line,) = memory.lines(ServeSettings(base=f"org/name@{'b' * 40}"))
    assert line.status == "warn" and "not on this machine yet" in line.what


def test_the_default_base_is_where_serve_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from posterior.models import base as models

    monkeypatch.delenv("POSTERIOR_CACHE")
    assert models.DEFAULT_ID == bases.DEFAULT
    path: Any = models.resolve().path
    assert bases.find(None) == path
