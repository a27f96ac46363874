"""The TypeScript client is that of this server; `make typescript-test` runs it."""

from __future__ import annotations

import json
import re

from tests.clients.conftest import ROOT
from tests.clients.typescript.document import document, sha256

CLIENT = ROOT / "clients/typescript"
EXAMPLE = (CLIENT / "src/example.ts").read_text().replace('"./index.js"', '"posterior-client"').strip()


def test_the_types_are_those_of_the_openapi_document() -> None:
    first = (CLIENT / "src/openapi.ts").read_text().partition("\n")[0]
    assert first.endswith(f"{sha256(document())}."), "the API has changed: `npm run types` in clients/typescript"


def test_the_pages_show_the_example_that_is_run() -> None:
    for page in (CLIENT / "README.md", ROOT / "docs/clients.md"):
        (shown,) = re.findall(r"```typescript\n(.*?)\n```", page.read_text(), re.DOTALL)
        assert shown == EXAMPLE, page


def test_its_libraries_are_pinned_as_they_are_locked() -> None:
    package = json.loads((CLIENT / "package.json").read_text())
    locked = json.loads((CLIENT / "package-lock.json").read_text())["packages"]
    for name, version in (package["dependencies"] | package["devDependencies"]).items():
        assert locked[f"node_modules/{name}"]["version"] == version
