"""The server's /openapi.json without the version, of which the types of clients/typescript are made.

`python -m tests.clients.typescript.document` prints it, with `--hash` its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

from fastapi.testclient import TestClient

from server.http.app import create_app
from server.metrics import Metrics
from server.services.predictive import Service
from tests.server import fakes


def document() -> dict[str, Any]:
    """The document of a server over a fake engine: it depends on nothing that is served."""
    parts: Any = (fakes.registry(), fakes.Engine(), fakes.Linearizer(), fakes.Tokenizer(), Metrics())
    with TestClient(create_app(Service(*parts), None)) as client:
        shown = client.get("/openapi.json").json()
    return {**shown, "info": {"title": shown["info"]["title"], "version": ""}}


def sha256(document: dict[str, Any]) -> str:
    """The hash of a document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    print(sha256(document()) if "--hash" in sys.argv else json.dumps(document(), sort_keys=True))
