#!/usr/bin/env bash
# Makes src/openapi.ts from the server's /openapi.json: `npm run types`. Its first line has the hash of that document, which
# tests/clients/test_typescript.py compares with the server's.
#   PYTHON=python3   the interpreter of the server's environment (default: .venv/bin/python of this repository)
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-../../.venv/bin/python}
document=$(mktemp --suffix .json)
trap 'rm -f "$document"' EXIT
PYTHONPATH=../..:../python "$python" -m tests.clients.typescript.document >"$document"
hash=$(PYTHONPATH=../..:../python "$python" -m tests.clients.typescript.document --hash)
types=$(npx openapi-typescript "$document" --default-non-nullable=false)
printf '// Made by types.sh from the /openapi.json with the SHA-256 %s.\n%s\n' "$hash" "$types" >src/openapi.ts
