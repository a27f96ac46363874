"""The server's /openapi.json without its version and its servers, of which the types of clients/typescript are made.

`python -m tests.clients.typescript.document` prints it, with `--hash` its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

from server.http.app import create_app
from server.metrics import Metrics
from server.services.predictive import Service
from tests.server import fakes


def document() -> dict[str, Any]:
    """The document of a server that is not there: it depends on nothing that is served."""
    parts: Any = (fakes.registry(), fakes.Engine(), fakes.Linearizer(), fakes.Tokenizer(), Metrics())
    return comparable(create_app(Service(*parts), None).state.description())


def comparable(document: dict[str, Any]) -> dict[str, Any]:
    """What the types are made of."""
    return {"openapi": document["openapi"], "info": {"title": "Posterior Server", "version": ""}} | {
        name: document[name] for name in ("paths", "components")
    }


def sha256(document: dict[str, Any]) -> str:
    """The hash of a document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    print(sha256(document()) if "--hash" in sys.argv else json.dumps(document(), sort_keys=True))
