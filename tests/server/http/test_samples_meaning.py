"""The ways to tell the meanings of samples apart: who is asked what, and what becomes of the answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from posterior.data.candidates import Candidates
from server.engine import Adapter, Scores
from server.errors import Refused, Unavailable
from server.services import judge
from server.services.predictive import Service
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.fakes import Draft, same_initial
from tests.server.http.sampling import DRAFTS, N, ask, chat
from tests.server.http.test_answers import events

WAYS = ("embedding", "nli", "judge")
# " Paris." and "paris" begin alike; "the Paris" is another meaning here. The most probable sample of each comes first.
EXPECTED = [("paris", 2), ("London", 1), ("the Paris", 1), ("Rome and", 1)]
QUESTION = "Which town?"


@dataclass
class Engine(fakes.Engine):
    """Whose base finds " yes" more probable than " no" where both answers begin with the same letter."""

    max_model_len: int = 4096
    judging: Exception | None = None  # what happens instead
    read: list[str] = field(default_factory=list)

    async def score(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Candidates,
        adapters: Sequence[Adapter | None],
        *,
        states: bool = False,
    ) -> Scores:
        if self.judging is not None:
            raise self.judging
        assert list(adapters) == [None] and not states
        assert [fakes.Tokenizer().decode(each) for each in candidates] == [" yes", " no"]
        self.scored.append((len(prompts), 1))
        texts = [fakes.Tokenizer().decode(prompt) for prompt in prompts]
        self.read += texts
        lines = [dict(line.split(": ", 1) for line in text.splitlines() if ": " in line) for text in texts]
        same = torch.tensor([same_initial(each["First answer"], each["Second answer"]) for each in lines])
        log_p = torch.stack([same.double(), 1 - same.double()], -1).mul(0.8).add(0.1).log()
        return Scores(log_p[:, None], torch.zeros(len(prompts), 1, dtype=torch.long), [0] * len(prompts))


@pytest.fixture
def engine() -> Engine:
    return Engine(drafts=DRAFTS)


def have(service: Any, comparer: Any) -> Any:
    """Lets the service have this comparer."""
    service.comparer = comparer
    return comparer


@pytest.fixture
def comparer(service: Service) -> Iterator[fakes.Comparer]:
    yield have(service, fakes.Comparer())


def semantic(body: Any) -> dict[str, Any]:
    return dict(body["choices"][0]["uncertainty"]["semantic"])


def found(record: dict[str, Any]) -> list[tuple[str, int]]:
    """The meanings; those of equal probability in any order."""
    return sorted((meaning["text"], meaning["samples"]) for meaning in record["meanings"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("returned", ["meaning", "greedy"])
@pytest.mark.parametrize("send", [ask, chat])
def test_samples_are_grouped_as_the_way_says(
    client: TestClient, comparer: fakes.Comparer, way: str, returned: str, send: Any
) -> None:
    options = {"meaning": way, "return": returned}
    record = semantic(send(client, uncertainty=options).json())
    assert (record["meaning"], record["returned"], record["samples"]) == (way, returned, N)
    assert found(record) == sorted(EXPECTED) and record["meanings"][0]["text"] == "paris"
    assert record["own"] == (0 if returned == "meaning" else None), '"hello" begins like no sample'
    *_, last = events(send(client, uncertainty=options, stream=True))
    assert semantic(last) == record


@pytest.mark.parametrize("way", WAYS)
def test_the_greedy_text_has_a_meaning_of_the_samples(
    client: TestClient, comparer: fakes.Comparer, engine: Engine, way: str
) -> None:
    engine.drafts = [Draft("Bye", [[-1.0] * 3]), Draft("bye", [[-1.0] * 3]), Draft("Howdy", [[-2.0] * 3])]
    record = semantic(ask(client, samples=3, uncertainty={"meaning": way, "return": "greedy"}).json())
    assert (record["own"], record["meanings"][1]["text"]) == (1, "Howdy")


def test_a_model_is_asked_in_rounds_with_the_question(client: TestClient, comparer: fakes.Comparer) -> None:
    options = {"meaning": "nli"}
    assert chat(client, uncertainty=options, messages=[
        {"role": "user", "content": "An earlier one"}, {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": [{"type": "text", "text": "Which"}, {"type": "text", "text": "town?"}]},
        {"role": "assistant", "content": "It is"},
    ]).status_code == 200  # fmt: skip
    assert comparer.asked == [("nli", "Which\ntown?", n) for n in (4, 2, 1)]
    for prompt, questions in (
        (QUESTION, [QUESTION]),
        ([QUESTION, "And?"], [QUESTION, "And?"]),
        (list(QUESTION.encode()), [QUESTION]),
        ([list(QUESTION.encode()), [65]], [QUESTION, "A"]),
    ):
        comparer.asked.clear()
        assert ask(client, prompt=prompt, uncertainty=options).status_code == 200
        assert [key for key, _ in itertools.groupby(asked for _, asked, _ in comparer.asked)] == questions
    comparer.asked.clear()
    assert chat(client, uncertainty=options, messages=[{"role": "system", "content": "Say"}]).status_code == 200
    assert comparer.asked.pop(0)[1] == ""
    comparer.asked.clear()
    assert ask(client).status_code == 200 and comparer.asked == [], "exact asks nobody"


def test_the_judge_is_the_base_and_each_round_is_one_batch(client: TestClient, engine: Engine) -> None:
    assert ask(client, prompt=QUESTION, uncertainty={"meaning": "judge"}).status_code == 200
    assert engine.scored == [(4, 1), (2, 1), (1, 1)]
    first = [draft.text.strip() for draft in (DRAFTS[3], DRAFTS[1])]
    assert judge.asked(QUESTION, *first) in engine.read[:4]
    assert judge.asked("Q", "a", "b").startswith("Question: Q\nFirst answer: a\nSecond answer: b\n")


def test_a_judge_that_cannot_read_it_all_says_so(client: TestClient, engine: Engine) -> None:
    engine.max_model_len = 128
    error = error_of(ask(client, uncertainty={"meaning": "judge"}), 400)
    assert "two of its samples" in error["message"] and "the limit is 128" in error["message"]
    assert error["param"] == "uncertainty.meaning"


@pytest.mark.parametrize("way", ["embedding", "nli"])
def test_a_way_that_the_server_does_not_have_names_the_option(
    client: TestClient, engine: Engine, service: Service, way: str
) -> None:
    for names in (None, {"embedding", "nli"} - {way}):
        have(service, names and fakes.Comparer(frozenset(names)))
        error = error_of(ask(client, uncertainty={"meaning": way}), 400)
        assert f"--meaning-{way} FOLDER" in error["message"] and error["param"] == "uncertainty.meaning"
    assert engine.bodies == []


def test_a_worker_that_is_away_is_503_before_anything_is_drawn(
    client: TestClient, comparer: fakes.Comparer, engine: Engine
) -> None:
    comparer.problem = Unavailable("the comparison of meanings is starting again; try again later")
    response = ask(client, uncertainty={"meaning": "nli"})
    assert "starting again" in error_of(response, 503)["message"] and response.headers["retry-after"] == "5"
    assert engine.bodies == [] and client.get("/ready").status_code == 503
    assert ask(client, uncertainty={"meaning": "judge"}).status_code == ask(client).status_code == 200


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("returned", ["meaning", "greedy"])
def test_errors_of_a_comparison(
    client: TestClient, comparer: fakes.Comparer, engine: Engine, way: str, returned: str
) -> None:
    options = {"meaning": way, "return": returned}
    for failure, status in ((Refused("a text has 600 tokens"), 400), (Unavailable("interrupted"), 503)):
        comparer.failure = engine.judging = failure
        assert error_of(ask(client, uncertainty=options), status)["message"] == str(failure)
        streamed = ask(client, uncertainty=options, stream=True)
        assert str(failure) in streamed.text and "semantic" not in streamed.text


def test_comparisons_are_bounded_before_anything_is_drawn(
    client: TestClient, comparer: fakes.Comparer, engine: Engine
) -> None:
    prompt = ["x"] * 5
    for way in ("nli", "judge"):
        error = error_of(ask(client, samples=64, prompt=prompt, uncertainty={"meaning": way}), 400)
        assert "5 prompts x 64 texts x 63 / 2 are 10080 comparisons" in error["message"]
        assert error["param"] == "uncertainty.samples" and engine.bodies == []
    assert ask(client, samples=64, prompt=prompt, uncertainty={"meaning": "embedding"}).status_code == 200
    assert ask(client, samples=64, prompt=prompt[:4], uncertainty={"meaning": "nli"}).status_code == 200
