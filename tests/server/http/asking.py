"""Questions for POST /v1/decisions, and what asks them."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient

from posterior.data.decisions import TEMPLATE
from posterior.data.task import Task
from server.services.predictive import Service

INPUT = "The parcel came late."
LATE = {"type": "predicate", "instructions": "The parcel was late.", "name": "late"}
MOOD = {
    "type": "choice",
    "instructions": "How does the customer feel?",
    "choices": [{"value": "glad", "description": "likes it"}, {"value": "true"}, {"value": True}],
}
STARS = {"type": "score", "instructions": "How urgent is it?", "levels": [{"label": "low"}, {"label": "high"}]}
QUESTIONS = [LATE, MOOD, STARS]


def decide(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/decisions", json={"model": "gang", "input": INPUT, "questions": QUESTIONS, **body})


def answers(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = decide(client, **body)
    assert response.status_code == 200, response.text
    return list(response.json()["answers"])


def choice(options: int) -> dict[str, Any]:
    return {"type": "choice", "instructions": "Which?", "choices": [{"value": f"o{i}"} for i in range(options)]}


def own(service: Service, **fields: Any) -> Task:
    """The posterior "gang" as one of decisions."""
    task = Task("decision", TEMPLATE, **fields)
    posterior: Any = service.registry.served["gang"].posterior
    posterior.task = task
    return task
