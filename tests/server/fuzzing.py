"""Requests made up from /openapi.json, valid and not, and what must hold of every answer."""

from __future__ import annotations

from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

load_all_checks()
CONFORM = [CHECKS.get_one(name) for name in ("content_type_conformance", "response_schema_conformance")]
ERROR = {"message", "type", "param", "code"}
SECONDS = 120  # for one answer; a hang is longer


def document(url: str, headers: dict[str, str]) -> dict[str, Any]:
    response = requests.get(f"{url}/openapi.json", headers=headers, timeout=SECONDS)
    assert response.status_code == 200, response.text
    return dict(response.json())


def run(
    described: dict[str, Any], url: str, headers: dict[str, str], models: list[str], cases: int, *, allowed: bool
) -> int:
    """Send about `cases` requests to the server at `url`, most to the routes with a body; returns how many.

    allowed: whether `headers` show the key, if there is one; else nothing but the public routes may be answered.
    """
    operations = [found.ok() for found in schemathesis.openapi.from_dict(described).get_all_operations()]
    each = max(1, cases // (2 * sum(operation.method == "post" for operation in operations)))
    sent = 0
    with requests.Session() as session:
        session.headers.update(headers)

        def test(case: Case, model: str, mode: GenerationMode) -> None:
            nonlocal sent
            if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body.update(modest(case.body, model))
            sent += 1
            check(case, case.call(base_url=url, session=session, timeout=SECONDS), mode, allowed=allowed)

        for operation in operations:
            count = each if operation.method == "post" else min(each, 10)
            for mode in GenerationMode:
                try:
                    strategy = operation.as_strategy(generation_mode=mode)
                    _generated(test, strategy, models, mode, count)
                except Unsatisfiable:
                    assert mode == GenerationMode.NEGATIVE  # a route without parameters has no wrong ones
    return sent


def _generated(test: Any, strategy: st.SearchStrategy[Case], models: list[str], mode: GenerationMode, n: int) -> None:
    limits = settings(
        max_examples=n, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    seed(0)(limits(given(case=strategy, model=st.sampled_from(models), mode=st.just(mode))(test)))()


def modest(body: dict[str, Any], model: str) -> dict[str, Any]:
    """The changes that make a valid request one that is answered, and soon: a model that is there, few tokens."""
    changes: dict[str, Any] = {"model": model}
    if "inputs" not in body:  # a text stops soon
        changes |= {"max_tokens": 2, "min_tokens": None, "n": min(body.get("n") or 1, 2)}
        changes.pop("n") if "prompts" in body else None
    return {name: value for name, value in changes.items() if name == "model" or "messages" in body or "prompt" in body}


def check(case: Case, response: Any, mode: GenerationMode, *, allowed: bool) -> None:
    """Raises AssertionError, or schemathesis' own failure, for an answer that must not be."""
    said = f"{case.method} {case.path} {case.body!r}: {response.status_code} {response.text[:500]}"
    public = case.operation.definition.raw.get("security") == []
    if not allowed and not public:
        assert response.status_code in (401, 404, 405), said
    if response.status_code >= 500:
        assert response.status_code == 503 and int(response.headers["retry-after"]) > 0, said
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == ERROR and error["message"] and "\n" not in error["message"], said
        assert "Traceback" not in error["message"] and "pydantic" not in error["message"], said
    if allowed and mode == GenerationMode.POSITIVE:
        assert str(response.status_code) in case.operation.definition.raw["responses"], said
        if response.status_code < 400:
            case.validate_response(response, checks=CONFORM)
