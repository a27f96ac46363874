"""The dashboard's panels and Prometheus's programs, for the tests of both."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

GRAFANA = Path(__file__).parents[2] / "clients" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "posterior.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def tool(name: str) -> str:
    """Path of one of Prometheus's programs."""
    path = shutil.which(name)
    assert path, f"`{name}` is missing: apt-get install --no-install-recommends prometheus"
    return path


def expression(target: dict[str, Any]) -> str:
    """A panel's query as Grafana would send it, with every posterior chosen."""
    expr: str = target["expr"]
    return expr.replace("$__rate_interval", "1m").replace("$posterior", ".*")


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
