"""Rows in files and commands' arguments, for tests of verbs on a tiny base."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def arguments(module: Any, *words: Any) -> argparse.Namespace:
    """What the verb of this module makes of its words."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])
